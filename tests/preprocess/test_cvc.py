"""CVC-ClinicDB in the archive's form, made here, with every frame's pixels known."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from preprocess import cvc_clinicdb

SHAPE = (12, 16)


def frame(number: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (*SHAPE, 3), dtype=np.uint8)


def mask(number: int) -> np.ndarray:
    found = np.zeros(SHAPE, dtype=bool)
    found[2:8, number % 8 : number % 8 + 4] = True
    return found


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """Eleven frames of three videos: 1 to 4, 5 to 9, 10 and 11."""
    root = tmp_path / "CVC-ClinicDB"
    for folder in ("Original", "Ground Truth"):
        (root / folder).mkdir(parents=True)
    for number in range(1, 12):
        Image.fromarray(frame(number)).save(root / "Original" / f"{number}.tif")
        Image.fromarray(mask(number).astype(np.uint8) * 255).save(root / "Ground Truth" / f"{number}.tif")
    (tmp_path / "table.csv").write_text("sequence,first,last\n1,1,4\n2,5,9\n3,10,11\n")
    return root


def run(archive: Path, *flags: str, table: str = "table.csv") -> int:
    paths = ["--src_path", str(archive), "--dst_path", str(archive.parent / "out"), "--sequences", str(archive.parent / table), "--num_workers", "0"]
    return cvc_clinicdb.main([*paths, *flags])


def test_frames_go_to_their_videos_under_their_numbers(archive: Path, capsys: pytest.CaptureFixture) -> None:
    assert run(archive) == 0
    assert "11 pictures with masks of 3 cases" in capsys.readouterr().out
    out = archive.parent / "out"
    numbers = {1: range(1, 5), 2: range(5, 10), 3: range(10, 12)}
    expected = {f"image/video_{video:04d}/image_{number:04d}.png" for video, frames in numbers.items() for number in frames}
    assert {path.relative_to(out).as_posix() for path in (out / "image").rglob("*.png")} == expected
    for name in expected:
        number = int(name[-8:-4])
        np.testing.assert_array_equal(np.asarray(Image.open(out / name)), frame(number))
        label = Image.open(out / name.replace("image", "label"))
        assert label.mode == "L"
        np.testing.assert_array_equal(np.asarray(label), mask(number) * 255)
    assert json.loads((out / "manifest.json").read_text())["cases"]["video_0002"]["frames"] == [5, 6, 7, 8, 9]


def test_a_table_of_frames_makes_the_same_videos(archive: Path) -> None:
    rows = [(3, 11), (1, 4), *((2, number) for number in range(5, 10)), (3, 10), *((1, number) for number in (3, 1, 2))]
    (archive.parent / "frames.csv").write_text("frame_id,sequence_id\n" + "".join(f"{number},{video}\n" for video, number in rows))
    assert run(archive, table="frames.csv") == 0
    found = sorted(path.parent.name for path in (archive.parent / "out" / "image").rglob("*.png"))
    assert found == ["video_0001"] * 4 + ["video_0002"] * 5 + ["video_0003"] * 2


def test_masks_of_zero_and_one_and_empty_ones(archive: Path) -> None:
    Image.fromarray(mask(3).astype(np.uint8)).save(archive / "Ground Truth" / "3.tif")
    Image.fromarray(np.zeros(SHAPE, np.uint8)).save(archive / "Ground Truth" / "4.tif")
    assert run(archive) == 0
    for number, expected in ((3, mask(3)), (4, np.zeros(SHAPE, bool))):
        path = archive.parent / "out" / "label" / "video_0001" / f"label_{number:04d}.png"
        np.testing.assert_array_equal(np.asarray(Image.open(path)), expected * 255)


def test_it_is_resumed_and_brought_up_to_date(archive: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(archive) == 0
    out = archive.parent / "out"
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.png")}
    assert run(archive) == 0
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.png")} == before

    Image.fromarray(frame(99)).save(archive / "Original" / "6.tif")  # another frame, and the table of videos as it was
    os.utime(archive / "Original" / "6.tif", ns=(1, 1))
    assert run(archive) == 0
    np.testing.assert_array_equal(np.asarray(Image.open(out / "image/video_0002/image_0006.png")), frame(99))
    after = {path: path.stat().st_mtime_ns for path in out.rglob("*.png")}
    assert {path for path in after if after[path] != before[path]} == {path for path in before if path.parent.name == "video_0002"}

    (out / "label/video_0003/label_0010.png").unlink()
    assert run(archive) == 0
    assert (out / "label/video_0003/label_0010.png").is_file()

    (archive.parent / "table.csv").write_text("sequence,first,last\n1,1,9\n2,10,11\n")  # nothing may be left of the third video
    assert run(archive) == 0
    assert {path.name for path in (out / "image").iterdir()} == {"video_0001", "video_0002"}
    assert len(list((out / "label").rglob("*.png"))) == 11


def test_nothing_of_a_case_that_failed_stays(archive: Path) -> None:
    break_frame_7(archive)
    assert run(archive) == 2
    out = archive.parent / "out"
    assert {path.name for path in (out / "image").iterdir()} == {"video_0001"}  # the first case is finished, two frames of the second were made
    stray = out / "image" / "video_0002" / "image_0005.png"  # as a run that was killed leaves it
    stray.parent.mkdir()
    stray.write_bytes(b"half")
    Image.fromarray(frame(7)).save(archive / "Original" / "7.tif")
    (archive.parent / "table.csv").write_text("sequence,first,last\n1,1,4\n3,5,11\n")
    assert run(archive) == 0
    assert {path.name for path in (out / "image").iterdir()} == {"video_0001", "video_0003"}
    assert len(list((out / "image").rglob("*.png"))) == 11


def test_an_output_below_a_file(archive: Path, capsys: pytest.CaptureFixture) -> None:
    (archive.parent / "out").write_text("a file")
    assert run(archive) == 2
    assert "out: expected a" in capsys.readouterr().err


def test_several_processes_make_the_same(archive: Path) -> None:
    assert run(archive) == 0
    alone = {path.name: path.read_bytes() for path in (archive.parent / "out").rglob("*.png")}
    assert run(archive, "--num_workers", "2", "--overwrite") == 0
    assert {path.name: path.read_bytes() for path in (archive.parent / "out").rglob("*.png")} == alone


def break_frame_7(archive: Path) -> None:
    (archive / "Original" / "7.tif").write_bytes((archive / "Original" / "7.tif").read_bytes()[:200])


FAULTS = {
    "no mask": (lambda root: (root / "Ground Truth" / "5.tif").unlink(), "found the number 5 without a mask (1 such)"),
    "no frame": (lambda root: (root / "Original" / "5.tif").unlink(), "found the number 5 of a mask without a frame"),
    "a name": (lambda root: (root / "Original" / "5.tif").rename(root / "Original" / "five.tif"), "five.tif: expected frames called by their number"),
    "a size": (lambda root: Image.new("L", (5, 4)).save(root / "Ground Truth" / "5.tif"), "case video_0002: "),
    "grey": (lambda root: Image.new("L", SHAPE[::-1], 90).save(root / "Ground Truth" / "5.tif"), "expected a mask in black and white"),
    "damaged": (break_frame_7, "7.tif: expected a picture"),
    "folder": (lambda root: (root / "Original").rename(root / "original frames"), "--src_path is the folder that holds Original and Ground Truth"),
    "table": (lambda root: (root.parent / "table.csv").unlink(), "table.csv: no such file; --sequences is a CSV file with the columns"),
    "columns": (lambda root: (root.parent / "table.csv").write_text("a,b\n1,2\n"), "expected the columns sequence, first, last"),
    "not all": (lambda root: (root.parent / "table.csv").write_text("sequence,first,last\n1,1,10\n"), "frame 11 is in no sequence"),
    "too many": (lambda root: (root.parent / "table.csv").write_text("sequence,first,last\n1,1,12\n"), "frame 12 has no file"),
    "twice": (lambda root: (root.parent / "table.csv").write_text("sequence,first,last\n1,1,6\n2,6,11\n"), "line 3: expected every frame in one"),
    "backwards": (lambda root: (root.parent / "table.csv").write_text("sequence,first,last\n1,11,1\n"), "line 2: expected whole numbers from 1"),
    "words": (lambda root: (root.parent / "table.csv").write_text("sequence,first,last\none,1,11\n"), "line 2: expected whole numbers from 1"),
    "no rows": (lambda root: (root.parent / "table.csv").write_text("sequence,first,last\n"), "expected at least one sequence"),
    "other files": (lambda root: (root.parent / "out").mkdir() or (root.parent / "out" / "x").touch(), "expected a new or empty folder"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_one_line(archive: Path, fault: str, capsys: pytest.CaptureFixture) -> None:
    change, words = FAULTS[fault]
    change(archive)
    assert run(archive) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert words in error


def test_an_output_within_the_archive_and_no_archive(archive: Path, capsys: pytest.CaptureFixture) -> None:
    assert run(archive, "--dst_path", str(archive / "out")) == 2
    assert "found one of them within the other" in capsys.readouterr().err
    assert run(archive, "--src_path", str(archive / "nowhere")) == 2
    assert "check --src_path" in capsys.readouterr().err


def test_another_datasets_folder_is_left_alone(archive: Path, capsys: pytest.CaptureFixture) -> None:
    assert run(archive) == 0
    manifest = archive.parent / "out" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"CVC-ClinicDB"', '"other"'))
    before = sorted((archive.parent / "out").rglob("*"))
    assert run(archive, "--overwrite") == 2
    assert "found other; name another" in capsys.readouterr().err
    assert sorted((archive.parent / "out").rglob("*")) == before


def test_a_manifest_never_reaches_out_of_its_folder(archive: Path, capsys: pytest.CaptureFixture) -> None:
    assert run(archive) == 0
    precious = archive.parent / "precious.png"
    precious.touch()
    manifest = archive.parent / "out" / "manifest.json"
    manifest.write_text(manifest.read_text().replace("image/video_0001/image_0001.png", "../precious.png"))
    assert run(archive, "--overwrite") == 2
    assert "expected files in this folder, found ../precious.png" in capsys.readouterr().err
    assert precious.exists()
