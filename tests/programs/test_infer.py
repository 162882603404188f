"""infer_demo.py on scans of every kind: where the labels lie, what is written beside them, and what a bad scan does to a good one."""

import csv
import json
import shutil
from collections.abc import Callable
from itertools import permutations, product
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from PIL import Image

from pgsam import load_model
from pgsam.engine.infer import difference, find_inputs, find_references
from pgsam.engine.predict import keep_largest
from pgsam.errors import UserError
from tests.damages import DAMAGES
from tests.dicom_files import write_dicom_series

Call = Callable[..., object]
TABLES = {"labels_itksnap.txt", "labels_slicer.ctbl", "volumes.csv", "run.json"}
ORGANS = ("spleen", "right kidney", "left kidney", "gallbladder", "liver", "stomach", "aorta", "pancreas")


@pytest.fixture
def infer(call, trained):
    """`infer("-i", scan, "-o", folder)` with the small trained model."""
    return lambda *flags: call("infer_demo", "--checkpoint", trained / "final.safetensors", "--device", "cpu", *flags)


@pytest.fixture
def scan(raw) -> Path:
    return raw / "Training" / "img" / "img0008.nii.gz"


def labels_of(path: Path) -> np.ndarray:
    return np.asanyarray(nib.load(path).dataobj)


def run_of(folder: Path) -> dict:
    return json.loads((folder / "run.json").read_text())


# --- geometry -----------------------------------------------------------------------------------------------------------------------------

# Each order of the axes twice, with flips that differ: 12 ways to store one volume.
STORED = [(order, flips) for i, order in enumerate(permutations(range(3))) for flips in [tuple(product((1, -1), repeat=3))[k] for k in (i, 7 - i)]]


@pytest.mark.parametrize(("order", "flips"), STORED)
def test_a_reoriented_scan_gets_the_reoriented_labels(infer, tested_scan, tmp_path, order, flips):
    source, labels = tested_scan
    turn = np.array([[axis, flip] for axis, flip in zip(order, flips, strict=True)])
    turned = source.as_reoriented(turn)
    nib.save(turned, tmp_path / "turned.nii.gz")
    assert infer("-i", tmp_path / "turned.nii.gz", "-o", tmp_path / "out").code == 0
    found = nib.load(tmp_path / "out" / "turned_seg.nii.gz")
    wanted = labels.as_reoriented(turn)
    np.testing.assert_array_equal(np.asanyarray(found.dataobj), np.asanyarray(wanted.dataobj))
    assert found.header.get_zooms() == pytest.approx(np.asarray(source.header.get_zooms())[np.argsort(order)], rel=1e-6)
    assert_same_grid(found, turned)


def assert_same_grid(found, wanted) -> None:
    """Corner voxels within 1e-3 mm, directions within 1e-5."""
    assert found.shape == wanted.shape
    corners = np.array([[*corner, 1] for corner in product(*((0, size - 1) for size in (*wanted.shape, 1)[:3]))])
    assert np.abs(corners @ (found.affine - wanted.affine).T).max() < 1e-3
    directions = [image.affine[:3, :3] / np.linalg.norm(image.affine[:3, :3], axis=0) for image in (found, wanted)]
    assert np.abs(directions[0] - directions[1]).max() < 1e-5
    assert found.get_data_dtype() == np.uint8


@pytest.fixture(scope="session")
def tested_scan(raw, trained, tmp_path_factory):
    """A scan with three different spacings and its labels."""
    import infer_demo

    folder = tmp_path_factory.mktemp("tested_scan")
    source = nib.load(raw / "Training" / "img" / "img0008.nii.gz")
    affine = source.affine @ np.diag([1.0, 1.25, 1.0, 1.0])
    source = nib.Nifti1Image(np.asanyarray(source.dataobj), affine)
    assert len(set(np.round(source.header.get_zooms(), 3))) == 3
    nib.save(source, folder / "scan.nii.gz")
    flags = ["--checkpoint", str(trained / "final.safetensors"), "-i", str(folder / "scan.nii.gz"), "-o", str(folder), "--device", "cpu"]
    assert infer_demo.main(flags) == 0
    labels = nib.load(folder / "scan_seg.nii.gz")
    assert len(np.unique(np.asanyarray(labels.dataobj))) > 3
    return source, labels


