"""Reports on slices: what is appended is read, what is torn is mended, and PG-SAM's numbered texts belong to their lines."""

import json
import os
import pickle
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pgsam.errors import UserError
from pgsam.prior.provenance import Provenance, Report, refuse_label_reports
from pgsam.prior.slice_reports import append_slice_report, read_slice_reports, read_text_folder

PROVENANCE = {"generator": "a model", "prompt": "describe it", "created": "2026-11-21", "saw_labels": False}
A_REPORT = Report("A slice through the liver.", Provenance("a model", "describe it", "2026-11-21", False))

printable = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
a_text = printable.filter(lambda text: any(c.isalnum() for c in text))


def write(path: Path, content: object) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


@settings(deadline=None, max_examples=25)
@given(texts=st.lists(a_text, min_size=1, max_size=4))
def test_appended_reports_are_read_as_they_were(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("appended") / "slices.jsonl"
    for i, text in enumerate(texts):
        append_slice_report(path, f"case0005_slice{i:03d}", Report(text, Provenance(text, text, "2026-11-21", i % 2 == 1)))
    reports = read_slice_reports(path)
    assert len(reports) == len(texts) == path.read_bytes().count(b"\n")
    for i, text in enumerate(texts):
        key = f"case0005_slice{i:03d}"
        assert reports.text(key) == text.strip()
        assert reports.reports[key].provenance == Provenance(text, text, "2026-11-21", i % 2 == 1)
    assert reports.saw_labels == (len(texts) > 1)


def test_slices_without_a_report_are_named_in_order(tmp_path: Path) -> None:
    append_slice_report(tmp_path / "slices.jsonl", "case0005_slice001", A_REPORT)
    reports = read_slice_reports(tmp_path / "slices.jsonl")
    assert reports.missing(["case0006_slice000", "case0005_slice001", "case0005_slice000"]) == ["case0006_slice000", "case0005_slice000"]
    assert reports.text("case0005_slice000") is None
    assert pickle.loads(pickle.dumps(reports)) == reports  # the workers of a loader get it that way


def test_what_is_appended_lies_on_the_disk_before_the_call_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, synced = tmp_path / "slices.jsonl", []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_size))
    append_slice_report(path, "case0005_slice000", A_REPORT)
    assert synced == [path.stat().st_size]


def test_file_torn_at_any_byte_keeps_its_whole_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, text = tmp_path / "slices.jsonl", "Größe der Leber {normal}."
    for i in range(2):
        append_slice_report(path, f"case0005_slice00{i}", Report(text, A_REPORT.provenance))
    whole = path.read_bytes()
    first_ends = whole.index(b"\n") + 1
    capsys.readouterr()
    for cut in range(first_ends, len(whole)):
        kept = 1 + (cut == len(whole) - 1)  # a record that only lacks its line break is whole
        torn = kept == 1 and cut > first_ends
        path.write_bytes(whole[:cut])
        assert len(read_slice_reports(path)) == kept
        assert ("NOTE" in capsys.readouterr().out) == torn
        append_slice_report(path, "case0005_slice002", A_REPORT)
        assert ("cut off" in capsys.readouterr().out) == torn
        assert list(read_slice_reports(path).reports) == [*["case0005_slice000", "case0005_slice001"][:kept], "case0005_slice002"]
        assert path.read_bytes().startswith(whole[:first_ends])


def test_long_last_lines_are_mended_too(tmp_path: Path) -> None:
    path = tmp_path / "slices.jsonl"
    append_slice_report(path, "a", Report("liver " * 50_000, A_REPORT.provenance))
    append_slice_report(path, "b", Report("spleen " * 50_000, A_REPORT.provenance))
    path.write_bytes(path.read_bytes()[:-10])
    append_slice_report(path, "c", A_REPORT)
    assert list(read_slice_reports(path).reports) == ["a", "c"]


def test_file_torn_in_its_only_line_starts_again(tmp_path: Path) -> None:
    path = write(tmp_path / "slices.jsonl", '{"key": "a", "te')
    assert len(read_slice_reports(path)) == 0
    append_slice_report(path, "a", A_REPORT)
    assert read_slice_reports(path).text("a") == A_REPORT.text


