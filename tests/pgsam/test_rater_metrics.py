"""Threshold-averaged IoU and Dice, worked out by hand."""

import numpy as np
import pytest

from pgsam.rater_metrics import THRESHOLDS, threshold_scores

# Four raters' worth of agreement on 4 x 4 places, and a prediction.
AGREEMENT = np.array([[0.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.75, 0.0], [0.0, 1.0, 0.5, 0.0], [0.0, 0.25, 0.0, 0.0]])
PREDICTED = np.array([[0.0, 0.0, 0.0, 0.0], [0.0, 0.95, 0.8, 0.2], [0.0, 0.6, 0.4, 0.0], [0.0, 0.0, 0.0, 0.0]])
# threshold   places above in the agreement        above in the prediction             both   either   IoU   Dice
#   0.1       1 1 .75 .5 .25: 5                     .95 .8 .2 .6 .4: 5                   4      6       4/6   8/10
#   0.3       1 1 .75 .5: 4                         .95 .8 .6 .4: 4                      4      4       1     1
#   0.5       1 1 .75 (0.5 is not above): 3         .95 .8 .6: 3                         3      3       1     1
#   0.7       1 1 .75: 3                            .95 .8: 2                            2      3       2/3   4/5
#   0.9       1 1: 2                                .95: 1                               1      2       1/2   2/3
IOU = (4 / 6 + 1 + 1 + 2 / 3 + 1 / 2) / 5
DICE = (8 / 10 + 1 + 1 + 4 / 5 + 2 / 3) / 5


def test_a_case_worked_out_by_hand() -> None:
    iou, dice = threshold_scores(PREDICTED, AGREEMENT)
    assert iou == pytest.approx(IOU, abs=1e-6)
    assert dice == pytest.approx(DICE, abs=1e-4)  # the published code's smoothing moves it by less


def test_the_smoothing_is_the_published_one() -> None:
    """One place predicted, another drawn: both 0, so IoU is 1e-6 / (2 + 1e-6) and Dice 1e-4 / (2 + 1e-4), at every threshold."""
    iou, dice = threshold_scores(np.array([1.0, 0.0]), np.array([0.0, 1.0]))
    assert iou == pytest.approx(1e-6 / (2 + 1e-6), rel=1e-9)
    assert dice == pytest.approx(1e-4 / (2 + 1e-4), rel=1e-9)


def test_nothing_predicted_and_nothing_drawn_is_right() -> None:
    assert threshold_scores(np.zeros((3, 3)), np.zeros((3, 3))) == (1.0, 1.0)


def test_binary_raters_that_agree_give_the_plain_scores() -> None:
    """Masks of 0 and 1 are cut alike by every threshold: 3 places, 4 places, 2 in common."""
    predicted, drawn = np.zeros(10), np.zeros(10)
    predicted[:3], drawn[1:5] = 1, 1
    assert threshold_scores(predicted, drawn) == pytest.approx((2 / 5, 4 / 7), abs=1e-4)


def test_thresholds() -> None:
    assert THRESHOLDS == (0.1, 0.3, 0.5, 0.7, 0.9)
    with pytest.raises(ValueError, match="one shape"):
        threshold_scores(np.zeros(3), np.zeros(4))
