"""Datasets with one planted fault of each kind: every one is found under its name, and nothing else; clean ones, and real CTs, give no finding."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import h5py
import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform

from datasets.labels import BTCV_NAMES, FLARE22_NAMES, SYNAPSE8_NAMES
from datasets.phantom import make_phantom, write_phantoms
from datasets.slices import read_slice
from pgsam.errors import UserError
from pgsam.volume import Volume, reorient
from pgsam.volume_io import read_scan
from preprocess import checks, synapse, verify_dataset
from preprocess.checks import KINDS, voxel_hash
from preprocess.sides import normal_name, side_pairs
from tests.damages import DAMAGES, cut
from tests.dicom_files import write_dicom_series

REPO = Path(__file__).resolve().parents[2]
SHARED_CT = REPO.parent / "shared" / "data" / "abdomen_ct"
SHAPE = (10, 72, 80)
LAS = np.diag([-4.8, 16 / 3, 20.0, 1.0])  # the phantom's grid in nibabel's frame
BTCV_OF_FLARE = {FLARE22_NAMES.index(name) + 1: BTCV_NAMES.index(name) + 1 for name in FLARE22_NAMES if name in BTCV_NAMES}


@pytest.fixture(scope="module")
def phantoms():
    """Four phantom scans (HU int16, BTCV ids uint8) in nibabel's order (W, H, D)."""
    scans = [make_phantom(case, SHAPE) for case in (5, 6, 8, 22)]
    return [(np.ascontiguousarray(scan.image_hu.T), np.ascontiguousarray(scan.labels.T)) for scan in scans]


def save(path, array, affine=LAS):
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, affine), path)
    return path


def verify(source, *flags):
    """Exit code, {(kind, case)} and the JSON."""
    output = Path(source).parent / "findings.json"
    output.unlink(missing_ok=True)
    code = verify_dataset.main([str(flag) for flag in (source, "--num_workers", 1, "--output", output, *flags)])
    content = json.loads(output.read_text()) if output.exists() else None
    assert content is None or {row["kind"] for row in content["findings"]} <= KINDS.keys()
    return code, {(row["kind"], row["case"]) for row in content["findings"]} if content else None, content


def found(content, kind, case=""):
    """The one row of a kind and case, as a sentence."""
    (row,) = [row for row in content["findings"] if (row["kind"], row["case"]) == (kind, case)]
    return f"{row['file']}: {row['found']}; {row['advice']}"


def clean(source, *flags):
    code, rows, content = verify(source, *flags)
    assert (code, rows) == (0, set()), rows
    assert content["counts"]["findings"] == 0
    assert all(entry["findings"] == [] for entry in content["cases"])
    return content


# --- layouts ----------------------------------------------------------------------------------------------------------------------------


def write_nnunet(root, phantoms, channel="CT", form="v2"):
    names = {"background": 0, **{name: value for value, name in enumerate(BTCV_NAMES, start=1)}}
    description = {"channel_names": {"0": channel}, "labels": names, "file_ending": ".nii.gz", "numTraining": 3}
    if form != "v2":
        description = {"modality": {"0": channel}, "labels": {str(value): name for name, value in names.items()}, "numTraining": 3}
        description["training"] = [{"image": f"./imagesTr/p{i}.nii.gz", "label": f"./labelsTr/p{i}.nii.gz"} for i in range(3)]
        description["test"] = ["./imagesTs/p3.nii.gz"]
    for number, (image, label) in enumerate(phantoms):
        part = "Ts" if number == 3 else "Tr"
        save(root / f"images{part}" / f"p{number}{'' if form == 'msd' else '_0000'}.nii.gz", image)
        if part == "Tr" or form == "v2":
            save(root / f"labels{part}" / f"p{number}.nii.gz", label)
    (root / "dataset.json").write_text(json.dumps(description))
    return root


def write_flare22(root, phantoms):
    back = np.zeros(14, np.uint8)
    back[list(BTCV_OF_FLARE.values())] = list(BTCV_OF_FLARE)
    for number, (image, label) in enumerate(phantoms, start=1):
        save(root / "images" / f"FLARE22_Tr_{number:04d}_0000.nii.gz", image)
        name = f"FLARE22_Tr_{number:04d}.nii"
        save(root / "labels" / (f"{name}/{name}" if number % 2 else f"{name}.gz"), back[label])
    return root


def write_transunet(root, phantoms):
    """As TransUNet's files: nothing but arrays, classes 1 to 8, lists; no manifest."""
    table = np.array([0, *(SYNAPSE8_NAMES.index(name) + 1 if name in SYNAPSE8_NAMES else 0 for name in BTCV_NAMES)], np.float32)
    for folder in ("train_npz", "test_vol_h5", "lists"):
        (root / folder).mkdir(parents=True)
    lines = []
    for number, (image, label) in enumerate(phantoms):
        scaled, classes = ((np.clip(image.T, -125, 275) + 125) / 400).astype(np.float32), table[label.T]
        if number == 3:
            with h5py.File(root / "test_vol_h5" / "case0003.npy.h5", "w") as file:
                file["image"], file["label"] = scaled, classes
            continue
        for index in range(len(scaled)):
            lines.append(f"case{number:04d}_slice{index:03d}")
            np.savez(root / "train_npz" / f"{lines[-1]}.npz", image=scaled[index], label=classes[index])
    (root / "lists" / "train.txt").write_text("\n".join(lines))
    (root / "lists" / "test_vol.txt").write_text("case0003\n")
    return root


def write_pairs(path, rows, columns="case,image,label,split"):
    path.write_text("\n".join([columns, *rows]) + "\n")
    return path


def clean_pairs(folder, phantoms):
    for number, (image, label) in enumerate(phantoms):
        save(folder / f"p{number}_ct.nii.gz", image)
        save(folder / f"p{number}_label.nii.gz", label)
    return write_pairs(folder / "pairs.csv", [f"p{i},p{i}_ct.nii.gz,p{i}_label.nii.gz,{'test' if i == 3 else 'train'}" for i in range(len(phantoms))])