def test_every_format_gives_the_same_labels(infer, scan, tmp_path):
    """What a scan is stored as changes nothing, and every result is a NIfTI on its grid."""
    image = sitk.ReadImage(str(scan))
    sitk.WriteImage(image, str(tmp_path / "a.nrrd"), True)
    sitk.WriteImage(image, str(tmp_path / "b.mha"), True)
    write_dicom_series(tmp_path / "c", sitk.Cast(image, sitk.sitkInt16))
    shutil.make_archive(str(tmp_path / "d"), "zip", tmp_path / "c")
    assert infer("-i", scan, "-o", tmp_path / "out").code == 0
    wanted = nib.load(tmp_path / "out" / "img0008_seg.nii.gz")
    for name in ("a.nrrd", "b.mha"):
        result = infer("-i", tmp_path / name, "-o", tmp_path / "out")
        assert (result.code, result.err) == (0, "")
        found = nib.load(tmp_path / "out" / f"{name[0]}_seg.nii.gz")
        np.testing.assert_array_equal(np.asanyarray(found.dataobj), np.asanyarray(wanted.dataobj))
        assert_same_grid(found, wanted)
    for name in ("c", "d.zip"):
        result = infer("-i", tmp_path / name, "-o", tmp_path / "out")
        assert (result.code, result.err) == (0, "")
        found = sitk.ReadImage(str(tmp_path / "out" / f"{name[0]}_seg.nii.gz"))
        onto = sitk.Resample(sitk.ReadImage(str(tmp_path / "out" / "img0008_seg.nii.gz")), found, sitk.Transform(), sitk.sitkNearestNeighbor)
        same = sitk.GetArrayViewFromImage(onto) == sitk.GetArrayViewFromImage(found)
        assert same.mean() > 0.9999  # DICOM stores positions as decimals
        assert run_of(tmp_path / "out")["cases"][name[0]]["intensity"]["reason"] == "its file says so"


# --- what is written ----------------------------------------------------------------------------------------------------------------------


