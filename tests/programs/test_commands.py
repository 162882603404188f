"""The programs from end to end: raw phantoms, preprocessing, training, testing and segmenting a scan, and SAMed's commands as published."""

import csv
import importlib
import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import h5py
import nibabel as nib
import numpy as np
import pytest
import torch
from medpy.metric import binary
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from scipy.ndimage import zoom

from pgsam import load_model

ROOT = Path(__file__).resolve().parents[2]
ORGANS = ["spleen", "right kidney", "left kidney", "gallbladder", "liver", "stomach", "aorta", "pancreas"]
SYNAPSE8 = np.array([0, 1, 2, 3, 4, 0, 5, 6, 7, 0, 0, 8, 0, 0])  # BTCV label -> class (TransUNet)
METRICS = {"dsc", "hd95_vox", "hd95_mm", "hd95_mm_penalised", "assd_mm"}
SAMED, SAMED_S = "sam_lora_image_encoder", "sam_lora_image_encoder_mask_decoder"


def nifti(path):
    """Voxels in the order of the file (i, j, k), and the affine."""
    image = nib.load(path)
    return np.asanyarray(image.dataobj), image.affine


def strict_json(path):
    """JSON without NaN and Infinity, which other readers refuse."""

    def refuse(constant):
        raise ValueError(constant)

    return json.loads(path.read_text(), parse_constant=refuse)


def history(run):
    with (run / "history.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def weights(run):
    return load_file(run / "final.safetensors")


def card(run):
    with safe_open(run / "final.safetensors", framework="pt") as file:
        return json.loads(file.metadata()["pgsam"])


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def published_labels(model, volume, input_size):
    """SAMed's test of one volume [D, H, W] with scipy: cubic to input_size, cubic to img_size, argmax of the masks, nearest back."""
    labels = np.zeros(volume.shape, np.uint8)
    for index, image in enumerate(volume):
        for size in (input_size, model.img_size):
            image = zoom(image, (size / image.shape[0], size / image.shape[1]), order=3)
        with torch.inference_mode():
            masks = model(torch.from_numpy(image)[None, None].repeat(1, 3, 1, 1))["masks"]
        found = torch.softmax(masks, dim=1).argmax(dim=1)[0].numpy()
        labels[index] = zoom(found, (volume.shape[1] / len(found), volume.shape[2] / len(found)), order=0)
    return labels


# --- preprocess, train, test, segment -----------------------------------------------------------------------------------------------------


def test_training_leaves_a_complete_run_folder(trained, prepared):
    expected = {"config.json", "command.txt", "env.json", "log.txt", "steps.csv", "history.csv", "tensorboard", "last.pt", "prev.pt"}
    expected |= {"final.safetensors"}
    assert {path.name for path in trained.iterdir()} == expected
    rows = history(trained)
    assert [(int(row["epoch"]), int(row["step"])) for row in rows] == [(epoch, 5 * epoch) for epoch in range(1, 13)]  # 30 slices by 6
    assert float(rows[-1]["loss"]) < 0.6 * float(rows[0]["loss"])
    command = shlex.split((trained / "command.txt").read_text())
    assert command[:4] == ["python", "train.py", "--root_path", str(prepared)]
    flags = strict_json(trained / "config.json")["flags"]
    assert (flags["root_path"], flags["max_epochs"], flags["warmup"], flags["AdamW"]) == (str(prepared), 12, True, True)
    assert strict_json(trained / "env.json")["device"] == "cpu"
    assert any((trained / "tensorboard").iterdir())


def test_the_release_file_says_what_a_user_needs(trained):
    stored = card(trained)
    assert stored["module"] == SAMED
    assert (stored["vit_name"], stored["img_size"], stored["input_size"]) == ("vit_tiny", 64, 56)
    assert stored["class_names"] == ORGANS
    assert (stored["orientation"], stored["image_kind"], stored["window"]) == ("LAS", "ct_window", [-125, 275])
    assert stored["training_cases"] == stored["training_patients"] == ["case0005", "case0006", "case0007"]
    assert stored["sam_sha256"] is None


@pytest.fixture(scope="session")
def tested(trained, prepared, tmp_path_factory):
    """The results folder of the trained model, with NIfTI."""
    import test

    folder = tmp_path_factory.mktemp("tested") / "results"
    flags = ["--checkpoint", trained / "final.safetensors", "--volume_path", prepared, "--output_dir", folder, "--is_savenii"]
    assert test.main([*map(str, flags), "--device", "cpu"]) == 0
    return folder


def test_the_results_folder_is_as_designed(tested):
    cases = ["case0008", "case0022"]
    assert {path.name for path in tested.iterdir()} == {"metrics.json", "metrics.csv", "report.html", "test_log", "predictions", "overlays"}
    predictions = {f"{case}_{kind}.nii.gz" for case in cases for kind in ("pred", "img", "gt")}
    assert {path.name for path in (tested / "predictions").iterdir()} == predictions
    results = strict_json(tested / "metrics.json")
    assert set(results) == {"settings", "cases", "summary"}
    assert results["settings"]["run"]["seconds"] > 0
    assert list(results["cases"]) == cases
    for organs in results["cases"].values():
        assert list(organs) == ORGANS
        assert all(set(row) == METRICS | {"n_pred", "n_ref"} for row in organs.values())
    assert set(results["summary"]) == {"strict", "transunet"}
    for summary in results["summary"].values():
        assert list(summary["organs"]) == ORGANS
        rows = [*summary["organs"].values(), summary["mean"]]
        assert all(set(row["dsc"]) == {"mean", "ci95", "n", "n_undefined"} for row in rows)
        assert all({"n_missed", "n_false_positive"} <= set(row) for row in summary["organs"].values())
    with (tested / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["case"], row["organ"]) for row in rows] == [(case, organ) for case in cases for organ in ORGANS]
    for row in rows:
        for name, value in results["cases"][row["case"]][row["organ"]].items():
            assert row[name] == ("" if value is None else str(value))
    log = (tested / "test_log" / "log.txt").read_text()
    for line in (
        "idx 0 case case0008 mean_dice",
        "Mean class 5 name liver mean_dice",
        "protocol: strict",
        "protocol: transunet",
        "Testing Finished!",
    ):
        assert line in log
    for case in cases:
        with Image.open(tested / "overlays" / f"{case}.png") as picture:
            assert min(picture.size) > 100