@pytest.mark.parametrize("form", ["v2", "v1", "msd"])
def test_a_clean_nnunet_folder(form, phantoms, tmp_path, capsys):
    content = clean(write_nnunet(tmp_path / "Dataset001_Abdomen", phantoms, form=form))
    assert content["settings"]["kind"] == "nnunet"
    assert content["counts"] == {"cases": 4, "files": 8 if form == "v2" else 7, "findings": 0, "by_kind": {}}
    first = content["cases"][0]
    assert (first["case"], first["split"], first["shape"], first["orientation"]) == ("p0", "train", [10, 72, 80], "LAS")
    np.testing.assert_allclose(first["spacing_mm"], [20, 16 / 3, 4.8], atol=1e-5)
    assert first["labels_present"] == [value for value in range(1, 14) if (phantoms[0][1] == value).any()]
    assert first["intensity"] == [phantoms[0][0].min(), phantoms[0][0].max()]
    assert first["sides"]["as expected"] > 5
    assert first["sides"]["reversed"] == 0
    out = capsys.readouterr().out
    assert "an nnU-Net dataset, label map dataset.json, images in Hounsfield units" in out
    assert "4 cases" in out
    assert "no findings" in out


def test_clean_raw_and_prepared_btcv(tmp_path, capsys):
    raw, prepared = tmp_path / "raw", tmp_path / "prepared"
    write_phantoms(raw, (5, 6, 8, 22), shape=SHAPE)
    content = clean(raw)
    assert content["settings"]["kind"] == "btcv"
    assert [(entry["case"], entry["split"]) for entry in content["cases"]] == [
        ("case0005", "train"),
        ("case0006", "train"),
        ("case0008", "test"),
        ("case0022", "test"),
    ]
    assert all(entry["sides"]["as expected"] > 9 for entry in content["cases"])  # also organs that the eight classes leave out
    splits = {entry["case"]: entry["split"] for entry in clean(raw, "--dataset", "BTCV", "--label_map", "synapse12")["cases"]}
    assert set(splits.values()) == {"train"}  # the 24 / 6 split tests on cases 35 to 40
    assert synapse.main(["--src_path", str(raw), "--dst_path", str(prepared), "--num_workers", "1"]) == 0
    content = clean(prepared)
    assert content["settings"]["kind"] == "prepared"
    assert [entry["orientation_assumed"] for entry in content["cases"]] == [False] * 4
    assert content["counts"]["files"] == 22  # two cases of ten slices, two volumes
    assert content["cases"][0]["classes_present"] == list(SYNAPSE8_NAMES)
    assert "classes of manifest.json" in capsys.readouterr().out
    assert clean(prepared / "train_npz")["counts"] == content["counts"]


def test_other_clean_datasets(phantoms, tmp_path, capsys):
    assert clean(clean_pairs(tmp_path / "pairs", phantoms), "--label_map", "btcv13")["settings"]["kind"] == "csv"
    assert clean(write_flare22(tmp_path / "flare", phantoms))["settings"]["kind"] == "flare22"
    capsys.readouterr()
    content = clean(write_transunet(tmp_path / "transunet", phantoms))
    assert {(entry["orientation_assumed"], entry["orientation"]) for entry in content["cases"]} == {(True, "LAS")}
    out = capsys.readouterr().out
    assert "no manifest.json, so the 8 classes of Synapse" in out
    assert "BTCV's orientation LAS assumed in 4" in out


def test_scans_without_labels(phantoms, tmp_path):
    folder = tmp_path / "scans"
    save(folder / "a.nii.gz", phantoms[0][0])
    sitk.WriteImage(sitk.GetImageFromArray(phantoms[1][0].T), str(folder / "b.nrrd"))
    sitk.WriteImage(sitk.GetImageFromArray(phantoms[2][0].T), str(folder / "a.mha"))
    (folder / "notes.txt").write_text("not a scan")
    assert [entry["case"] for entry in clean(folder)["cases"]] == ["a.mha", "a.nii.gz", "b"]
    assert clean(folder / "b.nrrd")["counts"]["cases"] == 1
    save(folder / "c.nii.gz", np.clip(phantoms[0][0], 0, 200))
    clean(folder)  # whether it is a CT is not known
    assert verify(folder, "--image_kind", "ct_window")[1] == {("intensity", "c")}
    for name, lowest, found_ct in (("mr", -47, False), ("splines", -99, False), ("fat", -110, True)):  # -47 is the minimum of a real MR
        path = save(tmp_path / f"{name}.nii.gz", np.clip(phantoms[0][0], lowest, 200))
        assert verify(path, "--image_kind", "ct_window")[1] == (set() if found_ct else {("intensity", name)})


@pytest.mark.skipif(not SHARED_CT.is_dir(), reason="needs ../shared/data/abdomen_ct (real CT)")
def test_real_cts_have_their_organs_on_the_right_side_and_mirrored_ones_do_not(tmp_path):
    names = ("crlm1004", "crlm1006", "ts01")
    plain = write_pairs(tmp_path / "a.csv", [f"{n},{SHARED_CT}/{n}_ct.nii.gz,{SHARED_CT}/{n}_label_model_made.nii.gz,train" for n in names])
    content = clean(plain, "--label_map", "btcv13")
    assert [entry["sides"]["as expected"] >= 6 for entry in content["cases"]] == [True] * 3
    rows = []
    for name, (mirror_image, mirror_label, mirror_header) in zip(names, ((0, 1, 0), (1, 1, 0), (0, 0, 1)), strict=True):
        for kind, mirrored in (("ct", mirror_image), ("label_model_made", mirror_label)):
            image = nib.load(SHARED_CT / f"{name}_{kind}.nii.gz")  # type: ignore[attr-defined]
            affine = np.diag([-1.0, 1, 1, 1]) @ image.affine if mirror_header else image.affine
            save(tmp_path / f"{name}_{kind}.nii.gz", np.asarray(image.dataobj)[:: -1 if mirrored else 1], affine)
        rows.append(f"{name},{name}_ct.nii.gz,{name}_label_model_made.nii.gz,train")
    code, kinds, content = verify(write_pairs(tmp_path / "b.csv", rows), "--label_map", "btcv13")
    assert (code, kinds) == (1, {("left-right flip", name) for name in names})
    assert "situs inversus" in found(content, "left-right flip", "ts01")