def test_tables_and_run_json(infer, scan, trained, tmp_path):
    import hashlib

    result = infer("-i", scan, "-o", tmp_path / "out")
    assert (result.code, result.err) == (0, "")
    out = tmp_path / "out"
    assert {path.name for path in out.iterdir()} == {"img0008_seg.nii.gz", "img0008.png", *TABLES}
    labels = nib.load(out / "img0008_seg.nii.gz")
    voxel_ml = abs(np.linalg.det(labels.affine[:3, :3])) / 1000
    with (out / "volumes.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["organ"] for row in rows] == list(ORGANS)
    for label, row in enumerate(rows, start=1):
        count = np.count_nonzero(np.asanyarray(labels.dataobj) == label)
        assert (row["case"], int(row["label"]), int(row["voxels"])) == ("img0008", label, count)
        assert float(row["ml"]) == pytest.approx(count * voxel_ml, abs=1e-3)
    run = run_of(out)
    case = run["cases"]["img0008"]
    assert case["input_sha256"] == hashlib.sha256(scan.read_bytes()).hexdigest()
    assert run["checkpoint_sha256"] == hashlib.sha256((trained / "final.safetensors").read_bytes()).hexdigest()
    assert case["seconds"] > 0
    assert case["error"] is None
    assert case["intensity"]["window"] == [-125.0, 275.0]
    assert run["device"] == "cpu"
    assert {"torch", "SimpleITK", "numpy"} <= run["packages"].keys()


def test_label_tables_name_every_organ_with_one_colour(infer, scan, tmp_path):
    """Read as ITK-SNAP's manual and 3D Slicer's colour table format describe the lines."""
    assert infer("-i", scan, "-o", tmp_path / "out").code == 0
    snap = [line for line in (tmp_path / "out" / "labels_itksnap.txt").read_text().splitlines() if not line.startswith("#")]
    fields = [line.split(None, 7) for line in snap]
    assert fields[0] == ["0", "0", "0", "0", "0", "0", "0", '"Clear Label"']
    assert [(int(f[0]), f[7].strip('"')) for f in fields[1:]] == list(enumerate(ORGANS, start=1))
    assert all(f[4:7] == ["1", "1", "1"] for f in fields[1:])
    slicer = [line.split() for line in (tmp_path / "out" / "labels_slicer.ctbl").read_text().splitlines() if not line.startswith("#")]
    assert all(len(line) == 6 for line in slicer)
    assert [(int(line[0]), line[1].replace("_", " ")) for line in slicer[1:]] == list(enumerate(ORGANS, start=1))
    assert [line[2:5] for line in slicer[1:]] == [f[1:4] for f in fields[1:]]
    assert all(0 <= int(value) <= 255 for line in slicer for value in line[2:])


def test_a_reference_gives_scores_and_the_picture_of_the_differences(infer, scan, raw, tmp_path):
    reference = raw / "Training" / "label" / "label0008.nii.gz"
    result = infer("-i", scan, "-o", tmp_path / "out", "--reference", reference, "--label_map", "synapse8")
    assert (result.code, result.err) == (0, "")
    assert "protocol: strict" in result.out
    found = labels_of(tmp_path / "out" / "img0008_seg.nii.gz")
    truth = labels_of(reference)
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    pred, ref = found == 5, truth == 6  # liver: BTCV's label 6
    wanted = 2 * np.count_nonzero(pred & ref) / (np.count_nonzero(pred) + np.count_nonzero(ref))
    assert metrics["cases"]["img0008"]["liver"]["dsc"] == pytest.approx(wanted)
    assert metrics["cases"]["img0008"]["liver"]["hd95_mm"] > 0
    sizes = []
    for name in ("img0008.png", "img0008_difference.png"):
        with Image.open(tmp_path / "out" / name) as picture:
            sizes.append(picture.size)
    assert sizes[0][1] - sizes[1][1] == 260  # a row more: image, reference, prediction; image, difference
    turned = nib.load(reference).as_reoriented([[1, -1], [2, 1], [0, -1]])
    nib.save(turned, tmp_path / "turned.nii.gz")  # a reference that is stored another way is the same reference
    assert infer("-i", scan, "-o", tmp_path / "again", "--reference", tmp_path / "turned.nii.gz", "--label_map", "synapse8").code == 0
    assert json.loads((tmp_path / "again" / "metrics.json").read_text()) == metrics


def test_a_perfect_prediction_has_no_difference(infer, scan, tmp_path):
    assert infer("-i", scan, "-o", tmp_path / "out").code == 0
    shutil.copy(tmp_path / "out" / "img0008_seg.nii.gz", tmp_path / "truth.nii.gz")
    assert infer("-i", scan, "-o", tmp_path / "again", "--reference", tmp_path / "truth.nii.gz").code == 0
    rows = json.loads((tmp_path / "again" / "metrics.json").read_text())["cases"]["img0008"]
    assert {row["dsc"] for row in rows.values()} <= {1.0, None}
    assert {row["hd95_vox"] for row in rows.values()} <= {0.0, None}


def test_the_picture_of_the_differences_shows_them(infer, scan, tmp_path):
    """A reference that misses the liver and has an organ where nothing is: both colours are in the picture, and in no other one."""
    assert infer("-i", scan, "-o", tmp_path / "out").code == 0
    labels = nib.load(tmp_path / "out" / "img0008_seg.nii.gz")
    truth = np.asanyarray(labels.dataobj).copy()
    counts = []
    for name in ("same", "other"):
        nib.save(nib.Nifti1Image(truth, labels.affine), tmp_path / f"{name}.nii.gz")
        assert infer("-i", scan, "-o", tmp_path / name, "--reference", tmp_path / f"{name}.nii.gz").code == 0
        with Image.open(tmp_path / name / "img0008_difference.png") as picture:
            pixels = np.asarray(picture).astype(int)[: 2 * 260 - 4, 110:]
        blue, orange = ((np.abs(pixels - colour).max(axis=2) <= 2).sum() for colour in ((66, 135, 245), (255, 176, 0)))
        counts.append((blue, orange))
        truth[truth == 5] = 0
        truth[:6, :6] = 1
    assert counts[0] == (0, 0)
    assert min(counts[1]) > 20


def test_differences_by_hand():
    labels, reference = np.array([[0, 1, 2, 2, 0]]), np.array([[0, 1, 1, 0, 2]])
    assert difference(labels, reference).tolist() == [[0, 0, 3, 2, 1]]


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        ("shape", "on the grid of img0008"),
        ("moved", "corner voxels up to 0.02 mm apart"),
        ("labels", "expected labels 0 to 8"),
        ("fractions", "expected labels 0 to 8"),
    ],
)
def test_references_that_do_not_fit(infer, scan, tmp_path, damage, said):
    image = nib.load(scan)
    array, affine = np.zeros(image.shape, np.float32), image.affine.copy()
    if damage == "shape":
        array = array[1:]
    elif damage == "moved":
        affine[2, 3] += 0.02
    else:
        array[3, 3, 3] = 9 if damage == "labels" else 1.5
    nib.save(nib.Nifti1Image(array, affine), tmp_path / "truth.nii.gz")
    infer("-i", scan, "-o", tmp_path / "out", "--reference", tmp_path / "truth.nii.gz").refused(tmp_path / "truth.nii.gz", said)
    assert not (tmp_path / "out").exists()


