"""Everything a user can get wrong ends in one line on stderr and exit code 2, and leaves nothing half-done behind."""

import gc
import importlib
import json
import pickle
import shutil
import zipfile
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from datasets.order import UpdateSampler
from pgsam import build_model
from pgsam.engine.checkpoint import load_training_state
from pgsam.models.samed import to_samed_state

SHAPE = (72, 80)
CASE = "case0006_slice004"  # the last of the list
SAMED, SAMED_S = "sam_lora_image_encoder", "sam_lora_image_encoder_mask_decoder"


class Trap:
    """Unpickling it makes a file in the working folder."""

    def __reduce__(self):
        return open, ("trap", "w")


@pytest.fixture(autouse=True)
def trap(tmp_path, monkeypatch):
    """The file that nothing may make."""
    monkeypatch.chdir(tmp_path)
    yield
    assert not (tmp_path / "trap").exists()


def test_the_trap_works(tmp_path):
    pickle.loads(pickle.dumps(Trap())).close()
    assert (tmp_path / "trap").exists()
    (tmp_path / "trap").unlink()


# --- ways to be wrong: each takes the path of a good file ---------------------------------------------------------------------------------


def absent(path):
    path.unlink()


def empty(path):
    path.write_bytes(b"")


def garbage(path):
    path.write_bytes(b"neither one thing nor the other " * 64)


def half(path):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def a_folder(path):
    path.unlink()
    path.mkdir()


def git_lfs_pointer(path):
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\n")


def web_page(path):
    path.write_bytes(b"\n<!DOCTYPE html><html><head><title>403 Forbidden</title></head></html>\n")


def changed(**arrays):
    """Replaces image, label or both, in an npz or h5 file, by an array or a function of the array there was; None takes the key away."""

    def damage(path):
        h5 = path.suffix == ".h5"
        with h5py.File(path) if h5 else np.load(path) as file:
            content = {key: np.array(file[key]) for key in ("image", "label")}
        for key, value in arrays.items():
            content[key] = value(content[key]) if callable(value) else value
        content = {key: value for key, value in content.items() if value is not None}
        if not h5:
            return np.savez(path, **content)
        with h5py.File(path, "w") as file:
            for key, value in content.items():
                file.create_dataset(key, data=value, dtype=h5py.string_dtype() if value.dtype == object else None)

    return damage


