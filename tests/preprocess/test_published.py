"""The published splits and layouts against what was published (specs/samed_rag_adapter.md, sections 4 and 5.3), on tiny volumes."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

from preprocess import flare22, synapse
from preprocess.published import BTCV, FLARE22, SPLITS
from tests.raw_datasets import btcv_pair, write_btcv, write_flare

BTCV_CASES = {*range(1, 11), *range(21, 41)}  # BTCV has no cases 11 to 20
FLARE_TO_SYNAPSE = [0, 5, 2, 1, 8, 7, 0, 0, 0, 4, 0, 6, 0, 3]


def published(number, table):
    image, label = btcv_pair(number)
    scaled = (np.clip(image.astype(np.float32), -125, 275) + np.float32(125)) / np.float32(400)
    return scaled.transpose(2, 1, 0), np.array(table, np.float32)[label].transpose(2, 1, 0)


def run(program, src, dst, *flags):
    return program.main(["--src_path", str(src), "--dst_path", str(dst), "--num_workers", "1", *flags])


def lists(dst):
    train = [line.rpartition("_slice")[0] for line in (dst / "lists" / "train.txt").read_text().split()]
    return list(dict.fromkeys(train)), (dst / "lists" / "test_vol.txt").read_text().split()


def manifest_of(dst):
    return json.loads((dst / "manifest.json").read_text())


# --- splits -------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dataset", "numbers", "n_train", "test"),
    [
        ("Synapse", BTCV_CASES, 18, {1, 2, 3, 4, 8, 22, 25, 29, 32, 35, 36, 38}),
        ("Synapse_12", BTCV_CASES, 24, {35, 36, 37, 38, 39, 40}),
        ("BTCV", BTCV_CASES, 24, {35, 36, 37, 38, 39, 40}),
        ("FLARE22", set(range(1, 51)), 30, {1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 31, 33, 35, 37, 39, 41, 43, 45, 47, 49}),
        ("FLARE", set(range(1, 51)), 30, {1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 31, 33, 35, 37, 39, 41, 43, 45, 47, 49}),
    ],
)
def test_the_published_splits(dataset, numbers, n_train, test):
    split = SPLITS[dataset]
    assert set(split.test) == test
    assert set(split.train) == numbers - test
    assert (len(split.train), len(split.test)) == (n_train, len(test))


# --- BTCV -----------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "table", "last_class", "tests"),
    [
        ((), [0, 1, 2, 3, 4, 0, 5, 6, 7, 0, 0, 8, 0, 0], "pancreas", ["case0008", "case0035"]),
        (("--dataset", "Synapse_12"), [*range(13), 12], "adrenal glands", ["case0035", "case0040"]),
        (("--dataset", "BTCV"), range(14), "left adrenal gland", ["case0035", "case0040"]),
        (("--dataset", "Synapse_12", "--label_map", "btcv13"), range(14), "left adrenal gland", ["case0035", "case0040"]),
    ],
)
def test_btcv_by_dataset(tmp_path, flags, table, last_class, tests):
    src, dst = tmp_path / "RawData", tmp_path / "out"
    write_btcv(src, (5, 8, 35, 40))
    assert run(synapse, src, dst, *flags) == 0
    assert lists(dst) == ([f"case{n:04d}" for n in (5, 8, 35, 40) if f"case{n:04d}" not in tests], tests)
    manifest = manifest_of(dst)
    assert manifest["class_names"][-1] == last_class
    assert manifest["dataset"] == (flags[1] if flags else "Synapse")
    with h5py.File(dst / "test_vol_h5" / "case0035.npy.h5") as file:
        np.testing.assert_array_equal(file["label"], published(35, table)[1])
    slices = [np.load(path)["label"] for path in sorted((dst / "train_npz").glob("case0005_slice*"))]
    np.testing.assert_array_equal(slices, published(5, table)[1])


def test_the_folder_above_btcvs_files_will_do(tmp_path):
    write_btcv(tmp_path / "Abdomen" / "RawData", (5,))
    (tmp_path / "Abdomen" / "Testing").mkdir()
    assert run(synapse, tmp_path / "Abdomen", tmp_path / "out") == 0
    assert manifest_of(tmp_path / "out")["cases"]["case0005"]["image"] == "RawData/Training/img/img0005.nii.gz"


# --- FLARE22 --------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["{name}.nii.gz", "{name}.nii", "{name}.nii/{name}.nii", "{name}.nii.gz/another.nii.gz"])
def test_flare22(tmp_path, form):
    src, dst = tmp_path / "FLARE_origin", tmp_path / "out"
    write_flare(src, (1, 2, 31, 32), form=form)
    assert run(flare22, src, dst) == 0
    assert lists(dst) == (["FLARE22_Tr_0002", "FLARE22_Tr_0032"], ["FLARE22_Tr_0001", "FLARE22_Tr_0031"])
    for name, number in (("FLARE22_Tr_0001", 1), ("FLARE22_Tr_0031", 31)):
        image, label = published(number, FLARE_TO_SYNAPSE)
        with h5py.File(dst / "test_vol_h5" / f"{name}.npy.h5") as file:
            np.testing.assert_array_equal(file["image"], image)
            np.testing.assert_array_equal(file["label"], label)
    slices = [np.load(path)["label"] for path in sorted((dst / "train_npz").glob("FLARE22_Tr_0032_slice*"))]
    np.testing.assert_array_equal(slices, published(32, FLARE_TO_SYNAPSE)[1])
    manifest = manifest_of(dst)
    assert (manifest["dataset"], manifest["label_map"], manifest["window"]) == ("FLARE22", "flare22", [-125, 275])
    assert manifest["class_names"][4] == "liver"


@pytest.mark.parametrize("below", ["FLARE22Train", "."])
@pytest.mark.parametrize("names", [("images", "labels"), ("Images", "Labels")])
def test_flares_folder_above_and_its_capitals(tmp_path, below, names):
    write_flare(tmp_path / "src" / below, (2,), images=names[0], labels=names[1])
    (tmp_path / "src" / "readme").mkdir()
    assert run(flare22, tmp_path / "src", tmp_path / "out") == 0
    assert list(manifest_of(tmp_path / "out")["cases"]) == ["FLARE22_Tr_0002"]


def test_patients_of_flare_and_btcv_are_others(tmp_path):
    """Else a model trained on case 5 of BTCV could not be tested on case 5 of FLARE22."""
    write_btcv(tmp_path / "btcv", (1, 2, 5))
    write_flare(tmp_path / "flare", (1, 2, 5))
    assert run(synapse, tmp_path / "btcv", tmp_path / "a") == run(flare22, tmp_path / "flare", tmp_path / "b") == 0
    a, b = ({entry["patient"] for entry in manifest_of(tmp_path / name)["cases"].values()} for name in "ab")
    assert len(a) == len(b) == 3
    assert not a & b


def test_bad_flare_folders(tmp_path, capsys):
    src, dst = tmp_path / "src", tmp_path / "out"

    def refused(*messages, flags=(), source=src):
        assert run(flare22, source, dst, *flags) == 2
        error = capsys.readouterr().err
        assert all(message in error for message in messages), error
        assert error.count("\n") == 1
        assert not dst.exists()

    write_flare(src, (1, 2), form="{name}.nii/{name}.nii")
    refused("expected the 50 cases of the published split", "0050", flags=("--require_all",))
    refused("no such folder", source=tmp_path / "elsewhere")
    folder = src / "labels" / "FLARE22_Tr_0002.nii"
    shutil.copy(folder / folder.name, folder / "copy.nii")
    refused(str(folder), "found a folder with FLARE22_Tr_0002.nii, copy.nii")
    for path in folder.iterdir():
        path.unlink()
    (folder / "._copy.nii").write_bytes(b"")
    refused(str(folder), "found a folder with none")
    shutil.rmtree(folder)
    refused("found alone: FLARE22_Tr_0002_0000.nii")
    write_flare(src, (51,))
    shutil.rmtree(src / "images" / "FLARE22_Tr_0002_0000.nii")
    refused("cases 0051 are not in the published split")
    write_flare(src / "copy", (1,))
    shutil.rmtree(src / "images")
    write_flare(src / "other", (1,))
    refused("several folders in it hold FLARE22's raw files (copy, other)")
    assert run(flare22, src, dst, "--dataset", "BTCV") == 2
    assert "--dataset" in capsys.readouterr().err


def test_a_layout_is_found_by_its_files(tmp_path):
    assert FLARE22.find(tmp_path) is None
    write_flare(tmp_path / "a", (1,))
    assert FLARE22.find(tmp_path / "a") == (tmp_path / "a" / "images", tmp_path / "a" / "labels")
    assert FLARE22.find(tmp_path) == (tmp_path / "a" / "images", tmp_path / "a" / "labels")
    assert FLARE22.find(tmp_path, below=False) is None
    assert BTCV.find(tmp_path) is None
    for path in (tmp_path / "a" / "images").iterdir():
        path.rename(path.with_name("scan.nii.gz"))
    assert FLARE22.find(tmp_path / "a") is None


@pytest.mark.parametrize("script", ["preprocess/flare22.py", "preprocess/nifti.py", "scripts/download_weights.py"])
def test_the_scripts_run_from_another_folder(tmp_path, script):
    command = [sys.executable, Path(__file__).resolve().parents[2] / script, "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert f"python {script}" in done.stdout
    assert done.stderr == ""
