"""nnU-Net's raw folders and the Medical Segmentation Decathlon's: what is recognised, who is tested, what is refused."""

import json
import random
from pathlib import Path

import h5py
import numpy as np
import pytest

from pgsam.errors import UserError
from preprocess import nifti
from preprocess.common import check_cases
from preprocess.nnunet import read_nnunet, split_cases
from tests.raw_datasets import SHAPE, V1, V2, change, make_decathlon, make_nnunet, pair, save


def run(*flags):
    return nifti.main([str(flag) for flag in (*flags, "--num_workers", "1")])


def manifest_of(output):
    return json.loads((output / "manifest.json").read_text())


def training_labels(output, case):
    return np.stack([np.load(path)["label"] for path in sorted((output / "train_npz").glob(f"{case}_slice*.npz"))])


def refused(capsys, message, *flags):
    """The one line of an error that contains `message`; nothing was written."""
    output = Path(flags[flags.index("--output") + 1])
    assert run(*flags) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not output.exists()


# --- what is recognised -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("description", [V2, V1])
def test_a_folder_with_test_labels(description, tmp_path):
    root = make_nnunet(tmp_path / "Dataset001_Liver", description, train=2, test=1)
    assert run("--nnunet", root, "--output", tmp_path / "out") == 0
    manifest = manifest_of(tmp_path / "out")
    assert (manifest["class_names"], manifest["dataset"]) == (["liver", "tumour"], "Dataset001_Liver")
    assert {name: entry["split"] for name, entry in manifest["cases"].items()} == {"Tr_000": "train", "Tr_001": "train", "Ts_000": "test"}
    assert manifest["cases"]["Ts_000"]["label"] == "labelsTs/Ts_000.nii.gz"
    np.testing.assert_array_equal(training_labels(tmp_path / "out", "Tr_001"), pair(1)[1].transpose(2, 1, 0))
    with h5py.File(tmp_path / "out" / "test_vol_h5" / "Ts_000.npy.h5") as file:
        np.testing.assert_array_equal(file["label"], pair(0)[1].transpose(2, 1, 0))


def test_the_decathlon(tmp_path, capsys):
    root = make_decathlon(tmp_path / "Task03_Liver")
    (root / "imagesTr" / "preview.png").write_bytes(b"no case: these datasets are NIfTI")
    assert run("--nnunet", root, "--output", tmp_path / "out", "--test_fraction", 0) == 0
    (line, *_) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"{root}: Medical Segmentation Decathlon (names without _0000), 3 labelled cases in imagesTr, no labelsTs; channel CT")
    assert "imagesTs has no labels and is not used" in line
    assert "numTraining" not in line
    manifest = manifest_of(tmp_path / "out")
    assert list(manifest["cases"]) == ["liver_0", "liver_1", "liver_2"]
    assert manifest["class_names"] == ["liver", "tumour"]
    np.testing.assert_array_equal(training_labels(tmp_path / "out", "liver_2"), pair(2)[1].transpose(2, 1, 0))


@pytest.mark.parametrize(
    ("description", "said"),
    [(V2, "nnU-Net raw data, version 2, 2 labelled"), (V1, "nnU-Net raw data, version 1, 2 labelled"), (V2, "numTraining in dataset.json says 6")],
)
def test_it_is_said_what_was_recognised(tmp_path, description, said):
    assert said in read_nnunet(make_nnunet(tmp_path / "d", description, train=2)).explain()


def test_names_with_four_digits_are_not_channels_where_the_labels_have_them_too(tmp_path):
    root = make_nnunet(tmp_path / "d", V1, train=2, channel="", names="scan_{number:04d}")
    assert list(read_nnunet(root).train) == ["scan_0000", "scan_0001"]


@pytest.mark.parametrize("ending", [".nrrd", ".mha", ".nii", ".NRRD"])
def test_other_file_endings(tmp_path, ending):
    root = make_nnunet(tmp_path / "d", V2 | {"file_ending": ending}, train=2, ending=ending.lower())
    (root / "imagesTr" / "Tr_000_0000.png").write_bytes(b"a preview, of another ending")
    assert run("--nnunet", root, "--output", tmp_path / "out", "--test_fraction", 0) == 0
    np.testing.assert_array_equal(training_labels(tmp_path / "out", "Tr_001"), pair(1)[1].transpose(2, 1, 0))


