"""One orientation for scans stored in any, against nibabel; CSV and nnU-Net listings; what is refused before any work."""

import csv
import json
from itertools import permutations
from pathlib import Path

import h5py
import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from nibabel.orientations import axcodes2ornt, inv_ornt_aff, io_orientation, ornt_transform
from scipy.spatial.transform import Rotation

from pgsam.errors import UserError
from pgsam.volume import from_attributes
from preprocess import nifti
from preprocess.common import Case, check_cases
from tests.dicom_files import write_dicom_series

SHARED_CT = Path(__file__).resolve().parents[3] / "shared" / "data" / "abdomen_ct"
SHAPE = (8, 7, 5)
LAS = np.diag([-0.8, 0.7, 3.0, 1.0])
SYNAPSE8 = [0, 1, 2, 3, 4, 0, 5, 6, 7, 0, 0, 8, 0, 0]


def pair(seed=0, shape=SHAPE, top=14):
    rng = np.random.default_rng(seed)
    return rng.integers(-1024, 1500, shape).astype(np.int16), rng.integers(0, top, shape).astype(np.uint8)


def stored_as(image, code):
    return image.as_reoriented(ornt_transform(io_orientation(image.affine), axcodes2ornt(code)))


def write_pair(folder, name, arrays, affine=LAS, codes=("LAS", "LAS")):
    folder.mkdir(parents=True, exist_ok=True)
    for array, kind, code in zip(arrays, ("ct", "label"), codes, strict=True):
        nib.save(stored_as(nib.Nifti1Image(array, affine), code), folder / f"{name}_{kind}.nii.gz")


def write_csv(path, rows, columns=("case", "image", "label", "split")):
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(rows)
    return path


def rows_for(*names_and_splits):
    return [(name, f"raw/{name}_ct.nii.gz", f"raw/{name}_label.nii.gz", split) for name, split in names_and_splits]


def run(*flags):
    return nifti.main([str(flag) for flag in (*flags, "--num_workers", "1")])


def slices(output, case):
    """Images and labels of a training case, stacked, and the geometry entries of its slices."""
    files = [np.load(path, allow_pickle=False) for path in sorted((output / "train_npz").glob(f"{case}_slice*.npz"))]
    return np.stack([file["image"] for file in files]), np.stack([file["label"] for file in files]), files


def published(arrays):
    image = (np.clip(arrays[0].astype(np.float32), -125, 275) + np.float32(125)) / np.float32(400)
    return image.transpose(2, 1, 0), np.array(SYNAPSE8, np.float32)[arrays[1]].transpose(2, 1, 0)


@pytest.mark.parametrize("oblique", [False, True])
def test_a_scan_stored_in_any_orientation_gives_the_same_slices(oblique, tmp_path):
    affine = LAS.copy()
    if oblique:
        affine[:3, :3] = Rotation.from_euler("xyz", (11, -8, 19), degrees=True).as_matrix() @ LAS[:3, :3]
    affine[:3, 3] = (31, -20, 9)
    arrays = pair()
    codes = ["".join(axes) for axes in permutations("RPI")] + ["LAS", "SAL", "RAS", "LPS"]
    for number, code in enumerate(codes):  # the label is stored in an order of its own
        write_pair(tmp_path / "raw", f"c{number}", arrays, affine, (code, codes[number - 1]))
    names = [(f"c{number}", "train" if number else "test") for number in range(len(codes))]
    table = write_csv(tmp_path / "pairs.csv", rows_for(*names))
    assert run("--pairs", table, "--output", tmp_path / "out", "--label_map", "synapse8") == 0
    image, label = published(arrays)
    for number, code in enumerate(codes[1:], start=1):
        found_image, found_label, files = slices(tmp_path / "out", f"c{number}")
        np.testing.assert_array_equal(found_image, image)
        np.testing.assert_array_equal(found_label, label)
        assert {(str(file["orientation"]), str(file["source_orientation"])) for file in files} == {("LAS", code)}
        for d, file in enumerate(files):
            place = from_attributes(file, file["image"])
            assert place is not None
            np.testing.assert_allclose(place.affine @ (0, 2, 3, 1), np.diag([-1, -1, 1, 1]) @ affine @ (3, 2, d, 1), atol=1e-4)
    with h5py.File(tmp_path / "out" / "test_vol_h5" / "c0.npy.h5") as file:
        np.testing.assert_array_equal(file["image"], image)
        np.testing.assert_array_equal(file["label"], label)
        volume = from_attributes(file.attrs, file["image"][:])
        assert volume is not None
        np.testing.assert_allclose(volume.affine @ (4, 2, 3, 1), np.diag([-1, -1, 1, 1]) @ affine @ (3, 2, 4, 1), atol=1e-4)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["orientation"] == "LAS"
    assert manifest["cases"]["c3"]["source_orientation"] == codes[3]
    assert manifest["cases"]["c3"]["image"] == "raw/c3_ct.nii.gz"


