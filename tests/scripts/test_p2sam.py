"""scripts/p2sam.py on pictures, with a network of random numbers: where results lie, what the tables say, and what is refused."""

import functools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

from pgsam.engine.oneshot import random_backbone
from pgsam.engine.oneshot_files import PictureTask, Task, read_example
from pgsam.oneshot import P2SAM
from tests.tables import read_csv

NETWORK = ("--ckpt", "none", "--sam-type", "vit_tiny", "--img_size", "64", "--device", "cpu")
QUICK = (*NETWORK, "--max-num-pos", "2")
Run = Callable[..., Any]


@pytest.fixture
def run(call: Callable[..., Any]) -> Run:
    """`run("--reference", ...)` gives exit code, stdout and stderr."""
    return functools.partial(call, "scripts.p2sam")


def table(folder: Path) -> list[dict[str, str]]:
    return read_csv(folder / "results.csv")


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
    run(*state, "--input", pictures / "new", *NETWORK[:5], "128", "-o", pictures / "four").refused("red_box.safetensors")
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
    run(*words, *extra, *NETWORK).refused(*needles)
    assert sorted(pictures.rglob("*")) == before


def test_a_saved_reference_keeps_the_seed_of_its_clustering(pictures: Path, run: Run) -> None:
    saved = ("--reference", pictures / "x.safetensors", "--input", pictures / "new", "-o", pictures / "out", "--ckpt", pictures / "sam.pth")
    run(*saved, "--seed", 0).refused("--seed", "x.safetensors", "keeps its settings")
    run(*saved).refused("sam.pth", "no such file")


def test_only_a_saved_reference_is_replaced_by_another(pictures: Path, run: Run) -> None:
    given = ("--reference", pictures / "a.png", "--mask", pictures / "a_mask.png", "--input", pictures / "new" / "b.png", *QUICK)
    state = pictures / "out" / "s.safetensors"  # in the folder of the results, which is not there
    for _ in range(2):
        assert run(*given, "-o", pictures / "out", "--save_reference", state)[0] == 0
    before = state.read_bytes()
    outcome = run("--reference", state, "--input", pictures / "new" / "b.png", "-o", pictures / "out", *NETWORK, "--save_reference", state)
    outcome.refused("--save_reference")
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
    outcome.refused("b_seg.png", "would be written over")
    assert (pictures / "b_seg.png").read_bytes() == mask


def test_what_is_done_stays_when_a_picture_is_bad(pictures: Path, run: Run) -> None:
    (pictures / "new" / "c.jpg").write_bytes(b"no picture")
    out = pictures / "out"
    outcome = run("--reference", pictures / "a.png", "--mask", pictures / "a_mask.png", "--input", pictures / "new", "-o", out, *QUICK)
    outcome.refused("c.jpg", "1 of 3 are done")
    assert {path.name for path in out.iterdir()} == {"b_seg.png", "b.png", "results.csv", "run.json"}
    assert {row["case"] for row in table(out)} == {"b"}


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