def one(value):
    """The array with one voxel set to `value`."""

    def damage(array):
        array = array.astype(np.float32)
        array.flat[array.size // 2] = value
        return array

    return damage


def objects(array):
    traps = np.empty(array.shape, object)
    traps.flat[:] = [Trap()] * array.size
    return traps


def flipped_bytes(path):
    """Damages the stored pixels of an npz file; its directory and the headers stay whole."""
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        place = archive.getinfo("image.npy").header_offset + 4000
    content[place : place + 64] = bytes(64 * [0xA5])
    path.write_bytes(content)


def flipped_bytes_compressed(path):
    """The same in a file by `np.savez_compressed`."""
    with np.load(path) as file:
        np.savez_compressed(path, **{key: file[key] for key in ("image", "label")})
    with zipfile.ZipFile(path) as archive:
        start = archive.getinfo("image.npy").header_offset
    content = bytearray(path.read_bytes())
    data = start + 30 + sum(int.from_bytes(content[start + at : start + at + 2], "little") for at in (26, 28))  # after name and extra field
    content[data : data + 64] = bytes(64 * [0xFF])  # a kind of block that deflate does not have
    path.write_bytes(content)


def too_few_pixels(path):
    """A whole zip whose image ends before its header says so."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content[:9000] if name == "image.npy" else content)


def flipped_bytes_h5(path):
    """Damages a compressed chunk of an h5 file; what is around it stays whole."""
    with h5py.File(path) as file:
        content = {key: file[key][()] for key in ("image", "label")}
    with h5py.File(path, "w") as file:
        for key, value in content.items():
            file.create_dataset(key, data=value, compression="gzip", chunks=value.shape)
        place = file["image"].id.get_chunk_info(0).byte_offset
    raw = bytearray(path.read_bytes())
    raw[place + 300 : place + 364] = bytes(64 * [0xA5])
    path.write_bytes(raw)


def part_of_the_geometry(path):
    with h5py.File(path, "a") as file:
        del file.attrs["origin"]


# --- training: before the run folder is made ----------------------------------------------------------------------------------------------

BAD_SLICES = {
    "absent": (absent, "no file"),
    "empty": (empty, "expected an npz"),
    "garbage": (garbage, "expected an npz"),
    "half": (half, "expected an npz"),
    "folder": (a_folder, "no file"),
    "object image": (changed(image=objects), "pickled objects"),
    "object label": (changed(label=objects), "pickled objects"),
    "no label": (changed(label=None), "expected the keys image and label"),
    "no image": (changed(image=None), "expected the keys image and label"),
    "shapes differ": (changed(label=np.zeros((72, 79), np.float32)), "[72, 80] and [72, 79]"),
    "three axes": (changed(image=np.zeros((1, *SHAPE)), label=np.zeros((1, *SHAPE))), "expected image and label [H, W]"),
    "no pixels": (changed(image=np.zeros((0, 80)), label=np.zeros((0, 80))), "[0, 80]"),
    "compressed pixels damaged": (flipped_bytes_compressed, "expected an npz"),
    "text": (changed(image=np.full(SHAPE, "0.5")), "expected numbers in image"),
    "complex": (changed(image=np.zeros(SHAPE, complex)), "expected numbers in image"),
}


@pytest.fixture
def train(call, data, from_scratch, tmp_path):
    """Trains on `data` into `run`; flags are added."""

    def run(*flags, output="run"):
        return call("train", "--root_path", data, "--output", tmp_path / output, *from_scratch, "--max_epochs", 2, *flags)

    return run


@pytest.mark.parametrize("way", BAD_SLICES)
def test_a_bad_slice_is_found_before_training(train, data, tmp_path, way):
    damage, said = BAD_SLICES[way]
    damage(data / "train_npz" / f"{CASE}.npz")
    train().refused(data / "train_npz" / f"{CASE}.npz", CASE, said)
    assert not (tmp_path / "run").exists()


BAD_LISTS = {
    "absent": (absent, "found none"),
    "empty": (empty, "found an empty list"),
    "blank": (lambda path: path.write_text("\n \n\n"), "found an empty list"),
    "twice": (lambda path: path.write_text(2 * path.read_text()), "more than once"),
    "not text": (lambda path: path.write_bytes(bytes(range(128, 256))), "expected"),
}


@pytest.mark.parametrize("way", BAD_LISTS)
def test_a_bad_list_of_slices(train, data, tmp_path, way):
    damage, said = BAD_LISTS[way]
    damage(data / "lists" / "train.txt")
    train().refused(data / "lists", "train.txt", said)
    assert not (tmp_path / "run").exists()


def test_no_data(call, from_scratch, tmp_path):
    call("train", "--root_path", tmp_path / "none", "--output", tmp_path / "run", *from_scratch).refused(
        tmp_path / "none", "expected", "found no folder"
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("manifest", ["{", "[]", '{"class_names": "liver", "cases": {}}'])
def test_a_damaged_manifest(train, data, tmp_path, manifest):
    (data / "manifest.json").write_text(manifest)
    train().refused(data / "manifest.json", "expected")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", ["a folder with a file", "a file"])
def test_a_run_folder_in_use(train, tmp_path, kind):
    run = tmp_path / "run"
    kept = run
    if kind != "a file":
        run.mkdir()
        kept = run / "last.pt"
    kept.write_text("precious")
    result = train()
    result.refused(run, "expected a new or empty folder", "--output")
    assert result.out == ""  # before any work
    assert kept.read_text() == "precious"
    assert len(list(tmp_path.iterdir())) == 2  # this and the data


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--img_size 500", "--img_size 500: expected a multiple of 16"),
        ("--img_size 0", "--img_size 0: expected a multiple of 16"),
        ("--stop_epoch 5 --max_epochs 3", "--stop_epoch 5: expected at most --max_epochs 3"),
        ("--num_classes 5", "--num_classes 5: the manifest of"),
        ("--vit_name vit_tiny --ckpt sam_vit_b_01ec64.pth", "sam_vit_b_01ec64.pth: expected the official SAM file of vit_tiny, found no such file"),
        ("--batch_size 0", "--batch_size 0: expected at least 1"),
        ("--rank 0", "--rank 0: expected at least 1"),
        ("--rank 9999", "--rank 9999: expected at most"),
        ("--base_lr 0", "--base_lr 0.0: expected a positive"),
        ("--base_lr nan", "--base_lr nan: expected a positive"),
        ("--weight_decay -1", "--weight_decay -1.0: expected at least 0"),
        ("--dice_param 2", "--dice_param 2.0: expected a number from 0 to 1"),
        ("--warmup_period 9", "--warmup_period 9: nothing is warmed up without --warmup"),
        ("--num_workers -1", "--num_workers -1: expected at least 0"),
        ("--seed -1", "--seed -1: expected at least 0"),
        (f"--seed {2**64}", f"--seed {2**64}: expected a number below 2**63"),
        ("--base_lr inf", "--base_lr inf: expected a positive number"),
        (f"--tune full --module {SAMED_S}", "--tune full"),
        ("--device mps", "--device mps"),
    ],
)
def test_a_bad_value_of_a_training_flag(train, tmp_path, flags, said):
    train(*flags.split()).refused(said)
    assert not (tmp_path / "run").exists()


# --- training: on reading ----------------------------------------------------------------------------------------------------------------

BAD_PIXELS = {
    "absent": (absent, "expected an npz"),
    "half": (half, "expected an npz"),
    "pixels damaged": (flipped_bytes, "expected an npz"),
    "compressed pixels damaged": (flipped_bytes_compressed, "expected an npz"),
    "pixels missing": (too_few_pixels, "expected an npz"),
    "object image": (changed(image=objects), "Object arrays cannot be loaded"),
    "NaN": (changed(image=one(np.nan)), "expected finite pixels, found NaN"),
    "infinity": (changed(image=one(np.inf)), "expected finite pixels, found infinity"),
    "label above": (changed(label=one(9)), "expected labels 0 to 8 (--num_classes), found 0 to 9"),
    "label below": (changed(label=one(-1)), "found -1 to"),
    "label NaN": (changed(label=one(np.nan)), "expected labels 0 to 8"),
    "label between": (changed(label=one(2.5)), "expected whole numbers"),
    "raw HU": (changed(image=lambda image: image * 400 - 125), "expected [0, 1]; raw HU?"),
    "slightly above": (changed(image=one(1.6)), "expected [0, 1]; raw HU? found values from"),
}


@pytest.mark.parametrize("way", BAD_PIXELS)
def test_a_slice_that_goes_bad_leaves_the_last_checkpoint(train, data, tmp_path, monkeypatch, way):
    damage, said = BAD_PIXELS[way]
    path, run = data / "train_npz" / f"{CASE}.npz", tmp_path / "run"
    go_to = UpdateSampler.go_to

    def go_to_and_damage(sampler, epoch, start=0):
        if epoch == 1:
            damage(path)
        go_to(sampler, epoch, start)

    monkeypatch.setattr(UpdateSampler, "go_to", go_to_and_damage)
    train("--batch_size", 2).refused(path, CASE, said)
    state = load_training_state(run / "last.pt")
    assert (state["epochs_done"], state["step"]) == (1, 3)
    assert all(bool(value.isfinite().all()) for value in state["model"].values())
    assert len((run / "history.csv").read_text().splitlines()) == 2
    assert not (run / "final.safetensors").exists()
    assert not [file for file in run.iterdir() if file.name.startswith(".")]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_slice_that_is_bad_from_the_start_stops_the_first_epoch(train, data, tmp_path, monkeypatch, workers):
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.1)  # seconds that torch waits for each worker of a failed epoch
    path = data / "train_npz" / f"{CASE}.npz"
    changed(image=one(np.nan))(path)
    train("--num_workers", workers).refused(path, CASE, "expected finite pixels, found NaN")
    assert not any((tmp_path / "run" / name).exists() for name in ("last.pt", "final.safetensors"))
    gc.collect()  # ends the workers now


def test_a_loss_that_explodes_names_the_cases_and_keeps_the_last_checkpoint(train, data, tmp_path):
    error = train("--base_lr", 1e30, "--batch_size", 2).refused("the loss is not finite", "--base_lr")
    assert any(name in error for name in (data / "lists" / "train.txt").read_text().split())
    assert not (tmp_path / "run" / "final.safetensors").exists()


# --- checkpoints --------------------------------------------------------------------------------------------------------------------------


def torch_trap(path):
    torch.save({"image_encoder.pos_embed": Trap()}, path)


def pickle_trap(path):
    path.write_bytes(pickle.dumps({"image_encoder.pos_embed": Trap()}, protocol=2))


BAD_WEIGHTS = {
    "torch file that runs code": (torch_trap, "expected tensors only, found pickled objects that could run code"),
    "pickle that runs code": (pickle_trap, "expected"),
    "absent": (absent, "found no such file"),
    "folder": (a_folder, "found a folder"),
    "empty": (empty, "found an empty file"),
    "git-lfs pointer": (git_lfs_pointer, "found a git-lfs pointer"),
    "web page": (web_page, "found a web page"),
    "half": (half, "truncated"),
    "garbage": (garbage, "expected a torch checkpoint, found a damaged, truncated or other file"),
    "other tensors": (lambda path: torch.save({"fc.weight": torch.zeros(2, 2)}, path), "other tensors: fc.weight"),
    "no state dict": (lambda path: torch.save({"state_dict": {"a": torch.zeros(1)}}, path), "expected a flat dict of tensors"),
}


@pytest.fixture
def sam_file(sam_tiny_file, tmp_path):
    """A copy of the small SAM file, to damage."""
    return Path(shutil.copy(sam_tiny_file, tmp_path / "sam.pth"))


@pytest.fixture(scope="session")
def samed_tiny_file(tmp_path_factory):
    """A file in SAMed's layout, of the smallest model."""
    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("samed") / "epoch_159.pth"
    torch.save(to_samed_state(build_model(SAMED, vit_name="vit_tiny", img_size=64, verbose=False)), path)
    return path


@pytest.fixture
def samed_file(samed_tiny_file, tmp_path):
    return Path(shutil.copy(samed_tiny_file, tmp_path / "samed.pth"))


@pytest.mark.parametrize("way", BAD_WEIGHTS)
def test_a_bad_sam_file(call, train, data, raw, sam_file, samed_tiny_file, tmp_path, way):
    damage, said = BAD_WEIGHTS[way]
    damage(sam_file)
    train("--ckpt", sam_file).refused(sam_file, said)
    assert not (tmp_path / "run").exists()
    common = ("--checkpoint", samed_tiny_file, "--ckpt", sam_file, "--img_size", 64)
    call("test", *common, "--volume_path", data, "--output_dir", tmp_path / "results").refused(sam_file, said)
    call("infer_demo", *common, "-i", raw / "Training" / "img" / "img0008.nii.gz", "-o", tmp_path / "out").refused(sam_file, said)
    assert not (tmp_path / "results").exists()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("way", BAD_WEIGHTS)
def test_a_bad_samed_file(call, train, data, raw, sam_tiny_file, samed_file, tmp_path, way):
    damage, said = BAD_WEIGHTS[way]
    damage(samed_file)
    train("--lora_ckpt", samed_file).refused(samed_file, said)
    assert not (tmp_path / "run").exists()
    common = ("--checkpoint", samed_file, "--ckpt", sam_tiny_file, "--img_size", 64)
    call("test", *common, "--volume_path", data, "--output_dir", tmp_path / "results").refused(samed_file, said)
    call("infer_demo", *common, "-i", raw / "Training" / "img" / "img0008.nii.gz", "-o", tmp_path / "out").refused(samed_file, said)
    assert not (tmp_path / "results").exists()
    assert not (tmp_path / "out").exists()


def without_card(path):
    save_file(load_file(path), path)


def without_a_tensor(path):
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    state = load_file(path)
    del state["mask_decoder.mask_tokens.weight"]
    save_file(state, path, metadata=metadata)


def of_a_later_version(path):
    with safe_open(path, framework="pt") as file:
        card = json.loads(file.metadata()["pgsam"])
    save_file(load_file(path), path, metadata={"pgsam": json.dumps({**card, "module": "a_method_of_next_year"})})


BAD_RELEASES = {
    "torch file that runs code": (torch_trap, "expected a .safetensors checkpoint, found a damaged or truncated file"),
    "pickle that runs code": (pickle_trap, "expected a .safetensors checkpoint, found a damaged or truncated file"),
    "absent": (absent, "found no such file"),
    "empty": (empty, "found an empty file"),
    "git-lfs pointer": (git_lfs_pointer, "found a git-lfs pointer"),
    "web page": (web_page, "found a web page"),
    "half": (half, "damaged or truncated"),
    "no card": (without_card, "without a model card"),
    "a tensor missing": (without_a_tensor, "1 are absent: mask_decoder.mask_tokens.weight"),
    "unknown module": (of_a_later_version, "a_method_of_next_year"),
}


@pytest.mark.parametrize("way", BAD_RELEASES)
def test_a_bad_release_file(call, data, raw, trained, tmp_path, way):
    damage, said = BAD_RELEASES[way]
    path = Path(shutil.copy(trained / "final.safetensors", tmp_path / "model.safetensors"))
    damage(path)
    call("test", "--checkpoint", path, "--volume_path", data, "--output_dir", tmp_path / "results").refused(path, "expected", said)
    assert not (tmp_path / "results").exists()
    scan = raw / "Training" / "img" / "img0008.nii.gz"
    call("infer_demo", "--checkpoint", path, "-i", scan, "-o", tmp_path / "out").refused(path, "expected", said)
    assert not (tmp_path / "out").exists()


def test_the_default_sam_file_is_absent(call, data, tmp_path, monkeypatch):
    monkeypatch.setattr("pgsam.engine.flags.REPOSITORY", tmp_path / "elsewhere")
    error = call("train", "--root_path", data, "--output", tmp_path / "run").refused(
        "checkpoints/sam_vit_b_01ec64.pth", "found no such file", "--ckpt none"
    )
    assert "vit_b" in error
    assert not (tmp_path / "run").exists()
    call("train", "--root_path", data, "--output", tmp_path / "run", "--vit_name", "vit_tiny").refused("vit_tiny", "--ckpt none")
    assert not (tmp_path / "run").exists()


def test_a_sam_file_of_another_encoder(call, data, sam_tiny_file, tmp_path):
    flags = ("--root_path", data, "--output", tmp_path / "run", "--ckpt", sam_tiny_file, "--img_size", 64)
    call("train", *flags, "--vit_name", "vit_b").refused(sam_tiny_file, "expected a SAM checkpoint of vit_b, found vit_tiny")
    assert not (tmp_path / "run").exists()


CONTRADICTIONS = [("--vit_name", "vit_b"), ("--rank", 3), ("--num_classes", 9), ("--module", SAMED_S)]


@pytest.mark.parametrize(("flag", "value"), [*CONTRADICTIONS, ("--img_size", 128), ("--input_size", 224)])
def test_a_flag_that_differs_from_the_release_file(call, data, raw, trained, tmp_path, flag, value):
    path = trained / "final.safetensors"
    common = ("--checkpoint", path, flag, value)
    call("test", *common, "--volume_path", data, "--output_dir", tmp_path / "results").refused(path, flag, value, "was trained with")
    scan = raw / "Training" / "img" / "img0008.nii.gz"
    call("infer_demo", *common, "-i", scan, "-o", tmp_path / "out").refused(path, flag, value, "was trained with")
    assert not (tmp_path / "results").exists()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("flag", "value"), CONTRADICTIONS)