# --- files that cannot be read -----------------------------------------------------------------------------------------------------------


def write_series(folder, image, name="", skip=()):
    """One DICOM series of slices 20 mm apart, of which some are left out; `name` is its description and in its files' names."""
    volume = sitk.GetImageFromArray(image.T)
    volume.SetSpacing((4.8, 16 / 3, 20.0))
    files = write_dicom_series(folder / name, volume, uid=f"1.2.826.{len(name) + 1}", t0008_103e=name)
    for index, path in enumerate(files):
        path.unlink() if index in skip else path.rename(folder / f"{name}{path.name}")
    return folder


def test_folders_of_dicom_series(phantoms, tmp_path):
    folder = tmp_path / "patients"
    image, other = phantoms[0][0], phantoms[1][0]
    write_series(folder / "whole", image)
    assert clean(folder)["counts"]["files"] == 10
    write_series(folder / "gap", image + np.int16(1), skip=(4,))
    write_series(folder / "two", image + np.int16(2), "thin")
    write_series(folder / "two", image + np.int16(3), "reformatted")
    write_series(folder / "bright", other + np.int16(1024))  # DICOM says that it is a CT
    cut(0.5)(write_series(folder / "torn", other) / "003.dcm")
    save(folder / "same.nii.gz", image, np.diag([-4.8, -16 / 3, 20, 1]))
    code, kinds, content = verify(folder)
    assert code == 1
    assert kinds == {("damaged file", "gap"), ("two series", "two"), ("intensity", "bright"), ("damaged file", "torn"), ("duplicate image", "whole")}
    assert "missing" in found(content, "damaged file", "gap")
    assert "003.dcm" in found(content, "damaged file", "torn")
    assert str(tmp_path) not in found(content, "damaged file", "torn")
    sentence = found(content, "two series", "two")
    assert all(words in sentence for words in ("two: 2 DICOM series", "thin (10 slices)", "reformatted (10 slices)")), sentence
    assert verify(folder / "two")[1] == {("two series", "two")}


def test_dicom_files_among_the_images_are_a_finding(phantoms, tmp_path):
    """They would be passed over, or taken for the whole folder."""
    folder = tmp_path / "Dataset001_A"
    write_nnunet(folder, phantoms)
    write_series(tmp_path / "series", phantoms[0][0])
    (tmp_path / "series" / "003.dcm").rename(folder / "imagesTr" / "stray.dcm")
    code, kinds, _ = verify(folder)
    assert code == 1
    assert kinds == {("unexpected file", ""), ("missing partner", "stray"), ("bad list", "")}  # and one case more than dataset.json says


def test_damaged_files_are_named_and_do_not_stop_the_rest(phantoms, tmp_path):
    folder = tmp_path / "scans"
    image = phantoms[0][0]
    save(folder / "whole.nii.gz", image)
    for number, (name, (damage, _)) in enumerate(DAMAGES.items(), start=1):
        damage(save(folder / f"{name}.nii.gz", image + number))
    code, kinds, content = verify(folder)
    assert (code, kinds) == (1, {("damaged file", name) for name in DAMAGES})
    for name, (_, said) in DAMAGES.items():
        sentence = found(content, "damaged file", name)
        assert said in sentence, sentence
        assert sentence.startswith(f"{name}.nii.gz: ")
        assert str(tmp_path) not in sentence, sentence  # the file has a column of its own
    assert [entry["shape"] for entry in content["cases"] if entry["case"] == "whole"] == [[10, 72, 80]]


def test_a_scan_that_does_not_fit_into_memory_does_not_stop_the_rest(phantoms, tmp_path, monkeypatch):
    def read(path):
        if path.name.startswith("huge"):
            raise MemoryError
        return read_scan(path)

    monkeypatch.setattr(checks, "read_scan", read)
    for number, name in enumerate(("huge", "small")):
        save(tmp_path / "scans" / f"{name}.nii.gz", phantoms[number][0])
    assert verify(tmp_path / "scans")[:2] == (1, {("damaged file", "huge")})


def test_a_prepared_volume_that_does_not_fit_into_memory_does_not_stop_the_rest(phantoms, tmp_path, monkeypatch):
    def load(file, **_):
        raise MemoryError

    root = write_transunet(tmp_path / "transunet", phantoms)
    monkeypatch.setattr(np, "load", load)
    code, kinds, _ = verify(root)
    assert (code, kinds) == (1, {("damaged file", f"case{number:04d}") for number in range(3)})


# --- labels, geometry, duplicates, patients ----------------------------------------------------------------------------------------------


class Plant:
    """Writes pairs of which each can be wrong in one way; the images differ, so that only planted duplicates are duplicates."""

    def __init__(self, folder, phantoms):
        self.folder, self.rows, self.expected = folder, [], set()
        self.image, self.label = phantoms[0]

    def add(self, case, *kinds, image=None, label=None, image_affine=LAS, label_affine=LAS, split="train", patient=""):
        if image is None:
            image = self.image + np.int16(len(self.rows))
        self.row(
            case,
            save(self.folder / f"{case}_ct.nii.gz", image, image_affine).name,
            save(self.folder / f"{case}_label.nii.gz", self.label if label is None else label, label_affine).name,
            *kinds,
            split=split,
            patient=patient,
        )

    def row(self, case, image, label, *kinds, split="train", patient=""):
        self.rows.append(f"{case},{image},{label},{split},{patient}")
        self.expected |= {(kind, case) for kind in kinds}

    def table(self):
        return write_pairs(self.folder / "pairs.csv", self.rows, "case,image,label,split,patient")


