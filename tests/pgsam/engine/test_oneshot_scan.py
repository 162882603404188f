"""Slices of volumes: orientation and grid against nibabel's, given slices, positions, and masks of objects that overlap."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform

from datasets.labels import LabelMap
from pgsam.engine.oneshot_scan import AXES, Cutting, cut, fit_slices, is_same_scan, positions_in, read_labelled, segment_scan
from pgsam.errors import UserError
from pgsam.models.card import ModelCard
from pgsam.oneshot.result import OneShotResult
from pgsam.sam.backbone import Embedding
from pgsam.sam.geometry import Frame

SHAPE = (9, 8, 7)  # i, j, k of the file
SPACING = (1.5, 2.0, 4.0)
WINDOW = (0.0, 100.0)
CUTTING = Cutting(window=WINDOW)
CARD = ModelCard("sam_promptable", "vit_tiny", 64, 64, (), window=(-50.0, 70.0))


class Pixels:
    """A backbone whose tokens are the pixels: one feature, the grey value."""

    identity, size = "pixels", 16

    def __init__(self) -> None:
        self.calls = 0

    def encode(self, image: np.ndarray) -> Embedding:
        self.calls += 1
        shape = image.shape[:2]
        assert (image == image[..., :1]).all()
        return Embedding(torch.from_numpy(image[..., 0].copy()), Frame(shape, shape, 16, 1))

    def decode(self, *_: object, **__: object) -> None:
        raise AssertionError("the method of these tests needs no decoder")


@dataclass
class GreyValue:
    """Finds what is within 0.06 of the mean grey value of its examples; nearer values have larger logits, and position breaks no tie."""

    grey: list[float] | None = None

    def fit(self, image: Embedding, mask: np.ndarray) -> "GreyValue":
        self.grey = [float(image.features.numpy()[mask].mean())]
        return self

    def extended(self, image: Embedding, mask: np.ndarray) -> "GreyValue":
        assert self.grey is not None
        return GreyValue([*self.grey, float(image.features.numpy()[mask].mean())])

    def predict(self, image: Embedding) -> OneShotResult:
        logits = (0.06 - np.abs(image.features.numpy() - np.mean(self.grey))).astype(np.float32)
        mask = logits > 0
        reason = None if mask.any() else "nothing of that grey"
        none = np.zeros((0, 2))
        distance = None if reason else float(0.06 - logits[mask].mean())
        return OneShotResult(mask, logits, torch.zeros(1, 1), None, None, distance, float("nan"), none, none[:, 0], None, (), reason)


def phantom() -> tuple[np.ndarray, np.ndarray]:
    """Two objects whose grey drifts along k (RAS), noise around them; no two axes or directions look alike."""
    rng = np.random.default_rng(0)
    image = rng.uniform(0, 12, SHAPE)
    truth = np.zeros(SHAPE, np.uint8)
    truth[1:5, 2:6, 1:6], truth[5:8, 1:4, 2:7] = 6, 1
    drift = 2.0 * np.arange(SHAPE[2])
    image = np.where(truth == 6, 40 + drift, np.where(truth == 1, 75 + drift, image)).astype(np.float32)
    return image, truth


def save(folder: Path, name: str, array: np.ndarray, orientation: str = "RAS", affine: np.ndarray | None = None) -> Path:
    """An array in RAS as a NIfTI whose axes are stored in another orientation; nibabel moves it."""
    affine = np.diag([*SPACING, 1.0]) if affine is None else affine
    stored = nibabel.Nifti1Image(array, affine)
    stored = stored.as_reoriented(ornt_transform(io_orientation(affine), axcodes2ornt(tuple(orientation))))
    nibabel.save(stored, folder / f"{name}.nii.gz")
    return folder / f"{name}.nii.gz"


def in_ras(labels: np.ndarray, path: Path) -> np.ndarray:
    """Labels [D, H, W] on the grid of a file, as the array (i, j, k) in RAS; nibabel moves them back."""
    return np.asarray(nibabel.as_closest_canonical(nibabel.Nifti1Image(labels.transpose(2, 1, 0), nibabel.load(path).affine)).dataobj)


def few(truth: np.ndarray, axis: int, numbers: tuple[int, ...]) -> np.ndarray:
    """`truth` in slices `numbers` along an axis, 0 elsewhere."""
    kept = np.zeros_like(truth)
    where = (slice(None),) * axis + (list(numbers),)
    kept[where] = truth[where]
    return kept


def run(scan: Path, reference: Path, mask: Path, cutting: Cutting = CUTTING, **options) -> tuple[np.ndarray, list[dict], Pixels]:
    labelled = read_labelled(reference, mask, cutting, **{key: options.pop(key) for key in ("chosen", "label_map") if key in options})
    backbone, objects = Pixels(), {"one": 1, "six": 6}
    objects = {name: label for name, label in objects.items() if (labelled.labels == label).any()}
    methods, _ = fit_slices(labelled, objects, GreyValue, backbone)
    labels, rows = segment_scan(cut(scan, cutting), objects, methods, backbone, reference=labelled, **options)
    return labels, rows, backbone


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    """By axis: the labels in RAS of a scan that is its own reference, and of another with that reference, in RAS and without turning anything."""
    folder, (image, truth) = tmp_path_factory.mktemp("ras"), phantom()
    results = {}
    for axis, (name, number) in enumerate((("sagittal", 3), ("coronal", 2), ("axial", 3))):
        scan, mask = save(folder, f"scan{axis}", image), save(folder, f"mask{axis}", few(truth, axis, (number,)))
        labels, _, _ = run(scan, scan, mask, Cutting(name, window=WINDOW), below=0.03)
        results[name] = in_ras(labels, scan)
    return results


@pytest.mark.parametrize("axis", list(AXES))
@pytest.mark.parametrize(
    ("scan_is", "reference_is", "mask_is"), [("LPS", "LPS", "RAS"), ("ASL", "SRP", "IPR"), ("RIP", "RAS", "RIP"), ("PIR", "ILA", "ILA")]
)
def test_orientation_of_the_files_changes_nothing(
    tmp_path: Path, expected: dict[str, np.ndarray], axis: str, scan_is: str, reference_is: str, mask_is: str
) -> None:
    image, truth = phantom()
    place = ("sagittal", "coronal", "axial").index(axis)
    labelled = few(truth, place, ({"sagittal": 3, "coronal": 2, "axial": 3}[axis],))
    scan, reference = save(tmp_path, "scan", image, scan_is), save(tmp_path, "reference", image, reference_is)
    mask = save(tmp_path, "mask", labelled, mask_is)
    labels, _, _ = run(scan, reference, mask, Cutting(axis, window=WINDOW), below=0.03)
    assert labels.shape == nibabel.load(scan).shape[::-1]
    assert set(np.unique(labels)) >= {0, 6}
    assert np.array_equal(in_ras(labels, scan), expected[axis])


def test_slices_are_cut_as_preprocessing_cuts_them(tmp_path: Path) -> None:
    """Axial slices lie as BTCV's: rows grow to anterior and columns to the patient's left; the others have superior on top."""
    image, _ = phantom()
    for orientation in ("RAS", "PIR"):
        path = save(tmp_path, orientation, image, orientation)
        stacks = {name: cut(path, Cutting(name, window=(0, 100))).image.array * 100 for name in AXES}
        assert np.allclose(stacks["axial"], image[::-1].transpose(2, 1, 0), atol=1e-4)  # (S, A, L)
        assert np.allclose(stacks["coronal"], image[::-1, :, ::-1].transpose(1, 2, 0), atol=1e-4)  # (A, I, L)
        assert np.allclose(stacks["sagittal"], image[::-1, ::-1, ::-1].transpose(0, 2, 1), atol=1e-4)  # (L, I, P)


@pytest.mark.parametrize(
    ("axis", "trained_on", "orientation", "plane"),
    [
        (None, None, "LAS", "axial"),
        ("sagittal", None, "PIL", "sagittal"),
        (None, "RPI", "RPI", "axial"),
        ("axial", "RPI", "RPI", "axial"),  # the plane of the checkpoint, in its directions
        ("coronal", "RPI", "LIA", "coronal"),
        (None, "ILP", "ILP", "coronal"),
    ],
)
def test_a_checkpoints_slices_are_the_default(tmp_path: Path, axis: str | None, trained_on: str | None, orientation: str, plane: str) -> None:
    image, _ = phantom()
    card = None if trained_on is None else replace(CARD, orientation=trained_on)
    cutting = Cutting(axis, window=WINDOW, card=card)
    assert (cutting.orientation, cutting.plane) == (orientation, plane)
    slices = cut(save(tmp_path, "scan", image), cutting)
    assert slices.image.orientation == orientation


def test_a_checkpoints_scaling_is_the_default(tmp_path: Path) -> None:
    """CT in the card's window; percentiles where it was trained with them, and a file that does not say is what it was trained on."""
    image, _ = phantom()
    path = save(tmp_path, "scan", image - np.float32(300))  # below the fat of Hounsfield units
    assert cut(path, Cutting()).intensity.window == (-125, 275)
    assert cut(path, Cutting(card=CARD)).intensity.window == (-50, 70)
    assert cut(path, Cutting(card=CARD, window=(-300, 0))).intensity.window == (-300, 0)
    percentile = cut(path, Cutting(card=replace(CARD, image_kind="percentile", window=None))).intensity
    assert percentile.modality == "mr"
    assert -300 <= percentile.window[0] < percentile.window[1] <= -190
    assert cut(path, Cutting(card=CARD, modality="mr")).intensity.warning is not None
    assert cut(path, Cutting(modality="mr")).intensity.warning is None


