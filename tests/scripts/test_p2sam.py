"""scripts/p2sam.py on pictures and scans, with a network of random numbers: where results lie, what the tables say, and what is refused."""

import csv
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pytest
import safetensors.torch
import SimpleITK
import torch
from PIL import Image

import pgsam.engine.oneshot
from pgsam.engine.oneshot import random_backbone
from pgsam.engine.oneshot_files import PictureTask, Task, read_example
from pgsam.models.card import ModelCard
from pgsam.oneshot import P2SAM
from scripts import p2sam
from tests.dicom_files import write_dicom_series

NETWORK = ("--ckpt", "none", "--sam-type", "vit_tiny", "--img_size", "64", "--device", "cpu")
QUICK = (*NETWORK, "--max-num-pos", "2")
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """`run("--reference", ...)` gives exit code, stdout and stderr."""

    def call(*flags: object) -> tuple[int, str, str]:
        code = p2sam.main([str(flag) for flag in flags])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return call


def refused(outcome: tuple[int, str, str], *needles: object) -> None:
    code, _, error = outcome
    assert code == 2, error
    assert len(error.splitlines()) == 1, error
    for needle in needles:
        assert str(needle) in error, error


def table(folder: Path) -> list[dict[str, str]]:
    with (folder / "results.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def draw(path: Path, shape: tuple[int, int] = (40, 60), colour: tuple[int, int, int] = (200, 40, 40), seed: int = 0) -> np.ndarray:
    """A picture with a rectangle of `colour` on noise; its mask."""
    rng = np.random.default_rng(seed)
    image = rng.integers(60, 120, (*shape, 3)).astype(np.uint8)
    mask = np.zeros(shape, bool)
    mask[shape[0] // 4 : shape[0] // 2, shape[1] // 3 : shape[1] // 2] = True
    image[mask] = colour
    Image.fromarray(image).save(path)
    return mask


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """`a.png` with `a_mask.png` of one object and `two.png` of objects 3 and 7; a folder `new` with three other pictures."""
    mask = draw(tmp_path / "a.png")
    Image.fromarray(mask.astype(np.uint8) * 255).save(tmp_path / "a_mask.png")
    two = mask.astype(np.uint8) * 3
    two[30:38, 5:25] = 7
    Image.fromarray(two).save(tmp_path / "two.png")
    (tmp_path / "new").mkdir()
    draw(tmp_path / "new" / "b.png", (40, 60), seed=1)
    draw(tmp_path / "new" / "c.jpg", (70, 30), seed=2)
    Image.fromarray(np.random.default_rng(3).integers(0, 65535, (24, 48)).astype(np.uint16)).save(tmp_path / "new" / "d.png")
    return tmp_path


# --- pictures -----------------------------------------------------------------------------------------------------------------------------


def test_a_folder_of_pictures(pictures: Path, run: Run) -> None:
    out = pictures / "out"
    flags = ("--reference", pictures / "a.png", "--mask", pictures / "two.png", "--input", pictures / "new", "-o", out, *QUICK)
    code, printed, error = run(*flags, "--vis")
    assert (code, error) == (0, "")
    rows = table(out)
    assert [(row["case"], row["label"]) for row in rows] == [(name, label) for name in "bcd" for label in ("3", "7")]
    for name, size in (("b", (60, 40)), ("c", (30, 70)), ("d", (48, 24))):
        with Image.open(out / f"{name}_seg.png") as labels:
            assert (labels.mode, labels.size) == ("L", size)
            values = np.asarray(labels)
        assert set(np.unique(values)) <= {0, 3, 7}
        for row in rows:
            if row["case"] == name:
                assert int(row["pixels"]) == (values == int(row["label"])).sum()
                assert row["reason"] or float(row["distance"]) >= 0
        figures = sorted(path.name for path in (out / f"{name}_vis").iterdir())
        assert figures == ["label_3_object_3.png", "label_7_object_7.png"]
        with Image.open(out / f"{name}_vis" / figures[0]) as figure:
            assert figure.width == 1600
        assert (out / f"{name}.png").is_file()
    assert "b: " in printed
    facts = json.loads((out / "run.json").read_text())
    assert facts["objects"] == {"object 3": 3, "object 7": 7}
    assert facts["options"]["object 3"]["parts"] == [1, 2]
    assert set(facts["cases"]) == {"b", "c", "d"}
    assert run(*flags)[0] == 0  # again, without figures: those of before are gone
    assert not list(out.glob("*_vis/*.png"))


def test_labels_do_not_depend_on_company(pictures: Path, run: Run) -> None:
    """A picture gets the same labels alone as in a folder, and from a mask of 0 and 1, of 0 and 255, in colour and of a palette."""
    mask = np.asarray(Image.open(pictures / "a_mask.png")) > 0
    Image.fromarray(mask).save(pictures / "bits.png")
    Image.fromarray(mask.astype(np.uint8)).save(pictures / "ones.png")
    red = np.zeros((*mask.shape, 3), np.uint8)
    red[mask] = (128, 0, 0)
    Image.fromarray(red).save(pictures / "red.png")
    palette = Image.new("P", mask.shape[::-1])
    palette.putpalette([0, 0, 0, 9, 9, 9, 0, 200, 0])
    palette.putdata((mask * 2).ravel().tolist())
    palette.save(pictures / "palette.png")
    found = []
    for name, value in (("a_mask", 255), ("bits", 1), ("ones", 1), ("red", 255), ("palette", 2)):
        flags = ("--reference", pictures / "a.png", "--mask", pictures / f"{name}.png", "-o", pictures / name, *QUICK)
        assert run(*flags, "--input", pictures / "new" / "b.png")[0] == 0
        labels = np.asarray(Image.open(pictures / name / "b_seg.png"))
        assert set(np.unique(labels)) <= {0, value}
        found.append(labels > 0)
    assert run(*flags[: -len(QUICK) - 1], pictures / "all", *QUICK, "--input", pictures / "new")[0] == 0
    found.append(np.asarray(Image.open(pictures / "all" / "b_seg.png")) > 0)
    assert found[0].any()
    assert all(np.array_equal(found[0], labels) for labels in found)


def test_a_label_map_names_joins_and_leaves_out(pictures: Path, run: Run) -> None:
    path = pictures / "map.json"
    path.write_text(json.dumps({"class_names": ["thing"], "map": {"3": 1, "7": 0}}))
    out = pictures / "out"
    flags = ("--reference", pictures / "a.png", "--mask", pictures / "two.png", "--input", pictures / "new" / "b.png", *QUICK)
    assert run(*flags, "-o", out, "--label_map", path)[0] == 0
    assert [(row["object"], row["label"]) for row in table(out)] == [("thing", "1")]
    assert run(*flags, "-o", pictures / "three", "--labels", 3)[0] == 0
    first, second = (np.asarray(Image.open(folder / "b_seg.png")) for folder in (out, pictures / "three"))
    assert np.array_equal(first * 3, second)
    assert run(*flags, "-o", pictures / "one", "--one_object")[0] == 0
    assert [(row["object"], row["label"]) for row in table(pictures / "one")] == [("object 255", "255")]


def test_two_examples_of_different_objects(pictures: Path, run: Run) -> None:
    """An object learns from the examples that show it, whatever stands beside them."""
    mask = draw(pictures / "other.png", (50, 50), (20, 200, 20), seed=9)
    Image.fromarray(mask.astype(np.uint8) * 7).save(pictures / "seven.png")
    Image.fromarray((np.asarray(Image.open(pictures / "a_mask.png")) > 0).astype(np.uint8) * 3).save(pictures / "three.png")
    common = ("--input", pictures / "new" / "b.png", *QUICK)
    both = ("--reference", pictures / "a.png", pictures / "other.png", "--mask", pictures / "three.png", pictures / "seven.png", "--labels", 3, 7)
    assert run(*both, *common, "-o", pictures / "both", "--vis")[0] == 0
    rows = table(pictures / "both")
    for i, (name, picture, label) in enumerate((("three", "a.png", 3), ("seven", "other.png", 7))):
        assert run("--reference", pictures / picture, "--mask", pictures / f"{name}.png", *common, "-o", pictures / name)[0] == 0
        (row,) = table(pictures / name)
        assert {key: value for key, value in row.items() if key != "pixels"} == {key: value for key, value in rows[i].items() if key != "pixels"}
        assert row["label"] == str(label)


def test_a_saved_reference_gives_the_same_labels(pictures: Path, run: Run) -> None:
    given = ("--reference", pictures / "a.png", "--mask", pictures / "a_mask.png")
    common = ("--input", pictures / "new", *NETWORK)
    assert run(*given, *common, "--max-num-pos", 2, "-o", pictures / "one", "--save_reference", pictures / "red_box.safetensors")[0] == 0
    state = ("--reference", pictures / "red_box.safetensors")
    assert run(*state, *common, "-o", pictures / "two")[0] == 0
    for name in "bcd":
        first, second = (np.asarray(Image.open(pictures / folder / f"{name}_seg.png")) for folder in ("one", "two"))
        assert np.array_equal(first > 0, second > 0)
        assert set(np.unique(second)) <= {0, 1}
    assert {row["object"] for row in table(pictures / "two")} == {"red_box"}
    assert run(*state, *common, "-o", pictures / "three", "--labels", 9, "--min_similarity", 1.1)[0] == 0
    assert not np.asarray(Image.open(pictures / "three" / "b_seg.png")).any()
    assert all("min_similarity 1.1" in row["reason"] for row in table(pictures / "three"))
    refused(run(*state, "--input", pictures / "new", *NETWORK[:5], "128", "-o", pictures / "four"), "red_box.safetensors")
    assert not (pictures / "four").exists()


def test_instances_are_numbered(pictures: Path, run: Run) -> None:
    out = pictures / "out"
    flags = ("--reference", pictures / "a.png", "--mask", pictures / "a_mask.png", "--input", pictures / "new" / "b.png", "-o", out, *QUICK)
    assert run(*flags, "--instances", 3)[0] == 0
    rows = table(out)
    assert 1 <= len(rows) <= 3
    assert [row["instance"] for row in rows] == [str(i) for i in range(1, len(rows) + 1)]
    labels = np.asarray(Image.open(out / "b_seg.png"))
    assert [int(row["pixels"]) for row in rows] == [(labels == i).sum() for i in range(1, len(rows) + 1)]
    assert run(*flags, "-o", pictures / "one")[0] == 0  # the first one is what is found without the flag, and keeps its pixels
    assert np.array_equal(labels == 1, np.asarray(Image.open(pictures / "one" / "b_seg.png")) == 255)


def test_flags_of_the_method_reach_it(pictures: Path, run: Run) -> None:
    given = ("--reference", pictures / "a.png", "--mask", pictures / "a_mask.png", "--input", pictures / "new" / "b.png", *NETWORK)
    flags = "--min_num_pos 2 --max-num-pos 3 --min-num-neg 1 --max_num_neg 2 --policy medical --compat released --seed 5 --max_tokens 40"
    state = pictures / "deep" / "folder" / "s.safetensors"
    more = ("--transport", "sinkhorn", "--max_distance", 1e9, "--min_similarity", -1, "--save_reference", state)
    assert run(*given, *flags.split(), "-o", pictures / "one", *more)[0] == 0
    limits = {"max_distance": 1e9, "min_similarity": -1.0, "guided": False, "weighted": False}
    counts = {"parts": [2, 3], "negatives": [1, 2], "max_tokens": 40, "seed": 5}
    settings = {**limits, **counts, "policy": "medical", "compat": "released", "transport": "sinkhorn"}
    assert json.loads((pictures / "one" / "run.json").read_text())["options"] == {"object 255": settings}
    saved = ("--reference", state, "--input", pictures / "new" / "b.png", *NETWORK, "--seed", 5)  # of the random start: another one would not fit
    assert run(*saved, "-o", pictures / "again", "--min_similarity", -0.5)[0] == 0
    assert json.loads((pictures / "again" / "run.json").read_text())["options"] == {"s": {**settings, "min_similarity": -0.5}}
    assert run(*given, "--max-num-pos", 1, "-o", pictures / "two", "--max_distance", 0)[0] == 0
    (row,) = table(pictures / "two")
    assert "max_distance 0" in row["reason"]
    assert row["pixels"] == "0"
    assert (row["n_parts"], row["n_negatives"]) == ("1", "1")


def test_a_pixel_belongs_to_the_first_instance_that_has_it(pictures: Path) -> None:
    backbone = random_backbone("vit_tiny", 64, verbose=False)
    example = read_example(pictures / "a.png", pictures / "a_mask.png")
    method = P2SAM(backbone, parts=(1, 1)).fit(example.image, example.labels)
    result = method.predict(example.image)
    masks = [np.zeros((40, 60), bool) for _ in range(3)]
    masks[0][:20], masks[1][10:30], masks[2][15:, :5] = True, True, True
    method.predict_instances = lambda image, most: [replace(result, mask=mask) for mask in masks][:most]
    task = Task(backbone, {"thing": 255}, pictures / "out")
    case = PictureTask(task, {"thing": method}, instances=3).segment("b", pictures / "new" / "b.png")
    labels = np.asarray(Image.open(pictures / "out" / "b_seg.png"))
    expected = np.zeros((40, 60), np.uint8)
    expected[30:, :5], expected[20:30], expected[:20] = 3, 2, 1
    assert np.array_equal(labels, expected)
    assert [row["pixels"] for row in case.rows] == [1200, 600, 50]


@pytest.mark.parametrize("method", ["persam", "persam_f", "direct"])
def test_baselines(pictures: Path, run: Run, method: str) -> None:
    out = pictures / method
    flags = ("--reference", pictures / "a.png", "--mask", pictures / "a_mask.png", "--input", pictures / "new" / "b.png", "-o", out)
    assert run(*flags, *NETWORK, "--method", method)[0] == 0
    (row,) = table(out)
    assert row["distance"] == ""
    assert (row["similarity_max"] == "") == (method == "direct")


# --- what is refused ----------------------------------------------------------------------------------------------------------------------


def make_faulty(folder: Path) -> None:
    Image.fromarray(np.zeros((40, 60), np.uint8)).save(folder / "empty.png")
    Image.fromarray(np.ones((60, 40), np.uint8)).save(folder / "turned.png")
    soft = np.tile(np.arange(60, dtype=np.uint8), (40, 1))
    Image.fromarray(soft).save(folder / "soft.png")
    Image.fromarray(np.full((40, 60), 300, np.uint16)).save(folder / "many.png")
    (folder / "damaged.png").write_bytes((folder / "a_mask.png").read_bytes()[:40])
    (folder / "note.safetensors").write_text("mine")
    for name in ("nothing", "nothing.safetensors", "kept", "kept_too", "kept_too/b_vis", "ours"):
        (folder / name).mkdir()
    for name in ("kept/results.csv", "kept_too/b_vis/mine.png", "ours/run.json", "ours/b_vis"):
        (folder / name).write_text("mine")
    safetensors.torch.save_file({"x": torch.zeros(1)}, folder / "state.safetensors")
    nibabel.save(nibabel.Nifti1Image(np.ones((4, 4, 4), np.uint8), np.eye(4)), folder / "scan.nii.gz")


@pytest.mark.parametrize(
    ("flags", "needles"),
    [
        ("--mask turned.png", ("turned.png", "60 x 40", "40 x 60")),
        ("--mask turned.png --one_object", ("turned.png", "60 x 40", "40 x 60")),
        ("--mask empty.png", ("empty.png", "an empty one")),
        ("--mask empty.png --one_object", ("empty.png", "an empty one")),
        ("--mask damaged.png", ("damaged.png",)),
        ("--mask nowhere.png", ("nowhere.png", "no such file")),
        ("--mask soft.png", ("soft.png", "59 different", "--one_object")),
        ("--mask many.png", ("many.png", "300")),
        ("--mask scan.nii.gz", ("scan.nii.gz", "a picture")),
        ("--mask two.png two.png", ("--mask", "1 reference", "found 2")),
        ("", ("--mask", "found 0")),
        ("--mask two.png --labels 3 5", ("--labels 5", "two.png", "found 3, 7")),
        ("--mask two.png --instances 3", ("--instances", "found 2", "--labels")),
        ("--mask two.png --save_reference x.safetensors", ("--save_reference", "found 2")),
        ("--mask a_mask.png --save_reference x.pt", ("--save_reference x.pt", ".safetensors")),
        ("--mask two.png --method direct", ("--method direct", "found 2")),
        ("--mask a_mask.png --method persam --policy medical --max-num-neg 2", ("--max_num_neg, --policy", "--method persam")),
        ("--mask a_mask.png --method direct --min_similarity 0.5", ("--min_similarity", "--method direct")),
        ("--mask a_mask.png --max-num-neg 3", ("--max-num-neg 3", "--policy medical")),
        ("--mask a_mask.png --min-num-pos 4 --max-num-pos 2", ("--min-num-pos 4", "--max-num-pos")),
        ("--mask a_mask.png --min-num-pos 0", ("--min_num_pos 0", "at least 1")),
        ("--mask a_mask.png --instances 300", ("--instances 300", "255")),
        ("--mask a_mask.png --axis coronal --slices 3", ("--axis, --slices", "about scans")),
        ("--mask a_mask.png --propagate", ("--propagate_below",)),
        ("--mask a_mask.png --propagate_below 3", ("--propagate_below", "--propagate")),
        ("--mask a_mask.png --input nothing", ("nothing", "found none")),
        ("--mask a_mask.png --input scan.nii.gz", ("scan.nii.gz", "expected pictures", "a scan")),
        ("--mask a_mask.png --input nowhere", ("nowhere", "no such file")),
        ("--mask a_mask.png -o new", ("new", "holds the scans themselves")),
        ("--mask a_mask.png --label_map nowhere.json", ("nowhere.json", "not found")),
        ("--mask a_mask.png --reference a.png x.safetensors", ("found both",)),
        ("--mask a_mask.png --reference x.safetensors", ("--mask", "x.safetensors")),
        ("--reference x.safetensors --vis", ("--vis",)),
        ("--reference x.safetensors --max-num-pos 3 --min_num_neg 0", ("--max_num_pos", "--min_num_neg", "x.safetensors", "keeps its settings")),
        ("--reference x.safetensors --policy natural --compat fixed", ("--policy", "--compat", "keeps its settings")),
        ("--reference x.safetensors --max_tokens 9 --transport exact", ("--max_tokens", "--transport", "keeps its settings")),
        ("--mask a_mask.png --min_similarity nan", ("--min_similarity", "a finite number", "nan")),
        ("--mask a_mask.png --min_similarity inf", ("--min_similarity", "a finite number", "inf")),
        ("--mask a_mask.png --max_distance inf", ("--max_distance", "a finite number", "inf")),
        ("--mask a_mask.png --max_distance x", ("--max_distance", "a finite number", "x")),
        ("--mask a_mask.png --propagate --propagate_below nan", ("--propagate_below", "a number", "nan")),
        ("--mask a_mask.png --method persam --transport exact --propagate_below 3", ("--transport, --propagate_below", "--method persam")),
        ("--mask a_mask.png --save_reference note.safetensors", ("note.safetensors", "no saved reference")),
        ("--mask a_mask.png --save_reference nothing.safetensors", ("nothing.safetensors", "no saved reference")),
        ("--mask a_mask.png --save_reference a.png/x.safetensors", ("a.png", "no folder")),
        ("--mask a_mask.png --base state.safetensors --save_reference state.safetensors", ("state.safetensors", "is read in this run")),
        ("--mask a_mask.png -o kept", ("results.csv", "is there already", "run.json")),
        ("--mask a_mask.png --vis -o kept_too", ("b_vis", "is there already", "run.json")),
        ("--mask a_mask.png --vis -o ours", ("b_vis", "is a file")),
        ("--reference x.safetensors y.safetensors --labels 1 1", ("--labels", "for each of 2")),
        ("--reference x.safetensors", ("x.safetensors", "cannot be read")),
        ("--mask a_mask.png a_mask.png --reference a.png scan.nii.gz", ("expected pictures, or one scan",)),
    ],
)
def test_one_line_says_what_is_wrong_and_nothing_is_written(
    pictures: Path, run: Run, monkeypatch: pytest.MonkeyPatch, flags: str, needles: tuple[str, ...]
) -> None:
    make_faulty(pictures)
    monkeypatch.chdir(pictures)
    before = sorted(pictures.rglob("*"))
    words = flags.split()
    defaults = {"--reference": "a.png", "--input": "new", "-o": "out"}
    extra = [word for name, value in defaults.items() if name not in words for word in (name, value)]
    refused(run(*words, *extra, *NETWORK), *needles)
    assert sorted(pictures.rglob("*")) == before


def test_a_saved_reference_keeps_the_seed_of_its_clustering(pictures: Path, run: Run) -> None:
    saved = ("--reference", pictures / "x.safetensors", "--input", pictures / "new", "-o", pictures / "out", "--ckpt", pictures / "sam.pth")
    refused(run(*saved, "--seed", 0), "--seed", "x.safetensors", "keeps its settings")
    refused(run(*saved), "sam.pth", "no such file")


def test_only_a_saved_reference_is_replaced_by_another(pictures: Path, run: Run) -> None:
    given = ("--reference", pictures / "a.png", "--mask", pictures / "a_mask.png", "--input", pictures / "new" / "b.png", *QUICK)
    state = pictures / "out" / "s.safetensors"  # in the folder of the results, which is not there
    for _ in range(2):
        assert run(*given, "-o", pictures / "out", "--save_reference", state)[0] == 0
    before = state.read_bytes()
    outcome = run("--reference", state, "--input", pictures / "new" / "b.png", "-o", pictures / "out", *NETWORK, "--save_reference", state)
    refused(outcome, "--save_reference")
    assert state.read_bytes() == before


def test_figures_of_before_go_and_other_pictures_stay(pictures: Path, run: Run) -> None:
    given = ("--reference", pictures / "a.png", "--mask", pictures / "a_mask.png", "--input", pictures / "new" / "b.png", *QUICK)
    assert run(*given, "-o", pictures / "out", "--vis")[0] == 0
    (pictures / "out" / "b_vis" / "mine.png").write_text("mine")
    assert run(*given, "-o", pictures / "out")[0] == 0
    assert [path.name for path in (pictures / "out" / "b_vis").iterdir()] == ["mine.png"]


def test_single_valued_masks_are_of_one_object_however_they_are_written(pictures: Path, run: Run) -> None:
    """0 and 1 beside 0 and 255 is what two masks of 0 and 255 are; with --labels they are two objects, and so where a mask holds several."""
    mask = draw(pictures / "other.png", (50, 50), (20, 200, 20), seed=9)
    for name, value in (("ones", 1), ("full", 255)):
        Image.fromarray(mask.astype(np.uint8) * np.uint8(value)).save(pictures / f"{name}.png")
    given = ("--reference", pictures / "a.png", pictures / "other.png", "--input", pictures / "new" / "b.png", *QUICK)
    found = {}
    for name, flags in (("full", ()), ("ones", ()), ("two", ("--labels", 1, 255))):
        masks = ("--mask", pictures / "a_mask.png", pictures / f"{'full' if name == 'full' else 'ones'}.png")
        code, printed, _ = run(*given, *masks, *flags, "-o", pictures / f"out_{name}")
        assert code == 0
        assert ("hold" in printed and "--labels 1 255" in printed) == (name == "ones")
        found[name] = table(pictures / f"out_{name}")
    assert found["ones"] == found["full"]
    assert [row["label"] for row in found["ones"]] == ["255"]
    assert [row["label"] for row in found["two"]] == ["1", "255"]
    assert run(*given, "--mask", pictures / "two.png", pictures / "ones.png", "-o", pictures / "three")[0] == 0
    assert [row["label"] for row in table(pictures / "three")] == ["1", "3", "7"]


def test_a_reference_is_never_written_over(pictures: Path, run: Run) -> None:
    mask = (pictures / "a_mask.png").read_bytes()
    (pictures / "b_seg.png").write_bytes(mask)
    outcome = run(
        "--reference", pictures / "a.png", "--mask", pictures / "b_seg.png", "--input", pictures / "new" / "b.png", "-o", pictures, *NETWORK
    )
    refused(outcome, "b_seg.png", "would be written over")
    assert (pictures / "b_seg.png").read_bytes() == mask


def test_what_is_done_stays_when_a_picture_is_bad(pictures: Path, run: Run) -> None:
    (pictures / "new" / "c.jpg").write_bytes(b"no picture")
    out = pictures / "out"
    outcome = run("--reference", pictures / "a.png", "--mask", pictures / "a_mask.png", "--input", pictures / "new", "-o", out, *QUICK)
    refused(outcome, "c.jpg", "1 of 3 are done")
    assert {path.name for path in out.iterdir()} == {"b_seg.png", "b.png", "results.csv", "run.json"}
    assert {row["case"] for row in table(out)} == {"b"}


# --- scans --------------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def scans(tmp_path: Path) -> Path:
    """`ct.nii.gz` (24, 20, 6) in HU, oblique and stored PIR-like; `labels.nii.gz` with labels 2 and 5 in slices 1 and 4 of its last axis."""
    rng = np.random.default_rng(0)
    affine = np.array([[0.0, 0, -2.0, 30], [-1.5, 0.1, 0, 20], [0.1, 1.5, 0, -40], [0, 0, 0, 1]])
    affine[:3, :2] /= np.linalg.norm(affine[:3, :2], axis=0) / 1.5
    image = rng.normal(-80, 20, (24, 20, 6)).astype(np.int16)
    image[4:14, 5:15], image[16:22, 3:9] = 150, 60
    labels = np.zeros(image.shape, np.uint8)
    labels[4:14, 5:15, [1, 4]], labels[16:22, 3:9, 4] = 5, 2
    nibabel.save(nibabel.Nifti1Image(image, affine), tmp_path / "ct.nii.gz")
    nibabel.save(nibabel.Nifti1Image(labels, affine), tmp_path / "labels.nii.gz")
    return tmp_path


def test_a_scan_and_its_own_labelled_slices(scans: Path, run: Run) -> None:
    given = ("--reference", scans / "ct.nii.gz", "--mask", scans / "labels.nii.gz", *QUICK, "--axis", "sagittal")
    out = scans / "out"
    code, _, error = run(*given, "--input", scans / "ct.nii.gz", "-o", out, "--propagate", "--propagate_below", "inf", "--vis")
    assert (code, error) == (0, "")
    source, labels = nibabel.load(scans / "ct.nii.gz"), nibabel.load(out / "ct_seg.nii.gz")
    assert labels.shape == source.shape
    assert np.allclose(labels.affine, source.affine, atol=1e-5)
    assert labels.get_data_dtype() == np.uint8
    stored, mine = np.asarray(labels.dataobj), np.asarray(nibabel.load(scans / "labels.nii.gz").dataobj)
    assert np.array_equal(stored[..., [1, 4]], mine[..., [1, 4]])
    assert set(np.unique(stored)) <= {0, 2, 5}
    rows = table(out)
    assert [(row["slice"], row["label"]) for row in rows] == [(str(k), label) for k in range(6) for label in ("2", "5")]
    for row in rows:
        assert int(row["pixels"]) == (stored[..., int(row["slice"])] == int(row["label"])).sum()
        assert (row["source"] == "given") == (row["slice"] in ("1", "4"))
    learned = {(row["slice"], row["label"]): row["reference_slice"] for row in rows if row["source"] == "predicted"}
    assert learned == {("0", "5"): "1", ("2", "5"): "1", ("3", "5"): "4", ("5", "5"): "4"} | {(k, "2"): "4" for k in "0235"}
    second = {(row["slice"], row["label"]): row["second_reference_slice"] for row in rows if row["source"] == "predicted"}
    for k in ("0", "3", "5"):
        assert second[k, "5"] == ""  # its neighbour is given itself
    empty = {(row["slice"], row["label"]): row["reason"] != "" for row in rows}
    assert second["2", "2"] == ("" if empty["3", "2"] else "3")
    assert second["0", "2"] == second["5", "2"] == ""  # slice 1 is labelled, and it is not there
    assert not empty["3", "2"]
    figures = {path.name for path in (out / "ct_vis").iterdir()}
    assert figures == {f"slice_000{k}_label_{label}_object_{label}.png" for k in "0235" for label in "25"}
    facts = json.loads((out / "run.json").read_text())
    assert facts["given_slices"] == [1, 4]
    assert facts["propagate_below"] == facts["flags"]["propagate_below"] == "inf"
    assert facts["cases"]["ct"]["intensity"]["modality"] == "ct"


def test_another_scan_and_chosen_slices(scans: Path, run: Run) -> None:
    image = np.asarray(nibabel.load(scans / "ct.nii.gz").dataobj)
    affine = np.diag([-1.0, 1, 3, 1])
    nibabel.save(nibabel.Nifti1Image(image[:, :, :3].transpose(2, 0, 1).copy(), affine), scans / "other.nii.gz")
    given = ("--reference", scans / "ct.nii.gz", "--mask", scans / "labels.nii.gz", *QUICK, "--axis", "sagittal", "--slices", "4", "--labels", 5)
    assert run(*given, "--input", scans / "other.nii.gz", "-o", scans / "out")[0] == 0
    rows = table(scans / "out")
    assert [row["slice"] for row in rows] == ["0", "1", "2"]
    assert {row["reference_slice"] for row in rows} == {"4"}
    labels = nibabel.load(scans / "out" / "other_seg.nii.gz")
    assert np.allclose(labels.affine, affine)
    assert labels.shape == (3, 24, 20)
    assert run(*given, "--input", scans / "other.nii.gz", "-o", scans / "out2", "--save_reference", scans / "five.safetensors")[0] == 0
    saved = ("--reference", scans / "five.safetensors", *NETWORK, "--labels", 5, "--input", scans / "other.nii.gz")
    for flags in ((), ("--axis", "sagittal", "--modality", "ct", "--window", -125, 275)):  # what it was fitted with, said again
        assert run(*saved, *flags, "-o", scans / "out3")[0] == 0
        again = np.asarray(nibabel.load(scans / "out3" / "other_seg.nii.gz").dataobj)
        assert np.array_equal(again, np.asarray(labels.dataobj))
    for flags in (("--axis", "axial"), ("--modality", "mr"), ("--window", 0, 100)):
        refused(run(*saved, *flags, "-o", scans / "out4"), flags[0], "five.safetensors was fitted on")
    assert not (scans / "out4").exists()


def test_scans_are_cut_as_the_checkpoint_and_the_saved_reference_say(scans: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """A card of sagittal slices in another window stands in for --axis and --window; a saved reference for the flags it was fitted with."""
    opened = pgsam.engine.oneshot.open_backbone
    given = ("--reference", scans / "ct.nii.gz", "--mask", scans / "labels.nii.gz", "--input", scans / "ct.nii.gz", "--slices", 4, "--labels", 5)
    flags = ("--axis", "sagittal", "--window", "-200", "300")
    keep = ("--save_reference", scans / "five.safetensors")
    assert run(*given, *NETWORK, "--max-num-pos", 1, *flags, "-o", scans / "out", *keep)[0] == 0
    expected = table(scans / "out")
    assert run("--reference", scans / "five.safetensors", *NETWORK, "--labels", 5, "--input", scans / "ct.nii.gz", "-o", scans / "saved")[0] == 0
    kept = [(row["slice"], row["pixels"], row["distance"]) for row in table(scans / "saved") if row["slice"] != "4"]
    assert kept == [(row["slice"], row["pixels"], row["distance"]) for row in expected if row["slice"] != "4"]

    def with_card(args):
        backbone = opened(args)
        backbone.card = ModelCard("sam_promptable", "vit_tiny", 64, 64, (), orientation="PIL", window=(-200.0, 300.0))
        return backbone

    monkeypatch.setattr(pgsam.engine.oneshot, "open_backbone", with_card)
    assert run(*given, *NETWORK, "--max-num-pos", 1, "-o", scans / "card")[0] == 0
    assert table(scans / "card") == expected
    code, printed, _ = run(*given, *NETWORK, "--max-num-pos", 1, "-o", scans / "mr", "--modality", "mr")
    assert code == 0
    assert printed.count("but the checkpoint was trained on CT") == 2  # the reference and the input
    assert "the reference as" not in printed


@pytest.mark.parametrize(
    ("flags", "needles"),
    [
        ("--slices 3", ("--slices 3", "1, 4")),
        ("--slices x", ("--slices x", "12,30")),
        ("--mask zeros.nii.gz", ("zeros.nii.gz", "at least one slice with a label")),
        ("--mask small.nii.gz", ("small.nii.gz", "on the grid of ct")),
        ("--input four.nii.gz", ("four.nii.gz",)),
        ("--input ct.nii.gz --instances 2", ("--instances", "about pictures")),
        ("--input ct.nii.gz --one_object", ("--one_object", "about pictures")),
        ("--input a.png", ("a.png", "expected scans")),
        ("--labels 3", ("--labels 3", "found 2, 5")),
        ("--labels 5 --save_reference x.safetensors", ("--save_reference", "2 labelled slices", "--slices")),
        ("--window 100 -100", ("--window",)),
    ],
)
def test_what_is_refused_of_scans(scans: Path, run: Run, monkeypatch: pytest.MonkeyPatch, flags: str, needles: tuple[str, ...]) -> None:
    monkeypatch.chdir(scans)
    affine = nibabel.load(scans / "ct.nii.gz").affine
    nibabel.save(nibabel.Nifti1Image(np.zeros((24, 20, 6), np.uint8), affine), scans / "zeros.nii.gz")
    nibabel.save(nibabel.Nifti1Image(np.ones((24, 20, 5), np.uint8), affine), scans / "small.nii.gz")
    nibabel.save(nibabel.Nifti1Image(np.ones((4, 4, 4, 4), np.int16), np.eye(4)), scans / "four.nii.gz")
    draw(scans / "a.png")
    before = sorted(scans.rglob("*"))
    words = flags.split()
    defaults = {"--reference": "ct.nii.gz", "--mask": "labels.nii.gz", "--input": "ct.nii.gz", "-o": "out"}
    extra = [word for name, value in defaults.items() if name not in words for word in (name, value)]
    refused(run(*words, *extra, *NETWORK, "--axis", "sagittal"), *needles)
    assert sorted(scans.rglob("*")) == before


def test_how_a_scan_is_paired_and_scaled(scans: Path, run: Run) -> None:
    """Six thin slices lie at the middle of the reference, which is 12 mm long, or spread over all of it; slices 0 and 2 are labelled."""
    image = np.asarray(nibabel.load(scans / "ct.nii.gz").dataobj)
    nibabel.save(nibabel.Nifti1Image(image.transpose(2, 0, 1).copy(), np.diag([-0.1, 1, 1, 1])), scans / "thin.nii.gz")
    labels = np.zeros(image.shape, np.uint8)
    labels[4:14, 5:15, [0, 2]] = 1
    nibabel.save(nibabel.Nifti1Image(labels, nibabel.load(scans / "ct.nii.gz").affine), scans / "labels.nii.gz")
    given = ("--reference", scans / "ct.nii.gz", "--mask", scans / "labels.nii.gz", *NETWORK, "--max-num-pos", 1, "--axis", "sagittal")
    for match, nearest in (((), "002222"), (("--match", "relative"), "002222"), (("--match", "middle"), "222222")):
        assert run(*given, "--input", scans / "thin.nii.gz", "-o", scans / "out", *match, "--window", -200, 300)[0] == 0
        assert "".join(row["reference_slice"] for row in table(scans / "out")) == nearest
    case = json.loads((scans / "out" / "run.json").read_text())["cases"]["thin"]
    assert case["intensity"]["window"] == [-200, 300]


def test_a_dicom_series_is_known_as_the_scan_it_was_made_from(scans: Path, run: Run) -> None:
    image = SimpleITK.ReadImage(scans / "ct.nii.gz")
    write_dicom_series(scans / "series", image)
    given = ("--reference", scans / "ct.nii.gz", "--mask", scans / "labels.nii.gz", *NETWORK, "--max-num-pos", 1, "--labels", 5)
    assert run(*given, "--input", scans / "series", "-o", scans / "out", "--axis", "sagittal")[0] == 0
    found, mine = (SimpleITK.ReadImage(scans / name) for name in ("out/series_seg.nii.gz", "labels.nii.gz"))
    onto = SimpleITK.Resample(found, mine, SimpleITK.Transform(), SimpleITK.sitkNearestNeighbor)
    labels, given_labels = (SimpleITK.GetArrayFromImage(image) for image in (onto, mine))
    assert np.array_equal(labels[[1, 4]] == 5, given_labels[[1, 4]] == 5)
    assert [row["source"] for row in table(scans / "out")].count("given") == 2


def test_a_scan_read_as_another_kind_is_said(scans: Path, run: Run) -> None:
    image = np.asarray(nibabel.load(scans / "ct.nii.gz").dataobj)[..., :2].transpose(2, 0, 1)
    nibabel.save(nibabel.Nifti1Image((image + 1000).astype(np.int16), np.diag([1.0, 1, 3, 1])), scans / "mr.nii.gz")
    given = ("--reference", scans / "ct.nii.gz", "--mask", scans / "labels.nii.gz", *QUICK, "--axis", "sagittal")
    code, printed, _ = run(*given, "--input", scans / "mr.nii.gz", "-o", scans / "out", "--slices", 4)
    assert code == 0
    assert "warning: " in printed
    assert "read as mr" in printed
    code, printed, _ = run(*given, "--input", scans / "mr.nii.gz", "-o", scans / "out", "--slices", 4, "--modality", "mr")
    assert "warning: " not in printed


# --- real images --------------------------------------------------------------------------------------------------------------------------


def test_real_pictures(shared: Callable[[str], Path], tmp_path: Path, run: Run) -> None:
    polyps = sorted(shared("data/polyps").glob("*.jpg"))[:3]
    masks = [path.with_name(f"{path.stem}_mask.png") for path in polyps]
    code, _, error = run("--reference", *polyps[:2], "--mask", *masks[:2], "--input", polyps[2], "-o", tmp_path / "polyp", *QUICK)
    assert (code, error) == (0, "")
    with Image.open(polyps[2]) as image, Image.open(tmp_path / "polyp" / f"{polyps[2].stem}_seg.png") as labels:
        assert image.size == labels.size
    slices = shared("data/sam_med2d")
    given = ("--reference", slices / "amos_0004_75.png", "--mask", slices / "amos_0004_75_liver_000.png", "--one_object")
    assert run(*given, "--input", slices / "amos_0006_90.png", "-o", tmp_path / "liver", *QUICK)[0] == 0
    toys = shared("data/perseg")
    (reference, *others) = sorted((toys / "Images" / "duck_toy").iterdir())
    given = ("--reference", reference, "--mask", toys / "Annotations" / "duck_toy" / f"{reference.stem}.png")
    assert run(*given, "--input", others[0], "-o", tmp_path / "duck", *QUICK)[0] == 0


def test_a_real_scan(shared: Callable[[str], Path], tmp_path: Path, run: Run) -> None:
    folder = shared("data/abdomen_ct")
    source = nibabel.load(folder / "crlm1004_label_model_made.nii.gz")
    few = np.zeros(source.shape, np.uint8)
    few[..., 20] = np.asarray(source.dataobj)[..., 20]
    nibabel.save(nibabel.Nifti1Image(few, source.affine), tmp_path / "few.nii.gz")
    scan = folder / "crlm1004_ct.nii.gz"
    flags = ("--reference", scan, "--mask", tmp_path / "few.nii.gz", "--input", scan, "-o", tmp_path / "out", "--labels", 6, *NETWORK)
    assert run(*flags, "--max-num-pos", 1)[0] == 0
    found = nibabel.load(tmp_path / "out" / "crlm1004_ct_seg.nii.gz")
    assert np.allclose(found.affine, nibabel.load(scan).affine, atol=1e-5)
    assert np.array_equal(np.asarray(found.dataobj)[..., 20] == 6, few[..., 20] == 6)
    assert len(table(tmp_path / "out")) == source.shape[2]