def test_grey_pictures_and_pictures_in_colour(tmp_path, capsys):
    from PIL import Image

    rng = np.random.default_rng(0)
    root = tmp_path / "grey"
    for folder in ("imagesTr", "labelsTr"):
        (root / folder).mkdir(parents=True)
    (root / "dataset.json").write_text(json.dumps(V2 | {"channel_names": {"0": "grey"}, "file_ending": ".png"}))
    label = rng.integers(0, 3, (9, 12)).astype(np.uint8)
    Image.fromarray(rng.integers(0, 256, (9, 12)).astype(np.uint8)).save(root / "imagesTr" / "a_0000.png")
    Image.fromarray(label).save(root / "labelsTr" / "a.png")
    assert run("--nnunet", root, "--output", tmp_path / "out", "--test_fraction", 0, "--orientation", "LPS") == 0
    np.testing.assert_array_equal(training_labels(tmp_path / "out", "a")[0], label)
    Image.fromarray(rng.integers(0, 256, (9, 12, 3)).astype(np.uint8)).save(root / "imagesTr" / "a_0000.png")
    assert run("--nnunet", root, "--output", tmp_path / "out", "--test_fraction", 0) == 2
    assert "case a: " in capsys.readouterr().err
    change(root, channel_names={"0": "R", "1": "G", "2": "B"})
    refused(capsys, "pictures in colour, which are not prepared yet", "--nnunet", root, "--output", tmp_path / "no")


@pytest.mark.parametrize(
    ("channel", "kind"), [("CT", "ct_window"), ("ct", "ct_window"), ("MRI", "percentile"), ("T2", "percentile"), ("noNorm", "percentile")]
)
def test_the_channels_name_says_how_images_are_scaled(tmp_path, capsys, channel, kind):
    """nnU-Net's convention: CT, whatever its capitals, else image by image."""
    root = make_nnunet(tmp_path / "d", V2 | {"channel_names": {"0": channel}}, train=2)
    for flags, expected in (((), kind), (("--image_kind", "percentile"), "percentile"), (("--image_kind", "ct_window"), "ct_window")):
        assert run("--nnunet", root, "--output", tmp_path / "out", "--test_fraction", 0, *flags) == 0
        manifest = manifest_of(tmp_path / "out")
        assert manifest["image_kind"] == expected
        assert manifest["window"] == ([-125, 275] if expected == "ct_window" else None)
    assert ("Hounsfield" if kind == "ct_window" else "image by image") in capsys.readouterr().out


def test_a_window_for_images_that_have_none(tmp_path, capsys):
    root = make_nnunet(tmp_path / "d", V2 | {"channel_names": {"0": "MRI"}}, train=2)
    flags = ("--nnunet", root, "--output", tmp_path / "out", "--window", 0, 500)
    refused(capsys, "has the channel MRI, which is scaled image by image; leave it out, or give --image_kind ct_window", *flags)
    assert run(*flags, "--image_kind", "ct_window") == 0
    assert manifest_of(tmp_path / "out")["window"] == [0, 500]


# --- several channels ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("description", "needles"),
    [
        (V2 | {"channel_names": {"0": "T1", "1": "T2"}}, ("found 2 (T1, T2)", "NAME_0001 for T2", "--pairs")),
        (
            V1 | {"modality": {"0": "FLAIR", "1": "T1w", "2": "t1gd", "3": "T2w"}},
            ("found 4 (FLAIR, T1w, t1gd, T2w)", "image.slicer[..., 3]", "--pairs"),
        ),
    ],
)
def test_several_channels_are_a_question(tmp_path, description, needles):
    with pytest.raises(UserError, match="choose the channel that shows") as error:
        read_nnunet(make_nnunet(tmp_path / "d", description, train=1))
    for needle in needles:
        assert needle in str(error.value)


def test_a_file_with_several_channels_in_it(tmp_path, capsys):
    """dataset.json says one, the file is 4-D."""
    root = make_decathlon(tmp_path / "d", train=1)
    save(np.zeros((*SHAPE, 2), np.int16), root / "imagesTr" / "liver_0.nii.gz")
    assert run("--nnunet", root, "--output", tmp_path / "out", "--test_fraction", 0) == 2
    error = capsys.readouterr().err
    assert str(root / "imagesTr" / "liver_0.nii.gz") in error
    assert "save one frame or channel as a file of its own" in error


