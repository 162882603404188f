"""One orientation for scans stored in any, against nibabel; CSV and nnU-Net listings; what is refused before any work."""

import csv
import json
from itertools import permutations
from pathlib import Path

import h5py
import nibabel as nib
import numpy as np
import pytest
from nibabel.orientations import axcodes2ornt, inv_ornt_aff, io_orientation, ornt_transform
from scipy.spatial.transform import Rotation

from pgsam.errors import UserError
from pgsam.volume import from_attributes
from preprocess import nifti
from preprocess.common import Case, check_cases

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


# --- nnU-Net ----------------------------------------------------------------------------------------------------------------------------

V2 = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "liver": 1, "tumour": 2}, "file_ending": ".nii.gz", "numTraining": 6}
V1 = {"modality": {"0": "CT"}, "labels": {"0": "background", "1": "liver", "2": "tumour"}}


def make_nnunet(root, description=V2, train=6, test=0):
    root.mkdir(parents=True)
    (root / "dataset.json").write_text(json.dumps(description))
    for part, count in (("Tr", train), ("Ts", test)):
        for number in range(count):
            for folder, suffix, array in zip((f"images{part}", f"labels{part}"), ("_0000", ""), pair(number, top=3), strict=True):
                (root / folder).mkdir(exist_ok=True)
                nib.save(nib.Nifti1Image(array, LAS), root / folder / f"{part}_{number:03d}{suffix}.nii.gz")
    return root


@pytest.mark.parametrize("description", [V2, V1])
def test_nnunet_with_test_labels(description, tmp_path):
    root = make_nnunet(tmp_path / "Dataset001_Liver", description, train=2, test=1)
    assert run("--nnunet", root, "--output", tmp_path / "out") == 0
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["class_names"] == ["liver", "tumour"]
    assert {name: entry["split"] for name, entry in manifest["cases"].items()} == {"Tr_000": "train", "Tr_001": "train", "Ts_000": "test"}
    assert manifest["cases"]["Ts_000"]["label"] == "labelsTs/Ts_000.nii.gz"
    np.testing.assert_array_equal(slices(tmp_path / "out", "Tr_001")[1], pair(1, top=3)[1].transpose(2, 1, 0))
    with h5py.File(tmp_path / "out" / "test_vol_h5" / "Ts_000.npy.h5") as file:
        np.testing.assert_array_equal(file["label"], pair(0, top=3)[1].transpose(2, 1, 0))


def test_nnunet_splits_by_name_and_by_seed(tmp_path):
    root = make_nnunet(tmp_path / "data")

    def tests(*rule):
        return [case.name for case in nifti.read_nnunet(root, *rule)[0] if case.split == "test"]

    (tmp_path / "tests.txt").write_text("Tr_004\n\nTr_001\n")
    assert tests(tmp_path / "tests.txt") == ["Tr_001", "Tr_004"]
    draws = {seed: tests(None, 0.3, seed) for seed in range(20)}
    assert all(len(draw) == 2 for draw in draws.values())
    assert len(set(map(tuple, draws.values()))) > 5
    assert draws[3] == tests(None, 0.3, 3)
    assert tests(None, 0.0) == []
    assert len(tests(None, 0.01)) == 1
    assert len(tests(None, 0.99)) == 5
    assert tests() == tests(None, 0.2)
    assert len(tests()) == 1
    for rule, message in (((None, 1.0), "below 1"), ((tmp_path / "no.txt",), "no such file")):
        with pytest.raises(UserError, match=message):
            tests(*rule)
    (tmp_path / "tests.txt").write_text("Tr_004\nTr_104\n")
    with pytest.raises(UserError, match="found Tr_104"):
        tests(tmp_path / "tests.txt")


def test_a_label_map_makes_nnunets_label_numbers_free(tmp_path):
    """Gaps and odd names matter only where the labels are taken as they are."""
    root = make_nnunet(tmp_path / "data")
    description = json.loads((root / "dataset.json").read_text())
    (root / "dataset.json").write_text(json.dumps({**description, "labels": {"background": 0, "liver": 1, "tumour": 7}}))
    with pytest.raises(UserError, match="--label_map"):
        nifti.read_nnunet(root)
    cases, labels = nifti.read_nnunet(root, own_labels=False)
    assert cases
    assert labels is None


def test_columns_that_are_not_read_are_said(tmp_path, capsys):
    path = tmp_path / "pairs.csv"
    path.write_text("case,image,label,split,site\na,a.nii.gz,b.nii.gz,train,Bonn\n")
    assert [case.name for case in nifti.read_pairs(path)] == ["a"]
    assert "the columns site are not read" in capsys.readouterr().out


BAD_NNUNET = {
    "two channels": ({**V2, "channel_names": {"0": "T1", "1": "T2"}}, "expected one channel"),
    "regions": ({**V2, "labels": {"background": 0, "whole": [1, 2], "core": 2}}, "no regions"),
    "ignore": ({**V2, "labels": {"background": 0, "liver": 1, "ignore": 2}}, "ignore"),
    "gap": ({**V2, "labels": {"background": 0, "liver": 1, "tumour": 3}}, "without a gap"),
    "no labels": ({"channel_names": {"0": "CT"}}, "expected labels as"),
    "pictures": ({**V2, "file_ending": ".png"}, "file_ending"),
    "a list": ([1], "JSON object"),
}


@pytest.mark.parametrize("kind", BAD_NNUNET)
def test_bad_nnunet_descriptions(kind, tmp_path):
    description, message = BAD_NNUNET[kind]
    root = make_nnunet(tmp_path / "data", description, train=1)
    with pytest.raises(UserError, match=message) as caught:
        nifti.read_nnunet(root, None, 0.0)
    assert "dataset.json" in str(caught.value)


def test_bad_nnunet_folders(tmp_path):
    def refused(message):
        with pytest.raises(UserError, match=message):
            nifti.read_nnunet(root, None, 0.0)

    root = make_nnunet(tmp_path / "data", train=2)
    (root / "labelsTr" / "Tr_001.nii.gz").rename(root / "labelsTr" / "Tr_002.nii.gz")
    refused(r"alone: Tr_001, Tr_002")
    (root / "labelsTr" / "Tr_002.nii.gz").rename(root / "labelsTr" / "Tr_001.nii.gz")
    (root / "imagesTr" / "Tr_001_0000.nii.gz").rename(root / "imagesTr" / "Tr_000_0001.nii.gz")
    refused("expected one channel, named NAME_0000")
    (root / "imagesTr" / "Tr_000_0001.nii.gz").unlink()
    (root / "labelsTr" / "Tr_001.nii.gz").unlink()
    (root / "dataset.json").write_text("{")
    refused("expected JSON")
    (root / "dataset.json").unlink()
    refused("no such file")


def test_nnunet_labels_that_dataset_json_does_not_name(tmp_path, capsys):
    root = make_nnunet(tmp_path / "data", train=2)
    nib.save(nib.Nifti1Image(np.full(SHAPE, 3, np.uint8), LAS), root / "labelsTr" / "Tr_001.nii.gz")
    assert run("--nnunet", root, "--output", tmp_path / "out", "--test_fraction", 0) == 2
    assert "Tr_001.nii.gz: unexpected label value 3" in capsys.readouterr().err


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