def test_only_the_largest_piece_stays(infer, scan, tmp_path):
    from scipy.ndimage import label as components

    assert infer("-i", scan, "-o", tmp_path / "all").code == 0
    assert infer("-i", scan, "-o", tmp_path / "one", "--largest_component").code == 0
    everything, largest = (labels_of(tmp_path / name / "img0008_seg.nii.gz") for name in ("all", "one"))
    assert np.array_equal(largest[largest > 0], everything[largest > 0])
    pieces = [components(everything == value, np.ones((3, 3, 3)))[1] for value in range(1, 9)]
    assert max(pieces) > 1, "the example says nothing"
    assert all(components(largest == value, np.ones((3, 3, 3)))[1] <= 1 for value in range(1, 9))


def test_largest_pieces_by_hand():
    labels = np.zeros((1, 5, 7), np.uint8)
    labels[0, 0, :2], labels[0, 2:, 0], labels[0, 4, 1], labels[0, 4, 6] = 1, 1, 1, 1  # two pixels, four, and one
    labels[0, 0, 4], labels[0, 1, 5] = 2, 2  # they share a corner: one piece
    cleaned = keep_largest(labels)
    assert np.argwhere(cleaned == 1).tolist() == [[0, 2, 0], [0, 3, 0], [0, 4, 0], [0, 4, 1]]
    np.testing.assert_array_equal(cleaned == 2, labels == 2)
    assert labels[0, 0, 0] == 1, "the input is left alone"


# --- intensities and pictures -------------------------------------------------------------------------------------------------------------


def test_another_modality_is_said_and_written_down(infer, scan, tmp_path):
    image = nib.load(scan)
    values = np.asanyarray(image.dataobj).astype(np.float32)
    nib.save(nib.Nifti1Image(values + 1024, image.affine), tmp_path / "mr.nii.gz")
    result = infer("-i", tmp_path / "mr.nii.gz", "-o", tmp_path / "out")
    assert result.code == 0
    assert "warning: mr: read as mr" in result.out
    case = run_of(tmp_path / "out")["cases"]["mr"]
    assert case["intensity"]["modality"] == "mr"
    assert "expect no sensible labels" in case["intensity"]["warning"]
    # Told that it is CT, with a window that undoes the offset, it is the same image again.
    result = infer("-i", tmp_path / "mr.nii.gz", "-o", tmp_path / "ct", "--modality", "ct", "--window", -125 + 1024, 275 + 1024)
    assert (result.code, "warning" in result.out) == (0, False)
    infer("-i", scan, "-o", tmp_path / "plain")
    same = labels_of(tmp_path / "ct" / "mr_seg.nii.gz") == labels_of(tmp_path / "plain" / "img0008_seg.nii.gz")
    assert same.mean() > 0.9999  # float32 rounds x + 1024


