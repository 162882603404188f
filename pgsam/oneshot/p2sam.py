"""P2SAM: segments from one labelled image, without training (arXiv 2403.05433), and what its released programs do around it.

The object's tokens in the reference are clustered into n parts. In another image, each part's most similar place becomes a positive point, three
passes of SAM's decoder make a mask of the points, and the tokens in the mask are compared with the reference's by optimal transport. The n whose
mask is nearest wins: SAM's answer to a point is ambiguous, and this says how many points it takes.

What the released programs get wrong is corrected here; `compat="released"` brings it back where a published number may depend on it: guidance
stretched over the padding, padding among the tokens, a mask resized without antialiasing.
"""

import copy
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pgsam.errors import UserError
from pgsam.oneshot.cascade import POLICIES, cascade
from pgsam.oneshot.guidance import attention_bias, semantic_token
from pgsam.oneshot.parts import distinct_count, part_labels, part_prototypes
from pgsam.oneshot.reference import Reference, check_compat, embed, references_of, touched_tokens
from pgsam.oneshot.result import Candidate, OneShotResult, result_of
from pgsam.oneshot.saved import PARTS_OF_A_REFERENCE, SETTINGS, check_tensors, read_saved, write_saved
from pgsam.oneshot.similarity import peak, similarity_maps, too_unlike, trough, upscale_similarity
from pgsam.oneshot.transport import TRANSPORTS, wasserstein2
from pgsam.sam.backbone import Backbone, Embedding, Guidance


