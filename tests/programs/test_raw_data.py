"""Raw datasets given straight to train.py and test.py: phantoms in the layouts of BTCV, FLARE22, nnU-Net and the Decathlon, up to a score."""

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from safetensors import safe_open

from datasets.labels import BTCV_NAMES, FLARE22_NAMES
from datasets.layout import find_data

ORGANS = ["spleen", "right kidney", "left kidney", "gallbladder", "liver", "stomach", "aorta", "pancreas"]


def card(run):
    with safe_open(run / "final.safetensors", framework="numpy") as file:
        return next(json.loads(value) for value in file.metadata().values() if "training_patients" in value)


def scores_of(results):
    return json.loads((results / "metrics.json").read_text())["cases"]


def snapshot(folder):
    return {path.relative_to(folder).as_posix(): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def scans(raw):
    """(number, image, label) of the phantoms in BTCV's layout."""
    for path in sorted((raw / "Training" / "img").iterdir()):
        number = int(path.name[3:7])
        yield number, nib.load(path), nib.load(raw / "Training" / "label" / f"label{number:04d}.nii.gz")


@pytest.fixture
def work(tmp_path, monkeypatch):
    """An empty working folder; preparing takes no processes of its own."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setattr("preprocess.raw.default_workers", lambda: 1)
    return tmp_path / "work"


@pytest.fixture
def train_and_test(call, from_scratch, work):
    """Trains an epoch on a folder and tests on it; the runs may have seeds of their own."""

    def run(root, *flags, seeds=(1, 2)):
        outcome = call("train", "--root_path", root, "--output", "run", *from_scratch, "--max_epochs", 1, "--seed", seeds[0], *flags)
        assert outcome.code == 0, outcome
        made = snapshot(work / "data")
        argv = ("--checkpoint", "run/final.safetensors", "--data_dir", root, "--output_dir", "results", "--device", "cpu", "--seed", seeds[1], *flags)
        second = call("test", *argv)
        assert second.code == 0, second
        assert snapshot(work / "data") == made  # what training prepared is tested on as it is
        return outcome.out, card(Path("run")), scores_of(Path("results"))

    return run


def test_btcv(train_and_test, raw, prepared, work):
    out, stored, cases = train_and_test(raw)
    assert f"data/{raw.name}" in out
    assert stored["training_patients"] == ["case0005", "case0006", "case0007"]
    assert (stored["class_names"], stored["dataset"]) == (ORGANS, "Synapse")
    assert list(cases) == ["case0008", "case0022"]
    by_script, by_itself = (find_data(folder, "train_npz", "train.txt") for folder in (prepared, work / "data" / raw.name))
    assert by_itself.names == by_script.names
    for name in by_script.names:
        first, second = (np.load(folder.files / f"{name}.npz") for folder in (by_script, by_itself))
        np.testing.assert_array_equal(first["image"], second["image"])
        np.testing.assert_array_equal(first["label"], second["label"])


def test_flare22(train_and_test, raw, tmp_path):
    """BTCV's phantoms with FLARE22's numbers; classes are the organs of the same names."""
    flare = [0, *(FLARE22_NAMES.index(name) + 1 if name in FLARE22_NAMES else 0 for name in BTCV_NAMES)]
    expected = {}
    for (_, image, label), number in zip(scans(raw), (1, 2, 4, 31, 32), strict=True):
        name = f"FLARE22_Tr_{number:04d}"
        organs = np.asanyarray(label.dataobj)
        for folder, file, content in (("images", f"{name}_0000.nii", image.get_fdata()), ("labels", f"{name}.nii", np.array(flare)[organs])):
            (tmp_path / "FLARE22Train" / folder / file).mkdir(parents=True)
            array = content.astype(np.int16 if folder == "images" else np.uint8)
            nib.save(nib.Nifti1Image(array, image.affine), tmp_path / "FLARE22Train" / folder / file / file)
        expected[name] = {organ: int((organs == BTCV_NAMES.index(organ) + 1).sum()) for organ in ORGANS}
    _, stored, cases = train_and_test(tmp_path / "FLARE22Train")
    assert stored["training_patients"] == [f"FLARE22_Tr_{number:04d}" for number in (2, 4, 32)]
    assert (stored["class_names"], stored["dataset"]) == (ORGANS, "FLARE22")
    assert {case: {organ: row["n_ref"] for organ, row in organs.items()} for case, organs in cases.items()} == {
        name: expected[name] for name in ("FLARE22_Tr_0001", "FLARE22_Tr_0031")
    }


@pytest.fixture
def task(raw, tmp_path):
    """Phantoms with two labels, and a function that writes them as `imagesTr` with a dataset.json."""

    def write(name, description, channel):
        root = tmp_path / name
        for folder in ("imagesTr", "labelsTr"):
            (root / folder).mkdir(parents=True)
        (root / "dataset.json").write_text(json.dumps(description))
        for number, image, label in scans(raw):
            organs = np.asanyarray(label.dataobj)
            two = nib.Nifti1Image(((organs == 6) + 2 * (organs == 1)).astype(np.uint8), label.affine)
            nib.save(image, root / "imagesTr" / f"p{number}{channel}.nii.gz")
            nib.save(two, root / "labelsTr" / f"p{number}.nii.gz")
        return root

    return write


V2 = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "liver": 1, "spleen": 2}, "file_ending": ".nii.gz", "numTraining": 5}
MSD = {"modality": {"0": "MRI"}, "labels": {"0": "background", "1": "liver", "2": "spleen"}, "numTraining": 5, "test": ["./imagesTs/p9.nii.gz"]}


@pytest.mark.parametrize(
    ("name", "description", "channel", "kind"), [("Dataset001_Two", V2, "_0000", "ct_window"), ("Task01_Two", MSD, "", "percentile")]
)
def test_a_raw_folder_without_test_labels(train_and_test, task, work, name, description, channel, kind):
    """Both programs draw the same fifth, whatever their seeds, and nothing that was trained on is tested."""
    out, stored, cases = train_and_test(task(name, description, channel), seeds=(3, 4))
    assert "20% of the cases are drawn for testing" in out
    assert ("Medical Segmentation Decathlon" in out) == (name == "Task01_Two")
    assert (stored["class_names"], stored["image_kind"], stored["dataset"]) == (["liver", "spleen"], kind, name)
    assert sorted([*stored["training_patients"], *cases]) == ["p22", "p5", "p6", "p7", "p8"]
    assert len(cases) == 1
    assert (work / "data" / name / "manifest.json").is_file()


def test_the_settings_of_a_run_on_raw_data_can_be_given_again(train_and_test, call, task):
    train_and_test(task("Dataset001_Two", V2, "_0000"), "--prepared", "data/here")
    flags = json.loads(Path("run/config.json").read_text())["flags"]
    assert (flags["prepared"], flags["dataset"]) == ("data/here", None)
    Path("again.json").write_text(json.dumps({name: value for name, value in flags.items() if name not in ("config", "output")}))
    assert call("train", "--config", "again.json", "--output", "again").code == 0


def test_raw_data_of_other_classes_than_the_checkpoints(call, trained, task, work):
    flags = ("--checkpoint", trained / "final.safetensors", "--output_dir", "results", "--device", "cpu")
    call("test", *flags, "--data_dir", task("Dataset001_Two", V2, "_0000")).refused("found liver, spleen", "--label_map")
    assert not Path("results").exists()


@pytest.mark.parametrize("program", ["train", "test"])
def test_flags_that_do_not_fit_the_data(call, program, raw, prepared, trained, from_scratch, work):
    common = ("--output", "run", *from_scratch) if program == "train" else ("--checkpoint", trained / "final.safetensors", "--output_dir", "results")
    root = "--root_path" if program == "train" else "--volume_path"
    for flags, needles in (
        ((root, raw, "--dataset", "FLARE22"), ("--dataset FLARE22", "raw data of BTCV")),
        ((root, prepared, "--prepared", "data/x"), ("--prepared data/x", "leave the flag out")),
        ((root, raw, "--prepared", raw), ("--prepared", "another folder than the raw dataset's")),
        ((root, work), ("found neither", "imagesTr")),
    ):
        call(program, *common, *flags).refused(*needles)
    assert not any(work.iterdir())


def test_a_sam_file_is_missed_before_the_data_are_prepared(call, raw, work):
    call("train", "--root_path", raw, "--output", "run").refused("sam_vit_b_01ec64.pth", "no such file")
    assert not Path("data").exists()


# --- a patient in both lists ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def train(call, data, from_scratch, tmp_path):
    """Trains on the prepared phantoms."""
    return lambda *flags: call("train", "--root_path", data, "--output", tmp_path / "run", *from_scratch, "--max_epochs", 1, *flags)


def test_training_refuses_a_patient_of_the_test_list(train, data, tmp_path):
    manifest = json.loads((data / "manifest.json").read_text())
    manifest["cases"]["case0022"]["patient"] = "case0006"
    (data / "manifest.json").write_text(json.dumps(manifest))
    train().refused(data / "lists" / "test_vol.txt", "1 of the patients are in train.txt too (case0006)", "--allow_overlap")
    assert not (tmp_path / "run").exists()
    assert train("--allow_overlap").code == 0


@pytest.mark.parametrize("root", ["", "train_npz"])
def test_training_refuses_a_case_of_the_test_list_without_a_manifest(train, data, root):
    (data / "manifest.json").unlink()
    (data / "lists" / "test_vol.txt").write_text("case0005.npy.h5\n")
    train("--root_path", data / root).refused("(case0005)", "--allow_overlap")


@pytest.mark.parametrize("content", [None, "", "\n\n"])
def test_training_without_a_test_list(train, data, content):
    path = data / "lists" / "test_vol.txt"
    path.unlink()
    if content is not None:
        path.write_text(content)
    assert train().code == 0


def test_the_test_list_of_another_folder_of_lists(train, data, tmp_path):
    """With --list_dir both lists are that folder's."""
    (tmp_path / "lists").mkdir()
    (data / "lists" / "train.txt").rename(tmp_path / "lists" / "train.txt")
    (data / "lists" / "test_vol.txt").write_text("case0005\n")
    assert train("--list_dir", tmp_path / "lists").code == 0
    (tmp_path / "lists" / "test_vol.txt").write_text("case0006\n")
    train("--list_dir", tmp_path / "lists", "--output", tmp_path / "other").refused(tmp_path / "lists" / "test_vol.txt", "(case0006)")
