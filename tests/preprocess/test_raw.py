"""What a raw folder is taken for, where its prepared form goes, and when it is left alone."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from pgsam.errors import UserError
from preprocess import flare22, nifti, synapse
from preprocess.raw import default_output, find_prepared, open_data, prepare_raw, recognise
from scripts import ablate, generate_reports
from tests.raw_datasets import V2, change, make_decathlon, make_nnunet, write_btcv, write_flare


@pytest.fixture(autouse=True)
def _in_an_empty_folder_and_one_process(tmp_path, monkeypatch):
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setattr("preprocess.raw.default_workers", lambda: 1)  # a process takes longer to start than these volumes to be made


def snapshot(folder):
    return {path.relative_to(folder).as_posix(): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def contents(folder):
    """Arrays and texts of a prepared folder by file."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix == ".npz":
            with np.load(path) as file:
                found[path.name] = (file["image"].tobytes(), file["label"].tobytes())
        elif path.suffix in (".txt", ".json"):
            found[path.name] = json.loads(path.read_text()) if path.suffix == ".json" else path.read_text()
    return found


def btcv(folder):
    write_btcv(folder, (5, 8, 35))


def flare(folder):
    write_flare(folder, (1, 2, 4))


def nnunet(folder):
    make_nnunet(folder, train=3, test=1)


def decathlon(folder):
    make_decathlon(folder, train=5)


RAW = {
    "BTCV": (btcv, synapse, ("--src_path", "--dst_path"), "Synapse"),
    "FLARE22": (flare, flare22, ("--src_path", "--dst_path"), "FLARE22"),
    "nnU-Net": (nnunet, nifti, ("--nnunet", "--output"), "raw"),
    "Decathlon": (decathlon, nifti, ("--nnunet", "--output"), "raw"),
}


@pytest.mark.parametrize("kind", RAW)
def test_a_raw_folder_is_prepared_as_by_its_script(tmp_path, kind, capsys):
    make, script, flags, dataset = RAW[kind]
    make(tmp_path / "raw")
    assert script.main([flags[0], str(tmp_path / "raw"), flags[1], str(tmp_path / "by_script"), "--num_workers", "1"]) == 0
    capsys.readouterr()
    manifest = prepare_raw(tmp_path / "raw", None, tmp_path / "by_itself", num_workers=1)
    assert manifest["dataset"] == dataset
    assert str(tmp_path / "by_itself") in capsys.readouterr().out
    expected = contents(tmp_path / "by_script")
    assert contents(tmp_path / "by_itself") == expected
    assert len(expected) > 4


@pytest.mark.parametrize("kind", RAW)
def test_the_second_time_nothing_is_made(tmp_path, kind, monkeypatch):
    RAW[kind][0](tmp_path / "raw")
    first = open_data(tmp_path / "raw", "train")
    assert first.files == Path("data/raw/train_npz")
    before = snapshot(Path("data/raw"))
    monkeypatch.setattr("preprocess.common.process_case", lambda *_: pytest.fail("a case was made again"))
    assert open_data(tmp_path / "raw", "train") == first
    test = open_data(tmp_path / "raw", "test")
    assert snapshot(Path("data/raw")) == before
    assert test.files == Path("data/raw/test_vol_h5")
    assert not set(first.patients()) & set(test.patients())


@pytest.mark.parametrize("kind", RAW)
def test_programs_for_prepared_data_refuse_a_raw_folder_by_its_name(tmp_path, kind, capsys):
    RAW[kind][0](tmp_path / "raw")
    named = f"{tmp_path / 'raw'}: expected a prepared folder, found raw data of {'nnU-Net' if kind == 'Decathlon' else kind}"
    for split in ("train", "test"):
        with pytest.raises(UserError) as raised:
            find_prepared(tmp_path / "raw", split)
        assert str(raised.value).startswith(named)
    reports = ["--output", "o.jsonl", "--base_url", "http://127.0.0.1:1/v1", "--model", "m"]
    for program, flags in (
        (ablate, ["--root_path", "raw", "--output", "out"]),
        (generate_reports, ["--root_path", "raw", *reports]),
        (generate_reports, ["--volume_path", "raw", *reports]),
    ):
        assert program.main([str(tmp_path / flag) if flag == "raw" else flag for flag in flags]) == 2
        assert named in capsys.readouterr().err
    assert not any(Path().iterdir())
    prepared = open_data(tmp_path / "raw", "train", prepared=tmp_path / "prepared")
    assert find_prepared(tmp_path / "prepared", "train") == prepared
    (tmp_path / "prepared" / "lists" / "train.txt").unlink()
    with pytest.raises(UserError, match=r"train\.txt: expected a list in"):
        find_prepared(tmp_path / "prepared", "train")