def test_another_orientation_window_and_the_order_of_the_list(tmp_path):
    arrays = pair()
    for name in ("b", "a", "z"):
        write_pair(tmp_path / "raw", name, arrays)
    table = write_csv(tmp_path / "pairs.csv", rows_for(("b", "train"), ("z", "test"), ("a", "train")))
    flags = ("--pairs", table, "--output", tmp_path / "out", "--orientation", "SPR", "--window", "-100", "300")
    assert run(*flags) == 0
    transform = ornt_transform(axcodes2ornt("LAS"), axcodes2ornt("SPR"))
    expected = nib.orientations.apply_orientation(arrays[0], transform).transpose(2, 1, 0)
    image, _, files = slices(tmp_path / "out", "a")
    np.testing.assert_array_equal(image, (np.clip(expected, -100, 300).astype(np.float32) + np.float32(100)) / np.float32(400))
    np.testing.assert_array_equal(files[0]["window"], (-100, 300))
    at = LAS @ inv_ornt_aff(transform, SHAPE) @ (0, 0, 2, 1)  # index (i, j, k) of the turned volume -> RAS
    place = from_attributes(files[2], files[2]["image"])
    assert place is not None
    np.testing.assert_allclose(place.origin_mm, np.array((-at[0], -at[1], at[2])), atol=1e-4)
    assert (tmp_path / "out" / "lists" / "train.txt").read_text().split() == [f"{case}_slice{d:03d}" for case in "ba" for d in range(8)]
    assert (tmp_path / "out" / "lists" / "test_vol.txt").read_text() == "z\n"


def test_labels_as_they_are_and_label_files_that_are_not_labels(tmp_path, capsys):
    image, label = pair(top=4)
    write_pair(tmp_path / "raw", "a", (image, label))
    write_pair(tmp_path / "raw", "b", (image, np.minimum(label, 2)))
    table = write_csv(tmp_path / "pairs.csv", rows_for(("a", "train"), ("b", "test")))
    assert run("--pairs", table, "--output", tmp_path / "out") == 0
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["class_names"] == ["label 1", "label 2", "label 3"]
    assert manifest["cases"]["b"]["labels_present"] == [1, 2]
    np.testing.assert_array_equal(slices(tmp_path / "out", "a")[1], label.transpose(2, 1, 0))
    for bad, message in ((label + 0.25, "not a whole number"), (label.astype(np.int16) - 1, "-1"), (label.astype(np.int16) + 300, "300")):
        write_pair(tmp_path / "raw", "a", (image, bad))
        assert run("--pairs", table, "--output", tmp_path / "out") == 2
        error = capsys.readouterr().err
        assert message in error
        assert "a_label.nii.gz" in error
    for name in "ab":
        write_pair(tmp_path / "raw", name, (image, label * 0))
    assert run("--pairs", table, "--output", tmp_path / "out") == 2
    assert "only background" in capsys.readouterr().err


