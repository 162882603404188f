"""The published preprocessing, done again with nibabel and numpy on tiny volumes, against ours; resuming, splits, pairing, damage."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import h5py
import nibabel as nib
import numpy as np
import pytest

from preprocess import synapse

REPO = Path(__file__).resolve().parents[2]
TEST_ORDER = [8, 22, 38, 36, 32, 2, 29, 3, 1, 4, 25, 35]
TRAIN = [5, 6, 7, 9, 10, 21, 23, 24, 26, 27, 28, 30, 31, 33, 34, 37, 39, 40]
SYNAPSE8 = [0, 1, 2, 3, 4, 0, 5, 6, 7, 0, 0, 8, 0, 0]  # BTCV label -> class
LAS = np.diag([-0.8, 0.7, 3.0, 1.0])


def make_case(src, number, affine=LAS, seed=None):
    rng = np.random.default_rng(number if seed is None else seed)
    shape = (7, 6, 2 + number % 3)
    for folder in ("img", "label"):
        (src / "Training" / folder).mkdir(parents=True, exist_ok=True)
    image = rng.integers(-1024, 1500, shape).astype(np.int16)
    image.flat[:3] = (-125, 275, 75)
    nib.save(nib.Nifti1Image(image, affine), src / "Training" / "img" / f"img{number:04d}.nii.gz")
    nib.save(nib.Nifti1Image(rng.integers(0, 14, shape).astype(np.uint8), affine), src / "Training" / "label" / f"label{number:04d}.nii.gz")


def published(src, number, table=SYNAPSE8):
    """TransUNet's arithmetic: nibabel, clip, (x + 125) / 400 in float32, axes reversed."""
    image = nib.load(src / "Training" / "img" / f"img{number:04d}.nii.gz").get_fdata().astype(np.float32)  # type: ignore[attr-defined]
    label = nib.load(src / "Training" / "label" / f"label{number:04d}.nii.gz").get_fdata().astype(int)  # type: ignore[attr-defined]
    image = (np.clip(image, -125, 275) + np.float32(125)) / np.float32(400)
    return image.transpose(2, 1, 0), np.array(table, np.float32)[label].transpose(2, 1, 0)


def run(src, dst, *flags):
    return synapse.main(["--src_path", str(src), "--dst_path", str(dst), "--num_workers", "1", *flags])


def snapshot(dst):
    return {path.relative_to(dst).as_posix(): path.stat().st_mtime_ns for path in dst.rglob("*") if path.is_file()}


def case_of(name):
    return Path(name).name[:8]


@pytest.fixture
def few(tmp_path):
    src = tmp_path / "RawData"
    for number in (5, 6, 8):
        make_case(src, number)
    return src, tmp_path / "out"


def test_the_published_files_and_lists(tmp_path):
    src, dst = tmp_path / "RawData", tmp_path / "out"
    for number in (*TRAIN, *TEST_ORDER):
        make_case(src, number)
    assert run(src, dst) == 0
    expected_lines = []
    for number in TRAIN:
        image, label = published(src, number)
        for index in range(len(image)):
            expected_lines.append(f"case{number:04d}_slice{index:03d}")
            with np.load(dst / "train_npz" / f"{expected_lines[-1]}.npz", allow_pickle=False) as file:
                assert file["image"].dtype == file["label"].dtype == np.float32
                np.testing.assert_array_equal(file["image"], image[index])
                np.testing.assert_array_equal(file["label"], label[index])
                assert str(file["source"]) == f"img{number:04d}.nii.gz"
                np.testing.assert_array_equal(file["window"], (-125, 275))
    for number in TEST_ORDER:
        image, label = published(src, number)
        with h5py.File(dst / "test_vol_h5" / f"case{number:04d}.npy.h5") as file:
            assert file["image"].dtype == file["label"].dtype == np.float32
            np.testing.assert_array_equal(file["image"], image)
            np.testing.assert_array_equal(file["label"], label)
            np.testing.assert_allclose(file.attrs["spacing"], (3, 0.7, 0.8), rtol=1e-6)
            assert file.attrs["orientation"] == file.attrs["source_orientation"] == "LAS"
    assert (dst / "lists" / "train.txt").read_text().split() == expected_lines
    assert (dst / "lists" / "test_vol.txt").read_text().split() == [f"case{number:04d}" for number in TEST_ORDER]
    assert len(list((dst / "train_npz").iterdir())) == len(expected_lines)
    assert len(list((dst / "test_vol_h5").iterdir())) == 12
    manifest = json.loads((dst / "manifest.json").read_text())
    assert (manifest["format"], manifest["num_classes"], manifest["window"], manifest["orientation"]) == (1, 8, [-125, 275], "LAS")
    assert manifest["class_names"][4] == "liver"
    assert manifest["cases"]["case0040"]["image"] == "Training/img/img0040.nii.gz"


