"""The PerSeg programs on phantoms and on the shared objects, with a random SAM."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pgsam.engine.oneshot import random_backbone
from pgsam.engine.oneshot_runs import method_options
from pgsam.oneshot import P2SAM, DirectTransfer
from pgsam.oneshot.images import read_image, read_mask
from pgsam.sam.backbone import SamBackbone
from scripts import eval_miou_perseg, p2sam_4d_lung, p2sam_cvc_clinicdb, p2sam_perseg
from tests.one_shot_layouts import TINY, perseg_tree
from tests.tables import read_csv

METHODS = {
    "p2sam": ["--max-num-pos", "2"],
    "persam": ["--method", "persam"],
    "persam_f": ["--method", "persam_f"],
    "direct": ["--method", "direct"],
}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return perseg_tree(tmp_path / "data_2003" / "00", cat00=3, dog=2)


def run(data: Path, outdir: Path, *flags: str) -> int:
    return p2sam_perseg.main(["--data", str(data), "--outdir", str(outdir), *TINY, *flags])


def refused(capsys: pytest.CaptureFixture[str]) -> str:
    """What went to stderr: one line."""
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of the images that any backbone encodes."""
    shapes: list[tuple[int, ...]] = []
    encode = SamBackbone.encode
    monkeypatch.setattr(SamBackbone, "encode", lambda self, image: shapes.append(image.shape) or encode(self, image))
    return shapes