@pytest.mark.parametrize("number", [8, 22])
def test_the_saved_reference_is_the_raw_label_on_the_grid_of_the_scan(tested, raw, number):
    label, affine = nifti(raw / "Training" / "label" / f"label{number:04d}.nii.gz")
    image, _ = nifti(raw / "Training" / "img" / f"img{number:04d}.nii.gz")
    for kind in ("pred", "gt", "img"):
        assert np.allclose(nifti(tested / "predictions" / f"case{number:04d}_{kind}.nii.gz")[1], affine, atol=1e-4)
    np.testing.assert_array_equal(nifti(tested / "predictions" / f"case{number:04d}_gt.nii.gz")[0], SYNAPSE8[label])
    scaled = (np.clip(image.astype(np.float32), -125, 275) + 125) / 400
    np.testing.assert_allclose(nifti(tested / "predictions" / f"case{number:04d}_img.nii.gz")[0], scaled, atol=1e-6)


def test_the_scores_are_those_of_the_saved_files(tested):
    results = strict_json(tested / "metrics.json")
    compared = 0
    for case, organs in results["cases"].items():
        prediction, affine = nifti(tested / "predictions" / f"{case}_pred.nii.gz")
        reference, _ = nifti(tested / "predictions" / f"{case}_gt.nii.gz")
        for label, organ in enumerate(ORGANS, start=1):
            a, b, row = prediction == label, reference == label, organs[organ]
            assert (row["n_pred"], row["n_ref"]) == (a.sum(), b.sum())
            if a.any() and b.any():
                spacing = np.sqrt((affine[:3, :3] ** 2).sum(axis=0))
                assert row["dsc"] == pytest.approx(binary.dc(a, b), abs=1e-12)
                assert row["hd95_vox"] == pytest.approx(binary.hd95(a, b), rel=1e-6)
                assert row["hd95_mm"] == pytest.approx(binary.hd95(a, b, spacing), rel=1e-4)  # spacing is float32 in the file
                compared += 1
            else:
                assert (row["dsc"], row["hd95_vox"]) == (0, None)
    assert compared >= 6
    for organ in ORGANS:
        dice = [organs[organ]["dsc"] for organs in results["cases"].values()]
        assert results["summary"]["strict"]["organs"][organ]["dsc"]["mean"] == pytest.approx(np.mean(dice))


def test_a_trained_model_finds_the_liver_of_a_phantom_it_has_not_seen(tested):
    results = strict_json(tested / "metrics.json")
    assert results["summary"]["strict"]["organs"]["liver"]["dsc"]["mean"] > 0.25


def test_predictions_follow_the_published_slice_protocol(tested, trained, prepared):
    model = load_model(trained / "final.safetensors", device="cpu")
    with h5py.File(prepared / "test_vol_h5" / "case0008.npy.h5") as file:
        expected = published_labels(model, file["image"][()], input_size=56)
    found, _ = nifti(tested / "predictions" / "case0008_pred.nii.gz")
    assert len(np.unique(expected)) > 3
    assert np.mean(found.transpose(2, 1, 0) == expected) > 0.9999