def test_a_window_from_a_config_file(infer, scan, tmp_path):
    config = tmp_path / "flags.json"
    config.write_text(json.dumps({"input": str(scan), "output": str(tmp_path / "out"), "window": [-60, 140.5]}))
    assert infer("--config", config).code == 0
    assert run_of(tmp_path / "out")["cases"]["img0008"]["intensity"]["window"] == [-60.0, 140.5]
    for bad in ([1], 7, [1, "x"], [1, 2, 3]):
        config.write_text(json.dumps({"input": str(scan), "window": bad}))
        infer("--config", config).refused(config, "window", "expected" if bad != [1, "x"] else "invalid")


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif"])
def test_a_picture_gets_a_picture(infer, tmp_path, suffix):
    pixels = np.random.default_rng(0).integers(0, 256, (90, 70, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / f"photo{suffix}")
    result = infer("-i", tmp_path / f"photo{suffix}", "-o", tmp_path / "out")
    assert result.code == 0
    assert "warning: photo: read as picture" in result.out
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"photo_seg.png", "photo.png", *TABLES}
    with Image.open(tmp_path / "out" / "photo_seg.png") as labels:
        assert labels.size == (70, 90)
        assert labels.mode == "L"
        assert np.asarray(labels).max() <= 8
    with (tmp_path / "out" / "volumes.csv").open(newline="") as file:
        assert {row["ml"] for row in csv.DictReader(file)} == {""}, "a picture has no millilitres"
    assert "pixels" in result.out
    assert " ml" not in result.out


def test_the_picture_of_a_picture_is_in_its_colours(infer, tmp_path):
    Image.new("RGB", (60, 60), (200, 30, 90)).save(tmp_path / "photo.png")
    assert infer("-i", tmp_path / "photo.png", "-o", tmp_path / "out").code == 0
    with Image.open(tmp_path / "out" / "photo.png") as drawn:
        assert drawn.getpixel((110 + 128, 128)) == (200, 30, 90)


def test_a_file_of_two_axes_gets_labels_of_two_axes(infer, scan, tmp_path):
    image = nib.load(scan)
    pixels = np.asanyarray(image.dataobj)[:, :, 5]
    nib.save(nib.Nifti1Image(pixels, image.affine), tmp_path / "flat.nii.gz")
    nib.save(nib.Nifti1Image(pixels[:, :, None, None], image.affine), tmp_path / "thin.nii.gz")  # one slice, one frame
    for name, shape in (("flat", pixels.shape), ("thin", (*pixels.shape, 1))):
        assert infer("-i", tmp_path / f"{name}.nii.gz", "-o", tmp_path / "out").code == 0
        labels = nib.load(tmp_path / "out" / f"{name}_seg.nii.gz")
        assert labels.shape == shape
        columns = [0, 1, 3] if name == "flat" else [0, 1, 2, 3]  # two axes have no third direction
        np.testing.assert_allclose(labels.affine[:, columns], image.affine[:, columns], atol=1e-4)
        with (tmp_path / "out" / "volumes.csv").open(newline="") as file:
            assert {row["ml"] == "" for row in csv.DictReader(file)} == {name == "flat"}, "two axes have no volume"
    assert np.array_equal(labels_of(tmp_path / "out" / "flat_seg.nii.gz"), labels_of(tmp_path / "out" / "thin_seg.nii.gz")[..., 0])


def test_a_result_never_takes_the_place_of_its_input(infer, tmp_path):
    Image.fromarray(np.zeros((40, 40), np.uint8)).save(tmp_path / "photo.png")
    before = (tmp_path / "photo.png").read_bytes()
    infer("-i", tmp_path / "photo.png", "-o", tmp_path).refused(tmp_path / "photo.png", "would be written over")
    assert [path.name for path in tmp_path.iterdir()] == ["photo.png"]
    assert (tmp_path / "photo.png").read_bytes() == before


def test_a_result_takes_the_place_of_results_only(infer, scan, tmp_path):
    """A label map made by hand beside the scan, a reference, another input's result: nothing of it is lost."""
    shutil.copy(scan, tmp_path / "x.nii.gz")
    (tmp_path / "x_seg.nii.gz").write_bytes(b"the work of a week")
    infer("-i", tmp_path / "x.nii.gz", "-o", tmp_path).refused(tmp_path / "x_seg.nii.gz", "without results of this program")
    infer("-i", tmp_path / "x.nii.gz", "-o", tmp_path, "--reference", tmp_path / "x_seg.nii.gz").refused(tmp_path / "x_seg.nii.gz", "is an input")
    assert (tmp_path / "x_seg.nii.gz").read_bytes() == b"the work of a week"
    for name in ("p.jpg", "p_seg.jpg"):
        (tmp_path / "pictures").mkdir(exist_ok=True)
        Image.fromarray(np.zeros((40, 40), np.uint8)).save(tmp_path / "pictures" / name)
    infer("-i", tmp_path / "pictures", "-o", tmp_path / "out").refused("p_seg.png", "p.jpg")
    (tmp_path / "file").write_text("")
    infer("-i", scan, "-o", tmp_path / "file" / "sub").refused(tmp_path / "file", "no folder")
    infer("-o", tmp_path / "file" / "sub").refused(tmp_path / "file" / "sub", "cannot be made")  # of the bundled case
    assert not (tmp_path / "out").exists()