@pytest.mark.parametrize("method", METHODS)
def test_every_method_segments_every_object(
    method: str, data: Path, tmp_path: Path, encoded: list[tuple[int, ...]], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run(data, out, *METHODS[method]) == 0
    printed = capsys.readouterr().out
    assert sorted(str(path.relative_to(out)) for path in out.rglob("*.*")) == [
        "cat00/01.png",
        "cat00/02.png",
        "dog/01.png",
        "results.csv",
        "results.json",
    ]
    for path in out.rglob("*.png"):
        truth = read_mask(data / "Annotations" / path.relative_to(out))
        assert read_mask(path, (truth.shape[0], truth.shape[1])).shape == truth.shape
    assert len(encoded) == (3 if method == "direct" else 5)  # every reference once, every image once
    results = json.loads((out / "results.json").read_text())
    assert (results["images"], results["references"]) == (3, 0 if method == "direct" else 2)
    assert results["settings"]["method"] == method
    assert results["settings"]["checkpoint"] is None
    assert results["settings"]["ground_truth_prompts"] is False
    rows = read_csv(out / "results.csv")
    assert [(row["object"], row["image"]) for row in rows] == [("cat00", "01"), ("cat00", "02"), ("dog", "01")]
    if method == "p2sam":
        assert all(row["reason"] or (row["n_parts"] in "12" and float(row["distance"]) > 0) for row in rows)

    again = tmp_path / "again.json"
    flags = ["--pred-path", str(out), "--gt-path", str(data / "Annotations"), "--output", str(again)]
    assert eval_miou_perseg.main(flags) == 0
    assert capsys.readouterr().out in printed
    assert json.loads(again.read_text())["summary"] == results["summary"]


@pytest.mark.parametrize(("compat", "transport"), [("fixed", "sinkhorn"), ("released", "exact")])
def test_the_program_does_what_the_library_does(data: Path, tmp_path: Path, compat: str, transport: str) -> None:
    out = tmp_path / "out"
    flags = ["--min_num_pos", "2", "--max_num_pos", "3", "--reg_patch_weight", "--seed", "5", "--compat", compat, "--transport", transport]
    assert run(data, out, *flags) == 0
    backbone = random_backbone("vit_tiny", 64, seed=5, verbose=False)
    method = P2SAM(backbone, parts=(2, 3), policy="natural", seed=5, weighted=True, compat=compat, transport=transport)
    method.fit(read_image(data / "Images/cat00/00.jpg"), read_mask(data / "Annotations/cat00/00.png"))
    options = json.loads((out / "results.json").read_text())["settings"]["options"]
    assert set(options) == {"parts", "negatives", "policy", "compat", "seed", "weighted", "transport"}
    assert options == json.loads(json.dumps({name: method.settings()[name] for name in options}))
    rows = read_csv(out / "results.csv")
    for row, name in zip(rows, ("01", "02"), strict=False):
        result = method.predict(read_image(data / f"Images/cat00/{name}.jpg"))
        assert np.array_equal(read_mask(out / f"cat00/{name}.png"), result.mask)
        assert row["n_parts"] == str(result.n_parts)
        assert float(row["distance"]) == result.distance
        assert float(row["similarity_max"]) == result.similarity_max
        points = [[float(number) for number in point.split()] for point in row["points"].split(";")]
        assert points == np.column_stack([result.points, result.labels]).tolist()


def test_prompts_from_the_truth_are_said_to_be(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    backbone = random_backbone("vit_tiny", 64, verbose=False)
    for prompt in ("point", "box"):
        out = tmp_path / prompt
        assert run(data, out, "--method", "direct", "--prompt", prompt) == 0
        assert f"direct transfer, a {prompt} made from the true mask" in capsys.readouterr().out
        assert json.loads((out / "results.json").read_text())["settings"]["ground_truth_prompts"] is True
        truth = read_mask(data / "Annotations/dog/01.png")
        expected = DirectTransfer(backbone, prompt=prompt).predict(read_image(data / "Images/dog/01.jpg"), truth)
        assert np.array_equal(read_mask(out / "dog/01.png"), expected.mask)


def test_with_figures_all_is_scored_too(data: Path, tmp_path: Path) -> None:
    for name, flags in (("plain", []), ("figures", ["--vis"])):
        assert run(data, tmp_path / name, *flags, "--max-num-pos", "1") == 0
    plain, figures = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("plain", "figures"))
    assert plain["summary"] == figures["summary"]
    drawn = sorted((tmp_path / "figures" / "vis").rglob("*.png"))
    assert [str(path.relative_to(tmp_path / "figures" / "vis")) for path in drawn] == ["cat00/01.png", "cat00/02.png", "dog/01.png"]
    flags = ["--pred-path", str(tmp_path / "figures"), "--gt-path", str(data / "Annotations")]
    assert eval_miou_perseg.main(flags) == 0


def test_masks_as_published_are_scored_the_same(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert run(data, out, "--max-num-pos", "1") == 0
    flags = ["--pred-path", str(out), "--gt-path", str(data / "Annotations")]
    capsys.readouterr()
    assert eval_miou_perseg.main(flags) == 0
    first = capsys.readouterr().out
    for path in [path for path in out.rglob("*.png")]:
        red = np.zeros((*read_mask(path).shape, 3), np.uint8)
        red[read_mask(path)] = (128, 0, 0)
        Image.fromarray(red).save(path)
    assert eval_miou_perseg.main(flags) == 0
    assert capsys.readouterr().out == first


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--method", "persam", "--max-num-pos", "2"], "--max-num-pos: belongs to --method p2sam, found --method persam"),
        (["--method", "direct", "--reg-patch-weight"], "--reg-patch-weight: belongs to --method p2sam, found --method direct"),
        (["--method", "direct", "--compat", "released"], "--compat: belongs to --method p2sam, persam or persam_f"),
        (["--method", "persam_f", "--transport", "exact"], "--transport: belongs to --method p2sam, found --method persam_f"),
        (["--transport", "assign"], "invalid choice: 'assign'"),
        (["--prompt", "box"], "--prompt: belongs to --method direct, found --method p2sam"),
        (["--min-num-pos", "3", "--max-num-pos", "2"], "--min-num-pos 3: expected at most --max-num-pos, which is 2"),
        (["--min-num-pos", "0"], "--min_num_pos 0: expected at least 1"),
        (["--max-num-neg", "2"], "unrecognized arguments: --max-num-neg 2"),
        (["--guided-attn"], "unrecognized arguments: --guided-attn"),
        (["--ref-idx", "0"], "expected the reference 0 among its names, found 00, 01, 02"),
    ],
)
def test_flags_that_cannot_be(data: Path, tmp_path: Path, flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(data, tmp_path / "out", *flags) == 2
    assert message in refused(capsys)
    assert not (tmp_path / "out").exists()


def test_flags_become_options() -> None:
    for flags, options in (
        (["--method", "persam", "--compat", "released"], {"compat": "released"}),
        (["--method", "persam_f"], {"compat": "fixed"}),
        (["--method", "direct", "--prompt", "point", "--seed", "3"], {"prompt": "point", "seed": 3}),
    ):
        assert method_options(p2sam_perseg.build_parser().parse_args(flags), "natural") == options
    for flags, parts, negatives in (
        ([], (1, 5), (1, 1)),
        (["--min-num-pos", "7", "--max-num-neg", "0"], (7, 7), (0, 0)),
        (["--max-num-pos", "2", "--min-num-neg", "3"], (1, 2), (3, 3)),
    ):
        options = method_options(p2sam_cvc_clinicdb.build_parser().parse_args(flags), "medical")
        assert (options["parts"], options["negatives"], options["policy"]) == (parts, negatives, "medical")
    assert method_options(p2sam_4d_lung.build_parser().parse_args([]), "medical")["parts"] == (1, 3)


def damage(data: Path) -> None:
    path = data / "Images/dog/01.jpg"
    path.write_bytes(path.read_bytes()[:300])


def blank(data: Path) -> None:
    Image.new("L", (56, 48)).save(data / "Annotations/dog/00.png")


def crop(data: Path) -> None:
    Image.new("L", (5, 4), 255).save(data / "Annotations/dog/01.png")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (damage, "Images/dog/01.jpg"),
        (blank, "Annotations/dog/00.png: expected the object in the reference's mask, found none"),
        (crop, "Annotations/dog/01.png: expected a mask of 56 x 56 pixels as its image has, found 5 x 4"),
    ],
)
def test_bad_data_is_found_before_anything_is_written(data: Path, tmp_path: Path, spoil, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    spoil(data)
    assert run(data, tmp_path / "out") == 2
    assert message in refused(capsys)
    assert not (tmp_path / "out").exists()


def test_a_folder_in_use_is_left_alone(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    (out / "cow").mkdir(parents=True)
    assert run(data, out) == 2
    assert "expected a new or empty folder for the results, found one in use" in refused(capsys)
    assert [path.name for path in out.rglob("*")] == ["cow"]
    assert run(perseg_tree(tmp_path / "b", vis=2), tmp_path / "new", "--vis") == 2
    assert "the data has something of that name" in refused(capsys)


def test_an_evaluation_without_a_prediction_is_an_error(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    truth = data / "Annotations"
    assert eval_miou_perseg.main(["--pred-path", str(truth), "--gt-path", str(truth)]) == 0  # the reference among them is not counted
    assert "mIoU 100.00  mAcc 100.00  bIoU 100.00" in capsys.readouterr().out
    (tmp_path / "none").mkdir()
    assert eval_miou_perseg.main(["--pred-path", str(tmp_path / "none"), "--gt-path", str(truth)]) == 2
    assert "none/cat00/01.png: expected a prediction for every mask, found none here and 2 more" in refused(capsys)


def test_paths_stand_in_the_results_as_they_were_given(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    data = data.relative_to(tmp_path)
    assert run(data, Path("out"), "--method", "direct") == 0
    for _ in range(2):  # the second takes the place of the first
        assert eval_miou_perseg.main(["--pred-path", "out", "--gt-path", str(data / "Annotations"), "--output", "scores.json"]) == 0
    settings = [json.loads(Path(name).read_text())["settings"] for name in ("out/results.json", "scores.json")]
    assert settings[0]["data"] == str(data)
    assert settings[1] == {"pred_path": "out", "gt_path": str(data / "Annotations"), "reference": "00"}
    assert all(str(tmp_path) not in path.read_text() for path in (Path("out/results.json"), Path("out/results.csv"), Path("scores.json")))


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("Annotations/dog/01.png", "expected a name that ends in .json"),
        ("Annotations/results.json", "is there already and no evaluation of this program"),
        ("Annotations/list.json", "is there already and no evaluation of this program"),
        ("Annotations/dog.json", "is there already"),
        ("nowhere/scores.json", "nowhere is no folder"),
    ],
)
def test_an_evaluation_takes_the_place_of_nothing_and_is_refused_before_the_work(
    data: Path, output: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    truth, path = data / "Annotations", data / output
    (truth / "results.json").write_text('{"settings": {}, "images": 3, "summary": {}}')
    (truth / "list.json").write_text("[1, 2]")
    (truth / "dog.json").write_text("no JSON")
    before = path.read_bytes() if path.exists() else None
    monkeypatch.setattr("pgsam.oneshot.scores.score_folder", lambda *_, **__: pytest.fail("scored"))
    assert eval_miou_perseg.main(["--pred-path", str(truth), "--gt-path", str(truth), "--output", str(path)]) == 2
    assert message in refused(capsys)
    assert (path.read_bytes() if path.exists() else None) == before


def test_shared_objects(shared, tmp_path: Path) -> None:
    data = shared("data/perseg")
    assert run(data, tmp_path / "out", "--max-num-pos", "2") == 0
    averages = json.loads((tmp_path / "out" / "results.json").read_text())["summary"]["averages"]
    assert 0 <= averages["object"]["iou"] <= 1
    assert len(list((tmp_path / "out").rglob("*.png"))) == 4