def test_percentiles_are_taken_from_the_whole_volume(tmp_path):
    image = np.random.default_rng(3).gamma(2, 300, SHAPE).astype(np.float32)
    write_pair(tmp_path / "raw", "a", (image, pair()[1]))
    table = write_csv(tmp_path / "pairs.csv", rows_for(("a", "train")))
    assert run("--pairs", table, "--output", tmp_path / "out", "--image_kind", "percentile") == 0
    lo, hi = np.percentile(image, (0.5, 99.5))
    found, _, files = slices(tmp_path / "out", "a")
    np.testing.assert_allclose(found, ((np.clip(image, lo, hi) - lo) / (hi - lo)).transpose(2, 1, 0), atol=1e-6)
    np.testing.assert_allclose(files[0]["window"], (lo, hi))
    assert str(files[0]["image_kind"]) == "percentile"


def test_a_case_that_changes_its_split_leaves_nothing_behind(tmp_path):
    for name in "ab":
        write_pair(tmp_path / "raw", name, pair())
    out = tmp_path / "out"
    for splits in (("train", "test"), ("test", "train")):
        table = write_csv(tmp_path / "pairs.csv", rows_for(*zip("ab", splits, strict=True)))
        assert run("--pairs", table, "--output", out) == 0
        train, test = ("a", "b") if splits[0] == "train" else ("b", "a")
        assert {path.name.split("_")[0] for path in (out / "train_npz").iterdir()} == {train}
        assert {path.name for path in (out / "test_vol_h5").iterdir()} == {f"{test}.npy.h5"}


# --- refused before any work ------------------------------------------------------------------------------------------------------------

PLAIN = ("case", "image", "label", "split")
ROW = ("a", "raw/a_ct.nii.gz", "raw/a_label.nii.gz", "train")
OTHER = ("b", "raw/b_ct.nii.gz", "raw/b_label.nii.gz", "test")
BAD_TABLES = {
    "missing column": (PLAIN[:3], [ROW[:3]], "expected the columns case, image, label, split"),
    "column twice": ((*PLAIN, "split"), [(*ROW, "test")], "found case, image, label, split, split"),
    "empty table": (PLAIN, [], "at least one case"),
    "bad split": (PLAIN, [ROW, (*OTHER[:3], "val")], "case b: expected split train or test, found 'val'"),
    "empty cell": (PLAIN, [("a", "", *ROW[2:])], "line 2: expected a value for image"),
    "short row": (PLAIN, [ROW, ("b", "c")], "line 3: expected as many cells"),
    "name twice": (PLAIN, [ROW, ("a", *OTHER[1:3], "train")], "case a: listed twice"),
    "image twice": (PLAIN, [ROW, ("b", "raw/../raw/a_ct.nii.gz", *OTHER[2:])], "have one image"),
    "absent file": (PLAIN, [ROW, ("b", "raw/c_ct.nii.gz", *OTHER[2:])], "c_ct.nii.gz (case b)"),
    "bad name": (PLAIN, [("a/b", *ROW[1:])], "expected a name of letters"),
    "name of a slice": (PLAIN, [("a_slice000", *ROW[1:])], "expected a name of letters"),
    "patient in both": ((*PLAIN, "patient"), [(*ROW, "p1"), (*OTHER, "p1")], "patient p1 is in training and test (cases a, b)"),
}


