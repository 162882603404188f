"""Agreement of a prediction with several raters: IoU and Dice at several thresholds, which prediction and raters' mean cross alike.

The measure of REFUGE with seven raters in Medical-SAM-Adapter (arXiv 2304.12620, its released code): "more than a threshold" of the predicted
probability against "more than that share of the raters drew it", averaged over thresholds.
"""

import numpy as np

THRESHOLDS = (0.1, 0.3, 0.5, 0.7, 0.9)
_IOU_SMOOTH = 1e-6
_DICE_SMOOTH = 1e-4


def threshold_scores(probability: np.ndarray, agreement: np.ndarray) -> tuple[float, float]:
    """IoU and Dice of one channel of one picture, each the mean over `THRESHOLDS`, in [0, 1].

    With P and T the places above a threshold, IoU is `(|P and T| + 1e-6) / (|P or T| + 1e-6)` and Dice `(2 |P and T| + 1e-4) / (|P| + |T| + 1e-4)`:
    1 where both are empty.

    Args:
        probability: as predicted, of any shape, in [0, 1].
        agreement: the share of the raters who drew a place, of the same shape, in [0, 1].

    Raises:
        ValueError: the shapes differ.
    """
    if probability.shape != agreement.shape:
        raise ValueError(f"expected maps of one shape, got {probability.shape} and {agreement.shape}")
    iou, dice = [], []
    for threshold in THRESHOLDS:
        predicted, drawn = probability > threshold, agreement > threshold
        both, total = int((predicted & drawn).sum()), int(predicted.sum()) + int(drawn.sum())
        iou.append((both + _IOU_SMOOTH) / (total - both + _IOU_SMOOTH))
        dice.append((2 * both + _DICE_SMOOTH) / (total + _DICE_SMOOTH))
    return float(np.mean(iou)), float(np.mean(dice))