def test_a_scan_gets_the_labels_that_testing_gave_it(call, tested, trained, raw, tmp_path):
    scan = shutil.copy(raw / "Training" / "img" / "img0008.nii.gz", tmp_path / "scan.nii.gz")
    result = call("infer_demo", "-i", scan, "-o", tmp_path / "out", "--checkpoint", trained / "final.safetensors", "--device", "cpu")
    assert (result.code, result.err) == (0, "")
    tables = {"labels_itksnap.txt", "labels_slicer.ctbl", "volumes.csv", "run.json"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"scan_seg.nii.gz", "scan.png", *tables}
    labels, affine = nifti(tmp_path / "out" / "scan_seg.nii.gz")
    np.testing.assert_array_equal(labels, nifti(tested / "predictions" / "case0008_pred.nii.gz")[0])
    assert np.issubdtype(labels.dtype, np.integer)
    assert np.allclose(affine, nifti(scan)[1], atol=1e-4)
    liver_ml = np.count_nonzero(labels == 5) * abs(np.linalg.det(affine[:3, :3])) / 1000
    assert liver_ml > 0
    assert f"{liver_ml:.1f} ml" in next(line for line in result.out.splitlines() if line.startswith("liver"))
    with Image.open(tmp_path / "out" / "scan.png") as picture:
        assert min(picture.size) > 100


@pytest.mark.parametrize("axes", ["RPI", "PIR"])
def test_a_scan_stored_another_way_gets_the_same_labels_in_its_own_way(call, tested, trained, raw, tmp_path, axes):
    scan = nib.load(raw / "Training" / "img" / "img0008.nii.gz")
    turn = nib.orientations.ornt_transform(nib.io_orientation(scan.affine), nib.orientations.axcodes2ornt(axes))
    turned = scan.as_reoriented(turn)
    nib.save(turned, tmp_path / "turned.nii")
    result = call(
        "infer_demo", "-i", tmp_path / "turned.nii", "-o", tmp_path / "out", "--checkpoint", trained / "final.safetensors", "--device", "cpu"
    )
    assert (result.code, result.err) == (0, "")
    labels = nib.load(tmp_path / "out" / "turned_seg.nii.gz")
    assert nib.aff2axcodes(labels.affine) == tuple(axes)
    assert np.allclose(labels.affine, turned.affine, atol=1e-4)
    back = labels.as_reoriented(nib.orientations.ornt_transform(nib.io_orientation(labels.affine), nib.io_orientation(scan.affine)))
    np.testing.assert_array_equal(np.asanyarray(back.dataobj), nifti(tested / "predictions" / "case0008_pred.nii.gz")[0])


# --- LoRA on a SAM file -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("module", "others"), [(SAMED, 167), (SAMED_S, 113)])
def test_lora_from_a_sam_file(call, data, raw, sam_tiny_file, vit_tiny, tmp_path, module, others):
    run, sam = tmp_path / "run", torch.load(sam_tiny_file, weights_only=True)
    result = call("train", "--root_path", data, "--output", run, *vit_tiny, "--module", module, "--ckpt", sam_tiny_file, "--max_epochs", 2, "--AdamW")
    assert (result.code, result.err) == (0, "")
    stored = weights(run)
    # SAMed's vit_b files have 215 and 161 tensors: four factors for each of 12 blocks, and these others whatever the image encoder.
    assert len(stored) == 4 * 6 + others
    assert sum(name.startswith("image_encoder.") for name in stored) == 4 * 6
    assert all(".lora_" in name for name in stored if name.startswith("image_encoder."))
    if module == SAMED_S:
        assert all(".lora_" in name for name in stored if name.startswith("mask_decoder.transformer."))
    assert any(value.any() for name, value in stored.items() if ".lora_b." in name)  # they start at zero
    model = load_model(run / "final.safetensors", ckpt=sam_tiny_file, device="cpu")
    frozen = [name for name in model.state_dict() if name not in stored]
    resized = [name for name in frozen if model.state_dict()[name].shape != sam[name].shape]
    assert all(torch.equal(model.state_dict()[name], sam[name]) for name in frozen if name not in resized)
    assert set(resized) == {"image_encoder.pos_embed", *(f"image_encoder.blocks.{i}.attn.rel_pos_{axis}" for i in (2, 5) for axis in "hw")}
    flags = ("--checkpoint", run / "final.safetensors", "--volume_path", data, "--module", module)
    call("test", *flags, "--output_dir", tmp_path / "no").refused("final.safetensors", "sha256", card(run)["sam_sha256"], "--ckpt")
    result = call("test", *flags, "--output_dir", tmp_path / "results", "--ckpt", sam_tiny_file, "--is_savenii")
    assert (result.code, result.err) == (0, "")
    scan = raw / "Training" / "img" / "img0008.nii.gz"
    inferred = call("infer_demo", "-i", scan, "-o", tmp_path / "out", "--checkpoint", run / "final.safetensors", "--ckpt", sam_tiny_file)
    assert (inferred.code, inferred.err) == (0, "")
    predicted, _ = nifti(tmp_path / "results" / "predictions" / "case0008_pred.nii.gz")
    np.testing.assert_array_equal(nifti(tmp_path / "out" / "img0008_seg.nii.gz")[0], predicted)