@pytest.mark.parametrize("kind", BAD_TABLES)
def test_bad_tables(kind, tmp_path, capsys):
    columns, rows, message = BAD_TABLES[kind]
    for name in "ab":
        write_pair(tmp_path / "raw", name, pair())
    assert run("--pairs", write_csv(tmp_path / "pairs.csv", rows, columns), "--output", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_table_as_spreadsheets_write_it(tmp_path):
    text = "\ufeffcase, image, label, split, patient\r\na, raw/a_ct.nii.gz, raw/a_label.nii.gz, train,\r\n"
    (tmp_path / "pairs.csv").write_bytes(text.encode())
    (case,) = nifti.read_pairs(tmp_path / "pairs.csv")
    assert case == Case("a", "train", "a", tmp_path / "raw" / "a_ct.nii.gz", tmp_path / "raw" / "a_label.nii.gz")


def test_flags_that_would_change_nothing_are_refused(tmp_path, capsys):
    write_pair(tmp_path / "raw", "a", pair())
    table = write_csv(tmp_path / "pairs.csv", [ROW])
    for flags in (
        ("--image_kind", "percentile", "--window", 0, 1),
        ("--test_fraction", 0.5),
        ("--seed", 1),
        ("--orientation", "LLL"),
        ("--window", 5, 1),
        ("--label_map", "synapse9"),
    ):
        assert run("--pairs", table, "--output", tmp_path / "out", *flags) == 2
        assert capsys.readouterr().err.startswith("error: ")
        assert not (tmp_path / "out").exists()


def test_no_cases_are_an_error():
    with pytest.raises(UserError, match="at least one case"):
        check_cases([])


# --- whose scan, and which labels -------------------------------------------------------------------------------------------------------


def test_columns_that_are_not_read_are_said(tmp_path, capsys):
    path = tmp_path / "pairs.csv"
    path.write_text("case,image,label,split,site\na,a.nii.gz,b.nii.gz,train,Bonn\n")
    assert [case.name for case in nifti.read_pairs(path)] == ["a"]
    assert "the columns site are not read" in capsys.readouterr().out


def test_patients_by_a_regular_expression(tmp_path, capsys):
    for name in ("P1_a", "P1_b", "P2_a"):
        write_pair(tmp_path / "raw", name, pair())
    out = tmp_path / "out"

    def prepare(*splits, rule=r"^(P\d+)_", columns=PLAIN, patients=()):
        rows = rows_for(*zip(("P1_a", "P1_b", "P2_a"), splits, strict=True))
        if patients:
            rows = [(*row, patient) for row, patient in zip(rows, patients, strict=True)]
        table = write_csv(tmp_path / "pairs.csv", rows, columns)
        return run("--pairs", table, "--output", out, "--patient_regex", rule), capsys.readouterr().err

    for arguments, message in (
        ({}, "patient P1 is in training and test (cases P1_a, P1_b)"),
        ({"rule": "P("}, "--patient_regex P(: expected a regular expression"),
        ({"rule": "P"}, "expected one group"),
        ({"rule": "(P)(1)"}, "expected one group"),
        ({"rule": "(P1)"}, "case P2_a: --patient_regex (P1) finds no patient"),
        ({"rule": "P(x?)"}, "case P1_a: --patient_regex P(x?) finds no patient"),
    ):
        code, error = prepare("train", "test", "test", **arguments)
        assert (code, error.count("\n")) == (2, 1)
        assert message in error
        assert not out.exists()
    assert prepare("train", "train", "test") == (0, "")
    manifest = json.loads((out / "manifest.json").read_text())
    assert {name: entry["patient"] for name, entry in manifest["cases"].items()} == {"P1_a": "P1", "P1_b": "P1", "P2_a": "P2"}
    # The column goes before the expression, row by row.
    assert prepare("train", "test", "test", columns=(*PLAIN, "patient"), patients=("other", "", ""))[0] == 0
    manifest = json.loads((out / "manifest.json").read_text())
    assert [entry["patient"] for entry in manifest["cases"].values()] == ["other", "P1", "P2"]


A_MAP = {"class_names": ["liver", "spleen"], "map": {"6": 1, "1": 2}, "default": 0}
B_MAP = {"class_names": ["liver", "spleen"], "map": {"1": 1, "3": 2}, "default": 0}


def write_maps(folder, **maps):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in maps.items():
        (folder / f"{name}.json").write_text(json.dumps(content))


def test_rows_with_label_maps_of_their_own(tmp_path):
    """Datasets with different label values become one task: liver is 6 in a, 1 in b and (FLARE22) in c."""
    arrays = pair()
    for name in "abc":
        write_pair(tmp_path / "raw", name, arrays)
    write_maps(tmp_path / "maps", a=A_MAP, b=B_MAP, rest={**B_MAP, "map": {"1": 1, "9": 2}})
    rows = [
        (*row, cell) for row, cell in zip(rows_for(("a", "train"), ("b", "train"), ("c", "train")), ("maps/a.json", " maps/b.json", ""), strict=True)
    ]
    table = write_csv(tmp_path / "pairs.csv", rows, (*PLAIN, "label_map"))
    assert run("--pairs", table, "--output", tmp_path / "out", "--label_map", tmp_path / "maps" / "rest.json") == 0
    stored = arrays[1].transpose(2, 1, 0)
    for name, liver, spleen in (("a", 6, 1), ("b", 1, 3), ("c", 1, 9)):
        np.testing.assert_array_equal(slices(tmp_path / "out", name)[1], np.select([stored == liver, stored == spleen], [1, 2], 0))
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert (manifest["class_names"], manifest["label_map"]) == (["liver", "spleen"], "a.json, b.json, rest.json")
    rows[1] = (*rows[1][:-1], "maps/rest.json")
    write_csv(table, rows, (*PLAIN, "label_map"))
    assert run("--pairs", table, "--output", tmp_path / "out", "--label_map", tmp_path / "maps" / "rest.json") == 0
    np.testing.assert_array_equal(slices(tmp_path / "out", "b")[1], np.select([stored == 1, stored == 9], [1, 2], 0))


def test_a_named_map_in_a_row_and_work_when_it_changes(tmp_path):
    arrays = pair(top=4)  # the last classes do not occur, and are classes all the same
    write_pair(tmp_path / "raw", "a", arrays)
    for cell in ("synapse8", "flare22"):
        table = write_csv(tmp_path / "pairs.csv", [(*ROW, cell)], (*PLAIN, "label_map"))
        assert run("--pairs", table, "--output", tmp_path / "out") == 0
        expected = np.array({"synapse8": SYNAPSE8, "flare22": [0, 5, 2, 1, 8, 7, 0, 0, 0, 4, 0, 6, 0, 3]}[cell])
        np.testing.assert_array_equal(slices(tmp_path / "out", "a")[1], expected[arrays[1]].transpose(2, 1, 0))
        assert json.loads((tmp_path / "out" / "manifest.json").read_text())["num_classes"] == 8


@pytest.mark.parametrize(
    ("cells", "flags", "message"),
    [
        (("a.json", "c.json"), (), "case b: expected the same classes in the same order from all label maps, found class 1 to be spleen in 'c.json'"),
        (("a.json", "d.json"), (), "found class 3 to be tumour in 'd.json' and no class in 'a.json'"),
        (("a.json", "synapse8"), (), "found class 1 to be spleen in 'synapse8' and liver in 'a.json'"),
        (("a.json", ""), (), "case b has no label_map, others have"),
        (("a.json", ""), ("--label_map", "btcv13"), "case a: expected the same classes"),
        (("a.json", "e.json"), (), "line 3: "),
        (("a.json", "synapse9"), (), "line 3: unknown label map 'synapse9'"),
        (("", ""), ("--label_map", "btcv13", "synapse8"), "--label_map: expected 1"),
    ],
)
def test_label_maps_that_are_not_one_task(tmp_path, capsys, cells, flags, message):
    for name in "ab":
        write_pair(tmp_path / "raw", name, pair())
    swapped = {**A_MAP, "class_names": ["spleen", "liver"]}
    write_maps(tmp_path, a=A_MAP, c=swapped, d={"class_names": ["liver", "spleen", "tumour"], "map": {"1": 1, "2": 2, "3": 3}})
    table = write_csv(tmp_path / "pairs.csv", [(*row, cell) for row, cell in zip((ROW, OTHER), cells, strict=True)], (*PLAIN, "label_map"))
    assert run("--pairs", table, "--output", tmp_path / "out", *flags) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


# --- other formats ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("image_suffix", "label_suffix"), [(".nrrd", ".nrrd"), (".mha", ".nii.gz"), ("", ".mha")])
def test_a_scan_in_another_format_gives_the_same_slices(tmp_path, image_suffix, label_suffix):
    """The same voxels as NRRD, as MetaImage and as a folder of DICOM slices, written by SimpleITK."""
    arrays = pair()
    write_pair(tmp_path / "raw", "a", arrays)
    image, label = (sitk.ReadImage(str(tmp_path / "raw" / f"a_{kind}.nii.gz")) for kind in ("ct", "label"))
    if image_suffix:
        sitk.WriteImage(image, str(tmp_path / "raw" / f"b_ct{image_suffix}"))
    else:
        write_dicom_series(tmp_path / "raw" / "b_ct", image)
    sitk.WriteImage(label, str(tmp_path / "raw" / f"b_label{label_suffix}"))
    rows = [ROW, ("b", f"raw/b_ct{image_suffix}", f"raw/b_label{label_suffix}", "train")]
    table = write_csv(tmp_path / "pairs.csv", rows)
    assert run("--pairs", table, "--output", tmp_path / "out", "--label_map", "synapse8") == 0
    for expected, found in zip(slices(tmp_path / "out", "a")[:2], slices(tmp_path / "out", "b")[:2], strict=True):
        np.testing.assert_array_equal(found, expected)


def test_a_changed_dicom_slice_is_noticed(tmp_path):
    write_pair(tmp_path / "raw", "a", pair())
    image = sitk.ReadImage(str(tmp_path / "raw" / "a_ct.nii.gz"))
    rows = [("a", "raw/dicom", "raw/a_label.nii.gz", "train")]
    table = write_csv(tmp_path / "pairs.csv", rows)
    found = []
    for scan in (image, image + 50):
        write_dicom_series(tmp_path / "raw" / "dicom", sitk.Cast(scan, sitk.sitkInt16))
        assert run("--pairs", table, "--output", tmp_path / "out", "--label_map", "synapse8") == 0
        found.append(slices(tmp_path / "out", "a")[0])
    assert (found[0] != found[1]).any()


# --- real scans -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not SHARED_CT.is_dir(), reason="needs ../shared/data/abdomen_ct (real CT)")
def test_real_scans_lie_alike(tmp_path):
    """In LAS slices the liver (right side) lies at low w, the spleen (left side) at high w, in all three scans of two source orders."""
    names = (("crlm1004", "train"), ("ts01", "train"), ("crlm1006", "test"))
    rows = [(name, SHARED_CT / f"{name}_ct.nii.gz", SHARED_CT / f"{name}_label_model_made.nii.gz", split) for name, split in names]
    table = write_csv(tmp_path / "pairs.csv", rows)
    assert run("--pairs", table, "--output", tmp_path / "out", "--label_map", "synapse8") == 0
    labels = {name: slices(tmp_path / "out", name)[1] for name in ("crlm1004", "ts01")}
    with h5py.File(tmp_path / "out" / "test_vol_h5" / "crlm1006.npy.h5") as file:
        labels["crlm1006"] = file["label"][:]
    assert {name: array.shape for name, array in labels.items()} == {
        "crlm1004": (41, 256, 256),
        "ts01": (112, 101, 122),
        "crlm1006": (51, 256, 256),
    }
    for array in labels.values():
        assert (array == 5).nonzero()[2].mean() < 0.45 * array.shape[2] < 0.55 * array.shape[2] < (array == 1).nonzero()[2].mean()
