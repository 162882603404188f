"""Segmentation from one labelled image, without training: PerSAM, PerSAM-F and P2SAM."""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from pgsam.oneshot.classes import OneShotClasses
from pgsam.oneshot.direct import DirectTransfer
from pgsam.oneshot.p2sam import P2SAM
from pgsam.oneshot.persam import PerSAM, PerSAMF
from pgsam.oneshot.reference import EmptyReference
from pgsam.oneshot.result import Candidate, OneShotResult
from pgsam.sam.backbone import Backbone, Embedding

_CLASSES: dict[str, Any] = {"p2sam": P2SAM, "persam": PerSAM, "persam_f": PerSAMF, "direct": DirectTransfer}
METHODS = tuple(_CLASSES)

__all__ = [
    "METHODS",
    "P2SAM",
    "Candidate",
    "DirectTransfer",
    "EmptyReference",
    "OneShot",
    "OneShotClasses",
    "OneShotResult",
    "PerSAM",
    "PerSAMF",
    "build_method",
]


class OneShot(Protocol):
    """A method that segments from labelled images."""

    backbone: Backbone

    def fit(self, images: np.ndarray | Embedding | Sequence[np.ndarray | Embedding], masks: np.ndarray | Sequence[np.ndarray]) -> "OneShot":
        """Takes in labelled images, one or a list."""
        ...

    def predict(self, image: np.ndarray | Embedding) -> OneShotResult:
        """The object in an image."""
        ...


def build_method(name: str, backbone: Backbone, **options: Any) -> OneShot:
    """The method `name` of METHODS; `options` are its constructor's.

    Raises:
        ValueError: there is no such method.
    """
    if name not in _CLASSES:
        raise ValueError(f"a method is one of {', '.join(METHODS)}, not {name!r}")
    return _CLASSES[name](backbone, **options)