def test_another_sam_file_than_in_training_has_to_be_asked_for(call, data, sam_tiny_file, vit_tiny, tmp_path):
    run = tmp_path / "run"
    assert call("train", "--root_path", data, "--output", run, *vit_tiny, "--ckpt", sam_tiny_file, "--max_epochs", 1).code == 0
    other = {name: 1.01 * value for name, value in torch.load(sam_tiny_file, weights_only=True).items()}
    torch.save(other, tmp_path / "other.pth")
    flags = ("--checkpoint", run / "final.safetensors", "--volume_path", data, "--output_dir", tmp_path / "results", "--ckpt", tmp_path / "other.pth")
    call("test", *flags).refused("other.pth", "expected", "found sha256", "--allow_other_base")
    assert not (tmp_path / "results").exists()
    assert call("test", *flags, "--allow_other_base").code == 0
    assert (tmp_path / "results" / "metrics.json").is_file()


def test_training_goes_on_from_the_tensors_of_another_run(call, data, sam_tiny_file, vit_tiny, tmp_path):
    common = ("--root_path", data, *vit_tiny, "--ckpt", sam_tiny_file, "--max_epochs", 1)
    assert call("train", *common, "--output", tmp_path / "first").code == 0
    start = ("--lora_ckpt", tmp_path / "first" / "final.safetensors")
    assert call("train", *common, "--output", tmp_path / "still", *start, "--base_lr", 1e-30).code == 0
    assert same(weights(tmp_path / "still"), weights(tmp_path / "first"))
    assert call("train", *common, "--output", tmp_path / "second", *start).code == 0
    assert not same(weights(tmp_path / "second"), weights(tmp_path / "first"))


# --- flags --------------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def short(call, data, from_scratch, tmp_path):
    """`short(name, *flags)` trains four steps and returns the final weights."""
    slices = data / "lists" / "train.txt"
    slices.write_text("".join(slices.read_text().splitlines(keepends=True)[2:]))  # four

    def run(name, *flags, root=data):
        result = call("train", "--root_path", root, "--output", tmp_path / name, *from_scratch, "--batch_size", 2, "--max_epochs", 2, *flags)
        assert (result.code, result.err) == (0, "")
        return weights(tmp_path / name)

    return run


def test_what_must_not_change_the_weights(short, data, tmp_path):
    reference = short("reference")
    assert same(reference, short("again"))
    assert same(reference, short("workers", "--num_workers", 2))
    assert same(reference, short("subfolder", root=data / "train_npz"))
    assert same(reference, short("lists", "--list_dir", data / "lists"))
    assert same(reference, short("explicit", "--module", SAMED, "--num_classes", 8, "--rank", 4, "--no-warmup", "--no-AdamW", "--stop_epoch", 2))


def test_every_flag_of_training_changes_the_weights(short):
    found = {"": short("reference")}
    flags = [
        "--seed 1", "--augment none", "--batch_size 3", "--base_lr 0.004", "--warmup", "--AdamW", "--weight_decay 0.1", "--dice_param 0.5",
        "--loss_resolution both", "--max_epochs 3 --stop_epoch 2", "--stop_epoch 1", "--warmup --warmup_period 3", "--input_size 64",
        "--img_size 48", "--rank 2", "--tune full", f"--module {SAMED_S}",
    ]  # fmt: skip
    for number, flag in enumerate(flags):
        found[flag] = short(f"run{number}", *flag.split())
        for other in list(found)[:-1]:
            assert not same(found[flag], found[other]), f"{flag} gives the weights of {other or 'no flag'}"


def test_volumes_are_found_by_folder_or_subfolder(call, trained, data, tmp_path):
    cases = []
    for number, where in enumerate([("--volume_path", data), ("--volume_path", data / "test_vol_h5"), ("--data_dir", data)]):
        output = tmp_path / f"results{number}"
        assert call("test", "--lora_ckpt", trained / "final.safetensors", *where, "--output_dir", output).code == 0
        cases.append(strict_json(output / "metrics.json")["cases"])
        assert not (output / "predictions").exists()  # without --is_savenii
    assert cases[0] == cases[1] == cases[2]