def test_a_dataset_with_one_fault_of_each_kind(phantoms, tmp_path):
    plant = Plant(tmp_path / "planted", phantoms)
    image, label = plant.image, plant.label
    shifted, mirrored = LAS.copy(), np.diag([-1.0, 1, 1, 1]) @ LAS
    shifted[2, 3] = 3
    plant.add("good")
    plant.add("shape", "shape mismatch", label=label[:, :-2])
    plant.add("grid", "grid mismatch", label_affine=shifted)
    plant.add("order", "orientation mismatch")
    stored = nib.load(plant.folder / "order_label.nii.gz")  # type: ignore[attr-defined]
    nib.save(stored.as_reoriented(ornt_transform(io_orientation(LAS), axcodes2ornt("RPS"))), plant.folder / "order_label.nii.gz")
    plant.add("fraction", "fractional label", label=label + np.float32(0.25) * (label == 6))
    plant.add("value", "unknown label", label=np.where(label == 13, 77, label).astype(np.uint8))
    plant.add("nothing", "empty label", label=label * 0)
    plant.add("unmapped", "empty label", label=np.where(label == 5, label, 0).astype(np.uint8))
    plant.add("flip", "left-right flip", label=label[::-1])
    plant.add("both", "left-right flip", image=image[::-1] + np.int16(40), label=label[::-1])
    plant.add("header", "left-right flip", image_affine=mirrored, label_affine=mirrored)
    plant.add("constant", "constant image", image=image * 0)
    plant.add("constant2", "constant image", image=image * 0)  # and no duplicate
    plant.add("scaled", "intensity", image=(np.clip(image, -125, 275) + np.float32(125)) / 400)
    plant.add("intercept", "intensity", image=image + np.int16(1024))
    plant.add("twin", "duplicate image", image=image.astype(np.float32))  # that of "good"
    plant.add("leak", "duplicate across splits", split="test", image=image + np.int16(1))  # that of "shape"
    plant.add("p1a", patient="p1")
    plant.add("p1b", "patient in two splits", patient="p1", split="test")
    plant.add("split", "bad list", split="validation")
    plant.row("gone", "no_ct.nii.gz", "good_label.nii.gz", "absent file")
    plant.row("good", "good_ct.nii.gz", "good_label.nii.gz", "listed twice")
    plant.expected.add(("class never occurs", ""))
    names = [*SYNAPSE8_NAMES, "unicorn"]
    table = {str(value): names.index(name) + 1 if name in names else 0 for value, name in enumerate(BTCV_NAMES, start=1)}
    (plant.folder / "map.json").write_text(json.dumps({"class_names": names, "map": {**table, "20": 9}}))
    code, kinds, content = verify(plant.table(), "--label_map", plant.folder / "map.json")
    assert code == 1
    assert kinds == plant.expected
    assert len(content["findings"]) == len(kinds)
    for kind, case, words in (
        ("shape mismatch", "shape", "found (10, 72, 80) of the image and (10, 70, 80) of the label"),
        ("grid mismatch", "grid", "up to 3 mm apart"),
        ("orientation mismatch", "order", "image LAS, label RPS"),
        ("fractional label", "fraction", f"found 6.25 and the like in {(label == 6).sum()} voxels"),
        ("unknown label", "value", f"found 77 ({(label == 13).sum()} voxels)"),
        ("empty label", "unmapped", "the values 5, which go to background"),
        ("constant image", "constant", "the value 0 everywhere"),
        ("intensity", "scaled", "found values from 0 to 1; it was scaled already"),
        ("intensity", "intercept", "restore the rescale intercept"),
        ("duplicate image", "twin", "same voxels as good; keep one"),
        ("duplicate across splits", "leak", "same voxels as shape in train, this one is in test"),
        ("patient in two splits", "p1b", "patient p1 is in train (p1a) and in test"),
        ("absent file", "gone", "no_ct.nii.gz: the image is listed"),
        ("class never occurs", "", "unicorn: in none of 20 labels"),
    ):
        assert words in found(content, kind, case)
    entries = {entry["case"]: entry for entry in content["cases"]}
    assert entries["leak"]["findings"] == ["duplicate across splits"]
    assert entries["fraction"]["labels_present"] is None
    assert entries["header"]["orientation"] == "RAS"
    order = ["", *entries]
    places = [order.index(row["case"]) for row in content["findings"]]
    assert places == sorted(places)  # the dataset's own, then case by case as they are listed


def test_of_three_twins_the_one_in_another_split_is_named(phantoms, tmp_path):
    plant = Plant(tmp_path / "twins", phantoms)
    for name, split in (("a", "train"), ("b", "test"), ("c", "train")):
        plant.add(name, image=plant.image, split=split)
    code, kinds, content = verify(plant.table())
    assert (code, kinds) == (1, {("duplicate across splits", "b"), ("duplicate across splits", "c")})
    assert "same voxels as b in test, this one is in train" in found(content, "duplicate across splits", "c")


def test_label_maps_of_rows_and_maps_with_a_default(phantoms, tmp_path):
    folder = tmp_path / "maps"
    clean_pairs(folder, phantoms[:2])
    save(folder / "p1_label.nii.gz", np.where(phantoms[1][1] == 6, 1, 0).astype(np.uint8))
    (folder / "one.json").write_text(json.dumps({"class_names": ["liver"], "map": {"1": 1}}))
    (folder / "six.json").write_text(json.dumps({"class_names": ["liver"], "map": {"6": 1}, "default": 0}))
    rows = ["p0,p0_ct.nii.gz,p0_label.nii.gz,train,six.json", "p1,p1_ct.nii.gz,p1_label.nii.gz,train,"]
    table = write_pairs(folder / "pairs.csv", rows, "case,image,label,split,label_map")
    content = clean(table, "--label_map", folder / "one.json")
    assert [entry["classes_present"] for entry in content["cases"]] == [["liver"], ["liver"]]
    assert [len(entry["labels_present"]) > 5 for entry in content["cases"]] == [True, False]
    assert verify(table)[1] == set()  # the values of the second are then as good as any
    assert ("unknown label", "p0") in verify(clean_pairs(folder, phantoms[:2]), "--label_map", folder / "one.json")[1]


