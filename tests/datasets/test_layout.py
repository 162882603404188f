"""Where data and lists are looked for, in which order, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from datasets.layout import DataFolder, case_of, find_data, read_manifest
from pgsam.errors import UserError

NAMES = ("case0005_slice000", "case0005_slice001", "case0006_slice010")


def write_list(folder: Path, content: str, name: str = "train.txt") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(content, encoding="utf-8")
    return folder / name


@pytest.fixture
def prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A prepared folder; the working folder is another one."""
    root = tmp_path / "data"
    (root / "train_npz").mkdir(parents=True)
    write_list(root / "lists", "\n".join(NAMES) + "\n")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    return root


@pytest.mark.parametrize("below", ["", "train_npz"])
def test_root_or_its_subfolder(prepared: Path, below: str) -> None:
    folder = find_data(prepared / below, "train_npz", "train.txt")
    assert folder == DataFolder(prepared / "train_npz", prepared / "lists" / "train.txt", NAMES, None)
    assert find_data(str(prepared / below), "train_npz", "train.txt") == folder


def test_lists_are_looked_for_in_the_documented_order(prepared: Path) -> None:
    """--list_dir, then lists/ beside the subfolder, then lists/lists_<dataset> of the working folder."""
    write_list(Path("lists/lists_Synapse"), "far_slice000\n")
    write_list(Path("lists/lists_FLARE"), "flare_slice000\n")
    write_list(prepared / "other", "chosen_slice000\n")

    def names(**flags: Any) -> tuple[str, ...]:
        return find_data(prepared, "train_npz", "train.txt", **flags).names

    assert names(list_dir=prepared / "other") == ("chosen_slice000",)
    assert names() == NAMES
    (prepared / "lists" / "train.txt").unlink()
    assert names() == ("far_slice000",)
    assert names(dataset="FLARE") == ("flare_slice000",)
    with pytest.raises(UserError, match=r"lists_BTCV, found none; give its folder with --list_dir"):
        names(dataset="BTCV")


def test_a_chosen_list_folder_is_not_replaced_by_a_default(prepared: Path) -> None:
    (prepared / "empty").mkdir()
    with pytest.raises(UserError, match=r"train\.txt: expected a list in .*empty, found none"):
        find_data(prepared, "train_npz", "train.txt", list_dir=prepared / "empty")


def test_files_in_the_folder_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_list(tmp_path / "flat" / "lists", "a_slice000\n")
    folder = find_data(tmp_path / "flat", "train_npz", "train.txt")
    assert (folder.files, folder.names) == (tmp_path / "flat", ("a_slice000",))


def test_no_such_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere: expected a prepared folder \(with train_npz/\).*found no folder"):
        find_data(tmp_path / "nowhere", "train_npz", "train.txt")


@pytest.mark.parametrize(
    "content",
    [
        "\n".join(NAMES),
        "\n".join(NAMES) + "\n\n\n  \n",
        "\r\n".join(NAMES) + "\r\n",
        "\ufeff" + "\n".join(NAMES),
        "\n".join(f"  {name}.npz\t" for name in NAMES),
    ],
    ids=["plain", "blank lines at the end", "Windows", "byte order mark", "suffixes and spaces"],
)
def test_forms_of_a_list(prepared: Path, content: str) -> None:
    (prepared / "lists" / "train.txt").write_bytes(content.encode())
    assert find_data(prepared, "train_npz", "train.txt").names == NAMES


def test_volume_lists_may_hold_the_suffix(prepared: Path) -> None:
    (prepared / "test_vol_h5").mkdir()
    write_list(prepared / "lists", "case0008.npy.h5\ncase0022\n", "test_vol.txt")
    folder = find_data(prepared, "test_vol_h5", "test_vol.txt")
    assert folder.names == folder.cases() == ("case0008", "case0022")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "found an empty list"),
        (" \n\n", "found an empty list"),
        ("a\nb\na\nb\nc", r"found a more than once \(2 such names\)"),
        ("a\na.npz", "found a more than once"),
    ],
)
def test_bad_lists(prepared: Path, content: str, words: str) -> None:
    path = write_list(prepared / "lists", content)
    with pytest.raises(UserError, match=words) as caught:
        find_data(prepared, "train_npz", "train.txt")
    assert str(caught.value).startswith(f"{path}: ")


def test_a_list_that_is_no_text(prepared: Path) -> None:
    (prepared / "lists" / "train.txt").write_bytes(b"\x80\x04\x95\xff")
    with pytest.raises(UserError, match=r"train\.txt: expected one name a line, found no UTF-8 text"):
        find_data(prepared, "train_npz", "train.txt")


@pytest.mark.parametrize(
    ("name", "case"),
    [
        ("case0005_slice012", "case0005"),
        ("case0005", "case0005"),
        ("a_slice_b_slice1", "a_slice_b"),
        ("x_slice", "x_slice"),
        ("_slice001", "_slice001"),
    ],
)
def test_the_case_of_a_slice(name: str, case: str) -> None:
    assert case_of(name) == case


def test_cases_and_patients(prepared: Path) -> None:
    assert find_data(prepared, "train_npz", "train.txt").patients() == ("case0005", "case0006")  # nothing else is known
    manifest = {"class_names": ["liver"], "cases": {"case0005": {"patient": "P7"}, "case0006": {"patient": "P7"}, "case0099": {"patient": "P1"}}}
    (prepared / "manifest.json").write_text(json.dumps(manifest))
    for root in (prepared, prepared / "train_npz"):
        folder = find_data(root, "train_npz", "train.txt")
        assert folder.manifest == manifest
        assert folder.cases() == ("case0005", "case0006")
        assert folder.patients() == ("P7",)
    manifest["cases"] = {"case0005": {"patient": "P7"}, "case0006": {"patient": None}}
    (prepared / "manifest.json").write_text(json.dumps(manifest))
    assert find_data(prepared, "train_npz", "train.txt").patients() == ("P7", "case0006")


@pytest.mark.parametrize(
    "content",
    [b"{", b"", b"\xff\xfe\x00", b"[]", b"3", b'{"cases": {}}', b'{"class_names": "liver", "cases": {}}', b'{"class_names": ["liver"], "cases": []}'],
)
def test_a_damaged_manifest(prepared: Path, content: bytes) -> None:
    (prepared / "manifest.json").write_bytes(content)
    with pytest.raises(UserError, match=r"manifest\.json: expected .*; run the preprocessing again"):
        find_data(prepared, "train_npz", "train.txt")


def test_no_manifest(tmp_path: Path) -> None:
    assert read_manifest(tmp_path) is None