class P2SAM:
    """Part-aware prompting of SAM from labelled images of the same object.

    Args:
        backbone: encodes and decodes.
        parts: (least, most) parts n that are tried; an n with fewer distinct tokens of the object than parts is left out.
        negatives: (least, most) negative points m. `natural` takes 0 or 1: the place least like the object. `medical` takes any: the places most like
            m clusters of the background.
        policy: `natural` or `medical`; see `cascade`.
        compat: `fixed` or `released`; see above.
        seed: of the clustering, and of the drawing for `max_tokens`.
        min_similarity: a result whose `similarity_max` is lower is refused: the object is not there. None: none is.
        max_distance: likewise where `distance` is higher. Distances, and so this limit, belong to one setting of backbone, `transport`, `max_tokens`
            and `weighted`.
        transport: `exact` or `sinkhorn`; see `wasserstein2`.
        max_tokens: see `wasserstein2`.
        guided: PerSAM's guidance in the first pass; None: with `natural` only.
        weighted: tokens of the mask count by the sigmoid of their logit in the distance (the released `--reg-patch-weight`).

    Attributes:
        references: what was fitted.
        facts: what `save` was told beside it, of a loaded one; else empty.

    Raises:
        ValueError: a setting is none of those.

    Example:
        >>> import numpy as np
        >>> from pgsam.oneshot import P2SAM
        >>> from pgsam.sam.backbone import SamBackbone
        >>> from pgsam.sam.build import build_image_encoder, build_mask_decoder, build_prompt_encoder
        >>> parts = build_image_encoder("vit_tiny", 64), build_prompt_encoder("vit_tiny", 64), build_mask_decoder("vit_tiny")
        >>> method = P2SAM(SamBackbone(*parts), parts=(1, 2))  # at a random start; pgsam.engine.oneshot opens trained files
        >>> image, mask = np.zeros((48, 64, 3), dtype=np.uint8), np.zeros((48, 64), dtype=bool)
        >>> image[16:, 16:48], mask[16:, 16:48] = 255, True
        >>> {n: tuple(rows.shape) for n, rows in method.fit(image, mask).prototypes.items()}  # the object in one part, and in two
        {1: (1, 128), 2: (2, 128)}
        >>> method.predict(image).mask.shape
        (48, 64)
    """

    def __init__(
        self,
        backbone: Backbone,
        *,
        parts: tuple[int, int] = (1, 5),
        negatives: tuple[int, int] = (1, 1),
        policy: str = "natural",
        compat: str = "fixed",
        seed: int = 0,
        min_similarity: float | None = None,
        max_distance: float | None = None,
        transport: str = "exact",
        max_tokens: int | None = None,
        guided: bool | None = None,
        weighted: bool = False,
    ) -> None:
        for name, value, allowed in (("policy", policy, POLICIES), ("transport", transport, TRANSPORTS)):
            if value not in allowed:
                raise ValueError(f"{name} is one of {', '.join(allowed)}, not {value!r}")
        check_compat(compat)
        for name, (low, high), least in (("parts", parts, 1), ("negatives", negatives, 0)):
            if not least <= low <= high:
                raise ValueError(f"{name} is (least, most) with {least} <= least <= most, not {(low, high)}")
        if policy == "natural" and negatives[1] > 1:
            raise ValueError(f"the natural policy has at most one negative point, not {negatives[1]}; medical takes more")
        if max_tokens is not None and max_tokens < 1:
            raise ValueError(f"max_tokens is at least 1, not {max_tokens}")
        for name, limit in (("min_similarity", min_similarity), ("max_distance", max_distance)):
            if limit is not None and math.isnan(limit):
                raise ValueError(f"{name} is a number or None, not {limit}: nothing is below or above it")
        self.backbone = backbone
        self.parts, self.negatives = (int(parts[0]), int(parts[1])), (int(negatives[0]), int(negatives[1]))
        self.policy, self.compat, self.seed = policy, compat, seed
        self.min_similarity, self.max_distance = min_similarity, max_distance
        self.transport, self.max_tokens = transport, max_tokens
        self.guided = policy == "natural" if guided is None else guided
        self.weighted = weighted
        self.references: tuple[Reference, ...] = ()
        self._parts: dict[int, Tensor] = {}  # n -> the part of every foreground token
        self._prototypes: dict[int, Tensor] = {}  # n -> (n, C)
        self._backgrounds: dict[int, Tensor] = {}  # m -> (m, C), medical only
        self._note: str | None = None
        self.facts: dict[str, Any] = {}

    def fit(self, images: np.ndarray | Embedding | Sequence[np.ndarray | Embedding], masks: np.ndarray | Sequence[np.ndarray]) -> "P2SAM":
        """Takes in one labelled image, or a list of them whose tokens count as one object's; each is encoded once.

        Args:
            images: `(H, W, 3)` uint8, or floating point in [0, 1], or already encoded.
            masks: `(H, W)`; whatever is not 0 is the object.

        Raises:
            EmptyReference: a mask has no pixel.
            ValueError: a mask has another size than its image, or there are not as many masks as images.
        """
        self._take(references_of(self.backbone, images, masks, self.compat)[1])
        return self

    def extended(self, image: np.ndarray | Embedding, mask: np.ndarray) -> "P2SAM":
        """A copy that has one more labelled image; this one stays as it is. Raises as `fit`."""
        more = references_of(self.backbone, image, mask, self.compat)[1]
        other = copy.copy(self)
        other._take([*self._fitted(), *more])
        return other

    def reference_parts(self, n: int) -> tuple[Tensor, ...]:
        """`(g, g)` int64 of each reference: 0 where a token is not of the object, else its part, 1 to n, in the order of the points."""
        labels, maps = self._parts[n] + 1, []
        for reference in self._fitted():
            parts = torch.zeros(reference.tokens.shape, dtype=torch.int64)
            parts[reference.tokens], labels = labels[: len(reference.foreground)], labels[len(reference.foreground) :]
            maps.append(parts)
        return tuple(maps)

    @property
    def prototypes(self) -> dict[int, Tensor]:
        """`{n: (n, C)}` of every n that is tried, rows of unit length."""
        return dict(self._prototypes)

    def predict(self, image: np.ndarray | Embedding) -> OneShotResult:
        """The object in an image `(H, W, 3)` or its embedding; the result says why if it is not found.

        Raises:
            RuntimeError: nothing was fitted.
        """
        return self._predict(embed(self.backbone, image), None)

    def predict_instances(self, image: np.ndarray | Embedding, *, most: int = 10, share: float = 0.9, overlap: float = 0.5) -> list[OneShotResult]:
        """Every instance of the object, in the order they are found: what is found is taken out of the similarity maps, and it is looked again.

        It ends when a result is empty or refused, when its `similarity_max` is below `share` of the first one's, or when more than `overlap` of its
        mask was found before; that result is not given back. Without any instance, the one empty result that says why. Where several instances are
        equally like the reference, the parts' points may fall on different ones, which then come as one.

        Args:
            image: as for `predict`.
            most: instances at most.
            share: see above.
            overlap: see above.
        """
        embedding = embed(self.backbone, image)
        results = [self._predict(embedding, None)]
        found = results[0].mask.copy()
        while results[0].reason is None and len(results) < most and not found.all():
            result = self._predict(embedding, found)
            if (
                result.reason
                or result.similarity_max < share * results[0].similarity_max
                or (result.mask & found).sum() > overlap * result.mask.sum()
            ):
                break
            results.append(result)
            found |= result.mask
        return results

    def settings(self) -> dict[str, Any]:
        """The arguments of the constructor."""
        return {name: getattr(self, name) for name in SETTINGS}

    def save(self, path: str | Path, facts: Mapping[str, Any] | None = None) -> None:
        """Writes what was fitted, and the settings, to a `.safetensors` file; no image can be made from it without the backbone.

        Args:
            path: the file, replaced if it is there.
            facts: what else is to be known of the reference, in JSON's types; `facts` of what is loaded. None: this one's `facts`.

        Raises:
            UserError: the file cannot be written.
        """
        tensors = {f"parts.{n}": labels for n, labels in self._parts.items()}
        tensors |= {f"prototypes.{n}": prototypes for n, prototypes in self._prototypes.items()}
        tensors |= {f"backgrounds.{m}": prototypes for m, prototypes in self._backgrounds.items()}
        for i, reference in enumerate(self._fitted()):
            tensors |= {f"references.{i}.{name}": getattr(reference, name) for name in PARTS_OF_A_REFERENCE}
        fields = {
            "backbone": self.backbone.identity,
            "settings": self.settings(),
            "references": len(self.references),
            "note": self._note,
            "facts": dict(self.facts if facts is None else facts),
        }
        write_saved(path, fields, tensors)

    @classmethod
    def load(cls, path: str | Path, backbone: Backbone) -> "P2SAM":
        """Reads what `save` wrote.

        Raises:
            UserError: the file is not there, not one of these, not whole, or made with another encoder.
        """
        try:
            fields, tensors = read_saved(path)
            if fields["backbone"] != backbone.identity:
                found = f"holds tokens of the encoder {fields['backbone']!r}, but this one is {backbone.identity!r}"
                raise UserError(f"{path}: {found}; use that encoder or fit again")
            settings: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in fields["settings"].items()}
            method = cls(backbone, **settings)
            numbers = check_tensors(tensors, fields["references"], backgrounds=method.policy == "medical")
        except (ValueError, TypeError) as error:  # Damaged, or settings that the constructor refuses
            raise UserError(f"{path}: expected a whole reference saved by P2SAM.save, found {error}; fit it again, or update PG-SAM") from error
        method.references = tuple(
            Reference(*(tensors[f"references.{i}.{name}"] for name in PARTS_OF_A_REFERENCE)) for i in range(fields["references"])
        )
        for kind, held in (("parts", method._parts), ("prototypes", method._prototypes), ("backgrounds", method._backgrounds)):
            held |= {n: tensors[f"{kind}.{n}"] for n in numbers[kind]}  # candidates are tried in this order, and the first of equals wins
        method._note, method.facts = fields["note"], fields["facts"]
        return method

    # --- what it is made of -------------------------------------------------------------------------------------------------------------------

    def _fitted(self) -> tuple[Reference, ...]:
        if not self.references:
            raise RuntimeError("nothing was fitted: call fit(image, mask) first")
        return self.references

    def _take(self, references: Sequence[Reference]) -> None:
        self.references = tuple(references)
        foreground = torch.cat([reference.foreground for reference in references])
        background = torch.cat([reference.background for reference in references])
        wanted, self._note = range_within(self.parts, distinct_count(foreground), "part", "object")
        self._parts = {n: part_labels(foreground, n, seed=self.seed) for n in wanted}
        self._prototypes = {n: part_prototypes(foreground, labels) for n, labels in self._parts.items()}
        self._backgrounds = {}
        if self.policy == "medical":
            wanted, note = range_within(self.negatives, distinct_count(background), "negative point", "background")
            self._note = "; ".join(line for line in (self._note, note) if line) or None
            empty = background.new_zeros(0, background.shape[1])
            self._backgrounds = {m: part_prototypes(background, part_labels(background, m, seed=self.seed)) if m else empty for m in wanted}

    def _predict(self, embedding: Embedding, found: np.ndarray | None) -> OneShotResult:
        candidates = self._candidates(embedding, found)
        chosen = min(candidates, key=lambda candidate: np.inf if candidate.distance is None else candidate.distance)  # the first of equals
        return result_of(chosen, candidates, embedding.frame, refused=self._refused(chosen), note=self._note)

    def _refused(self, chosen: Candidate) -> str | None:
        unlike = too_unlike(chosen.similarity, self.min_similarity)
        if unlike is None and self.max_distance is not None and chosen.distance is not None and chosen.distance > self.max_distance:
            return f"the nearest mask is at a distance of {chosen.distance:.4g}, above max_distance {self.max_distance:g}"
        return unlike

    def _candidates(self, embedding: Embedding, found: np.ndarray | None) -> tuple[Candidate, ...]:
        foreground = torch.cat([reference.foreground for reference in self._fitted()])
        semantic = semantic_token(foreground)
        negatives = self._background_points(embedding, found)
        candidates = []
        for n, prototypes in self._prototypes.items():
            maps = without(similarity_maps(prototypes, embedding, self.compat), embedding, found)
            positives = [peak(upscale_similarity(part, embedding.frame, self.compat), found) for part in maps]
            guidance = None
            if self.guided:
                guidance = Guidance(attention_bias(maps.mean(dim=0), embedding.frame, self.compat), semantic)
            if self.policy == "natural":
                lowest = trough(upscale_similarity(maps.mean(dim=0), embedding.frame, self.compat), found)
                negatives = [[lowest] * m for m in range(self.negatives[0], self.negatives[1] + 1)]
            for against in negatives:
                points, labels = np.array(positives + against), np.array([1] * len(positives) + [0] * len(against))
                done = cascade(self.backbone, embedding, points, labels, policy=self.policy, guidance=guidance)
                low_res = done.passes[-1]
                distance = None if done.reason else self._distance(foreground, embedding, low_res)
                candidates.append(Candidate(n, len(against), distance, points, labels, maps, done.passes, low_res, done.iou_predicted, done.reason))
        return tuple(candidates)

    def _background_points(self, embedding: Embedding, found: np.ndarray | None) -> list[list[tuple[float, float]]]:
        points = []
        for prototypes in self._backgrounds.values():
            maps = similarity_maps(prototypes, embedding, self.compat)
            points.append([peak(upscale_similarity(part, embedding.frame, self.compat), found) for part in maps])
        return points

    def _distance(self, foreground: Tensor, embedding: Embedding, low_res: Tensor) -> float:
        logits = F.interpolate(low_res[None, None], (embedding.frame.grid,) * 2, mode="bilinear", align_corners=False)[0, 0]
        tokens = retrieved_tokens(logits, embedding, self.compat)
        return wasserstein2(
            foreground,
            embedding.features[:, tokens].T,
            b_weights=logits[tokens].sigmoid() if self.weighted else None,
            backend=self.transport,
            max_tokens=self.max_tokens,
            seed=self.seed,
        )