def test_the_majority_of_clear_pairs_tells_left_from_right(tmp_path):
    """Blocks on a grid of 1 mm whose first axis grows to the patient's right (nibabel's R)."""
    places = {"liver": 60, "right kidney": 62, "spleen": 10, "left kidney": 12, "stomach": 80, "aorta": 42, "inferior vena cava": 38}

    def sides(**moved):
        label = np.zeros((100, 4, 4), np.uint8)
        for name, x in {**places, **moved}.items():
            label[x : x + 2] = BTCV_NAMES.index(name) + 1
        image = np.random.default_rng(0).integers(-1000, 1000, label.shape).astype(np.int16)
        save(tmp_path / "sides" / "image.nii.gz", image, np.eye(4))
        save(tmp_path / "sides" / "label.nii.gz", label, np.eye(4))
        table = write_pairs(tmp_path / "sides" / "pairs.csv", ["a,image.nii.gz,label.nii.gz,train"])
        _, kinds, content = verify(table, "--dataset", "BTCV")
        return content["cases"][0]["sides"], {kind for kind, case in kinds if case}

    assert sides() == ({"as expected": 4, "reversed": 2}, set())  # a stomach on the right; vena cava and aorta are too close to count
    assert sides(liver=30, spleen=45) == ({"as expected": 3, "reversed": 3}, set())
    assert sides(spleen=90) == ({"as expected": 2, "reversed": 4}, {"left-right flip"})
    assert sides(stomach=64, spleen=70)[0] == {"as expected": 2, "reversed": 0}


def test_a_folder_of_nnunet_with_faults_of_its_own(phantoms, tmp_path, capsys):
    root = write_nnunet(tmp_path / "Dataset001_Abdomen", phantoms, form="v1")
    for name in ("imagesTs/p3_0000.nii.gz", "labelsTr/p0.nii.gz", "imagesTr/p1_0000.nii.gz"):
        (root / name).unlink()
    save(root / "imagesTr" / "p2_0001.nii.gz", phantoms[2][0])
    save(root / "imagesTr" / "p4_0000.nii.gz", phantoms[3][0])
    save(root / "labelsTr" / "p5.nii.gz", phantoms[3][1])
    shutil.copy(root / "labelsTr" / "p2.nii.gz", root / "labelsTr" / "._p2.nii.gz")  # macOS writes such names
    save(root / "labelsTr" / "p2.nii", phantoms[2][1])
    code, kinds, content = verify(root)
    assert code == 1
    assert kinds == {
        ("absent file", "p0"),
        ("absent file", "p1"),
        ("absent file", "p3"),
        ("missing partner", "p4"),
        ("missing partner", "p5"),
        ("listed twice", "p2"),
        ("several channels", ""),
        ("bad list", ""),
    }
    assert "found the image and no label" in found(content, "missing partner", "p4")
    assert "found the label and no image" in found(content, "missing partner", "p5")
    assert "numTraining says 3 cases, found 5" in found(content, "bad list")
    assert found(content, "absent file", "p0").startswith("labelsTr/p0.nii.gz: the label is listed")
    out = capsys.readouterr().out.splitlines()
    assert out[1].split() == ["finding", "case", "file", "found", "|", "what", "to", "do"]
    assert len(out) == 1 + 1 + len(kinds) + 1
    assert "8 findings: 3 absent file, 1 bad list, 1 listed twice, 2 missing partner, 1 several channels" in out[-1]


BAD_DESCRIPTIONS = {
    "an ignore label": json.dumps(
        {"channel_names": {"0": "CT"}, "labels": {"0": "background", **dict(zip(range(1, 14), BTCV_NAMES, strict=True)), "14": "ignore"}}
    ),
    "no JSON": "{",
    "a list": "[1]",
    "regions": json.dumps({"channel_names": {"0": "CT"}, "labels": {"background": 0, "all": [1, 2]}}),
    "one name twice": json.dumps({"channel_names": {"0": "CT"}, "labels": {"0": "background", "1": "liver", "2": "liver"}}),
    "one value twice": json.dumps({"channel_names": {"0": "CT"}, "labels": {"background": 0, "liver": 1, "spleen": 1}}),
    "only background": json.dumps({"channel_names": {"0": "CT"}, "labels": {"background": 0}}),
}


@pytest.mark.parametrize("way", BAD_DESCRIPTIONS)
def test_a_bad_dataset_json_is_a_finding(way, phantoms, tmp_path):
    root = write_nnunet(tmp_path / "data", phantoms[:2])
    (root / "dataset.json").write_text(BAD_DESCRIPTIONS[way])
    assert verify(root)[:2] == (1, {("bad list", "")} | ({("class never occurs", "")} if "ignore" in way else set()))
    (root / "dataset.json").unlink()
    assert verify(root)[:2] == (1, {("absent file", "")})


def test_names_of_the_decathlon_may_look_like_channels(phantoms, tmp_path):
    root = tmp_path / "data"
    for number, (image, label) in enumerate(phantoms[:2], start=1):
        save(root / "imagesTr" / f"liver_{number:04d}.nii.gz", image)
        save(root / "labelsTr" / f"liver_{number:04d}.nii.gz", label)
    names = {"0": "background", **{str(value): name for value, name in enumerate(BTCV_NAMES, start=1)}}
    (root / "dataset.json").write_text(json.dumps({"modality": {"0": "CT"}, "labels": names, "numTraining": 2}))
    assert [entry["case"] for entry in clean(root)["cases"]] == ["liver_0001", "liver_0002"]


def test_an_nnunet_folder_of_mr_images_is_not_measured_in_hounsfield_units(phantoms, tmp_path):
    root = write_nnunet(tmp_path / "data", [(image + np.int16(1024), label) for image, label in phantoms], channel="T2")
    clean(root)
    assert verify(root, "--image_kind", "ct_window")[1] == {("intensity", f"p{number}") for number in range(4)}