# --- splits ---------------------------------------------------------------------------------------------------------------------------------


def held_out(*roots, patient_of=None, **rule):
    cases = split_cases([read_nnunet(root) for root in roots], patient_of=patient_of, **rule)
    check_cases(cases)
    return [case.name for case in cases if case.split == "test"]


def test_splits_by_name_and_by_seed(tmp_path):
    root = make_nnunet(tmp_path / "data")
    (tmp_path / "tests.txt").write_text("\ufeffTr_004\r\n\nTr_001\n", encoding="utf-8")  # as Windows editors write
    assert held_out(root, test_cases=tmp_path / "tests.txt") == ["Tr_001", "Tr_004"]
    draws = {seed: held_out(root, test_fraction=0.3, seed=seed) for seed in range(20)}
    assert all(len(draw) == 2 for draw in draws.values())
    assert len(set(map(tuple, draws.values()))) > 5
    for seed, draw in draws.items():  # the same in every process, whatever order sets have there
        order = [f"Tr_{number:03d}" for number in range(6)]
        random.Random(seed).shuffle(order)
        assert draw == sorted(order[:2])
    assert held_out(root, test_fraction=0.0) == []
    assert len(held_out(root, test_fraction=0.01)) == 1
    assert len(held_out(root, test_fraction=0.99)) == 5
    assert held_out(root) == held_out(root, test_fraction=0.2)
    assert len(held_out(root)) == 1


def test_bad_splits(tmp_path):
    root = make_nnunet(tmp_path / "data")
    tests = tmp_path / "tests.txt"
    for content, rule, message in (
        ("", {"test_fraction": 1.0}, "below 1"),
        (None, {"test_cases": tmp_path / "no.txt"}, "no such file"),
        ("Tr_004\nTr_104\n", {"test_cases": tests}, "found Tr_104"),
        ("\n", {"test_cases": tests}, "found none"),
        ("Tr_001", {"test_cases": tests, "test_fraction": 0.1}, "give one of the two"),
    ):
        tests.write_text(content or "")
        with pytest.raises(UserError, match=message):
            held_out(root, **rule)
    tests.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="no UTF-8"):
        held_out(root, test_cases=tests)
    with_tests = make_nnunet(tmp_path / "with_tests", test=1)
    tests.write_text("Tr_001")
    for rule in ({"test_cases": tests}, {"test_fraction": 0.5}):
        with pytest.raises(UserError, match="labelsTs names the test cases"):
            held_out(with_tests, **rule)


def test_all_scans_of_a_patient_are_in_one_split(tmp_path, capsys):
    """P0_0, P0_1, P1_2, P1_3, P2_4, P2_5: a third of the patients is two cases."""
    root = make_nnunet(tmp_path / "data", names="X")
    for folder, channel in (("imagesTr", "_0000"), ("labelsTr", "")):
        (root / folder / f"X{channel}.nii.gz").unlink()
        for number in range(6):
            save(pair(number)[channel == ""], root / folder / f"P{number // 2}_{number}{channel}.nii.gz")
    draws = [held_out(root, patient_of=lambda case: case[:2], test_fraction=0.34, seed=seed) for seed in range(12)]
    assert {tuple(draw) for draw in draws} == {("P0_0", "P0_1"), ("P1_2", "P1_3"), ("P2_4", "P2_5")}
    flags = ("--nnunet", root, "--output", tmp_path / "out", "--patient_regex", "^(P[0-9])_", "--test_fraction", 0.34, "--seed", 7)
    assert run(*flags) == 0
    cases = manifest_of(tmp_path / "out")["cases"]
    assert [name for name, entry in cases.items() if entry["split"] == "test"] == draws[7]
    assert {name: entry["patient"] for name, entry in cases.items()} == {name: name[:2] for name in cases}
    (tmp_path / "tests.txt").write_text("P0_0\n")
    flags = ("--nnunet", root, "--output", tmp_path / "no", "--patient_regex", "^(P[0-9])_", "--test_cases", tmp_path / "tests.txt")
    refused(capsys, "patient P0 is in training and test", *flags)
    refused(capsys, "--seed is for the draw", *flags, "--seed", 1)