def test_last_line_that_is_no_torn_record_is_neither_cut_off_nor_left_out(tmp_path: Path) -> None:
    path = write(tmp_path / "notes.txt", "what I saw\nin the liver")
    append_slice_report(path, "a", A_REPORT)
    assert path.read_text(encoding="utf-8").startswith("what I saw\nin the liver\n")
    marked = tmp_path / "marked.jsonl"
    marked.write_bytes(b"\xef\xbb\xbf" + json.dumps({"key": "a", "text": "A text.", **PROVENANCE}).encode())
    append_slice_report(marked, "b", A_REPORT)
    assert list(read_slice_reports(marked).reports) == ["a", "b"]
    with pytest.raises(UserError, match="line 1"):
        read_slice_reports(path)


def record(**changed: object) -> str:
    return json.dumps({"key": "case0005_slice001", "text": "A text.", **PROVENANCE, **changed})


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"key": "case0005_sl', "expected JSON"),
        (record(text=" "), "without a word"),
        (record(text=None), "null"),
        (record(key="case0005_slice000"), r"case0005_slice000 again \(first in line 1\)"),
        (record(key=""), "name of a slice"),
        (record(key=" case0005_slice001"), "name of a slice"),
        (record(key=5), "name of a slice"),
        (record(key="\ud800"), "surrogate"),
        (record(seed=1), '"seed"'),
        (record(saw_labels=None), "true or false"),
        (record(created="now"), "now"),
        ('{"key": "case0005_slice001", "text": "A text."}', '"created".*"saw_labels".*found "key", "text"'),
        (record()[:-1] + ', "text": "another"}', "text twice"),
        ("[]", "an empty list"),
        ("\0" * 20, "expected JSON"),
    ],
)
def test_damaged_line_is_refused_by_its_number(line: str, message: str, tmp_path: Path) -> None:
    lines = [record(key="case0005_slice000"), "", line, record(key="case0005_slice002")]
    with pytest.raises(UserError, match=message) as caught:
        read_slice_reports(write(tmp_path / "slices.jsonl", "\n".join(lines) + "\n"))
    assert "slices.jsonl: line 3" in str(caught.value)


def test_bytes_that_are_no_text_are_refused_by_their_line(tmp_path: Path) -> None:
    (tmp_path / "slices.jsonl").write_bytes(record(key="a").encode() + b"\r\n" + b"\xff\xfe\n" + record(key="b").encode())
    with pytest.raises(UserError, match=r"line 2.*UTF-8"):
        read_slice_reports(tmp_path / "slices.jsonl")


@pytest.mark.parametrize(
    ("key", "report"),
    [
        ("", A_REPORT),
        ("a", Report(" ", A_REPORT.provenance)),
        ("a", Report("A text.", Provenance("a model", "", "today", False))),
        ("a", Report("\ud800 a", A_REPORT.provenance)),
    ],
)
def test_record_that_could_not_be_read_again_is_not_written(key: str, report: Report, tmp_path: Path) -> None:
    append_slice_report(tmp_path / "slices.jsonl", "first", A_REPORT)
    before = (tmp_path / "slices.jsonl").read_bytes()
    with pytest.raises(UserError, match=r"slices\.jsonl"):
        append_slice_report(tmp_path / "slices.jsonl", key, report)
    assert (tmp_path / "slices.jsonl").read_bytes() == before


def test_file_that_cannot_be_read_or_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"slices\.jsonl.*found none"):
        read_slice_reports(tmp_path / "slices.jsonl")
    with pytest.raises(UserError, match="cannot be written"):
        append_slice_report(tmp_path / "absent" / "slices.jsonl", "a", A_REPORT)
    with pytest.raises(UserError, match="cannot be written"):
        append_slice_report(tmp_path, "a", A_REPORT)


def test_slice_reports_made_from_labels_are_refused_by_count(tmp_path: Path) -> None:
    lines = [record(key=f"case0005_slice{i:03d}", saw_labels=i > 0) for i in range(8)]
    reports = read_slice_reports(write(tmp_path / "slices.jsonl", "\n".join(lines)))
    with pytest.raises(UserError, match=r"found case0005_slice001.*7 in all.*--allow_label_reports") as caught:
        refuse_label_reports(reports, allowed=False)
    assert "case0005_slice000" not in str(caught.value)
    refuse_label_reports(reports, allowed=True)


# --- PG-SAM's folder of texts -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twelve texts, whose order by number is not their order by name."""
    (tmp_path / "texts").mkdir()
    for i in range(12):
        write(tmp_path / "texts" / f"text_{i}.txt", f"Slice number {i}.\n")
    write(tmp_path / "train.txt", "".join(f"case0005_slice{100 - i:03d}\n" for i in range(12)))
    return tmp_path / "texts"


