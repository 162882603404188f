"""Which reference belongs to which image, in the three layouts."""

from datetime import date
from pathlib import Path

import pytest

from pgsam.errors import UserError
from pgsam.oneshot.data import aligned, cvc_clinicdb, lung_4d, natural_order, perseg, perseg_targets, visit_date


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def perseg_tree(root: Path, **objects: list[str]) -> Path:
    for name, stems in objects.items():
        touch(root, *(f"Images/{name}/{stem}.jpg" for stem in stems), *(f"Annotations/{name}/{stem}.png" for stem in stems))
    return root


# --- PerSeg -------------------------------------------------------------------------------------------------------------------------------


def test_the_reference_is_left_out_by_its_name_and_not_by_its_path(tmp_path: Path) -> None:
    root = perseg_tree(tmp_path / "data_2003" / "00", cat00=["00", "01", "100"], dog=["00", "01"])
    benchmark = perseg(root)
    assert [(item.groups, item.name) for item in benchmark.items] == [(("cat00",), "01"), (("cat00",), "100"), (("dog",), "01")]
    first = benchmark.items[0]
    assert first.image == root / "Images/cat00/01.jpg"
    assert first.truth == root / "Annotations/cat00/01.png"
    assert first.prediction == Path("cat00/01.png")
    assert first.reference.image == root / "Images/cat00/00.jpg"
    assert first.reference.mask == root / "Annotations/cat00/00.png"
    assert len(benchmark.references) == 2
    targets, allowed = perseg_targets(root / "Annotations")
    assert [(t.groups, t.name, t.truth, t.prediction) for t in targets] == [(i.groups, i.name, i.truth, i.prediction) for i in benchmark.items]
    assert allowed == {Path("cat00/00.png"), Path("dog/00.png")}


def test_another_reference(tmp_path: Path) -> None:
    benchmark = perseg(perseg_tree(tmp_path, cat=["00", "01", "02"]), reference="01")
    assert [item.name for item in benchmark.items] == ["00", "02"]
    assert benchmark.items[0].reference.image.name == "01.jpg"


def test_hidden_files_and_notes_are_no_images(tmp_path: Path) -> None:
    perseg_tree(tmp_path, cat=["00", "01"])
    touch(tmp_path, "Images/.DS_Store", "Images/cat/._01.jpg", "Images/cat/notes.txt", "Annotations/.cache/x.png")
    assert [item.name for item in perseg(tmp_path).items] == ["01"]


def test_an_object_without_test_images_is_said(tmp_path: Path) -> None:
    benchmark = perseg(perseg_tree(tmp_path, cat=["00", "01"], dog=["00"]))
    assert [item.groups for item in benchmark.items] == [("cat",)]
    assert len(benchmark.left_out) == 1
    assert benchmark.left_out[0].startswith("dog")
    with pytest.raises(UserError, match="references only"):
        perseg(perseg_tree(tmp_path / "b", dog=["00"]))
    with pytest.raises(UserError, match="beside the reference 00, found none"):
        perseg_targets(tmp_path / "b" / "Annotations")