# --- several folders ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def two(tmp_path):
    """Two folders whose cases have the same names; liver is 1 in one and 2 in the other, which has a labelsTs."""
    other = {"background": 0, "tumour": 1, "liver": 2}
    return make_nnunet(tmp_path / "A", train=5), make_nnunet(tmp_path / "B", V2 | {"labels": other}, train=2, test=1)


def test_datasets_with_different_labels_become_one_task(two, tmp_path, capsys):
    maps = []
    for name, table in (("a", {"1": 1, "2": 2}), ("b", {"2": 1, "1": 2})):
        maps.append(tmp_path / f"{name}.json")
        maps[-1].write_text(json.dumps({"class_names": ["liver", "tumour"], "map": table}))
    assert run("--nnunet", *two, "--output", tmp_path / "out", "--label_map", *maps) == 0
    assert len([line for line in capsys.readouterr().out.splitlines() if "nnU-Net raw data" in line]) == 2
    manifest = manifest_of(tmp_path / "out")
    assert set(manifest["cases"]) == {*(f"A_Tr_{i:03d}" for i in range(5)), "B_Tr_000", "B_Tr_001", "B_Ts_000"}
    assert [entry["split"] for name, entry in manifest["cases"].items() if name[0] == "B"] == ["train", "train", "test"]
    assert [entry["split"] for name, entry in manifest["cases"].items() if name[0] == "A"].count("test") == 1
    assert (manifest["dataset"], manifest["label_map"]) == ("A, B", "a.json, b.json")
    stored = pair(1)[1].transpose(2, 1, 0)
    train = next(name for name in ("A_Tr_001", "A_Tr_002") if manifest["cases"][name]["split"] == "train")
    np.testing.assert_array_equal(training_labels(tmp_path / "out", train), pair(int(train[-1]))[1].transpose(2, 1, 0))
    np.testing.assert_array_equal(training_labels(tmp_path / "out", "B_Tr_001"), np.array([0, 2, 1])[stored])
    assert manifest["cases"]["B_Tr_001"]["image"] == "B/imagesTr/Tr_001_0000.nii.gz"


def test_one_map_for_all_folders(two, tmp_path):
    (tmp_path / "m.json").write_text(json.dumps({"class_names": ["one", "two"], "map": {"1": 1, "2": 2}}))
    assert run("--nnunet", *two, "--output", tmp_path / "out", "--label_map", tmp_path / "m.json") == 0
    np.testing.assert_array_equal(training_labels(tmp_path / "out", "B_Tr_001"), pair(1)[1].transpose(2, 1, 0))


def test_folders_that_are_not_one_task(two, tmp_path, capsys):
    flags = ("--nnunet", *two, "--output", tmp_path / "out")
    refused(capsys, "found class 1 to be tumour in 'B/dataset.json' and liver in 'A/dataset.json'", *flags)
    refused(capsys, "--label_map: expected 1 or 2, one for all or one for each folder of --nnunet, found 3", *flags, "--label_map", "a", "b", "c")
    change(two[1], channel_names={"0": "MRI"})
    refused(capsys, "A has the channel CT, B MRI; choose with --image_kind", *flags)
    same = make_nnunet(tmp_path / "again" / "A", train=1)
    refused(capsys, "expected folders of different names", "--nnunet", two[0], same, "--output", tmp_path / "out")


def test_a_patient_in_two_folders_is_in_one_split(two, tmp_path):
    """B's labelsTs holds the patient 000, so A's scan of that patient is tested too, whatever is drawn."""

    def patient_of(case):
        return case.rpartition("_")[2]

    change(two[1], labels=V2["labels"])
    for path in (two[1] / "labelsTr").iterdir():  # B trains on 001 and 002
        number = int(path.name[3:6]) + 1
        path.rename(path.with_name(f"new_{number:03d}.nii.gz"))
        (two[1] / "imagesTr" / f"Tr_{number - 1:03d}_0000.nii.gz").rename(two[1] / "imagesTr" / f"new_{number:03d}_0000.nii.gz")
    for seed in range(6):
        tests = held_out(*two, patient_of=patient_of, test_fraction=0.5, seed=seed)
        assert {"A_Tr_000", "B_Ts_000"} <= set(tests)
        assert not {"A_Tr_001", "A_Tr_002"} & set(tests)
        assert len(tests) == 3