def test_the_files_order_is_kept_whatever_the_orientation(tmp_path, capsys):
    src, dst = tmp_path / "RawData", tmp_path / "out"
    make_case(src, 5)
    make_case(src, 8, np.diag([0.8, 0.7, -3.0, 1.0]))
    assert run(src, dst) == 0
    with h5py.File(dst / "test_vol_h5" / "case0008.npy.h5") as file:
        np.testing.assert_array_equal(file["image"], published(src, 8)[0])
        assert file.attrs["orientation"] == "RAI"
    assert json.loads((dst / "manifest.json").read_text())["orientation"] is None
    assert "differ in orientation" in capsys.readouterr().out


def test_command_line_with_processes_from_another_folder(few, tmp_path):
    src, dst = few
    assert run(src, dst) == 0
    command = [sys.executable, REPO / "preprocess" / "synapse.py", "--src_path", src, "--dst_path", "parallel"]
    subprocess.run([*command, "--num_workers", "2"], cwd=tmp_path, check=True, capture_output=True)
    one, two = (sorted(path.relative_to(root) for path in root.rglob("*.*")) for root in (dst, tmp_path / "parallel"))
    assert one == two
    assert (dst / "manifest.json").read_bytes() == (tmp_path / "parallel" / "manifest.json").read_bytes()
    assert (dst / "lists" / "train.txt").read_bytes() == (tmp_path / "parallel" / "lists" / "train.txt").read_bytes()


def test_a_second_run_writes_nothing_and_a_lost_file_brings_back_its_case_only(few):
    src, dst = few
    assert run(src, dst) == 0
    first = snapshot(dst)
    assert run(src, dst) == 0
    assert snapshot(dst) == first
    (dst / "train_npz" / "case0006_slice001.npz").unlink()
    assert run(src, dst) == 0
    second = snapshot(dst)
    assert second.keys() == first.keys()
    assert {case_of(name) for name in first if second[name] != first[name] and name.endswith((".npz", ".h5"))} == {"case0006"}


def test_changed_sources_and_settings_are_made_again(few):
    src, dst = few
    assert run(src, dst) == 0
    first = snapshot(dst)
    make_case(src, 8, seed=99)
    assert run(src, dst) == 0
    second = snapshot(dst)
    assert {case_of(name) for name in first if second[name] != first[name] and name.endswith((".npz", ".h5"))} == {"case0008"}
    with h5py.File(dst / "test_vol_h5" / "case0008.npy.h5") as file:
        np.testing.assert_array_equal(file["image"], published(src, 8)[0])
    assert run(src, dst, "--label_map", "btcv13") == 0
    for name in ("case0005_slice000", "case0006_slice001"):
        label = published(src, int(name[4:8]), range(14))[1][int(name[-3:])]
        np.testing.assert_array_equal(np.load(dst / "train_npz" / f"{name}.npz")["label"], label)
    third = snapshot(dst)
    assert run(src, dst, "--label_map", "btcv13", "--overwrite") == 0
    assert all(after > third[name] for name, after in snapshot(dst).items() if name.endswith((".npz", ".h5")))


def test_one_bad_case_leaves_the_finished_ones_but_no_lists(few, capsys):
    src, dst = few
    damaged = src / "Training" / "img" / "img0008.nii.gz"
    whole = damaged.read_bytes()
    (dst / "lists").mkdir(parents=True)
    (dst / "lists" / "train.txt").write_text("case0005_slice000\n")  # of an earlier run
    damaged.write_bytes(whole[:-8])
    assert run(src, dst) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert "case0008" in message
    assert str(damaged) in message
    assert set(json.loads((dst / "manifest.json").read_text())["cases"]) == {"case0005", "case0006"}
    assert not list((dst / "lists").iterdir())
    assert not list((dst / "test_vol_h5").iterdir())
    before = snapshot(dst)
    damaged.write_bytes(whole)
    assert run(src, dst) == 0
    after = snapshot(dst)
    assert all(after[name] == time for name, time in before.items() if name.endswith(".npz"))
    assert (dst / "lists" / "test_vol.txt").read_text() == "case0008\n"


def test_a_bad_case_among_processes_is_reported_and_the_others_are_kept(few, capsys):
    src, dst = few
    label = src / "Training" / "label" / "label0006.nii.gz"
    nib.save(nib.Nifti1Image(np.full((7, 6, 2), 77, np.uint8), LAS), label)
    assert run(src, dst, "--num_workers", "2") == 2
    message = capsys.readouterr().err
    assert "case0006" in message
    assert "77" in message
    assert str(label) in message
    assert "case0006" not in json.loads((dst / "manifest.json").read_text())["cases"]


