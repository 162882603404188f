"""The organs' reports as a model reads them: one vector an organ, its wording drawn anew at every training step."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from pgsam.errors import UserError
from pgsam.prior.organ_reports import builtin_reports, normalise_name, read_organ_reports
from pgsam.prior.text_embeddings import builtin_embeddings
from pgsam.prior.text_encoder import BUILTIN_ENCODER, TextEncoder, load_text_encoder

NO_REPORTS = "none"
WORDING_NOISE = 0.02  # standard deviation a component, on unit vectors; between two wordings of an organ it is about 0.04 for MiniLM


@dataclass(frozen=True)
class OrganWordings:
    """What is said of each class: `texts` organ -> the report in use, `wordings` organ -> all that training may draw from.

    An organ without a report is in neither. `saw_labels`: a report was made from labels.
    """

    texts: Mapping[str, str]
    wordings: Mapping[str, tuple[str, ...]]
    saw_labels: bool = False


def gather_wordings(
    source: Mapping[str, str] | str | Path | None, class_names: Sequence[str], *, allow_missing: bool = False, may_miss: bool = True
) -> OrganWordings:
    """The reports of the classes.

    Args:
        source: a report file or a mapping organ -> text; None for the built-in reports; `"none"` tells every organ the empty text.
        class_names: foreground classes; spelling variants of an organ's name are known.
        allow_missing: organs without a report are left out instead of refused.
        may_miss: whether a model that allows that is possible at all.

    Raises:
        UserError: an organ without a report, an organ in `source` that is neither a class nor has a built-in report, or as `read_organ_reports`.
    """
    if source == NO_REPORTS:
        return OrganWordings({name: "" for name in class_names}, {name: ("",) for name in class_names})
    builtin = builtin_reports()
    bank = builtin if source is None else read_organ_reports(source, (*class_names, *builtin.organs))
    known = {name: normalise_name(name) for name in class_names if normalise_name(name) in bank.organs}
    missing = [name for name in class_names if name not in known]
    if not known:
        raise UserError(
            f"{bank.source}: expected a report of at least one class, found none of {', '.join(class_names)}; write them (--reports FILE.json, see "
            "scripts/generate_reports.py), or leave the text out (--aligner none with learned class tokens)"
        )
    if missing and not (allow_missing and may_miss):
        way_out = "give --allow_missing_text for a learned null text" if may_miss else "use --class_tokens learned, where a class is not its report"
        raise UserError(
            f"{bank.source}: expected a report of every class, found none of {', '.join(missing)}; write them (--reports FILE.json, see "
            f"scripts/generate_reports.py), or {way_out}"
        )
    texts, wordings = {}, {}
    for name, organ in known.items():
        wordings[name] = bank.training(organ)
        texts[name] = wordings[name][0]
    return OrganWordings(texts, wordings, bank.saw_labels)


def open_encoder(name: str) -> tuple[str | TextEncoder, str]:
    """What `embed_texts` is to read with, and the sha256 of its weights.

    The default encoder stays a name: it is known by its committed embeddings, which may be all that is needed. Any other is loaded, once.
    """
    if name == BUILTIN_ENCODER:
        return name, builtin_embeddings().identity
    encoder = load_text_encoder(name)
    return encoder, encoder.identity


def read_distinct(encoder: TextEncoder, texts: Sequence[str]) -> Tensor:
    """The vectors of `texts`, `(N, D)`; a text that stands there twice is read once."""
    distinct = list(dict.fromkeys(texts))
    return encoder(distinct)[[distinct.index(text) for text in texts]]


class OrganTexts(nn.Module):
    """The vectors of the organs' reports, `() -> (K, D)`.

    In evaluation they are those of the reports in use. In training every organ's vector is a random mixture of two of its wordings, plus a little
    noise, so that what is learned is the region where an organ's descriptions lie and not a few points of it; with a single wording it is that one's.
    Vectors are taken relative to the mean of the reports that training began with: what all reports share says nothing of an organ.

    Args:
        num_classes: K.
        dim: width D.
        missing: classes without a report; they share a learned vector.
    """

    centre: Tensor
    vectors: Tensor
    wordings: Tensor | None

    def __init__(self, num_classes: int, dim: int, missing: Sequence[int] = ()) -> None:
        super().__init__()
        self.register_buffer("centre", torch.zeros(dim))
        self.register_buffer("vectors", torch.zeros(num_classes, dim))
        self.register_buffer("wordings", None, persistent=False)  # (K, W, D), only while a model is made and trained
        self.missing = tuple(missing)
        self.null = nn.Parameter(torch.randn(dim) * dim**-0.5) if missing else None
        self.encoder: TextEncoder | None = None
        self._texts: list[tuple[str, ...]] = []
        self._encoded: Tensor | None = None

    def set_vectors(self, vectors: Sequence[Tensor | None], *, centre: bool = False) -> None:
        """Takes the wordings of every class, `(W_k, D)` with the report in use first, or None for a class without one.

        With `centre` their mean becomes the origin; classes with fewer wordings than others repeat theirs.
        """
        given = [v for v in vectors if v is not None]
        means = torch.stack([v.mean(dim=0) for v in given])
        if centre and len(means.unique(dim=0)) > 1:  # a report that all classes share must not become the origin, where only noise is left of it
            self.centre.copy_(means.mean(dim=0))
        most = max(len(v) for v in given)
        absent = torch.zeros(most, self.vectors.shape[1])
        rows = [absent if v is None else v[torch.arange(most) % len(v)] for v in vectors]
        self.wordings = torch.stack(rows).to(self.vectors.device)
        self.vectors.copy_(self.wordings[:, 0])

    def rename(self, texts: Mapping[int, str]) -> None:
        """Notes that classes have got another report: they are missing no longer, and an encoder of this model's own reads the new texts."""
        self.missing = tuple(i for i in self.missing if i not in texts)
        if not self.missing:
            self.null = None
        if self.encoder is not None:
            self._texts = [(texts[i],) if i in texts else known for i, known in enumerate(self._texts)]
        self._encoded = None

    def train_encoder(self, encoder: TextEncoder, texts: Sequence[tuple[str, ...]]) -> None:
        """Reads `texts` (of every class, the one in use first) with `encoder` at every step from now on, instead of fixed vectors."""
        self.encoder, self._texts = encoder, list(texts)

    def forward(self) -> Tensor:  # noqa: D102
        vectors = self._read() if self.encoder is not None else self._draw()
        vectors = vectors - self.centre
        if self.null is not None:
            absent = torch.zeros(len(vectors), 1, dtype=torch.bool, device=vectors.device)
            absent[list(self.missing)] = True
            vectors = torch.where(absent, self.null, vectors)
        return vectors

    def _draw(self) -> Tensor:
        if not self.training or self.wordings is None:
            return self.vectors
        classes, count, _ = self.wordings.shape
        if count == 1:
            return self.vectors
        # Drawn on the CPU, whose generator the training state holds.
        first, second = torch.randint(count, (2, classes)).to(self.wordings.device)
        share = torch.rand(classes, 1).to(self.wordings.device)
        rows = torch.arange(classes, device=self.wordings.device)
        mixed = share * self.wordings[rows, first] + (1 - share) * self.wordings[rows, second]
        return mixed + WORDING_NOISE * torch.randn(mixed.shape).to(mixed)

    def _read(self) -> Tensor:
        encoder = cast(TextEncoder, self.encoder)
        if self.training:
            return read_distinct(encoder, [texts[int(torch.randint(len(texts), ()))] for texts in self._texts])
        if self._encoded is None:
            with torch.inference_mode(False), torch.no_grad():  # what is kept is an ordinary tensor, whatever mode the caller is in
                self._encoded = read_distinct(encoder, [texts[0] for texts in self._texts])
        return self._encoded

    def train(self, mode: bool = True) -> "OrganTexts":
        """As `nn.Module.train`; what the encoder said before is forgotten, since training changes it."""
        self._encoded = None
        return super().train(mode)

    def _apply(self, fn: Callable, recurse: bool = True) -> "OrganTexts":  # type: ignore[override]
        self._encoded = None  # it lies on the device where the module was
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *arguments: object, **keywords: object) -> None:
        self._encoded = None
        super()._load_from_state_dict(*arguments, **keywords)  # type: ignore[arg-type]