def test_a_name_that_no_file_system_takes_is_one_line(infer, scan, tmp_path):
    path = tmp_path / f"{'x' * 247}.nii.gz"
    shutil.copy(scan, path)
    infer("-i", path, "-o", tmp_path / "out").refused("shorter name")
    assert not (tmp_path / "out").exists()


def test_results_of_an_earlier_run_do_not_stay_beside_new_ones(infer, scan, raw, tmp_path):
    flags = ("-i", scan, "-o", tmp_path / "out")
    assert infer(*flags, "--reference", raw / "Training" / "label" / "label0008.nii.gz", "--label_map", "synapse8").code == 0
    assert infer(*flags).code == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"img0008_seg.nii.gz", "img0008.png", *TABLES}


def test_a_line_of_pixels_is_drawn_as_one(infer, tmp_path):
    Image.fromarray(np.zeros((1, 3000), np.uint8)).save(tmp_path / "line.png")
    assert infer("-i", tmp_path / "line.png", "-o", tmp_path / "out").code == 0
    with Image.open(tmp_path / "out" / "line.png") as picture:
        assert max(picture.size) <= 110 + 4 * 256 + 4


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_scan_is_refused_by_its_name(infer, scan, tmp_path, name):
    damage, said = DAMAGES[name]
    path = tmp_path / "scan.nii.gz"
    shutil.copy(scan, path)
    damage(path)
    infer("-i", path, "-o", tmp_path / "out").refused(path, said)
    assert not (tmp_path / "out").exists()


def test_a_series_that_lacks_a_slice_is_refused(infer, scan, tmp_path):
    files = write_dicom_series(tmp_path / "series", sitk.Cast(sitk.ReadImage(str(scan)), sitk.sitkInt16))
    files[4].unlink()
    infer("-i", tmp_path / "series", "-o", tmp_path / "out").refused(tmp_path / "series", "missing")
    assert not (tmp_path / "out").exists()


# --- folders ------------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def scans(raw, tmp_path) -> Path:
    """Three scans in a folder."""
    folder = tmp_path / "scans"
    folder.mkdir()
    for name, number in (("a", 8), ("b", 22), ("c", 5)):
        shutil.copy(raw / "Training" / "img" / f"img{number:04d}.nii.gz", folder / f"{name}.nii.gz")
    return folder


def test_a_folder_of_scans(infer, scans, raw, tmp_path):
    (scans / "notes.txt").write_text("not a scan")
    references = tmp_path / "references"
    references.mkdir()
    for name, number in (("a", 8), ("b", 22), ("c", 5)):
        shutil.copy(raw / "Training" / "label" / f"label{number:04d}.nii.gz", references / f"{name}.nii.gz")
    (scans / "c.nii.gz").rename(scans / "c_0000.nii.gz")  # as nnU-Net names its images
    result = infer("-i", scans, "-o", tmp_path / "out", "--reference", references, "--label_map", "synapse8")
    assert (result.code, result.err) == (0, "")
    assert "3 of 3 scans segmented" in result.out
    for name in ("a", "b", "c_0000"):
        assert {f"{name}_seg.nii.gz", f"{name}.png", f"{name}_difference.png"} <= {path.name for path in (tmp_path / "out").iterdir()}
    assert list(run_of(tmp_path / "out")["cases"]) == ["a", "b", "c_0000"]
    assert list(json.loads((tmp_path / "out" / "metrics.json").read_text())["cases"]) == ["a", "b", "c_0000"]
    (references / "b.nii.gz").unlink()
    infer("-i", scans, "-o", tmp_path / "none", "--reference", references, "--label_map", "synapse8").refused(references, "none for b")
    assert not (tmp_path / "none").exists()