def test_a_flag_that_differs_from_a_samed_file(call, data, samed_tiny_file, sam_tiny_file, tmp_path, flag, value):
    flags = ("--lora_ckpt", samed_tiny_file, "--ckpt", sam_tiny_file, "--volume_path", data, "--output_dir", tmp_path / "results")
    call("test", *flags, flag, value).refused(samed_tiny_file, flag, value, "was trained with")
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(("flag", "value"), [("--vit_name", "vit_b"), ("--rank", 3), ("--module", SAMED_S)])
def test_training_on_from_a_file_that_does_not_fit(train, samed_tiny_file, tmp_path, flag, value):
    train("--lora_ckpt", samed_tiny_file, flag, value).refused(samed_tiny_file, "expected", flag.removeprefix("--"), value, "found")
    assert not (tmp_path / "run").exists()


# --- testing ------------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def test_program(call, data, trained, tmp_path):
    """Tests the small model on `data` into `results`; flags are added."""

    def run(*flags):
        return call("test", "--checkpoint", trained / "final.safetensors", "--volume_path", data, "--output_dir", tmp_path / "results", *flags)

    return run


BAD_VOLUMES = {
    "absent": (absent, "no file"),
    "empty": (empty, "expected an h5 file"),
    "garbage": (garbage, "expected an h5 file"),
    "half": (half, "expected an h5 file"),
    "no label": (changed(label=None), "expected the datasets image and label, found image"),
    "shapes differ": (changed(label=np.zeros((10, 72, 79), np.float32)), "[10, 72, 80] and [10, 72, 79]"),
    "two axes": (changed(image=np.zeros(SHAPE), label=np.zeros(SHAPE)), "expected image and label [D, H, W]"),
    "text": (changed(image=np.full((10, *SHAPE), "0.5", object)), "expected numbers in image"),
    "chunk damaged": (flipped_bytes_h5, "expected an h5 file"),
    "NaN": (changed(image=one(np.nan)), "expected finite pixels, found NaN"),
    "label above": (changed(label=one(9)), "expected labels 0 to 8 (--num_classes), found 0 to 9"),
    "label between": (changed(label=one(2.5)), "expected whole numbers"),
    "raw HU": (changed(image=lambda image: image * 400 - 125), "expected [0, 1]; raw HU?"),
    "part of the geometry": (part_of_the_geometry, "origin missing"),
}