def test_what_a_saved_reference_keeps(tmp_path: Path) -> None:
    image, _ = phantom()
    reference = cut(save(tmp_path, "scan", image - np.float32(300)), Cutting("coronal", card=CARD))
    facts = json.loads(json.dumps(Cutting("coronal", card=CARD).facts_of(reference)))
    again = Cutting(card=CARD).as_saved(facts, Path("s"))
    assert (again.orientation, again.window, again.modality, again.read_as) == ("LIA", None, None, "ct")
    assert Cutting("coronal", window=(-50, 70)).as_saved(facts, Path("s")).window == (-50, 70)
    facts = Cutting(modality="mr", window=(0, 9)).facts_of(cut(save(tmp_path, "mr", image), Cutting(modality="mr", window=(0, 9))))
    again = Cutting(series="3").as_saved(facts, Path("s"))
    assert (again.orientation, again.window, again.modality, again.series) == ("LAS", (0, 9), "mr", "3")
    assert Cutting("coronal").as_saved({}, Path("s")) == Cutting("coronal")
    for damaged in ({"orientation": "XYZ"}, {"window": 3}, {"modality": "pet"}, {"read_as": None}):
        with pytest.raises(UserError, match="damaged facts"):
            Cutting().as_saved({**facts, **damaged}, Path("s"))
    with pytest.raises(UserError, match="damaged facts"):
        Cutting().as_saved({"orientation": "LAS"}, Path("s"))


