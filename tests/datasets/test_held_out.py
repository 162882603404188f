"""Cases held out of a training: which ones, what is left to train on, and volumes that are put together from slices."""

import dataclasses
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from datasets.held_out import HeldOut, hold_out_list, hold_out_share, join_slices
from datasets.layout import DataFolder, find_data
from datasets.volumes import read_case
from pgsam.errors import UserError
from pgsam.volume import Volume, affine_of, take_slice, to_attributes

PATIENTS = {"a1": "anna", "a2": "anna", "b": "bert", "c": "carl", "d": "dora", "e": "emil"}
DEPTHS = {"a1": 3, "a2": 4, "b": 12, "c": 3, "d": 3, "e": 3}
SHAPE = (6, 5)


def oblique(spacing: Sequence[float] = (3.0, 0.7, 1.4), turn: float = 0.2) -> np.ndarray:
    axes = np.array([[0.0, 0.0, 1.0], [0.0, -1.0, 0.0], [1.0, 0.0, 0.0]])
    rotation = np.array([[np.cos(turn), -np.sin(turn), 0], [np.sin(turn), np.cos(turn), 0], [0, 0, 1]])
    return affine_of(np.array(spacing), np.array([10.0, -20.0, 30.0]), rotation @ axes)


def volume_of(case: str) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(sorted(PATIENTS).index(case))
    shape = (DEPTHS[case], *SHAPE)
    return rng.random(shape, dtype=np.float32), rng.integers(0, 3, shape).astype(np.float32)


def write_slices(files: Path, case: str, *, tells: bool = True) -> None:
    files.mkdir(parents=True, exist_ok=True)
    image, label = volume_of(case)
    volume = Volume(image, oblique())
    for index in range(len(image)):
        told = to_attributes(take_slice(volume, index), source_orientation="RAS", image_kind="ct_window", window=(-125.0, 275.0)) if tells else {}
        np.savez(files / f"{case}_slice{index:03d}.npz", image=image[index], label=label[index], **told)