@pytest.mark.parametrize("way", BAD_VOLUMES)
def test_a_bad_second_volume_leaves_no_results(test_program, data, tmp_path, way):
    damage, said = BAD_VOLUMES[way]
    path = data / "test_vol_h5" / "case0022.npy.h5"
    damage(path)
    test_program("--is_savenii").refused(path, "case0022" if way != "part of the geometry" else path, said)
    assert not (tmp_path / "results").exists()


def test_a_bad_volume_leaves_a_folder_of_the_users_as_it_was(test_program, data, tmp_path):
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "notes.txt").write_text("mine")
    changed(image=one(np.nan))(data / "test_vol_h5" / "case0022.npy.h5")
    test_program().refused("case0022")
    assert [path.name for path in (tmp_path / "results").iterdir()] == ["notes.txt"]
    changed(image=one(0.5))(data / "test_vol_h5" / "case0022.npy.h5")
    assert test_program().code == 0
    assert {"notes.txt", "metrics.json"} <= {path.name for path in (tmp_path / "results").iterdir()}


@pytest.mark.parametrize("way", BAD_LISTS)
def test_a_bad_list_of_volumes(test_program, data, tmp_path, way):
    damage, said = BAD_LISTS[way]
    damage(data / "lists" / "test_vol.txt")
    test_program().refused(data / "lists", "test_vol.txt", said)
    assert not (tmp_path / "results").exists()