def test_of_several_channels_the_first_is_measured(phantoms, tmp_path):
    root = write_nnunet(tmp_path / "data", [(image + np.int16(1024), label) for image, label in phantoms])
    for channels, expected in (({"1": "PET", "0": "CT"}, {("intensity", f"p{number}") for number in range(4)}), ({"0": "PET", "1": "CT"}, set())):
        description = json.loads((root / "dataset.json").read_text())
        (root / "dataset.json").write_text(json.dumps({**description, "channel_names": channels}))
        assert verify(root)[1] == {("several channels", "")} | expected


def test_raw_btcv_with_faults_of_its_own(tmp_path):
    raw = tmp_path / "raw"
    write_phantoms(raw, (5, 6, 8, 11), shape=SHAPE)  # there is no case 11 in the published split
    (raw / "Training" / "label" / "label0006.nii.gz").unlink()
    shutil.copy(raw / "Training" / "img" / "img0005.nii.gz", raw / "Training" / "img" / "scan.nii.gz")
    (raw / "Training" / "img" / "img0021.nii.gz").mkdir()  # unpacked, and nothing in it
    code, kinds, content = verify(raw)
    unpacked = {("damaged file", "case0021"), ("missing partner", "case0021")}
    assert (code, kinds) == (1, {*unpacked, ("missing partner", "case0006"), ("unexpected file", "case0011"), ("unexpected file", "")})
    assert found(content, "unexpected file").startswith("Training/img/scan.nii.gz")
    assert {entry["case"]: entry["split"] for entry in content["cases"]}["case0011"] is None


# --- prepared folders --------------------------------------------------------------------------------------------------------------------


def edit_slice(path, **changes):
    with np.load(path) as archive:
        entries = dict(archive)
    np.savez(path, **{**entries, **{key: change(entries[key]) for key, change in changes.items()}})


def edit_volume(path, **changes):
    with h5py.File(path, "r+") as file:
        for key, change in changes.items():
            file[key][...] = change(file[key][()])


def test_a_prepared_folder_with_one_fault_of_each_kind(tmp_path):
    raw, root = tmp_path / "raw", tmp_path / "prepared"
    write_phantoms(raw, (5, 6, 7, 9, 10, 21, 23, 24, 26, 27, 1, 2, 3, 4, 8, 22, 25), shape=SHAPE)
    assert synapse.main(["--src_path", str(raw), "--dst_path", str(root), "--num_workers", "1"]) == 0
    clean(root)
    train, test, expected = root / "train_npz", root / "test_vol_h5", set()

    def plant(kind, number):
        expected.add((kind, f"case{number:04d}"))
        return f"case{number:04d}"

    (train / f"{plant('absent file', 5)}_slice004.npz").unlink()
    cut(0.7)(train / f"{plant('damaged file', 6)}_slice003.npz")
    edit_slice(train / f"{plant('intensity', 7)}_slice005.npz", image=lambda image: image * 400 - 125)
    edit_slice(train / f"{plant('unknown label', 9)}_slice005.npz", label=lambda label: np.where(label == label.max(), 9, label))
    edit_slice(train / f"{plant('fractional label', 10)}_slice005.npz", label=lambda label: label / 2)
    for path in train.glob(f"{plant('empty label', 21)}_*.npz"):
        edit_slice(path, label=np.zeros_like)
    edit_slice(train / f"{plant('shape mismatch', 23)}_slice009.npz", image=lambda image: image[1:], label=lambda label: label[1:])
    for path in train.glob(f"{plant('left-right flip', 24)}_*.npz"):
        edit_slice(path, label=lambda label: label[:, ::-1])
    edit_slice(train / f"{plant('damaged file', 26)}_slice001.npz", image=lambda image: image * np.nan)
    with h5py.File(test / f"{plant('duplicate across splits', 1)}.npy.h5", "r+") as file:
        stack = [np.load(train / f"case0024_slice{index:03d}.npz")["image"] for index in range(10)]
        file["image"][...] = np.stack(stack)
    cut(0.5)(test / f"{plant('damaged file', 2)}.npy.h5")
    edit_volume(test / f"{plant('intensity', 3)}.npy.h5", image=lambda image: image * 255)
    edit_volume(test / f"{plant('left-right flip', 4)}.npy.h5", image=lambda image: image[..., ::-1], label=lambda label: label[..., ::-1])
    edit_volume(test / f"{plant('constant image', 8)}.npy.h5", image=np.zeros_like)
    (test / f"{plant('absent file', 22)}.npy.h5").unlink()
    (train / "case0027_slice009.npz").unlink()  # the last one, and no list says so: the manifest does
    expected.add(("absent file", "case0027"))
    lines = (root / "lists" / "train.txt").read_text().split()
    (root / "lists" / "train.txt").write_text("\n".join(line for line in lines if line != "case0027_slice009"))
    manifest = json.loads((root / "manifest.json").read_text())
    manifest["cases"][plant("patient in two splits", 25)]["patient"] = "case0005"
    (root / "manifest.json").write_text(json.dumps(manifest))
    (train / "readme.txt").write_text("what is this?")
    expected.add(("unexpected file", ""))
    code, kinds, content = verify(root)
    assert code == 1
    assert kinds == expected
    assert len(content["findings"]) == len(expected)
    for kind, case, words in (
        ("absent file", "case0005", "list or manifest name slices 004"),
        ("damaged file", "case0006", "train_npz/case0006_slice003.npz: expected image and label, found a damaged file"),
        ("damaged file", "case0026", "NaN"),
        ("damaged file", "case0002", "test_vol_h5/case0002.npy.h5"),
        ("intensity", "case0007", "expected an image scaled to [0, 1]"),
        ("unknown label", "case0009", "expected the label values 0, 1, 2, 3, 4, 5, 6, 7, 8 (manifest.json), found 9"),
        ("duplicate across splits", "case0001", "same voxels as case0024 in train, this one is in test"),
    ):
        assert words in found(content, kind, case)