def test_given_slices_keep_the_labels_of_the_user_whatever_the_method_says(tmp_path: Path) -> None:
    image, truth = phantom()
    wrong = few(truth, 2, (3,))
    wrong[0, 0, 3], wrong[1, 2, 3] = 6, 0  # as nobody would predict it
    scan, mask = save(tmp_path, "scan", image), save(tmp_path, "mask", wrong)
    labels, rows, _ = run(scan, scan, mask)
    assert np.array_equal(in_ras(labels, scan)[..., 3], wrong[..., 3])
    assert {(row["slice"], row["source"]) for row in rows} == {(k, "given" if k == 3 else "predicted") for k in range(7)}
    assert all("distance" not in row for row in rows if row["source"] == "given")
    other = save(tmp_path, "other", image + np.float32(0.25))
    labels, rows, _ = run(other, scan, mask)
    assert in_ras(labels, other)[0, 0, 3] == 0
    assert {row["source"] for row in rows} == {"predicted"}


def test_rows_count_along_the_files_own_axis(tmp_path: Path) -> None:
    """A file whose last axis runs to inferior is counted from superior, as its viewers count."""
    image, truth = phantom()
    for orientation, upside_down in (("RAS", False), ("LPI", True)):
        scan = save(tmp_path, f"scan{orientation}", image, orientation)
        mask = save(tmp_path, f"mask{orientation}", few(truth, 2, (1, 4, 5)), orientation)
        count = (lambda k: 6 - k) if upside_down else (lambda k: k)
        labels, rows, _ = run(scan, scan, mask, chosen=[count(1), count(5)])
        assert [row["slice"] for row in rows] == [k for k in range(7) for _ in range(2)]
        learned = {row["slice"]: row["reference_slice"] for row in rows if row["object"] == "six" and row["source"] == "predicted"}
        assert learned == {count(k): count(near) for k, near in {0: 1, 2: 1, 3: 1, 4: 5, 6: 5}.items()}
        one = {row["slice"]: row["reference_slice"] for row in rows if row["object"] == "one" and row["source"] == "predicted"}
        assert set(one.values()) == {count(5)}  # it is not in slice 1
        labelled = read_labelled(scan, mask, CUTTING, chosen=[count(1), count(5)])
        assert np.flatnonzero(labelled.labels.any(axis=(1, 2))).tolist() == list(labelled.given) == [1, 5]  # slice 4 has labels and was not chosen
        stored = np.asarray(nibabel.Nifti1Image(labels.transpose(2, 1, 0), np.eye(4)).dataobj)
        for row in rows:
            assert row["pixels"] == (stored[..., row["slice"]] == row["label"]).sum()


