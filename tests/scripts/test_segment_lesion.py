"""scripts/segment_lesion.py with a stub that finds what is bright, and with a small network: files, flags, refusals, sessions."""

import functools
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from PIL import Image
from torch import Tensor, nn

from pgsam.engine.checkpoint import save_release
from pgsam.engine.volumetric import card_of
from pgsam.volumetric.crop import VolumeRecipe
from pgsam.volumetric.model import Answer, build_volumetric
from pgsam.volumetric.picture import IN_OBJECT, OBJECT, OUTSIDE
from scripts import segment_lesion

Run = Callable[..., Any]
SHAPE = (36, 40, 44)  # [D, H, W]
LESION = (slice(14, 20), slice(8, 18), slice(22, 34))


class Bright(nn.Module):
    """A stub: the object is what is bright in the crop, one logit a voxel; crops of 32 voxels at the scan's spacing."""

    img_size, low_res_size, update_embedding = 32, 32, False

    def __init__(self, boxes: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.knows_boxes = boxes
        self.prompt_encoder = SimpleNamespace(takes_boxes=boxes, pe_layer=SimpleNamespace(compat=None))
        self.card = card_of("nano3d_32", {}, VolumeRecipe(None, None, "all"), modalities=("mr",))

    def encode(self, images: Tensor) -> Tensor:
        return images

    def decode(self, embedding: Tensor, points: object, boxes: object, masks: Tensor) -> Answer:
        return Answer(torch.where(embedding > 1, 3.0, -3.0).repeat(1, 4, 1, 1, 1), torch.ones(1, 4), embedding)

    def upscale(self, low_res_logits: Tensor) -> Tensor:
        return low_res_logits


@pytest.fixture
def run(call: Callable[..., Any]) -> Run:
    """`run("-i", ...)` gives exit code, stdout and stderr."""
    return functools.partial(call, "scripts.segment_lesion")


@pytest.fixture
def bright(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A checkpoint's path in whose place the stub is opened."""
    monkeypatch.setattr("pgsam.engine.volumetric.open_volumetric", lambda args: Bright())
    (tmp_path / "stub.safetensors").write_bytes(b"stub")
    return tmp_path / "stub.safetensors"


@pytest.fixture
def scan(tmp_path: Path) -> tuple[Path, np.ndarray, np.ndarray]:
    """An LPS scan with a bright lesion; its array [D, H, W], and its affine in nibabel's frame."""
    array = np.random.default_rng(0).integers(0, 20, SHAPE).astype(np.int16)
    array[LESION] = 400
    affine = np.diag([-1.1, -0.9, 2.5, 1.0])
    affine[:3, 3] = (40.0, 25.0, -30.0)
    path = tmp_path / "case.nii.gz"
    nibabel.save(nibabel.Nifti1Image(array.transpose(2, 1, 0), affine), path)
    return path, array, affine


def mask_of(folder: Path, name: str = "case") -> np.ndarray:
    return np.asarray(nibabel.load(folder / f"{name}_seg.nii.gz").dataobj).transpose(2, 1, 0)


@pytest.mark.parametrize("frame", ["lps", "ras", "voxel"])
def test_a_click_gives_the_mask_on_the_inputs_grid_a_picture_and_run_json(
    run: Run, bright: Path, scan: tuple[Path, np.ndarray, np.ndarray], tmp_path: Path, frame: str
) -> None:
    path, array, affine = scan
    voxel = np.array([28, 12, 16])
    ras = nibabel.affines.apply_affine(affine, voxel)
    near = nibabel.affines.apply_affine(affine, (34, 22, 18))
    values = {"lps": ras * (-1, -1, 1), "ras": ras, "voxel": voxel}[frame]
    outside = {"lps": near * (-1, -1, 1), "ras": near, "voxel": (34, 22, 18)}[frame]
    said = ",".join(f"{value:.6g}" for value in values)
    out = tmp_path / "out"
    code, printed, error = run(
        "-i", path, "--checkpoint", bright, "--point", said, "--negative", ",".join(map(str, outside)), "--frame", frame, "-o", out
    )
    assert (code, error) == (0, "")
    assert np.array_equal(mask_of(out), array == 400)
    np.testing.assert_allclose(nibabel.load(out / "case_seg.nii.gz").affine, affine, atol=1e-4)
    record = json.loads((out / "run.json").read_text())
    ml = (array == 400).sum() * 1.1 * 0.9 * 2.5 / 1000
    assert record["volume_ml"] == pytest.approx(ml, rel=1e-4)
    assert f"{ml:.2f} ml" in printed
    click, negative = record["prompts"]
    assert (click["kind"], click["positive"], negative["positive"]) == ("click", True, False)
    np.testing.assert_allclose(click["lps_mm"], ras * (-1, -1, 1), atol=1e-3)
    assert click["encode_seconds"] >= 0
    assert (click["opened"], negative["opened"]) == (1, 0)
    assert (record["reason"], record["warnings"]) == (None, [])
    picture = np.asarray(Image.open(out / "case.png").convert("RGB")).reshape(-1, 3).astype(int)
    for colour in (OBJECT, IN_OBJECT, OUTSIDE):
        assert (np.abs(picture - colour).sum(axis=1) < 12).sum() > 20
    assert "--point" in printed
    assert "1 new crop " in printed


def test_a_point_that_begins_with_a_negative_number(run: Run, bright: Path, scan: tuple[Path, np.ndarray, np.ndarray], tmp_path: Path) -> None:
    path, array, affine = scan
    x, y, z = nibabel.affines.apply_affine(affine, (28, 12, 16)) * (-1, -1, 1)
    assert x < 0
    assert y < 0
    for flags in (("--point", f"{x},{y},{z}"), ("--point", f"{x:e},{y},{z}")):
        assert run("-i", path, "--checkpoint", bright, *flags, "-o", tmp_path / "out")[0] == 0
    box = ",".join(map(str, (x - 3, y - 3, z - 3, x + 3, y + 3, z + 3)))
    code, _, _ = run("-i", path, "--checkpoint", bright, "--box", box, "-o", tmp_path / "out")
    assert code == 0
    assert np.array_equal(mask_of(tmp_path / "out"), array == 400)


def test_what_is_wrong_is_one_line_and_nothing_is_written(run: Run, bright: Path, scan: tuple[Path, np.ndarray, np.ndarray], tmp_path: Path) -> None:
    path = scan[0]
    out = tmp_path / "out"
    flags = ("-i", path, "--checkpoint", bright, "-o", out)
    run(*flags).refused("expected a prompt", "--point")
    run(*flags, "--point", "1,2").refused("--point", "3 numbers", "'1,2'")
    run(*flags, "--point", "1,2,x").refused("3 numbers")
    run(*flags, "--point", "nan,2,3").refused("--point nan,2,3", "finite")
    run(*flags, "--box", "1,2,3,4,5").refused("6 numbers")
    run(*flags, "--point", "400,2,3").refused("outside the scan", "(43, 39, 35)")
    run(*flags, "--frame", "voxel", "--point", "44,0,0").refused("outside the scan")
    run(*flags, "--frame", "ijk", "--point", "4,0,0").refused("--frame")
    run(*flags, "--point", "1,2,3", "--max_crops", "0").refused("--max_crops", "1 or more")
    run(*flags, "--point", "1,2,3", "--session", tmp_path / "no" / "s").refused("--session", "folder that there is")
    run(*flags, "--point", "1,2,3", "--series", "1").refused("--series")
    run("-i", tmp_path / "none.nii.gz", *flags[2:], "--point", "1,2,3").refused("no such file")
    assert not out.exists()
    Image.fromarray(np.zeros((30, 30), np.uint8)).save(tmp_path / "flat.png")
    run("-i", tmp_path / "flat.png", *flags[2:], "--point", "1,2,3").refused("flat.png", "three axes")
    nibabel.save(nibabel.Nifti1Image(np.zeros((30, 30), np.uint8), np.eye(4)), tmp_path / "flat.nii.gz")
    run("-i", tmp_path / "flat.nii.gz", *flags[2:], "--point", "1,2,3").refused("three axes")
    other = tmp_path / "other.nii.gz"
    nibabel.save(nibabel.Nifti1Image(np.ones((5, 5, 5), np.uint8), np.eye(4)), other)
    run(*flags, "--mask", other).refused("other.nii.gz", "grid")
    assert not out.exists()


def test_a_mask_and_prompts_in_their_order(run: Run, bright: Path, scan: tuple[Path, np.ndarray, np.ndarray], tmp_path: Path) -> None:
    path, array, affine = scan
    start = np.zeros(SHAPE, np.uint8)
    start[15:18, 10:14, 24:30] = 1
    nibabel.save(nibabel.Nifti1Image(start.transpose(2, 1, 0), affine), tmp_path / "start.nii.gz")
    out = tmp_path / "out"
    flags = ("-i", path, "--checkpoint", bright, "-o", out, "--frame", "voxel")
    assert run(*flags, "--negative", "1,1,1", "--mask", tmp_path / "start.nii.gz", "--point", "28,12,16")[0] == 0
    record = json.loads((out / "run.json").read_text())
    assert [prompt["kind"] for prompt in record["prompts"]] == ["click", "mask", "click"]
    assert len(record["warnings"]) == 1  # of the first
    assert record["flags"]["prompts"][1] == ["--mask", str(tmp_path / "start.nii.gz")]
    assert np.array_equal(mask_of(out), array == 400)
    many = tmp_path / "many.nii.gz"
    nibabel.save(nibabel.Nifti1Image(array.transpose(2, 1, 0) % 7, affine), many)
    run(*flags, "--mask", many).refused("many.nii.gz", "one other number")


def test_an_empty_answer_is_written_with_its_reason(run: Run, bright: Path, scan: tuple[Path, np.ndarray, np.ndarray], tmp_path: Path) -> None:
    path, array, affine = scan
    array[LESION] = 5
    array[::2] = 6
    nibabel.save(nibabel.Nifti1Image((array // 10 * 0 + (array > 5)).astype(np.int16).transpose(2, 1, 0), affine), path)
    code, printed, _ = run("-i", path, "--checkpoint", bright, "-o", tmp_path / "out", "--frame", "voxel", "--point", "20,20,17", "--modality", "mr")
    assert code == 0
    assert "empty: the model finds no object" in printed
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert "0.05, not above 0.5" in record["reason"]  # of a logit of -3
    assert record["volume_ml"] == 0
    assert not mask_of(tmp_path / "out").any()


def test_unknown_and_unlikely_spacings_are_said(run: Run, bright: Path, scan: tuple[Path, np.ndarray, np.ndarray], tmp_path: Path) -> None:
    _, array, _ = scan
    np.save(tmp_path / "bare.npy", array)
    nibabel.save(nibabel.Nifti1Image(array.transpose(2, 1, 0), np.diag([0.1, 0.1, 0.25, 1])), tmp_path / "centimetres.nii.gz")
    flags = ("--checkpoint", bright, "-o", tmp_path / "out", "--frame", "voxel", "--point", "28,12,16")
    code, printed, _ = run("-i", tmp_path / "bare.npy", *flags)
    assert code == 0
    assert "does not say the size of a voxel" in printed
    assert json.loads((tmp_path / "out" / "run.json").read_text())["volume_ml"] is None
    code, printed, _ = run("-i", tmp_path / "centimetres.nii.gz", *flags)
    assert code == 0
    assert "voxels of 0.1 x 0.1 x 0.25 mm" in printed


def test_nrrd_is_read(run: Run, bright: Path, scan: tuple[Path, np.ndarray, np.ndarray], tmp_path: Path) -> None:
    path, array, _ = scan
    sitk.WriteImage(sitk.ReadImage(str(path)), str(tmp_path / "same.nrrd"))
    flags = ("--checkpoint", bright, "-o", tmp_path / "out", "--frame", "voxel", "--point", "28,12,16")
    assert run("-i", tmp_path / "same.nrrd", *flags)[0] == 0
    assert np.array_equal(mask_of(tmp_path / "out", "same"), array == 400)


# --- with a network -----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def network(tmp_path: Path) -> Path:
    """A release file of random weights for CT and MR."""
    torch.manual_seed(0)
    model = build_volumetric("nano3d_32", tune="full", adapter="none")
    card = card_of("nano3d_32", {"tune": "full", "adapter": "none"}, VolumeRecipe())
    save_release(tmp_path / "nano.safetensors", model, card)
    return tmp_path / "nano.safetensors"


def test_a_session_goes_on_where_it_stopped(run: Run, network: Path, scan: tuple[Path, np.ndarray, np.ndarray], tmp_path: Path) -> None:
    path = scan[0]
    flags = ("-i", path, "--checkpoint", network, "--device", "cpu", "--frame", "voxel")
    once, twice, kept = tmp_path / "once", tmp_path / "twice", tmp_path / "case.session"
    new = ("--max_crops", 2, "--modality", "mr")
    assert run(*flags, "-o", once, *new, "--point", "28,12,16", "--negative", "10,10,10")[0] == 0
    assert run(*flags, "-o", twice, *new, "--point", "28,12,16", "--session", kept)[0] == 0
    code, printed, error = run(*flags, "-o", twice, "--negative", "10,10,10", "--session", kept)
    assert (code, error) == (0, "")
    assert np.array_equal(mask_of(once), mask_of(twice))
    assert 0 < mask_of(once).sum() < mask_of(once).size
    records = [json.loads((folder / "run.json").read_text()) for folder in (once, twice)]
    assert [record["prompts_of_this_run"] for record in records] == [2, 1]
    assert [len(record["prompts"]) for record in records] == [2, 2]
    assert "0 new crops" in printed or "new crop" in printed
    assert run(*flags, "-o", twice, "--session", kept)[0] == 0  # nothing new: the results again
    assert np.array_equal(mask_of(once), mask_of(twice))
    run(*flags, "-o", twice, "--session", kept, "--modality", "ct", "--point_memory", "all").refused("--point_memory, --modality", "leave them out")
    other = tmp_path / "other.nii.gz"
    image = nibabel.load(path)
    nibabel.save(nibabel.Nifti1Image(np.asarray(image.dataobj) + 1, image.affine), other)
    run("-i", other, *flags[2:], "-o", twice, "--session", kept).refused("case.session", "another")
    (tmp_path / "broken").write_bytes(kept.read_bytes()[:99])
    run(*flags, "-o", twice, "--session", tmp_path / "broken").refused("broken", "damaged")


def test_what_the_scan_is_comes_from_its_values_and_is_said(
    run: Run, network: Path, scan: tuple[Path, np.ndarray, np.ndarray], tmp_path: Path
) -> None:
    path, array, affine = scan
    flags = ("--checkpoint", network, "--device", "cpu", "--frame", "voxel", "--point", "28,12,16", "--max_crops", 1, "-o", tmp_path / "out")
    _, printed, _ = run("-i", path, *flags)
    assert "read as mr" in printed
    assert json.loads((tmp_path / "out" / "run.json").read_text())["recipe"]["clamp"] is None
    nibabel.save(nibabel.Nifti1Image((array - 1000).transpose(2, 1, 0), affine), path)
    _, printed, _ = run("-i", path, *flags)
    assert "read as ct" in printed
    assert json.loads((tmp_path / "out" / "run.json").read_text())["recipe"]["clamp"] == [-1000, 1000]


def test_a_scan_of_another_kind_than_the_models_is_said(run: Run, bright: Path, scan: tuple[Path, np.ndarray, np.ndarray], tmp_path: Path) -> None:
    flags = ("-i", scan[0], "--checkpoint", bright, "-o", tmp_path / "out", "--frame", "voxel", "--point", "28,12,16")  # a model of MR
    assert "trained on" not in run(*flags)[1]
    _, printed, _ = run(*flags, "--modality", "ct")
    assert "warning: case: is ct, and the model was trained on mr" in printed
    assert json.loads((tmp_path / "out" / "run.json").read_text())["recipe"]["clamp"] == [-1000, 1000]


def test_a_model_of_slices_is_refused(run: Run, scan: tuple[Path, np.ndarray, np.ndarray], tmp_path: Path) -> None:
    demo = Path(segment_lesion.__file__).parents[1] / "checkpoints" / "demo.safetensors"
    run("-i", scan[0], "--checkpoint", demo, "--point", "0,0,0", "-o", tmp_path / "out").refused("demo.safetensors", "slices")
    run("-i", scan[0], "--checkpoint", scan[0], "--point", "0,0,0", "-o", tmp_path / "out").refused("case.nii.gz")