def test_a_prepared_folder_of_others_with_faults(phantoms, tmp_path):
    """Without manifest the lists say what must be there; a gap between slices is seen even if the list has it too."""
    root = write_transunet(tmp_path / "transunet", phantoms)
    lines = (root / "lists" / "train.txt").read_text().split()
    (root / "train_npz" / "case0000_slice003.npz").unlink()
    (root / "lists" / "train.txt").write_text("\n".join(line for line in lines if line != "case0000_slice003"))
    for path in (root / "train_npz").glob("case0001_*.npz"):
        edit_slice(path, image=np.fliplr, label=np.fliplr)
    code, kinds, content = verify(root)
    assert (code, kinds) == (1, {("missing slice", "case0000"), ("left-right flip", "case0001")})
    assert "BTCV's LAS is assumed" in found(content, "left-right flip", "case0001")
    assert "slices 003 are missing" in found(content, "missing slice", "case0000")
    assert [entry["split"] for entry in content["cases"]] == ["train", "train", "train", "test"]
    (root / "lists" / "train.txt").write_text("case0001_slice000\n")
    assert [entry["split"] for entry in verify(root)[2]["cases"]] == [None, "train", None, "test"]
    (root / "lists" / "train.txt").unlink()
    (root / "lists" / "test_vol.txt").write_text("case0003\ncase0003\n")
    assert verify(root)[1] == kinds | {("bad list", "")}
    (tmp_path / "elsewhere").mkdir()
    shutil.move(root / "lists" / "test_vol.txt", tmp_path / "elsewhere" / "test_vol.txt")
    (tmp_path / "elsewhere" / "test_vol.txt").write_text("case0003\ncase0001\n")
    (tmp_path / "elsewhere" / "train.txt").write_text("\n".join(lines))
    shutil.copy(root / "test_vol_h5" / "case0003.npy.h5", root / "test_vol_h5" / "case0001.npy.h5")
    kinds = {("absent file", "case0000"), ("left-right flip", "case0001"), ("patient in two splits", "case0001"), ("duplicate image", "case0003")}
    assert verify(root, "--list_dir", tmp_path / "elsewhere")[1] == kinds
    (root / "manifest.json").write_text("{")  # then lists are not read, so nothing says that slice 3 must be there
    kinds = (kinds - {("absent file", "case0000")}) | {("missing slice", "case0000"), ("bad list", "")}
    code, found_kinds, content = verify(root, "--list_dir", tmp_path / "elsewhere")
    assert found_kinds == kinds
    assert "manifest.json" in found(content, "bad list")


def test_a_flag_says_the_classes_of_a_prepared_folder(phantoms, tmp_path):
    """Files with eight classes where thirteen are said: five never occur, and the sides come out by the wrong names."""
    root = write_transunet(tmp_path / "transunet", phantoms)
    content = verify(root, "--dataset", "BTCV")[2]
    absent = [row["found"] for row in content["findings"] if row["kind"] == "class never occurs"]
    assert absent == [f"{name}: in none of 4 labels" for name in BTCV_NAMES[8:]]


# --- patients ----------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def visits(phantoms, tmp_path):
    """Four scans P1_a, P1_b, P2_a, P2_b; the second of each patient is a test case."""
    image, label = phantoms[0]
    rows = []
    for number, name in enumerate(("P1_a", "P1_b", "P2_a", "P2_b")):
        save(tmp_path / "visits" / f"{name}.nii.gz", image + np.int16(number))
        rows.append(f"{name},{name}.nii.gz,label.nii.gz,{'test' if name.endswith('b') else 'train'}")
    save(tmp_path / "visits" / "label.nii.gz", label)
    return write_pairs(tmp_path / "visits" / "pairs.csv", rows)


def test_patients_by_regular_expression_and_by_table(visits, tmp_path):
    both = {("patient in two splits", "P1_b"), ("patient in two splits", "P2_b")}
    clean(visits)
    assert verify(visits, "--patient_regex", r"(P\d)_")[:2] == (1, both)
    assert verify(visits, "--patient_regex", r"(P1)_")[1] == {("patient in two splits", "P1_b"), ("no patient", "P2_a"), ("no patient", "P2_b")}
    table = write_pairs(tmp_path / "patients.csv", ["P1_a,anna", "P1_b,bert", "P2_a,carl", "P2_b,carl"], "case,patient")
    code, kinds, content = verify(visits, "--patients", table)
    assert (code, kinds) == (1, {("patient in two splits", "P2_b")})
    assert "patient carl is in train (P2_a) and in test" in found(content, "patient in two splits", "P2_b")
    assert [entry["patient"] for entry in content["cases"]] == ["anna", "bert", "carl", "carl"]
    own = write_pairs(tmp_path / "visits" / "own.csv", [f"{row},anna" for row in visits.read_text().split()[1:]], "case,image,label,split,patient")
    assert verify(own, "--patients", table)[1] == both  # the list's own patient goes first, as in preprocess/nifti.py
    write_pairs(table, ["P1_a ,anna", "P1_b, ", "P2_a,carl", "P2_b,dora"], "case, patient")
    assert verify(visits, "--patients", table)[1] == {("no patient", "P1_b")}


# --- the program -------------------------------------------------------------------------------------------------------------------------


