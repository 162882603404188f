"""FGMPA, the fine-grained modality prior aligner: organ reports against every location of the image embedding.

PG-SAM (arXiv 2503.18227, section 3.2, equations 1 to 3) gates the embedding by its likeness to a text and then normalises the result over
channels and over space, which takes the gate away again: with equations 1 to 3 a text hardly changes the guide. `Aligner` keeps the parts and
changes their order, and departs from the paper in four ways:

- every organ's report has a map of its own (the paper: one map for one text), and the maps are trained by an alignment loss, pixel against report;
- temperatures are learned (cosines divided by sqrt(C), as released, give uniform attention);
- the attention over locations sums over locations (the released code sums over the rows of the soft-max);
- normalisation comes first and the gate after it, so what the text says stays in the guide; the text's own content is added to it.

`PaperAligner` is equations 1 to 3 as printed.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MAX_SCALE = 100.0  # CLIP's bound on a learned inverse temperature
START_SCALE = 10.0


@dataclass(frozen=True)
class Alignment:
    """What an aligner found.

    `similarity` (B, K, h, w): cosine of every location and every organ's report, in [-1, 1]. `guide` (B, C, h, w). `logits` (B, K + 1, h, w):
    which report a location shows, channel 0 for none of them, to be trained against the labels; None where the aligner has no such claim.
    """

    similarity: Tensor
    guide: Tensor
    logits: Tensor | None


class Aligner(nn.Module):
    """Organ reports, and by choice a report on the slice, aligned with every location of an image embedding.

    With p the projected location, t_k the projected reports and s a learned scale, `a = softmax(s cos(p, [nothing, t_1 .. t_K]))` says which organ
    a location shows, and `W = 1 - a_0` is the paper's weight map. The guide is `W LN(F + A F) + sum_k a_k V t_k`, where A is attention over
    locations with a learned scale, its rows summing to one. A report r on the slice adds `sigmoid(s_r cos(p, t_r) + b_r) V_r t_r`.

    Args:
        dim: channels C of the embedding.
        text_dim: width D of a text embedding.
        slice_text: whether a report on the slice is read too.

    Shape: embedding `(B, C, h, w)`, reports `(K, D)`, slice reports `(B, D)` -> `Alignment`.
    """

    def __init__(self, dim: int, text_dim: int, *, slice_text: bool = False) -> None:
        super().__init__()
        self.location = nn.Linear(dim, dim, bias=False)
        self.query = nn.Linear(dim, dim, bias=False)
        self.text = nn.Sequential(nn.LayerNorm(text_dim), nn.Linear(text_dim, dim))
        self.value = nn.Linear(dim, dim)
        self.nothing = nn.Parameter(torch.randn(dim))
        self.text_scale = nn.Parameter(torch.tensor(math.log(START_SCALE)))
        self.context_scale = nn.Parameter(torch.tensor(math.log(START_SCALE)))
        self.slice_reader = SliceReader(dim, text_dim) if slice_text else None

    def forward(self, embedding: Tensor, reports: Tensor, slice_reports: Tensor | None = None) -> Alignment:  # noqa: D102
        tokens = embedding.flatten(2).transpose(1, 2)  # (B, N, C), N = h w
        normed = F.layer_norm(tokens, tokens.shape[-1:])
        location = F.normalize(self.location(normed), dim=-1)
        text = self.text(reports)  # (K, C)
        words = F.normalize(torch.cat([self.nothing[None], text]), dim=-1)  # (K + 1, C)
        cosine = location @ words.T  # (B, N, K + 1)
        logits = cosine * _scale(self.text_scale)
        shares = logits.softmax(dim=-1)
        context = attend_over_locations(F.normalize(self.query(normed), dim=-1), tokens, _scale(self.context_scale))
        guide = (1 - shares[..., :1]) * F.layer_norm(tokens + context, tokens.shape[-1:]) + shares[..., 1:] @ self.value(text)
        if self.slice_reader is not None:
            guide = guide + self.slice_reader(location, _given(slice_reports))
        return Alignment(_to_map(cosine[..., 1:], embedding), _to_map(guide, embedding), _to_map(logits, embedding))


class SliceReader(nn.Module):
    """What a report on the slice adds to the guide: its content, where the image is like it.

    Shape: unit locations `(B, N, C)`, reports `(B, D)` -> `(B, N, C)`.
    """

    def __init__(self, dim: int, text_dim: int) -> None:
        super().__init__()
        self.text = nn.Sequential(nn.LayerNorm(text_dim), nn.Linear(text_dim, dim))
        self.value = nn.Linear(dim, dim)
        self.scale = nn.Parameter(torch.tensor(math.log(START_SCALE)))
        self.offset = nn.Parameter(torch.tensor(0.0))

    def forward(self, location: Tensor, reports: Tensor) -> Tensor:  # noqa: D102
        text = self.text(reports)  # (B, C)
        cosine = torch.einsum("bnc,bc->bn", location, F.normalize(text, dim=-1))
        weight = torch.sigmoid(cosine * _scale(self.scale) + self.offset)
        return weight[..., None] * self.value(text)[:, None]


class PaperAligner(nn.Module):
    """Equations 1 to 3 as printed, for comparison: gate first, then normalise over channels and over space.

    `W = sigmoid(P cos(F, text))`, `A = softmax(F_n F_n^T / sqrt(C))` with layer-normalised F_n, `G = Gamma_spatial(Gamma_channel((F + A F) W))`.
    The text is the report on the slice where the model reads one, else the mean of the organs' reports. P is a learned factor and offset, so that
    any image size works (the released code's P knows 196 locations only); the image features are SAM's (the released code: CLIP's pooled vector).

    Args and shape: as `Aligner`; it claims nothing that a loss could train, so `logits` is None.
    """

    def __init__(self, dim: int, text_dim: int, *, slice_text: bool = False) -> None:
        super().__init__()
        self.location = nn.Linear(dim, dim, bias=False)
        self.text = nn.Linear(text_dim, dim)
        self.projection = nn.Parameter(torch.tensor([1.0, 0.0]))
        self.reads_slices = slice_text

    def forward(self, embedding: Tensor, reports: Tensor, slice_reports: Tensor | None = None) -> Alignment:  # noqa: D102
        tokens = embedding.flatten(2).transpose(1, 2)  # (B, N, C)
        location = F.normalize(self.location(tokens), dim=-1)
        similarity = location @ F.normalize(self.text(reports), dim=-1).T  # (B, N, K)
        text = _given(slice_reports) if self.reads_slices else reports.mean(dim=0, keepdim=True).expand(len(tokens), -1)
        cosine = torch.einsum("bnc,bc->bn", location, F.normalize(self.text(text), dim=-1))
        weight = torch.sigmoid(self.projection[0] * cosine + self.projection[1])[..., None]  # equation 1
        context = attend_over_locations(F.layer_norm(tokens, tokens.shape[-1:]), tokens, tokens.shape[-1] ** -0.5)  # equation 2
        guide = F.layer_norm((tokens + context) * weight, tokens.shape[-1:])  # equation 3, Gamma_channel
        guide = (guide - guide.mean(dim=1, keepdim=True)) / (guide.std(dim=1, keepdim=True) + 1e-6)  # Gamma_spatial
        return Alignment(_to_map(similarity, embedding), _to_map(guide, embedding), None)


ALIGNERS: dict[str, type[Aligner] | type[PaperAligner]] = {"gated": Aligner, "paper": PaperAligner}


def attend_over_locations(queries: Tensor, values: Tensor, scale: Tensor | float) -> Tensor:
    """`softmax(scale q q^T) values`, each location's weights over all locations summing to one: `(B, N, C)` both."""
    return (queries @ queries.transpose(1, 2) * scale).softmax(dim=-1) @ values


def _scale(log_scale: Tensor) -> Tensor:
    return log_scale.exp().clamp(max=MAX_SCALE)


def _to_map(tokens: Tensor, like: Tensor) -> Tensor:
    """`(B, N, C)` -> `(B, C, h, w)`."""
    return tokens.transpose(1, 2).reshape(len(tokens), -1, *like.shape[-2:])


def _given(slice_reports: Tensor | None) -> Tensor:
    if slice_reports is None:
        raise ValueError("an aligner with slice_text needs a report on every slice")
    return slice_reports
