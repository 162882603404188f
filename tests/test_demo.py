"""The bundled weights and case: what `infer_demo.py` does when nothing is asked of it."""

import re
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

import infer_demo
from datasets.phantom import make_phantom
from datasets.volumes import read_case
from pgsam.engine.checkpoint import read_card
from pgsam.volume_io import scale_intensity


def test_bundled_case_is_segmented_and_scored(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert infer_demo.main(["-o", str(tmp_path / "out")]) == 0
    text = capsys.readouterr().out
    assert "protocol: strict" in text
    mean = re.search(r"^mean +([\d.]+) +([\d.]+)", text, flags=re.MULTILINE)
    assert mean is not None
    assert float(mean[1]) > 80  # points of 100; 84.2 when the weights were made
    assert float(mean[2]) < 4  # voxels; 2.1 then
    picture = np.asarray(Image.open(tmp_path / "out" / "demo_case.png"))
    assert (picture.max(axis=2).astype(int) - picture.min(axis=2) > 60).mean() > 0.02, "organs in colour"
    label = nib.load(tmp_path / "out" / "demo_case_seg.nii.gz")
    assert nib.aff2axcodes(label.affine) == ("L", "A", "S")  # type: ignore[attr-defined]
    assert set(np.unique(np.asarray(label.dataobj))) == set(range(9))  # type: ignore[attr-defined]


def test_bundled_case_is_an_unseen_phantom() -> None:
    card = read_card(infer_demo.DEMO_CHECKPOINT)
    assert card.training_cases is not None
    assert "phantom0001" not in card.training_cases
    assert len(card.training_cases) == 64
    assert card.sam_sha256 is None
    case = read_case(infer_demo.DEMO_CASE, "demo_case", card.num_classes)
    phantom = make_phantom(1, shape=case.image.shape)
    # Not bit for bit: another CPU may round a voxel at a boundary the other way.
    assert np.mean(np.abs(scale_intensity(phantom.image_hu, "ct_window") - case.image) < 0.01) > 0.99


def test_bundled_files_stay_small() -> None:
    assert infer_demo.DEMO_CHECKPOINT.stat().st_size < 20_000_000
    assert infer_demo.DEMO_CASE.stat().st_size < 5_000_000