def test_an_interrupted_preparation_is_taken_up(tmp_path):
    nnunet(tmp_path / "raw")
    label = tmp_path / "raw" / "labelsTr" / "Tr_002.nii.gz"
    whole = label.read_bytes()
    label.write_bytes(whole[:-9])
    with pytest.raises(UserError, match="Tr_002"):
        prepare_raw(tmp_path / "raw", None, Path("out"), num_workers=1)
    before = snapshot(Path("out"))
    label.write_bytes(whole)
    prepare_raw(tmp_path / "raw", None, Path("out"), num_workers=1)
    after = snapshot(Path("out"))
    assert any(name.endswith("Tr_000_slice000.npz") for name in before)
    assert all(after[name] == time for name, time in before.items() if name.endswith(".npz"))


def test_the_datasets_of_one_raw_folder(tmp_path):
    btcv(tmp_path / "raw")
    for dataset, tests in (("Synapse", ["case0008", "case0035"]), ("Synapse_12", ["case0035"])):
        folder = open_data(tmp_path / "raw", "test", dataset=dataset, prepared=tmp_path / dataset)
        assert sorted(folder.names) == tests
        assert len(folder.manifest["class_names"]) == {"Synapse": 8, "Synapse_12": 12}[dataset]
    with pytest.raises(UserError, match=r"prepared otherwise \(manifest.json: dataset Synapse_12\); .*--prepared"):
        open_data(tmp_path / "raw", "test", dataset="BTCV", prepared=tmp_path / "Synapse_12")


OTHERWISE = {
    "window": (("--window", "0", "300"), "window [0.0, 300.0]"),
    "image kind": (("--image_kind", "percentile"), "image_kind percentile"),
    "label map": (("--label_map", "other.json"), "label_map other.json"),
    "split": (("--test_fraction", "0.6"), "for testing"),
    "orientation": (("--orientation", "RAS"), "orientation RAS"),
}


@pytest.mark.parametrize("way", OTHERWISE)
def test_what_was_prepared_otherwise_is_not_undone(tmp_path, way):
    flags, said = OTHERWISE[way]
    make_nnunet(tmp_path / "raw", train=5)
    Path("other.json").write_text(json.dumps({"class_names": ["a", "b"], "map": {"1": 1, "2": 2}}))
    assert nifti.main(["--nnunet", str(tmp_path / "raw"), "--output", "data/raw", "--num_workers", "1", *flags]) == 0
    before = snapshot(Path("data/raw"))
    with pytest.raises(UserError) as error:
        open_data(tmp_path / "raw", "train")
    assert said in str(error.value)
    assert snapshot(Path("data/raw")) == before


def test_where_the_prepared_form_goes(tmp_path, monkeypatch):
    raw = tmp_path / "work" / "data" / "raw"  # raw data where prepared data would go
    nnunet(raw)
    assert default_output(raw) == Path("data/raw_prepared")
    assert open_data("data/raw", "train").files == Path("data/raw_prepared/train_npz")
    assert not (raw / "train_npz").exists()
    for same in ("data/raw", raw, "data/../data/raw/"):
        with pytest.raises(UserError, match="expected another folder than the raw dataset's"):
            open_data("data/raw", "train", prepared=same)
    assert open_data(raw, "train", prepared=tmp_path / "elsewhere").files == tmp_path / "elsewhere" / "train_npz"
    monkeypatch.chdir(raw)
    assert default_output(Path(".")) == Path("data/raw")


def test_a_prepared_folder_is_taken_as_it_is(tmp_path, capsys):
    btcv(tmp_path / "raw")
    prepare_raw(tmp_path / "raw", None, Path("out"), num_workers=1)
    before, _ = snapshot(Path("out")), capsys.readouterr()
    for root in ("out", "out/train_npz"):
        assert open_data(root, "train").files == Path("out/train_npz")
    shutil.copytree(tmp_path / "raw", Path("out") / "sources")  # below a prepared folder anything may lie
    assert open_data("out", "test").files == Path("out/test_vol_h5")
    shutil.rmtree(Path("out") / "sources")
    assert (snapshot(Path("out")), capsys.readouterr().out) == (before, "")
    with pytest.raises(UserError, match="out is no raw dataset"):
        open_data("out", "train", prepared="elsewhere")