def write_volume_file(path: Path, case: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image, label = volume_of(case)
    with h5py.File(path, "w") as file:
        file["image"], file["label"] = image, label
        file.attrs.update(to_attributes(Volume(image, oblique()), source_orientation="RAS", image_kind="ct_window", window=(-125.0, 275.0)))
    return path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Cases a1 to d in the training list, e a volume, and a manifest."""
    folder = tmp_path / "data"
    for case in ("a1", "a2", "b", "c", "d"):
        write_slices(folder / "train_npz", case)
    write_volume_file(folder / "test_vol_h5" / "e.npy.h5", "e")
    (folder / "lists").mkdir()
    names = [f"{case}_slice{i:03d}" for case in ("d", "a1", "b", "a2", "c") for i in range(DEPTHS[case])]
    (folder / "lists" / "train.txt").write_text("".join(f"{name}\n" for name in names))
    cases = {case: {"patient": patient, "n_slices": DEPTHS[case]} for case, patient in PATIENTS.items()}
    (folder / "manifest.json").write_text(json.dumps({"class_names": ["x", "y"], "cases": cases}))
    return folder


def training(root: Path) -> DataFolder:
    return find_data(root, "train_npz", "train.txt")


def listed(root: Path, *names: str) -> Path:
    path = root.parent / "val.txt"
    path.write_text("".join(f"{name}\n" for name in names))
    return path


def held(folder: DataFolder, path: Path, **options: Any) -> tuple[DataFolder, HeldOut]:
    return hold_out_list(folder, path, **options)


# --- which cases ---------------------------------------------------------------------------------------------------------------------------


def test_a_listed_case_leaves_the_training_and_nothing_else_does(root: Path) -> None:
    before = training(root)
    after, out = held(before, listed(root, "c", "e", "b"))
    assert out.names == ("c", "e", "b")
    assert out.patients == ("bert", "carl", "emil")
    assert after.names == tuple(name for name in before.names if name[0] in "ad")  # in the order of before
    assert after.patients() == ("anna", "dora")
    assert (after.files, after.list_file, after.manifest) == (before.files, before.list_file, before.manifest)
    assert [case.slices[:2] for case in out.cases] == [("c_slice000", "c_slice001"), (), ("b_slice000", "b_slice001")]
    assert out.cases[1].paths == (root / "test_vol_h5" / "e.npy.h5",)
    assert out.cases[2].slices == tuple(f"b_slice{i:03d}" for i in range(12))
    assert out.describe() == [f"validation on 3 cases of 3 patients ({root.parent / 'val.txt'}): c, e, b"]


def test_a_case_is_whole_though_the_list_names_a_part_of_it(root: Path) -> None:
    (root / "lists" / "train.txt").write_text("b_slice002\nd_slice000\nb_slice004\n")
    after, out = held(training(root), listed(root, "b", "c"))  # c lies there and is not in the list at all
    assert after.names == ("d_slice000",)
    assert [len(case.paths) for case in out.cases] == [12, 3]


def test_slices_stand_in_the_order_of_their_numbers(root: Path) -> None:
    files = root / "train_npz"
    for index in range(12):  # as others number them
        (files / f"b_slice{index:03d}.npz").rename(files / f"b_slice{index}.npz")
    names = "".join(f"b_slice{i}\n" for i in range(12))
    (root / "lists" / "train.txt").write_text(f"{names}d_slice000\n")
    _, out = held(training(root), listed(root, "b"))
    assert np.array_equal(out.cases[0].read(2).image, volume_of("b")[0])


def test_the_test_list_is_spoken_of(root: Path) -> None:
    (root / "lists" / "test_vol.txt").write_text("e\n")
    _, out = held(training(root), listed(root, "c", "e"))
    assert out.tested == ("emil",)
    assert "NOTE: 1 of the validation patients are in the test list too (emil)" in out.describe()[1]
    assert held(training(root), listed(root, "c"))[1].tested == ()


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (("c", "nobody", "x_slice003"), ("nobody, x_slice003 (2 unknown of 3)", "one case a line, as a1")),
        (("a1", "a2", "b", "c", "d"), ("cases to be left to train on", "all 5 of", "name fewer")),
        (("a1",), ("1 of the patients stay in the training with other cases (anna)", "--allow_overlap")),
        (("c", "c"), ("expected every name once, found c more than once",)),
        ((), ("found an empty list",)),
    ],
)
def test_lists_that_cannot_be(root: Path, names: tuple[str, ...], said: tuple[str, ...]) -> None:
    path = listed(root, *names)
    with pytest.raises(UserError) as error:
        held(training(root), path)
    assert str(error.value).startswith(f"{path}: ")
    assert all(part in str(error.value) for part in said), error.value


def test_an_absent_list(root: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.txt: expected a list of cases for --val_list"):
        held(training(root), root / "nowhere.txt")


def test_overlap_can_be_allowed(root: Path) -> None:
    after, out = held(training(root), listed(root, "a1"), allow_overlap=True)
    assert out.patients == ("anna",)
    assert "anna" in after.patients()
    assert {name[:2] for name in after.names} == {"a2", "b_", "c_", "d_"}


def test_a_patient_of_a_volume_is_not_trained_on(root: Path) -> None:
    manifest = json.loads((root / "manifest.json").read_text())
    manifest["cases"]["e"]["patient"] = "dora"
    (root / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"stay in the training with other cases \(dora\)"):
        held(training(root), listed(root, "e"))
    assert held(training(root), listed(root, "e", "d"))[1].patients == ("dora",)


# --- a share -------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("share", "patients"), [(0.01, 1), (0.25, 1), (0.4, 2), (0.5, 2), (0.75, 3)])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_share_is_of_patients(root: Path, share: float, patients: int, seed: int) -> None:
    before = training(root)
    after, out = hold_out_share(before, share, seed)
    assert len(out.patients) == patients
    assert set(out.patients) | set(after.patients()) == set(before.patients())
    assert not set(out.patients) & set(after.patients())
    assert {PATIENTS[name] for name in out.names} == set(out.patients)
    assert set(out.names) == {case for case in before.cases() if PATIENTS[case] in out.patients}  # both of Anna's, or none
    assert (after, out) == hold_out_share(before, share, seed)
    assert out.source == f"--val_share {share:g}"


def test_the_seed_draws(root: Path) -> None:
    drawn = {hold_out_share(training(root), 0.25, seed)[1].patients for seed in range(40)}
    assert drawn == {("anna",), ("bert",), ("carl",), ("dora",)}


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, 1.5, float("nan")])
def test_a_share_out_of_range(root: Path, share: float) -> None:
    with pytest.raises(UserError, match=r"--val_share \S+: expected a number above 0 and below 1"):
        hold_out_share(training(root), share, 0)


@pytest.mark.parametrize(("names", "share", "said"), [(("b",), 0.1, "found 1 of the 1 in"), (("b", "c"), 0.9, "found 2 of the 2 in")])
def test_a_share_that_leaves_nobody(root: Path, names: tuple[str, ...], share: float, said: str) -> None:
    (root / "lists" / "train.txt").write_text("".join(f"{name}_slice000\n" for name in names))
    with pytest.raises(UserError, match=said):
        hold_out_share(training(root), share, 0)


def test_without_a_manifest_a_case_is_a_patient(root: Path) -> None:
    (root / "manifest.json").unlink()
    _, out = hold_out_share(training(root), 0.2, 3)
    assert (len(out.names), out.names) == (1, out.patients)


# --- volumes from slices -------------------------------------------------------------------------------------------------------------------


def test_slices_make_the_volume_that_the_file_holds(root: Path) -> None:
    expected = read_case(write_volume_file(root / "b.npy.h5", "b"), "b", 2)
    _, out = held(training(root), listed(root, "b"))
    found = out.cases[0].read(2)
    for field in dataclasses.fields(expected):
        if field.name not in ("image", "label", "geometry"):
            assert getattr(found, field.name) == getattr(expected, field.name), field.name
    assert np.array_equal(found.image, expected.image)
    assert np.array_equal(found.label, expected.label)
    assert (found.image.dtype, found.label.dtype) == (expected.image.dtype, expected.label.dtype)
    assert found.geometry is not None
    assert expected.geometry is not None
    assert np.allclose(found.geometry.affine, expected.geometry.affine, atol=1e-9, rtol=0)
    assert np.array_equal(found.geometry.array, expected.geometry.array)


def test_files_of_others_have_no_geometry(root: Path) -> None:
    write_slices(root / "train_npz", "c", tells=False)
    case = held(training(root), listed(root, "c"))[1].cases[0].read(2)
    assert (case.geometry, case.spacing_mm, case.window, case.image_kind, case.source_orientation) == (None,) * 5
    assert np.array_equal(case.image, volume_of("c")[0])


def rewrite(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    with np.load(path) as archive:
        entries = dict(archive)
    change(entries)
    np.savez(path, **entries)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda e: e.update(image=e["image"][1:], label=e["label"][1:]), "expected [6, 5] pixels as in b_slice000.npz, found [5, 5]"),
        (lambda e: e.update(origin=e["origin"] + 0.1), "expected slice 7 of the stack that begins with b_slice000.npz, found it 0.173 mm off"),
        (lambda e: e.update(spacing=np.array([3.0, 0.7, 1.5])), "mm off that place"),
        (lambda e: e.update(window=np.array([0.0, 1.0])), "expected the same window as in b_slice000.npz"),
        (lambda e: e.update(image_kind=np.array("percentile")), "expected the same image_kind"),
        (lambda e: e.pop("origin"), "expected the same origin"),
        (lambda e: e.update(origin=np.array([None, 1, 2])), "damaged"),
        (lambda e: e.update(image=e["image"] + 9), "expected [0, 1]; raw HU?"),
    ],
)
def test_slices_that_do_not_fit(root: Path, change: Callable[[dict[str, Any]], object], said: str) -> None:
    path = root / "train_npz" / "b_slice007.npz"
    case = held(training(root), listed(root, "b"))[1].cases[0]
    rewrite(path, change)
    with pytest.raises(UserError) as error:
        case.read(2)
    assert str(error.value).startswith(f"{path} (b"), error.value
    assert said in str(error.value)


def test_small_differences_of_place_are_rounding(root: Path) -> None:
    rewrite(root / "train_npz" / "b_slice007.npz", lambda e: e.update(origin=e["origin"] + 1e-3))
    held(training(root), listed(root, "b"))[1].cases[0].read(2)


@pytest.mark.parametrize("manifest", [True, False])
def test_a_slice_in_the_middle_is_missing(root: Path, manifest: bool) -> None:
    if not manifest:
        (root / "manifest.json").unlink()
    (root / "lists" / "train.txt").write_text("b_slice000\nd_slice000\n")
    (root / "train_npz" / "b_slice005.npz").unlink()
    with pytest.raises(UserError, match=r"train_npz \(b\): expected the slices 0 to 11 for a whole validation volume, found 11, without 5;"):
        held(training(root), listed(root, "b"))


def test_the_manifest_knows_the_last_slice(root: Path) -> None:
    (root / "lists" / "train.txt").write_text("b_slice000\nd_slice000\n")
    (root / "train_npz" / "b_slice011.npz").unlink()
    with pytest.raises(UserError, match="without 11"):
        held(training(root), listed(root, "b"))
    write_slices(root / "train_npz", "b")
    shutil.copy(root / "train_npz" / "b_slice011.npz", root / "train_npz" / "b_slice012.npz")
    with pytest.raises(UserError, match=r"the slices 0 to 11 for a whole validation volume, found 13, with more;"):
        held(training(root), listed(root, "b"))


@pytest.mark.parametrize("way", ["list", "share"])
def test_a_listed_slice_is_missing(root: Path, way: str) -> None:
    for case in ("b", "c"):  # whoever is drawn
        (root / "train_npz" / f"{case}_slice002.npz").unlink()
    (root / "lists" / "train.txt").write_text("b_slice002\nc_slice002\n")
    with pytest.raises(UserError, match=r"[bc]_slice002\.npz: [bc]_slice002 is in the list but has no file"):
        held(training(root), listed(root, "b")) if way == "list" else hold_out_share(training(root), 0.5, 0)


def test_leftovers_of_a_killed_preprocessing_are_no_slices(root: Path) -> None:
    (root / "train_npz" / ".123.b_slice012.npz").write_bytes(b"half a file")
    assert len(held(training(root), listed(root, "b"))[1].cases[0].paths) == 12


def test_one_slice_is_a_volume_too(root: Path) -> None:
    (root / "manifest.json").unlink()
    path = root / "train_npz" / "b_slice003.npz"
    case = join_slices([path], "b", 2)
    assert case.image.shape == (1, *SHAPE)
    assert case.spacing_mm == pytest.approx((3.0, 0.7, 1.4))