def test_a_bad_scan_stops_a_folder_unless_it_is_to_go_on(infer, scans, tmp_path):
    whole = (scans / "b.nii.gz").read_bytes()
    (scans / "b.nii.gz").write_bytes(whole[: len(whole) // 2])
    stopped = infer("-i", scans, "-o", tmp_path / "stopped")
    stopped.refused("b.nii.gz", "truncated", "1 of 3 are done", "--continue")
    assert {path.name for path in (tmp_path / "stopped").iterdir()} == {"a_seg.nii.gz", "a.png", *TABLES}
    result = infer("-i", scans, "-o", tmp_path / "out", "--continue")
    assert result.code == 1
    assert len(result.err.splitlines()) == 1
    assert "b.nii.gz" in result.err
    assert "2 of 3 scans segmented; failed: b" in result.out
    assert (tmp_path / "out" / "c_seg.nii.gz").is_file()
    assert not (tmp_path / "out" / "b_seg.nii.gz").exists()
    cases = run_of(tmp_path / "out")["cases"]
    assert "truncated" in cases["b"]["error"]
    assert cases["a"]["error"] is cases["c"]["error"] is None
    for name in "ac":
        (scans / f"{name}.nii.gz").write_bytes(b"")
    assert infer("-i", scans, "-o", tmp_path / "nothing", "--continue").code == 2


def test_folders_that_cannot_be_worked_on(infer, scan, scans, tmp_path):
    (tmp_path / "empty").mkdir()
    infer("-i", tmp_path / "empty", "-o", tmp_path / "out").refused(tmp_path / "empty", "found none")
    infer("-i", tmp_path / "absent", "-o", tmp_path / "out").refused(tmp_path / "absent", "no such file or folder")
    infer("-i", scans, "-o", scans).refused(scans, "holds the scans themselves")
    infer("-i", scan, "-o", tmp_path / "out", "--continue").refused("--continue", "one scan")
    infer("-i", scan, "-o", tmp_path / "out", "--label_map", "synapse8").refused("--label_map", "--reference")
    infer("-i", scan, "-o", tmp_path / "out", "--reference", scan, "--label_map", "btcv13").refused("--label_map btcv13", "portal")
    infer("-i", scans, "-o", tmp_path / "out", "--reference", scan).refused(scan, "expected a folder of references")
    infer("-o", tmp_path / "out", "--modality", "mr").refused("--modality", "-i")
    shutil.copy(scans / "a.nii.gz", scans / "A.nii.gz")
    sitk.WriteImage(sitk.ReadImage(str(scans / "a.nii.gz")), str(scans / "a.nrrd"))
    with pytest.raises(UserError, match=r"a\.nii\.gz and a\.nrrd would give results of one name"):
        find_inputs(scans)
    with pytest.raises(UserError, match=r"a\.nii\.gz and a\.nrrd are references of one name"):
        find_references({"a": scan, "b": scan}, scans, None)
    assert not (tmp_path / "out").exists()


def test_one_of_several_dicom_series(infer, raw, tmp_path):
    for number, name in ((8, "first"), (22, "second")):
        image = sitk.Cast(sitk.ReadImage(str(raw / "Training" / "img" / f"img{number:04d}.nii.gz")), sitk.sitkInt16)
        for path in write_dicom_series(tmp_path / name, image, uid=f"1.2.3.{number}", t0008_103e=f"the {name}"):
            (tmp_path / "both").mkdir(exist_ok=True)
            shutil.copy(path, tmp_path / "both" / f"{name}{path.name}")
    refused = infer("-i", tmp_path / "both", "-o", tmp_path / "out").refused(tmp_path / "both", "--series", "the first", "the second")
    assert "1.2.3.8" in refused
    assert "1.2.3.22" in refused
    assert not (tmp_path / "out").exists()
    for chosen in (1, "1.2.3.22", "22"):  # listed in the order of their UIDs
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        assert infer("-i", tmp_path / "both", "-o", tmp_path / "out", "--series", chosen).code == 0
        with (tmp_path / "out" / "volumes.csv").open(newline="") as file:
            found = [int(row["voxels"]) for row in csv.DictReader(file)]
        assert infer("-i", raw / "Training" / "img" / "img0022.nii.gz", "-o", tmp_path / "out").code == 0
        assert np.bincount(labels_of(tmp_path / "out" / "img0022_seg.nii.gz").ravel(), minlength=9)[1:].tolist() == found
    (tmp_path / "study").mkdir()
    for name in ("first", "second"):  # one subfolder a series: all of them, unless one is chosen
        (tmp_path / name).rename(tmp_path / "study" / name)
    assert "2 of 2 scans segmented" in infer("-i", tmp_path / "study", "-o", tmp_path / "all").out
    assert infer("-i", tmp_path / "study", "-o", tmp_path / "one", "--series", "1.2.3.22").code == 0
    assert list(run_of(tmp_path / "one")["cases"]) == ["study"]


# --- real scans ---------------------------------------------------------------------------------------------------------------------------

REAL = (
    "abdomen_ct/crlm1004_ct",
    "abdomen_ct/crlm1006_ct",
    "abdomen_ct/ts01_ct",
    "sarcoma_ct/sts002_ct",
    "sarcoma_ct/sts008_ct",
    "abdomen_mr/mr01_mr",
)


@pytest.mark.parametrize("name", REAL)
def test_real_scans(infer, shared, tmp_path, name):
    source = shared(f"data/{name}.nii.gz")
    result = infer("-i", source, "-o", tmp_path / "out")
    assert (result.code, result.err) == (0, "")
    assert_same_grid(nib.load(tmp_path / "out" / f"{source.name.removesuffix('.nii.gz')}_seg.nii.gz"), nib.load(source))
    assert ("warning: mr01_mr: read as mr" in result.out) == name.endswith("_mr")


def test_a_real_picture(infer, shared, tmp_path):
    source = shared("data/polyps/cju35k2fr3vc50988c85qkrwg.jpg")
    assert infer("-i", source, "-o", tmp_path / "out").code == 0
    with Image.open(source) as photo, Image.open(tmp_path / "out" / f"{source.stem}_seg.png") as labels:
        assert photo.size == labels.size


def test_a_real_ct_as_dicom(infer, shared, tmp_path):
    source = shared("data/abdomen_ct/ts01_ct.nii.gz")
    image = sitk.Cast(sitk.ReadImage(str(source)), sitk.sitkInt16)
    write_dicom_series(tmp_path / "dicom", image)
    assert infer("-i", tmp_path / "dicom", "-o", tmp_path / "out").code == 0
    sitk.WriteImage(image, str(tmp_path / "plain.nii.gz"))
    assert infer("-i", tmp_path / "plain.nii.gz", "-o", tmp_path / "out").code == 0
    found, wanted = (nib.load(tmp_path / "out" / f"{name}_seg.nii.gz") for name in ("dicom", "plain"))
    index = np.linalg.inv(wanted.affine) @ found.affine  # DICOM slices are in the order of their positions
    turn = nib.io_orientation(index)
    back = found.as_reoriented(turn)
    np.testing.assert_allclose(back.affine, wanted.affine, atol=1e-3)
    assert np.mean(np.asanyarray(back.dataobj) == np.asanyarray(wanted.dataobj)) > 0.9999


def test_the_colours_of_a_picture_reach_a_model_that_was_trained_on_pictures(trained, tmp_path):
    """An rgb checkpoint sees three channels, a CT checkpoint the luminance."""
    import dataclasses

    from pgsam.engine.predict import segment_scan
    from pgsam.volume_io import read_scan

    model = load_model(trained / "final.safetensors", device="cpu")
    pixels = np.zeros((64, 64, 3), np.uint8)
    pixels[:, :32, 0] = 200
    pixels[:, 32:, 2] = 200
    Image.fromarray(pixels).save(tmp_path / "p.png")
    seen = []
    model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].clone()))
    for kind in ("rgb", "ct_window"):
        card = dataclasses.replace(model.card, image_kind=kind, orientation="LPS", input_size=64)
        segment_scan(model, read_scan(tmp_path / "p.png"), card)
    rgb, grey = seen
    np.testing.assert_allclose(rgb[0, :, 5, 5], [200 / 255, 0, 0], atol=0.01)
    np.testing.assert_allclose(rgb[0, :, 5, 60], [0, 0, 200 / 255], atol=0.01)
    np.testing.assert_allclose(grey[0, :, 5, 5], [0.299 * 200 / 255] * 3, atol=0.01)