def test_the_list_says_what_is_tested(call, trained, data, tmp_path):
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / "test_vol.txt").write_text("case0022\n")
    flags = ("--checkpoint", trained / "final.safetensors", "--volume_path", data, "--output_dir", tmp_path / "results")
    assert call("test", *flags, "--list_dir", tmp_path / "lists").code == 0
    assert list(strict_json(tmp_path / "results" / "metrics.json")["cases"]) == ["case0022"]


def test_the_batch_of_testing_changes_no_label(call, trained, data, tmp_path):
    flags = ("--checkpoint", trained / "final.safetensors", "--volume_path", data, "--is_savenii", "--device", "cpu")
    for size in (1, 4):
        assert call("test", *flags, "--output_dir", tmp_path / str(size), "--batch_size", size).code == 0
    one, four = (nifti(tmp_path / size / "predictions" / "case0022_pred.nii.gz")[0] for size in "14")
    assert np.mean(one == four) > 0.9999


def test_a_config_file_lies_under_the_command_line(call, short, data, tmp_path):
    content = {
        "root_path": str(data), "output": str(tmp_path / "unused"), "module": SAMED, "vit_name": "vit_tiny", "ckpt": "none", "img_size": 64,
        "input_size": 56, "batch_size": 2, "max_epochs": 2, "device": "cpu", "warmup": True, "base_lr": 0.001, "AdamW": False, "seed": 7,
    }  # fmt: skip
    (tmp_path / "flags.json").write_text(json.dumps(content))
    expected = short("flags", "--warmup", "--base_lr", 0.002, "--seed", 7)
    result = call("train", "--config", tmp_path / "flags.json", "--output", tmp_path / "config", "--base_lr", 0.002)
    assert (result.code, result.err) == (0, "")
    assert same(weights(tmp_path / "config"), expected)
    assert not (tmp_path / "unused").exists()
    assert call("train", "--config", tmp_path / "flags.json", "--output", tmp_path / "off", "--no-warmup").code == 0
    assert same(weights(tmp_path / "off"), short("cold", "--base_lr", 0.001, "--seed", 7))


def test_a_config_file_also_serves_testing_and_inference(call, trained, data, raw, tmp_path):
    content = {
        "checkpoint": str(trained / "final.safetensors"),
        "volume_path": str(data),
        "output_dir": str(tmp_path / "results"),
        "is_savenii": True,
    }
    (tmp_path / "test.json").write_text(json.dumps(content))
    assert call("test", "--config", tmp_path / "test.json").code == 0
    predicted, _ = nifti(tmp_path / "results" / "predictions" / "case0008_pred.nii.gz")
    scan = raw / "Training" / "img" / "img0008.nii.gz"
    (tmp_path / "infer.json").write_text(json.dumps({"checkpoint": content["checkpoint"], "input": str(scan), "output": str(tmp_path / "out")}))
    assert call("infer_demo", "--config", tmp_path / "infer.json").code == 0
    np.testing.assert_array_equal(nifti(tmp_path / "out" / "img0008_seg.nii.gz")[0], predicted)


# --- other people's data ------------------------------------------------------------------------------------------------------------------


def test_an_nnunet_dataset_reaches_a_score(call, raw, from_scratch, tmp_path):
    nnunet, prepared = tmp_path / "Dataset001_Two", tmp_path / "prepared"
    names = ["imagesTr", "labelsTr", "imagesTs", "labelsTs"]
    for name in names:
        (nnunet / name).mkdir(parents=True)
    (nnunet / "dataset.json").write_text(
        json.dumps({"channel_names": {"0": "CT"}, "labels": {"background": 0, "liver": 1, "left": 2}, "numTraining": 2, "file_ending": ".nii.gz"})
    )
    labels = {}
    for number, split in ((5, "Tr"), (6, "Tr"), (8, "Ts")):
        image = nib.load(raw / "Training" / "img" / f"img{number:04d}.nii.gz")
        label = nib.load(raw / "Training" / "label" / f"label{number:04d}.nii.gz")
        organs = np.asanyarray(label.dataobj)
        two = nib.Nifti1Image(((organs == 6) + 2 * ((organs == 1) | (organs == 3))).astype(np.uint8), label.affine)
        turn = nib.orientations.ornt_transform(nib.io_orientation(image.affine), nib.orientations.axcodes2ornt("RAS" if number != 8 else "PIR"))
        nib.save(image.as_reoriented(turn), nnunet / f"images{split}" / f"patient{number}_0000.nii.gz")
        labels[number] = two.as_reoriented(turn)
        nib.save(labels[number], nnunet / f"labels{split}" / f"patient{number}.nii.gz")
    assert call("preprocess.nifti", "--nnunet", nnunet, "--output", prepared, "--num_workers", 1).code == 0
    assert call("train", "--root_path", prepared, "--output", tmp_path / "run", *from_scratch, "--max_epochs", 1).code == 0
    flags = ("--checkpoint", tmp_path / "run" / "final.safetensors", "--volume_path", prepared, "--output_dir", tmp_path / "results", "--is_savenii")
    assert call("test", *flags).code == 0
    assert list(strict_json(tmp_path / "results" / "metrics.json")["cases"]["patient8"]) == ["liver", "left"]
    reference, affine = nifti(tmp_path / "results" / "predictions" / "patient8_gt.nii.gz")
    np.testing.assert_array_equal(reference, np.asanyarray(labels[8].dataobj))
    assert np.allclose(affine, labels[8].affine, atol=1e-4)