def range_within(wanted: tuple[int, int], tokens: int, what: str, of: str) -> tuple[list[int], str | None]:
    """The numbers from least to most that `tokens` distinct tokens allow; if none, the most they do, and a line that says so."""
    allowed = [n for n in range(wanted[0], wanted[1] + 1) if n <= tokens]
    if allowed:
        return allowed, None
    return [tokens], f"the {of} of the reference has {tokens} distinct token(s), fewer than {wanted[0]} {what}(s): {tokens} taken instead"


def retrieved_tokens(logits: Tensor, embedding: Embedding, compat: str) -> Tensor:
    """`(g, g)` bool: the tokens in a mask, given its logits on the grid; of a mask too small for any, the one with the highest logit."""
    valid = embedding.frame.valid_tokens() | (compat == "released")
    tokens = (logits > 0) & valid
    if not tokens.any():
        best = int(np.where(valid.numpy(), logits.numpy(), -np.inf).argmax())
        tokens.view(-1)[best] = True
    return tokens


def without(maps: Tensor, embedding: Embedding, found: np.ndarray | None) -> Tensor:
    """Token maps `(n, g, g)` in which tokens that show any of `found` `(H, W)` have each map's least value."""
    if found is None or not found.any():
        return maps
    least = maps.amin(dim=(1, 2), keepdim=True)
    return embedding.frame.extend(torch.where(touched_tokens(found, embedding.frame), least, maps))