# --- refused ------------------------------------------------------------------------------------------------------------------------------


def test_neither_raw_nor_prepared(tmp_path):
    """The words of a folder that does not exist are those of `find_data`; of one that does, they say what was looked for."""
    with pytest.raises(UserError, match=r"nowhere: expected a prepared folder \(with train_npz/\).*found no folder"):
        open_data(tmp_path / "nowhere", "train")
    (tmp_path / "folder").mkdir()
    for inside in (None, "Dataset001_A"):
        if inside:
            make_nnunet(tmp_path / "folder" / inside, train=1)
        with pytest.raises(UserError) as error:
            open_data(tmp_path / "folder", "train")
        for needle in (
            "Training/img/img0001.nii.gz",
            "images/FLARE22_Tr_0001_0000.nii.gz",
            "dataset.json, imagesTr, labelsTr",
            "train_npz/",
            "neither",
        ):
            assert needle in str(error.value)
    assert "Dataset001_A in it: name that folder" in str(error.value)
    with pytest.raises(UserError, match="expected a raw dataset"):
        prepare_raw(tmp_path / "nowhere", None, Path("out"))


@pytest.mark.parametrize(
    ("makers", "said"),
    [
        ((btcv, nnunet), "raw data of BTCV and raw data of nnU-Net"),
        ((flare, btcv), "raw data of BTCV and raw data of FLARE22"),
        ((nnunet,), "raw data of nnU-Net and prepared data (train_npz)"),
        ((btcv,), "raw data of BTCV and prepared data (train_npz)"),
    ],
)
def test_both(tmp_path, makers, said):
    for number, make in enumerate(makers):
        make(tmp_path / f"part{number}")
        shutil.copytree(tmp_path / f"part{number}", tmp_path / "both", dirs_exist_ok=True)
    if len(makers) == 1:
        (tmp_path / "both" / "train_npz").mkdir()
    with pytest.raises(UserError) as error:
        recognise(tmp_path / "both")
    assert said in str(error.value)


def test_two_raw_datasets_below(tmp_path):
    btcv(tmp_path / "all" / "a")
    flare(tmp_path / "all" / "b")
    with pytest.raises(UserError, match="raw data of BTCV and raw data of FLARE22"):
        recognise(tmp_path / "all")


@pytest.mark.parametrize(
    ("make", "dataset", "said"),
    [
        (btcv, "FLARE22", "--dataset FLARE22: .* holds raw data of BTCV; give one of Synapse, Synapse_12, BTCV"),
        (flare, "Synapse", "--dataset Synapse: .* holds raw data of FLARE22; give one of FLARE22, FLARE"),
        (nnunet, "Synapse", "--dataset Synapse: .* has nnU-Net's layout, whose dataset.json names the classes"),
    ],
)
def test_a_dataset_that_the_files_are_not(tmp_path, make, dataset, said):
    make(tmp_path / "raw")
    with pytest.raises(UserError, match=said):
        open_data(tmp_path / "raw", "train", dataset=dataset)
    assert not Path("data").exists()


@pytest.mark.parametrize(("numbers", "split", "said"), [((5, 6), "test", "cases for testing"), ((8,), "train", "cases for training")])
def test_no_case_of_the_split_is_said_before_any_work(tmp_path, numbers, split, said):
    write_btcv(tmp_path / "raw", numbers)
    with pytest.raises(UserError, match=f"expected {said} in the split of Synapse, found none"):
        open_data(tmp_path / "raw", split)
    assert not Path("data").exists()


def test_a_folder_called_as_a_published_dataset(tmp_path):
    """An nnU-Net folder named BTCV is nnU-Net's all the same."""
    make_nnunet(tmp_path / "BTCV", V2, train=3)
    assert open_data(tmp_path / "BTCV", "train").manifest["class_names"] == ["liver", "tumour"]
    change(tmp_path / "BTCV", channel_names={"0": "a", "1": "b"})
    with pytest.raises(UserError, match="expected one channel"):
        open_data(tmp_path / "BTCV", "train")