def test_results_do_not_depend_on_the_number_of_processes(phantoms, tmp_path):
    plant = Plant(tmp_path / "planted", phantoms)
    plant.add("b", "left-right flip", label=plant.label[::-1])
    plant.add("a")
    plant.add("c", "duplicate image", image=plant.image)
    table = plant.table()
    command = [sys.executable, REPO / "preprocess" / "verify_dataset.py", table, "--label_map", "btcv13", "--num_workers", "2"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert done.stderr == ""
    assert "2 findings: 1 duplicate image, 1 left-right flip; written to findings.json" in done.stdout
    content = verify(table, "--label_map", "btcv13")[2]
    assert json.loads((tmp_path / "findings.json").read_text()) == content
    assert [entry["case"] for entry in content["cases"]] == ["b", "a", "c"]


WRONG_COMMANDS = {
    "no such folder": (("{tmp}/elsewhere",), "no such file or folder"),
    "nothing known": (("{tmp}/empty",), "expected a dataset, found no imagesTr"),
    "another kind": (("{visits}", "--kind", "nnunet"), "expected a folder"),
    "no such kind": (("{visits}", "--kind", "brats"), "brats"),
    "bad expression": (("{visits}", "--patient_regex", "(P"), "expected a regular expression"),
    "no group": (("{visits}", "--patient_regex", "P1"), "expected one group"),
    "two groups": (("{visits}", "--patient_regex", "(P)(1)"), "found 2"),
    "two ways to patients": (("{visits}", "--patient_regex", "(P)", "--patients", "x.csv"), "not allowed with"),
    "no patients": (("{visits}", "--patients", "{tmp}/none.csv"), "none.csv"),
    "patients without columns": (("{visits}", "--patients", "{visits}"), "expected the columns case, patient"),
    "patients with a short row": (("{visits}", "--patients", "{tmp}/short.csv"), "short.csv, line 2: expected as many cells"),
    "no label map": (("{visits}", "--label_map", "synapse9"), "unknown label map"),
    "two label maps": (("{visits}", "--label_map", "synapse8", "--dataset", "BTCV"), "give one of them"),
    "lists of raw data": (("{visits}", "--list_dir", "{tmp}"), "--list_dir is for prepared datasets"),
    "labels of scans": (("{tmp}/visits", "--label_map", "btcv13"), "leave them out"),
    "window of prepared data": (("{tmp}/prepared", "--image_kind", "ct_window"), "--image_kind is for raw images"),
    "prepared without cases": (("{tmp}/prepared",), "expected at least one case"),
    "no place for results": (("{visits}", "--output", "{tmp}/no/findings.json"), "no such folder"),
    "two datasets": (("{tmp}/two",), "found prepared and nnunet; say which with --kind"),
    "another dataset": (("{tmp}/raw", "--dataset", "FLARE22"), "expected the raw files of FLARE22"),
}


@pytest.mark.parametrize("way", WRONG_COMMANDS)
def test_a_wrong_command_is_one_line_and_leaves_nothing(way, visits, tmp_path, capsys, monkeypatch):
    flags, said = WRONG_COMMANDS[way]
    for folder in ("empty", "prepared/train_npz", "two/train_npz", "two/imagesTr", "raw/Training/img", "raw/Training/label"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "raw" / "Training" / "img" / "img0005.nii.gz").touch()
    write_pairs(tmp_path / "short.csv", ["P1_a"], "case,patient")
    monkeypatch.chdir(tmp_path / "empty")
    assert verify_dataset.main([flag.format(tmp=tmp_path, visits=visits) for flag in flags]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.startswith("error: ")
    assert len(error.splitlines()) == 1
    assert not any((tmp_path / "empty").iterdir())


# --- parts -------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "normal"),
    [
        ("Kidney_R", "right kidney"),
        ("kidney (left)", "left kidney"),
        ("Left Kidney", "left kidney"),
        ("left_adrenal", "left adrenal gland"),
        ("postcava", "inferior vena cava"),
        ("IVC", "inferior vena cava"),
        ("Gall-Bladder", "gallbladder"),
        ("Spleen", "spleen"),
        ("portal vein and splenic vein", "portal vein and splenic vein"),
        ("right lung lower lobe", "right lung lower lobe"),
    ],
)
def test_names_of_organs(name, normal):
    assert normal_name(name) == normal


def test_pairs_of_organs():
    assert side_pairs(["liver", "tumor"]) == []
    assert side_pairs(["liver", "spleen", "aorta", "inferior vena cava"]) == [("liver", "spleen"), ("inferior vena cava", "aorta")]
    assert side_pairs(["right lung", "left lung", "right rib"]) == [("right lung", "left lung")]
    assert len(side_pairs(normal_name(name) for name in BTCV_NAMES)) == 17  # 4 x 4 organs, vena cava and aorta


def test_the_hash_of_voxels_knows_one_scan_in_any_storage():
    rng = np.random.default_rng(0)
    array = rng.integers(-1000, 1000, (4, 5, 6)).astype(np.int16)
    affine = np.eye(4)[[2, 1, 0, 3]] * [[1], [-1], [1], [1]]  # LAS
    scan = Volume(array, affine)
    assert scan.orientation == "LAS"
    same = voxel_hash(scan)
    for code in ("LPS", "RAI", "PSL"):
        assert voxel_hash(reorient(scan, code)) == same
    for dtype in (">f4", np.float64, np.int32):
        assert voxel_hash(Volume(array.astype(dtype), affine)) == same
    other = array.copy()
    other[1, 2, 3] += 1
    assert voxel_hash(Volume(other, affine)) != same
    assert voxel_hash(Volume(np.ascontiguousarray(array[::-1]), affine)) != same
    assert voxel_hash(Volume(array.reshape(4, 6, 5), affine)) != same


@pytest.mark.parametrize(("lowest", "highest", "accepted"), [(-0.5, 1.5, True), (-0.51, 1.0, False), (0.0, 1.51, False)])
def test_what_training_accepts_is_no_finding(lowest, highest, accepted, tmp_path):
    """Cubic down-sampling overshoots [0, 1]."""
    path = tmp_path / "data" / "train_npz" / "case0005_slice000.npz"
    path.parent.mkdir(parents=True)
    (tmp_path / "data" / "lists").mkdir()
    (tmp_path / "data" / "lists" / "train.txt").write_text("case0005_slice000\n")
    np.savez(path, image=np.linspace(lowest, highest, 99, dtype=np.float32).reshape(9, 11), label=np.ones((9, 11), np.float32))
    assert (("intensity", "case0005") not in verify(tmp_path / "data")[1]) == accepted
    if accepted:
        read_slice(path, "case0005_slice000", 8)
    else:
        with pytest.raises(UserError, match="raw HU"):
            read_slice(path, "case0005_slice000", 8)


def test_every_kind_of_finding_is_planted_here():
    source = Path(__file__).read_text()
    assert [kind for kind in KINDS if f'"{kind}"' not in source and f"'{kind}'" not in source] == []