def test_a_results_folder_in_use(test_program, tmp_path):
    assert test_program().code == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "results").rglob("*")}
    test_program().refused(tmp_path / "results", "holds results already", "metrics.json", "--output_dir")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "results").rglob("*")} == before


def test_a_results_folder_that_is_a_file(test_program, tmp_path):
    (tmp_path / "results").write_text("precious")
    test_program().refused(tmp_path / "results", "--output_dir")
    assert (tmp_path / "results").read_text() == "precious"


def test_patients_that_were_trained_on_are_refused(test_program, data, tmp_path):
    manifest = json.loads((data / "manifest.json").read_text())
    manifest["cases"]["case0022"]["patient"] = "case0006"  # another scan of a patient of the training data
    (data / "manifest.json").write_text(json.dumps(manifest))
    test_program().refused(data / "lists" / "test_vol.txt", "were in the training data (case0006)", "--allow_overlap")
    assert not (tmp_path / "results").exists()
    assert test_program("--allow_overlap").code == 0
    assert (tmp_path / "results" / "metrics.json").is_file()


def test_cases_that_were_trained_on_are_refused_without_a_manifest(test_program, data, tmp_path):
    (data / "manifest.json").unlink()
    (data / "test_vol_h5" / "case0022.npy.h5").rename(data / "test_vol_h5" / "case0005.npy.h5")
    (data / "lists" / "test_vol.txt").write_text("case0008\ncase0005\n")
    test_program().refused(data / "lists" / "test_vol.txt", "were in the training data (case0005)")
    assert not (tmp_path / "results").exists()