def test_leftovers_of_a_killed_run_are_taken_away(few):
    src, dst = few
    assert run(src, dst) == 0
    manifest = json.loads((dst / "manifest.json").read_text())
    del manifest["cases"]["case0005"]
    (dst / "manifest.json").write_text(json.dumps(manifest))
    for name in ("case0005_slice007.npz", ".123.case0005_slice001.npz"):
        (dst / "train_npz" / name).write_bytes(b"half")
    assert run(src, dst) == 0
    assert {path.name for path in (dst / "train_npz").glob("*case0005*")} == {f"case0005_slice{index:03d}.npz" for index in range(4)}


def test_a_full_disk_leaves_no_slice_of_a_case(few, monkeypatch, capsys):
    """Slices take their places together, when all of a case have been written."""
    src, dst = few
    honest = np.savez

    def write(file, **arrays):
        if "case0006_slice001" in file.name:
            raise OSError(28, "No space left on device")
        honest(file, **arrays)

    monkeypatch.setattr(np, "savez", write)
    assert run(src, dst) == 2
    assert "case0006_slice001.npz: cannot be written ([Errno 28] No space left on device)" in capsys.readouterr().err
    assert {case_of(path) for path in (dst / "train_npz").iterdir()} == {"case0005"}
    monkeypatch.undo()
    assert run(src, dst) == 0
    assert len(list((dst / "train_npz").glob("case0006_slice*.npz"))) == 2


def test_the_manifest_counts_the_classes_that_occur(few):
    src, dst = few
    assert run(src, dst) == 0
    for name, entry in json.loads((dst / "manifest.json").read_text())["cases"].items():
        assert entry["labels_present"] == np.unique(published(src, int(name[4:]))[1])[1:].tolist()


def test_files_of_others_are_not_written_over(few, capsys):
    src, dst = few
    (dst / "train_npz").mkdir(parents=True)
    (dst / "train_npz" / "case0005_slice000.npz").write_bytes(b"the published file")
    assert run(src, dst) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert (dst / "train_npz" / "case0005_slice000.npz").read_bytes() == b"the published file"
    (dst / "manifest.json").write_text("[]")
    assert run(src, dst) == 2
    assert "manifest" in capsys.readouterr().err


def test_image_and_label_are_paired_by_number(few, capsys):
    src, dst = few
    labels = src / "Training" / "label"
    (labels / "label0006.nii.gz").rename(labels / "label0007.nii.gz")  # still three and three: zipped lists would pair them
    assert run(src, dst) == 2
    message = capsys.readouterr().err
    assert "img0006.nii.gz" in message
    assert "label0007.nii.gz" in message
    assert not dst.exists()


def test_sources_that_are_not_the_published_thirty(few, tmp_path, capsys):
    src, dst = few

    def refused(message, *flags, source=src):
        assert run(source, dst, *flags) == 2
        assert message in capsys.readouterr().err
        assert not dst.exists()

    refused("missing 0001, 0002, 0003, 0004, 0007, 0009", "--require_all")
    refused("no such folder", source=tmp_path / "elsewhere")
    refused("Training/img/img0001.nii.gz with Training/label/label0001.nii.gz", source=src / "Training" / "img")
    refused("unknown label map", "--label_map", "synapse9")
    make_case(src, 11)
    refused("0011 are not in the published split")
    (src / "Training" / "img" / "img0011.nii.gz").rename(src / "Training" / "img" / "scan11.nii.gz")
    refused("scan11.nii.gz: expected a name as img0001.nii.gz")
    (src / "Training" / "img" / "scan11.nii.gz").unlink()
    shutil.copy(src / "Training" / "img" / "img0005.nii.gz", src / "Training" / "img" / "img0005.nii")
    refused("are both case 5")


def test_image_and_label_of_different_shapes_or_headers(few, capsys):
    """The published arithmetic pairs arrays: another shape is an error, another header is said and nothing else."""
    src, dst = few
    image, label = (src / "Training" / folder / f"{folder}0005.nii.gz" for folder in ("img", "label"))
    correct = np.asarray(nib.load(label).dataobj)  # type: ignore[attr-defined]
    nib.save(nib.Nifti1Image(np.zeros((7, 6, 5), np.uint8), LAS), label)
    assert run(src, dst) == 2
    error = capsys.readouterr().err
    assert all(part in error for part in ("expected one shape, found (4, 6, 7)", str(image), str(label)))
    shifted = LAS.copy()
    shifted[0, 3] = 0.05
    nib.save(nib.Nifti1Image(correct, shifted), label)
    assert run(src, dst) == 0
    assert "place them apart in case0005;" in capsys.readouterr().out
    assert json.loads((dst / "manifest.json").read_text())["cases"]["case0005"]["grid_distance_mm"] == pytest.approx(0.05)
    images, labels = published(src, 5)
    with np.load(dst / "train_npz" / "case0005_slice001.npz") as archive:
        assert np.array_equal(archive["image"], images[1])
        assert np.array_equal(archive["label"], labels[1])
        assert labels[1].any()
