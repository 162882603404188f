"""The CVC-ClinicDB program on phantom videos and on the shared polyps, with a random SAM."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pgsam.engine.oneshot import random_backbone
from pgsam.metrics import dice
from pgsam.oneshot import P2SAM
from pgsam.oneshot.images import read_image, read_mask
from scripts import p2sam_cvc_clinicdb
from tests.one_shot_layouts import TINY, cvc_tree, save_pair
from tests.tables import read_csv


def run(data: Path, outdir: Path, *flags: str) -> int:
    return p2sam_cvc_clinicdb.main(["--data", str(data), "--outdir", str(outdir), *TINY, *flags])


def test_videos_are_segmented_after_their_third_frame_and_scored_by_frame_and_video(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, out = cvc_tree(tmp_path / "data", video_0001=6, video_0002=4, video_0003=3), tmp_path / "out"
    assert run(data, out, "--max-num-pos", "2", "--max-num-neg", "2") == 0
    printed = capsys.readouterr().out
    assert "NOTE: video_0003: the reference is its last frame" in printed
    written = sorted(out.rglob("*.png"))
    names = ["video_0001/image_0004.png", "video_0001/image_0005.png", "video_0001/image_0006.png", "video_0002/image_0010.png"]
    assert [str(path.relative_to(out)) for path in written] == names
    truths = [data / "label" / name.replace("image", "label") for name in names]
    values = [dice(read_mask(path), read_mask(truth)) for path, truth in zip(written, truths, strict=True)]
    summary = json.loads((out / "results.json").read_text())["summary"]
    assert summary["strict"]["image"]["mean"] == pytest.approx(np.mean(values))
    assert summary["strict"]["video"]["mean"] == pytest.approx((np.mean(values[:3]) + values[3]) / 2)
    assert f"{100 * np.mean(values):.2f} (4 of 4)" in printed

    method = P2SAM(random_backbone("vit_tiny", 64, verbose=False), parts=(1, 2), negatives=(1, 2), policy="medical")
    method.fit(read_image(data / "image/video_0001/image_0003.png"), read_mask(data / "label/video_0001/label_0003.png"))
    assert np.array_equal(method.predict(read_image(data / "image/video_0001/image_0006.png")).mask, read_mask(written[2]))


def test_another_reference_frame(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = cvc_tree(tmp_path / "data", video_0001=3)
    assert run(data, tmp_path / "out", "--ref_frame", "1", "--max-num-pos", "1", "--vis") == 0
    rows = read_csv(tmp_path / "out" / "results.csv")
    assert [(row["video"], row["image"], Path(row["reference"]).stem) for row in rows] == [
        ("video_0001", "0002", "image_0001"),
        ("video_0001", "0003", "image_0001"),
    ]
    assert len(list((tmp_path / "out" / "vis").rglob("*.png"))) == 2
    for flags, message in (
        (["--ref-frame", "4"], "expected at least 4 frames, found 3"),
        (["--ref-frame", "0"], "--ref_frame 0: expected at least 1"),
    ):
        capsys.readouterr()
        assert run(data, tmp_path / "none", *flags) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("flags", [["--max-num-pos", "2"], ["--method", "persam"], ["--method", "direct", "--prompt", "box"]])
def test_shared_polyps(shared, tmp_path: Path, flags: list[str]) -> None:
    pictures = sorted(shared("data/polyps").glob("*.jpg"))[:4]
    for i, path in enumerate(pictures, start=1):
        pixels, mask = (np.asarray(Image.open(file).resize((160, 128))) for file in (path, path.with_name(f"{path.stem}_mask.png")))
        name = f"video_0001/{{}}_{i:04d}.png"
        truth = (mask if mask.ndim == 2 else mask[..., 0]) > 127
        save_pair(tmp_path / "data/image" / name.format("image"), tmp_path / "data/label" / name.format("label"), pixels, truth)
    assert run(tmp_path / "data", tmp_path / "out", "--ref-frame", "2", *flags) == 0
    assert json.loads((tmp_path / "out" / "results.json").read_text())["summary"]["strict"]["image"]["n"] == 2