def test_a_bad_img_size_of_testing(call, data, samed_tiny_file, sam_tiny_file, tmp_path):
    flags = ("--lora_ckpt", samed_tiny_file, "--ckpt", sam_tiny_file, "--volume_path", data, "--output_dir", tmp_path / "results")
    call("test", *flags, "--img_size", 500).refused("--img_size 500: expected a multiple of 16", "496", "512")
    assert not (tmp_path / "results").exists()


# --- a scan -------------------------------------------------------------------------------------------------------------------------------


BAD_SCANS = {
    "absent": (absent, "no such file"),
    "garbage": (garbage, "expected a NIfTI"),
    "half": (half, "truncated"),
    "git-lfs pointer": (git_lfs_pointer, "git-lfs pointer"),
    "web page": (web_page, "web page"),
    "empty": (empty, "empty"),
}


@pytest.mark.parametrize("way", BAD_SCANS)
def test_a_bad_scan(call, raw, trained, tmp_path, way):
    damage, said = BAD_SCANS[way]
    scan = Path(shutil.copy(raw / "Training" / "img" / "img0008.nii.gz", tmp_path / "scan.nii.gz"))
    damage(scan)
    call("infer_demo", "-i", scan, "-o", tmp_path / "out", "--checkpoint", trained / "final.safetensors").refused(scan, said)
    assert not (tmp_path / "out").exists()