def test_a_list_of_pairs_reaches_a_score(call, raw, from_scratch, tmp_path):
    lines = ["case,image,label,split,patient"]
    for name, number, split in (("a1", 5, "train"), ("a2", 6, "train"), ("b", 8, "test")):
        image, label = (raw / "Training" / kind / f"{kind}{number:04d}.nii.gz" for kind in ("img", "label"))
        lines.append(f"{name},{image},{label},{split},{name[0]}")
    (tmp_path / "pairs.csv").write_text("\n".join(lines) + "\n")
    prepared = tmp_path / "prepared"
    argv = ("--pairs", tmp_path / "pairs.csv", "--output", prepared, "--label_map", "synapse8", "--window", -200, 300, "--num_workers", 1)
    assert call("preprocess.nifti", *argv).code == 0
    assert call("train", "--root_path", prepared, "--output", tmp_path / "run", *from_scratch, "--max_epochs", 1).code == 0
    stored = card(tmp_path / "run")
    assert (stored["training_cases"], stored["training_patients"], stored["window"]) == (["a1", "a2"], ["a"], [-200, 300])
    flags = ("--checkpoint", tmp_path / "run" / "final.safetensors", "--volume_path", prepared, "--output_dir", tmp_path / "results", "--is_savenii")
    assert call("test", *flags).code == 0
    results = strict_json(tmp_path / "results" / "metrics.json")
    label, _ = nifti(raw / "Training" / "label" / "label0008.nii.gz")
    assert {organ: row["n_ref"] for organ, row in results["cases"]["b"].items()} == {
        organ: np.count_nonzero(SYNAPSE8[label] == i) for i, organ in enumerate(ORGANS, start=1)
    }
    # The window goes with the checkpoint: a scan in HU gives the prediction that the prepared volume gave.
    scan = raw / "Training" / "img" / "img0008.nii.gz"
    assert call("infer_demo", "-i", scan, "-o", tmp_path / "out", "--checkpoint", tmp_path / "run" / "final.safetensors").code == 0
    np.testing.assert_array_equal(nifti(tmp_path / "out" / "img0008_seg.nii.gz")[0], nifti(tmp_path / "results" / "predictions" / "b_pred.nii.gz")[0])


# --- as programs --------------------------------------------------------------------------------------------------------------------------

PROGRAMS = {
    "train.py": ("--root_path", "--stop_epoch", "--no-AdamW"),
    "test.py": ("--lora_ckpt", "--is_savenii", "--data_dir"),
    "infer_demo.py": ("--input", "--checkpoint"),
    "preprocess/synapse.py": ("--src_path", "--dst_path"),
    "preprocess/flare22.py": ("--src_path", "--require_all"),
    "preprocess/nifti.py": ("--pairs", "--nnunet", "--window"),
    "preprocess/verify_dataset.py": ("--kind", "--patient_regex", "--output"),
    "scripts/download_weights.py": ("--output", "--base_url"),
    "datasets/phantom.py": ("--cases", "--spacing"),
}


@pytest.mark.parametrize("script", PROGRAMS)
def test_help_is_the_manual_and_all_flags(script, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "150")
    program = importlib.import_module(script.removesuffix(".py").replace("/", "."))
    with pytest.raises(SystemExit) as left:
        program.main(["--help"])
    out, err = capsys.readouterr()
    assert (left.value.code, err) == (0, "")
    assert program.__doc__.strip() in out
    for flag in PROGRAMS[script]:
        assert flag in out


def test_a_script_in_a_subfolder_runs_from_another_folder(shell, tmp_path):
    for script in ("preprocess/synapse.py", "preprocess/nifti.py", "datasets/phantom.py"):
        process = shell(tmp_path, script, "--help")
        out, err = process.communicate(timeout=120)
        assert (process.returncode, err) == (0, ""), script
        assert PROGRAMS[script][0] in out
    assert not any(tmp_path.iterdir())