# --- refused ------------------------------------------------------------------------------------------------------------------------------

BAD = {
    "regions": ({**V2, "labels": {"background": 0, "whole": [1, 2], "core": 2}}, "no regions"),
    "ignore": ({**V2, "labels": {"background": 0, "liver": 1, "ignore": 2}}, "ignore"),
    "gap": ({**V2, "labels": {"background": 0, "liver": 1, "tumour": 3}}, "without a gap"),
    "twice": ({**V2, "labels": {"background": 0, "liver": 1, "tumour": 1}}, "without a gap"),
    "only background": ({**V2, "labels": {"background": 0}}, "without a gap"),
    "no labels": ({"channel_names": {"0": "CT"}}, "expected labels as"),
    "no channels": ({"labels": V2["labels"]}, "expected channel_names"),
    "empty channels": ({**V2, "channel_names": {}}, "expected channel_names"),
    "unknown ending": ({**V2, "file_ending": ".exr"}, "file_ending, found '.exr'"),
    "ending is no text": ({**V2, "file_ending": 3}, "file_ending, found 3"),
    "a list": ([1], "JSON object"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_descriptions(kind, tmp_path):
    description, message = BAD[kind]
    root = make_nnunet(tmp_path / "data", description, train=1)
    with pytest.raises(UserError, match=message) as caught:
        read_nnunet(root)
    assert "dataset.json" in str(caught.value)


def test_a_label_map_makes_label_numbers_free(tmp_path):
    """Gaps and odd names matter only where the labels are taken as they are."""
    root = make_nnunet(tmp_path / "data", {**V2, "labels": {"background": 0, "liver": 1, "tumour": 7}})
    with pytest.raises(UserError, match="--label_map"):
        read_nnunet(root)
    folder = read_nnunet(root, own_labels=False)
    assert (len(folder.train), folder.label_map) == (6, None)


def test_bad_folders(tmp_path):
    def expect(message):
        with pytest.raises(UserError, match=message):
            read_nnunet(root)

    root = make_nnunet(tmp_path / "raw" / "data", train=2)
    images, labels = root / "imagesTr", root / "labelsTr"
    (labels / "Tr_001.nii.gz").rename(labels / "Tr_002.nii.gz")
    expect(r"alone: Tr_001, Tr_002")
    (labels / "Tr_002.nii.gz").rename(labels / "Tr_001.nii.gz")
    (images / "Tr_001_0000.nii.gz").rename(images / "Tr_001.nii.gz")
    expect(r"alone: Tr_000, Tr_000_0000")
    (images / "Tr_001.nii.gz").rename(images / "Tr_000_0001.nii.gz")
    expect("expected one channel, named NAME_0000")
    (images / "Tr_000_0001.nii.gz").unlink()
    (labels / "Tr_001.nii.gz").unlink()
    change(root, file_ending=".nrrd")
    expect(r"found nothing that ends in \.nrrd")
    change(root, file_ending=None, channel_names=None, modality={"0": "CT"})
    (images / "Tr_000_0000.nii").write_bytes((images / "Tr_000_0000.nii.gz").read_bytes())
    expect("are one case; keep one")
    (images / "Tr_000_0000.nii").unlink()
    assert list(read_nnunet(root).train) == ["Tr_000"]
    labels.rename(root / "labels")
    expect("labelsTr: no such folder")
    (root / "dataset.json").write_text("{")
    expect("expected JSON")
    (root / "dataset.json").unlink()
    expect("no such file")


def test_the_folder_above_names_the_datasets_in_it(tmp_path):
    for name in ("Dataset001_A", "Dataset002_B"):
        make_nnunet(tmp_path / name, train=1)
    with pytest.raises(UserError, match=r"Dataset001_A, Dataset002_B in it are some: name them"):
        read_nnunet(tmp_path)


def test_labels_that_dataset_json_does_not_name(tmp_path, capsys):
    root = make_nnunet(tmp_path / "data", train=2)
    save(np.full(SHAPE, 3, np.uint8), root / "labelsTr" / "Tr_001.nii.gz")
    assert run("--nnunet", root, "--output", tmp_path / "out", "--test_fraction", 0) == 2
    assert "Tr_001.nii.gz: unexpected label value 3" in capsys.readouterr().err