def test_what_propagation_adds(tmp_path: Path) -> None:
    """The grey drifts by 0.02 a slice and the method takes +-0.06: alone it is lost three slices away, and the mean with the neighbour goes on."""
    image, truth = phantom()
    scan, mask = save(tmp_path, "scan", image), save(tmp_path, "mask", few(truth, 2, (1,)))
    alone, rows, _ = run(scan, scan, mask)
    assert [k for k in range(7) if (in_ras(alone, scan)[..., k] == 6).any()] == [1, 2, 3]
    assert {row["slice"]: row["reason"] for row in rows if row["source"] == "predicted"}[5] == "nothing of that grey"
    assert all(row["second_reference_slice"] is None for row in rows if row["source"] == "predicted")
    led, rows, backbone = run(scan, scan, mask, below=1.0)
    assert [k for k in range(7) if (in_ras(led, scan)[..., k] == 6).any()] == [1, 2, 3, 4, 5]
    assert {row["slice"]: row["second_reference_slice"] for row in rows if row["source"] == "predicted"} == {0: None, 2: None, 3: 2, 4: 3, 5: 4, 6: 5}
    assert backbone.calls == 7  # the given slice for its method, each of the others once


def test_pixels_go_to_the_object_of_the_larger_logit(tmp_path: Path) -> None:
    image = np.full((4, 4, 2), 50, np.float32)
    image[:2, :, 0], image[2:, :, 0] = 46, 54
    image[..., 1] = np.linspace(44, 56, 16).reshape(4, 4)
    truth = np.zeros(image.shape, np.uint8)
    truth[:2, :, 0], truth[2:, :, 0] = 1, 6
    scan, mask = save(tmp_path, "scan", image), save(tmp_path, "mask", truth)
    labels, _, _ = run(scan, scan, mask)
    assert np.array_equal(in_ras(labels, scan)[..., 1], np.where(image[..., 1] < 50, 1, 6))