def test_text_of_a_number_belongs_to_the_line_of_that_number(folder: Path, tmp_path: Path) -> None:
    write(folder / "README.txt", "made by hand")
    reports = read_text_folder(folder, tmp_path / "train.txt", generator="HuatuoGPT-Vision")
    assert len(reports) == 12
    for i in range(12):
        assert reports.text(f"case0005_slice{100 - i:03d}") == f"Slice number {i}."
    assert reports.reports["case0005_slice100"].provenance == Provenance("HuatuoGPT-Vision", "", "", False)
    refuse_label_reports(reports, allowed=False)


def test_list_of_files_and_of_windows_is_read_as_names(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_bytes(b"\xef\xbb\xbf" + b"".join(b"case%d.npz\r\n" % i for i in range(11)) + b"case0008.npy.h5")
    assert list(read_text_folder(folder, tmp_path / "train.txt").reports) == [*(f"case{i}" for i in range(11)), "case0008"]


def test_folder_of_texts_made_from_labels_is_refused(folder: Path, tmp_path: Path) -> None:
    reports = read_text_folder(folder, tmp_path / "train.txt", saw_labels=True)
    with pytest.raises(UserError, match="12 in all"):
        refuse_label_reports(reports, allowed=False)


def spoil_missing_last(folder: Path) -> None:
    (folder / "text_11.txt").unlink()


def spoil_gap(folder: Path) -> None:
    (folder / "text_4.txt").unlink()


def spoil_shifted(folder: Path) -> None:
    (folder / "text_0.txt").rename(folder / "text_12.txt")


def spoil_extra(folder: Path) -> None:
    write(folder / "text_12.txt", "One more.")


def spoil_zeros(folder: Path) -> None:
    (folder / "text_0.txt").rename(folder / "text_00.txt")


def spoil_zeros_beside(folder: Path) -> None:
    write(folder / "text_03.txt", "The same number again.")


def spoil_copy(folder: Path) -> None:
    write(folder / "Text_3 (1).txt", "A browser's copy.")


def spoil_bytes(folder: Path) -> None:
    (folder / "text_7.txt").write_bytes(b"Gr\xf6\xdfe")


def spoil_empty(folder: Path) -> None:
    write(folder / "text_7.txt", " \n")


def spoil_blank_line(folder: Path) -> None:
    path = folder.parent / "train.txt"
    write(path, path.read_text(encoding="utf-8").replace("case0005_slice098\n", "\n"))


def spoil_twice(folder: Path) -> None:
    path = folder.parent / "train.txt"
    write(path, path.read_text(encoding="utf-8").replace("slice098", "slice099"))


def spoil_list_empty(folder: Path) -> None:
    write(folder.parent / "train.txt", "")


def spoil_list_absent(folder: Path) -> None:
    (folder.parent / "train.txt").unlink()


def spoil_all_but_the_folder(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_missing_last, r"12 lines.*1 missing \(text_11\.txt\);"),
        (spoil_gap, r"1 missing \(text_4\.txt\);"),
        (spoil_shifted, r"1 missing \(text_0\.txt\) and 1 without a line \(text_12\.txt\)"),
        (spoil_extra, r"found 1 without a line \(text_12\.txt\)"),
        (spoil_zeros, r"1 missing \(text_0\.txt\) and 1 without a line \(text_00\.txt\)"),
        (spoil_zeros_beside, r"found 1 without a line \(text_03\.txt\)"),
        (spoil_copy, r"found 1 without a line \(Text_3 \(1\)\.txt\)"),
        (spoil_bytes, r"text_7\.txt.*UTF-8"),
        (spoil_empty, r"text_7\.txt.*without a word"),
        (spoil_blank_line, r"train\.txt.*line 3 blank"),
        (spoil_twice, r"train\.txt.*case0005_slice099 more than once"),
        (spoil_list_empty, r"train\.txt.*line 1 blank"),
        (spoil_list_absent, r"train\.txt.*found none"),
        (spoil_all_but_the_folder, r"12 missing \(text_0\.txt, text_1\.txt, .*12 in all"),
    ],
)
def test_folder_that_disagrees_with_its_list_is_refused(spoil, message: str, folder: Path, tmp_path: Path) -> None:
    spoil(folder)
    with pytest.raises(UserError, match=message):
        read_text_folder(folder, tmp_path / "train.txt")


def test_absent_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"texts.*expected a folder"):
        read_text_folder(tmp_path / "texts", tmp_path / "train.txt")