def test_bad_flags_of_inference(call, raw, trained, tmp_path):
    scan, path = raw / "Training" / "img" / "img0008.nii.gz", trained / "final.safetensors"
    common = ("-i", scan, "-o", tmp_path / "out", "--checkpoint", path)
    call("infer_demo", *common, "--img_size", 500).refused("--img_size 500: expected a multiple of 16")
    call("infer_demo", *common, "--batch_size", 0).refused("--batch_size 0: expected at least 1")
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").write_text("precious")
    call("infer_demo", *common).refused(tmp_path / "out", "expected a folder", "found a file")
    assert (tmp_path / "out").read_text() == "precious"


# --- the command line itself --------------------------------------------------------------------------------------------------------------

REQUIRED = {"train": ("--root_path", "d", "--output", "o"), "test": ("--checkpoint", "f"), "infer_demo": ()}


@pytest.mark.parametrize("program", REQUIRED)
@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--no_such_flag", "1"), "--no_such_flag"),
        (("--img_siz", "512"), "--img_siz"),  # no guessing
        (("--vit_name", "vit_g"), "vit_g"),
        (("--module", "sam"), "sam_lora_image_encoder_mask_decoder"),
        (("--rank", "four"), "four"),
        (("--device",), "--device"),
        (("--config",), "--config"),
        (("--config", "none.json"), "none.json"),
    ],
)
def test_a_bad_command_line(call, program, flags, said, tmp_path):
    call(program, *REQUIRED[program], *flags).refused(said)
    assert not any(tmp_path.iterdir())


def test_a_required_flag_is_missing(call, tmp_path):
    call("test").refused("required", REQUIRED["test"][0])
    assert not any(tmp_path.iterdir())


def test_data_that_are_not_at_their_default_place(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    call("train", "--ckpt", "none").refused("data/Synapse", "preprocess/")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "expected a JSON object"),
        ("[1]", "expected flags"),
        ('{"no_such_flag": 1}', "no_such_flag"),
        ('{"batch_size": "many"}', "batch_size"),
        ('{"seed": null}', "seed"),
        ('{"root_path": null}', "root_path"),
        ('{"root_path": ["a", "b"]}', "root_path"),
        ('{"warmup": "no"}', "warmup: expected true or false, found 'no'"),
        ('{"no-warmup": true}', "no-warmup"),
        ('{"vit_name": "vit_g"}', "vit_g"),
        ('{"img_size": 500}', "--img_size 500"),
    ],
)
def test_a_bad_config_file(call, content, said, tmp_path):
    (tmp_path / "flags.json").write_text(content)
    error = call("train", "--config", "flags.json", "--output", "o", *(() if "root_path" in content else ("--root_path", "d"))).refused(said)
    assert "flags.json" in error or "--img_size" in error
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(("program", "flags"), [("train", ["--root_path", "a", "--output", "b"]), ("test", ["--checkpoint", "c.safetensors"])])
def test_several_processes_that_nobody_started(program, flags, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.safetensors").write_bytes(b"")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    assert importlib.import_module(program).main(flags) == 2
    assert capsys.readouterr().err.startswith("error: WORLD_SIZE=2: expected torchrun's")