@pytest.mark.parametrize(
    ("match", "depth", "spacing", "expected"),
    [
        ("relative", 14, 2.0, [-0.25, 0.25, 0.75]),
        ("relative", 7, 4.0, [0, 1, 2]),
        ("middle", 14, 2.0, [-0.25, 0.25, 0.75]),  # 28 mm both
        ("middle", 7, 4.0, [0, 1, 2]),
        ("middle", 5, 4.0, [1, 2, 3]),
        ("middle", 5, 2.0, [2, 2.5, 3]),
    ],
)
def test_positions_of_another_scans_slices(tmp_path: Path, match: str, depth: int, spacing: float, expected: list[float]) -> None:
    image, _ = phantom()
    reference = cut(save(tmp_path, "reference", image), CUTTING)
    other = np.zeros((*SHAPE[:2], depth), np.float32)
    scan = cut(save(tmp_path, "scan", other, affine=np.diag([1.5, 2, spacing, 1])), CUTTING)
    positions = positions_in(reference, scan, match)
    assert len(positions) == depth
    assert np.allclose(positions[:3], expected)


def test_a_scan_is_known_by_its_voxels_and_place(tmp_path: Path) -> None:
    image, _ = phantom()
    first = cut(save(tmp_path, "a", image), CUTTING)
    changed = image.copy()
    changed[0, 0, 0] += 500  # above the window, where the pictures of both are white
    image[0, 0, 0] += 400
    again = cut(save(tmp_path, "b", image, "PIR"), CUTTING)
    assert is_same_scan(cut(save(tmp_path, "c", image), CUTTING), again)
    assert not is_same_scan(first, again)
    assert not is_same_scan(cut(save(tmp_path, "d", changed), CUTTING), again)
    assert not is_same_scan(first, cut(save(tmp_path, "e", phantom()[0], affine=np.diag([1.5, 2, 4.1, 1])), CUTTING))
    assert not is_same_scan(first, cut(save(tmp_path, "f", phantom()[0][:-1]), CUTTING))


def test_a_label_map_names_and_joins(tmp_path: Path) -> None:
    image, truth = phantom()
    scan, mask = save(tmp_path, "scan", image), save(tmp_path, "mask", few(truth, 2, (3,)))
    both = LabelMap("both", ("organ",), {1: 1, 6: 1}, {})
    labelled = read_labelled(scan, mask, CUTTING, label_map=both)
    assert np.array_equal(labelled.labels > 0, cut(mask, Cutting(window=(0, 1))).image.array > 0)
    assert labelled.labels.max() == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"empty": True}, "at least one slice with a label, found none in 7 axial slices"),
        ({"chosen": [0, 3]}, "--slices 0: no label there"),
        ({"chosen": [40]}, "--slices 40: no label there"),
        ({"cropped": True}, "(7, 7, 9)"),
        ({"shifted": True}, "corner voxels up to"),
        ({"four": True}, "mask.nii.gz"),
        ({"large": True}, "found 300"),
    ],
)
def test_bad_labels_are_one_line(tmp_path: Path, change: dict, message: str) -> None:
    image, truth = phantom()
    labels = few(truth, 2, (3,)).astype(np.int16) * (0 if change.get("empty") else 1)
    labels = labels[:, :-1] if change.get("cropped") else labels
    labels = np.stack([labels, labels], axis=-1) if change.get("four") else labels
    if change.get("large"):
        labels[0, 0, 3] = 300
    affine = np.diag([*SPACING, 1.0])
    affine[0, 3] = 5.0 if change.get("shifted") else 0.0
    nibabel.save(nibabel.Nifti1Image(labels, affine), tmp_path / "mask.nii.gz")
    with pytest.raises(UserError) as caught:
        read_labelled(save(tmp_path, "scan", image), tmp_path / "mask.nii.gz", CUTTING, chosen=change.get("chosen"))
    assert message in str(caught.value)


def test_a_file_of_two_axes_is_one_slice_as_it_lies(tmp_path: Path) -> None:
    pixels = np.arange(20, dtype=np.float32).reshape(5, 4)
    nibabel.save(nibabel.Nifti1Image(pixels, np.diag([1.0, 1, 1, 1])), tmp_path / "flat.nii.gz")
    slices = cut(tmp_path / "flat.nii.gz", Cutting(window=(0, 20)))
    assert np.allclose(slices.image.array * 20, pixels.T[None])