@pytest.mark.slow
def test_all_steps_from_another_folder(shell, from_scratch, tmp_path):
    def run(script, *argv):
        process = shell(tmp_path, script, *argv)
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, (script, err)
        return out

    assert all(PROGRAMS[script][0] in run(script, "--help") for script in PROGRAMS)
    run("datasets/phantom.py", "--output", "raw", "--cases", 5, 8, "--shape", 4, 48, 48)
    assert "4 training slices of 1 cases, 1 test volumes, 8 classes" in run(
        "preprocess/synapse.py", "--src_path", "raw", "--dst_path", "data/Synapse", "--num_workers", 2
    )
    lines = [
        f"{case},raw/Training/img/img{n:04d}.nii.gz,raw/Training/label/label{n:04d}.nii.gz,{split}"
        for case, n, split in (("a", 5, "train"), ("b", 8, "test"))
    ]
    (tmp_path / "pairs.csv").write_text("\n".join(["case,image,label,split", *lines]))
    assert "4 training slices of 1 cases, 1 test volumes" in run("preprocess/nifti.py", "--pairs", "pairs.csv", "--output", "data/mine")
    run("train.py", "--root_path", "data/Synapse", "--output", "runs/tiny", *from_scratch, "--max_epochs", 1)
    out = run(
        "test.py", "--checkpoint", "runs/tiny/final.safetensors", "--volume_path", "data/Synapse", "--output_dir", "results/tiny", "--is_savenii"
    )
    assert "Testing Finished!" in out
    scan = "raw/Training/img/img0008.nii.gz"
    assert "liver" in run("infer_demo.py", "-i", scan, "-o", "out", "--checkpoint", "runs/tiny/final.safetensors")
    predicted, affine = nifti(tmp_path / "results/tiny/predictions/case0008_pred.nii.gz")
    np.testing.assert_array_equal(nifti(tmp_path / "out/img0008_seg.nii.gz")[0], predicted)
    assert np.allclose(nifti(tmp_path / scan)[1], affine, atol=1e-4)
    assert {path.name for path in tmp_path.iterdir()} == {"raw", "data", "pairs.csv", "runs", "results", "out"}


IMPORT_ALL = """
import argparse, importlib, random, sys
from pathlib import Path
import numpy, torch

root = Path(sys.argv[1])
sys.argv = ["program", "--no-such-flag"]
sys.dont_write_bytecode = True
sys.path.insert(0, str(root))
packages = [path for folder in ("pgsam", "datasets", "preprocess", "scripts") for path in sorted((root / folder).rglob("*.py"))]
paths = [*(root / f"{name}.py" for name in ("train", "test", "infer_demo")), *packages]
names = [".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__") for path in paths]

def refuse(what):
    def refusal(*args, **kwargs):
        raise SystemExit(f"an import {what}")
    return refusal

def watch(event, args):
    ours = event == "open" and isinstance(args[0], str) and str(root) in args[0] and "site-packages" not in args[0]  # .venv lies in the checkout
    if ours and not args[0].endswith((".py", ".pyc")):
        raise SystemExit(f"an import opened {args[0]}")

def state():
    kernels = torch.are_deterministic_algorithms_enabled(), torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled()
    return random.getstate(), str(numpy.random.get_state()), torch.get_rng_state().tolist(), kernels

argparse.ArgumentParser.parse_known_args = refuse("parsed the command line")
torch.cuda._lazy_init = torch._C._cuda_init = refuse("touched the GPU")
sys.addaudithook(watch)
before = state()
for name in names:
    module = importlib.import_module(name)
    if module.__file__ is None or not module.__file__.startswith(str(root)):
        raise SystemExit(f"{name} is not ours but {module.__file__}")
if state() != before:
    raise SystemExit("an import changed a random generator or a setting of torch")
if len(names) < 25:
    raise SystemExit(f"expected all modules, found {names}")
"""


