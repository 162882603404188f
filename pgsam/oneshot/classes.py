"""Several classes in one image, each known from its own example."""

from collections.abc import Mapping

import numpy as np

from pgsam.oneshot.reference import embed
from pgsam.oneshot.result import OneShotResult
from pgsam.sam.backbone import Embedding


class OneShotClasses:
    """One fitted method a class; the image is encoded once for all of them.

    Args:
        methods: class name -> method, in the order of the labels 1, 2, ...; all of one backbone.

    Raises:
        ValueError: there is none, there are more than 255, or their backbones differ.
    """

    def __init__(self, methods: Mapping) -> None:
        if not 1 <= len(methods) <= 255:
            raise ValueError(f"expected 1 to 255 classes, got {len(methods)}")
        self.methods = dict(methods)
        self.backbone = next(iter(self.methods.values())).backbone
        if any(method.backbone is not self.backbone for method in self.methods.values()):
            raise ValueError("the methods of all classes must share one backbone: the image is encoded once")

    @property
    def names(self) -> tuple[str, ...]:
        """Of the labels 1, 2, ..."""
        return tuple(self.methods)

    def predict(self, image: np.ndarray | Embedding) -> tuple[np.ndarray, dict[str, OneShotResult]]:
        """Labels `(H, W)` uint8, 0 where there is no class, and every class's own result.

        Where masks overlap, the larger logit wins, the first class of equals; a class that was not found is absent.
        """
        embedding = embed(self.backbone, image)
        results = {name: method.predict(embedding) for name, method in self.methods.items()}
        labels = np.zeros(embedding.frame.original, np.uint8)
        highest = np.full(labels.shape, -np.inf, np.float32)
        for label, result in enumerate(results.values(), start=1):
            wins = result.mask & (result.logits > highest)
            labels[wins], highest[wins] = label, result.logits[wins]
        return labels, results