@pytest.mark.parametrize(
    ("extra", "missing", "message"),
    [
        (["Images/cat/02.jpg"], [], r"Images/cat: expected the same names as in .*Annotations/cat, found 02 here only"),
        (["Annotations/cat/02.png"], [], r"Annotations/cat: expected the same names as in .*Images/cat, found 02 here only"),
        (["Images/cow/00.jpg"], [], r"Images: expected the same names as in .*Annotations, found cow here only"),
        (["Images/cat/01.png"], [], r"expected one picture called 01, found 01\.jpg too"),
        ([], ["Images/cat/00.jpg", "Annotations/cat/00.png"], r"Annotations/cat: expected the reference 00 among its names, found 01"),
        ([], ["Images/cat/00.jpg", "Images/cat/01.jpg"], r"Images/cat: expected pictures in it, found none"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path: Path, extra: list[str], missing: list[str], message: str) -> None:
    perseg_tree(tmp_path, cat=["00", "01"])
    touch(tmp_path, *extra)
    for name in missing:
        (tmp_path / name).unlink()
    with pytest.raises(UserError, match=message):
        perseg(tmp_path)


def test_another_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"Images: expected a folder, it cannot be listed"):
        perseg(tmp_path)
    (tmp_path / "Images").mkdir()
    with pytest.raises(UserError, match=r"Images: expected folders in it, found none"):
        perseg(tmp_path)


# --- CVC-ClinicDB -------------------------------------------------------------------------------------------------------------------------


def cvc_tree(root: Path, **videos: list[str]) -> Path:
    for name, numbers in videos.items():
        touch(root, *(f"image/{name}/image_{n}.png" for n in numbers), *(f"label/{name}/label_{n}.png" for n in numbers))
    return root


def test_the_third_frame_is_the_reference_of_those_after_it(tmp_path: Path) -> None:
    benchmark = cvc_clinicdb(cvc_tree(tmp_path, video_0001=["8", "9", "10", "11", "12"], video_0002=["13", "14", "15", "16"]))
    assert benchmark.levels == ("video",)
    assert [(item.groups[0], item.name) for item in benchmark.items] == [("video_0001", "11"), ("video_0001", "12"), ("video_0002", "16")]
    assert [item.reference.image.name for item in benchmark.items] == ["image_10.png", "image_10.png", "image_15.png"]
    assert benchmark.items[0].reference.mask == tmp_path / "label/video_0001/label_10.png"
    assert benchmark.items[0].prediction == Path("video_0001/image_11.png")
    assert benchmark.items[0].truth.name == "label_11.png"


def test_as_many_frames_are_scored_as_published(tmp_path: Path) -> None:
    lengths = [21] * 28 + [612 - 28 * 21]  # 29 videos of 612 frames, 525 of them after a third one
    numbers = iter(range(1, 613))
    tree = {f"video_{i:04d}": [f"{next(numbers):04d}" for _ in range(length)] for i, length in enumerate(lengths, start=1)}
    assert len(cvc_clinicdb(cvc_tree(tmp_path, **tree)).items) == 525


def test_short_videos(tmp_path: Path) -> None:
    cvc_tree(tmp_path, video_0001=["1", "2", "3", "4"], video_0002=["5", "6", "7"])
    assert cvc_clinicdb(tmp_path).left_out == ("video_0002: the reference is its last frame",)
    with pytest.raises(UserError, match=r"video_0002: expected at least 4 frames, found 3"):
        cvc_clinicdb(tmp_path, reference_frame=4)
    touch(tmp_path, "image/video_0001/frame_9.png")
    with pytest.raises(UserError, match=r"frame_9\.png: expected a name that begins with image_"):
        cvc_clinicdb(tmp_path)


# --- 4D-Lung ------------------------------------------------------------------------------------------------------------------------------


def lung_tree(root: Path, patient: str, **visits: int) -> Path:
    for visit, slices in visits.items():
        names = [f"{patient}/{visit}/Gated_00/1-{n:03d}.png" for n in range(40, 40 + slices)]
        touch(root, *(f"{side}/{name}" for side in ("image", "label") for name in names))
    return root


def test_the_first_visit_is_the_first_by_date_across_new_year(tmp_path: Path) -> None:
    visits = {"01-02-2001-NA-p4-86157": 3, "12-27-2000-NA-p4-14571": 5, "01-18-2001-NA-p4-89392": 4, "11-27-2001-NA-p4-1": 7}
    benchmark = lung_4d(lung_tree(tmp_path, "119_HM10395", **visits))
    assert benchmark.levels == ("patient", "visit")
    assert list(dict.fromkeys(item.groups[1][:10] for item in benchmark.items)) == ["01-02-2001", "01-18-2001", "11-27-2001"]
    assert {item.reference.image.parents[1].name for item in benchmark.items} == {"12-27-2000-NA-p4-14571"}
    matched = {}
    for item in benchmark.items:
        matched.setdefault(item.groups[1][:10], []).append(int(item.reference.image.stem[2:]) - 40)
    # Five slices of reference, the middle one is 2. Of three the middle one is 1, of four 2, of seven 3.
    assert matched == {"01-02-2001": [1, 2, 3], "01-18-2001": [0, 1, 2, 3], "11-27-2001": [0, 0, 1, 2, 3, 4, 4]}
    first = benchmark.items[0]
    assert first.prediction == Path("119_HM10395/01-02-2001-NA-p4-86157/Gated_00/1-040.png")
    assert first.reference.mask.parts[-5:-1] == ("label", "119_HM10395", "12-27-2000-NA-p4-14571", "Gated_00")
    assert len(benchmark.by_reference()) == 5
    assert sum(map(len, benchmark.by_reference().values())) == len(benchmark.items) == 14


def test_visits_of_one_day_go_by_name(tmp_path: Path) -> None:
    benchmark = lung_4d(lung_tree(tmp_path, "107", **{"05-26-1998-NA-p4-102": 1, "05-26-1998-NA-p4-9": 1}))
    assert benchmark.items[0].reference.image.parents[1].name.endswith("p4-9")


def test_dates() -> None:
    assert visit_date(Path("02-29-2000-NA")) == date(2000, 2, 29)
    for name in ("02-30-2000-NA", "13-01-2000", "2000-01-02-NA", "visit1", "01-02-20001"):
        with pytest.raises(UserError, match=f"{name}: expected a visit's folder that begins with its date, MM-DD-YYYY"):
            visit_date(Path("x") / name)


def test_a_patient_with_one_visit_is_said_and_another_gate_is_asked_for(tmp_path: Path) -> None:
    lung_tree(tmp_path, "107", **{"05-26-1998-a": 2, "06-26-1998-a": 2})
    lung_tree(tmp_path, "108", **{"05-26-1998-a": 2})
    assert lung_4d(tmp_path).left_out == ("108: 05-26-1998-a is the only visit",)
    with pytest.raises(UserError, match=r"Gated_03: expected a folder"):
        lung_4d(tmp_path, gate=3)


def test_slices_keep_their_distance_from_the_middle() -> None:
    for slices in range(1, 12):
        assert [aligned(i, slices, slices) for i in range(slices)] == list(range(slices))
        assert {aligned(i, slices, 1) for i in range(slices)} == {0}
    assert [aligned(i, 2, 9) for i in range(2)] == [3, 4]


def test_numbers_of_names_are_numbers() -> None:
    assert sorted(["1-10", "1-9", "1-010a", "a2", "a10", ""], key=natural_order) == ["", "1-9", "1-10", "1-010a", "a2", "a10"]