def test_importing_has_no_effect(tmp_path):
    process = subprocess.run([sys.executable, "-c", IMPORT_ALL, str(ROOT)], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (process.returncode, process.stdout, process.stderr) == (0, "", "")
    assert not any(tmp_path.iterdir())


# --- SAMed's README -----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def samed_folder(raw, sam_vit_b_file, tmp_path, monkeypatch):
    """A working folder as SAMed's users have it (its files hold image and label only), made the current one; a volume has two slices."""
    folder = tmp_path / "SAMed"
    for name in ("checkpoints", "testset/test_vol_h5", "train_npz", "lists/lists_Synapse"):
        (folder / name).mkdir(parents=True)
    (folder / "checkpoints" / "sam_vit_b_01ec64.pth").symlink_to(sam_vit_b_file)
    for number in (5, 8):
        image, label = (nifti(raw / "Training" / kind / f"{kind}{number:04d}.nii.gz")[0][..., 5:7].transpose(2, 1, 0) for kind in ("img", "label"))
        image = (np.clip(image.astype(np.float32), -125, 275) + 125) / 400
        label = SYNAPSE8[label].astype(np.float32)
        if number == 8:
            with h5py.File(folder / "testset" / "test_vol_h5" / "case0008.npy.h5", "w") as file:
                file["image"], file["label"] = image, label
        else:
            for index in range(2):
                np.savez(folder / "train_npz" / f"case0005_slice{index:03d}.npz", image=image[index], label=label[index])
    (folder / "lists" / "lists_Synapse" / "train.txt").write_text("case0005_slice000\ncase0005_slice001\n")
    (folder / "lists" / "lists_Synapse" / "test_vol.txt").write_text("case0008\n")
    (folder / "lists" / "lists_Synapse" / "all.txt").write_text("case0005.npy.h5\ncase0008.npy.h5\n")
    monkeypatch.chdir(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("module", [SAMED, SAMED_S])
def test_samed_readme_test(call, synthetic, samed_folder, sam_vit_b_file, module):
    """python test.py --is_savenii --output_dir D --lora_ckpt F [--module sam_lora_image_encoder_mask_decoder]"""
    torch.save(synthetic.synthetic_samed(768, 12, 8, decoder_lora=module == SAMED_S), "checkpoints/epoch_159.pth")
    chosen = ("--module", module) if module == SAMED_S else ()
    result = call("test", "--is_savenii", "--output_dir", "output", "--lora_ckpt", "checkpoints/epoch_159.pth", *chosen)
    assert (result.code, result.err) == (0, "")
    for said in ("img_size 512", "input_size 224", "(-125.0, 275.0) HU", "LAS", ", ".join(ORGANS), "overlap with the test list cannot be checked"):
        assert said in result.out
    results = strict_json(Path("output/metrics.json"))
    model = results["settings"]["model"]
    assert (model["module"], model["vit_name"], model["rank"], model["class_names"]) == (module, "vit_b", 4, ORGANS)
    predicted, _ = nifti("output/predictions/case0008_pred.nii.gz")
    with h5py.File("testset/test_vol_h5/case0008.npy.h5") as file:
        expected = published_labels(load_model("checkpoints/epoch_159.pth", ckpt=sam_vit_b_file), file["image"][()], input_size=224)
        np.testing.assert_array_equal(nifti("output/predictions/case0008_gt.nii.gz")[0].transpose(2, 1, 0), file["label"][()])
    assert len(np.unique(expected)) > 3
    assert np.mean(predicted.transpose(2, 1, 0) == expected) > 0.9999


@pytest.mark.slow
def test_samed_readme_train(call, raw, samed_folder):
    """python train.py --root_path D --output O --warmup --AdamW with SAMed's module, which is our default no more, stopped after an epoch.

    Its model is tested and used on a scan.
    """
    result = call("train", "--module", SAMED, "--root_path", "train_npz", "--output", "output/sam", "--warmup", "--AdamW", "--stop_epoch", 1)
    assert (result.code, result.err) == (0, "")
    assert "302 loaded as they are" in result.out  # of 314; spec 1.3
    run = Path("output/sam")
    assert len(history(run)) == 1
    assert float(history(run)[0]["lr"]) == pytest.approx(0.005 / 250)  # SAMed's first step
    recipe = strict_json(run / "config.json")["recipe"]
    assert (recipe["max_epochs"], recipe["batch_size"], recipe["base_lr"], recipe["adamw"]) == (200, 12, 0.005, True)
    assert len(weights(run)) == 215
    tested = call("test", "--checkpoint", run / "final.safetensors", "--is_savenii", "--output_dir", "tested")
    assert (tested.code, tested.err) == (0, "")
    assert strict_json(Path("tested/metrics.json"))["settings"]["model"]["training_cases"] == ["case0005"]
    scan = nib.load(raw / "Training" / "img" / "img0008.nii.gz").slicer[:, :, 5:7]
    nib.save(scan, "scan.nii.gz")
    inferred = call("infer_demo", "-i", "scan.nii.gz", "-o", "out", "--checkpoint", run / "final.safetensors")
    assert (inferred.code, inferred.err) == (0, "")
    labels, affine = nifti("out/scan_seg.nii.gz")
    np.testing.assert_array_equal(labels, nifti("tested/predictions/case0008_pred.nii.gz")[0])
    assert np.allclose(affine, scan.affine, atol=1e-4)
