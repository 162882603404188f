"""P2SAM finds the objects of the eight scenes with the right number of parts."""

import pytest

from pgsam.oneshot import P2SAM
from tests.pgsam.oneshot.scenes import scenes
from tests.pgsam.oneshot.toy_backbone import ToyBackbone

SCENES = scenes()


@pytest.mark.parametrize("name", SCENES)
def test_the_right_number_of_parts_is_found(name: str) -> None:
    scene = SCENES[name]
    result = P2SAM(ToyBackbone(), **scene.options).fit(scene.reference, scene.reference_mask).predict(scene.image)
    iou = (result.mask & scene.mask).sum() / (result.mask | scene.mask).sum()
    assert iou >= 0.8
    assert result.n_parts == scene.n_parts
