import hashlib
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from datetime import date
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datasets.labels import BTCV_NAMES, FLARE22_NAMES, LABEL_MAPS, SYNAPSE8_NAMES
from pgsam.errors import UserError
from pgsam.prior.reports import (
    OrganReports,
    Provenance,
    Report,
    append_slice_report,
    builtin_reports,
    normalise_name,
    read_organ_reports,
    read_slice_reports,
    read_text_folder,
    refuse_label_reports,
    reports_hash,
)

PROVENANCE = {"generator": "a model", "prompt": "describe it", "created": "2026-11-21", "saw_labels": False}
BANK = {"format": 1, "kind": "organ reports", "provenance": PROVENANCE, "held_out": ["sketch"]}
SPLEEN = {"short": "Spleen, short.", "sketch": "Spleen, noted.", "long": "Spleen, long."}
WORDS = {  # fewest and most words of each wording
    "long": (60, 120),
    "report": (60, 120),
    "short": (20, 35),
    "sentence": (12, 25),
    "terms": (5, 20),
    "location": (25, 50),
    "appearance": (25, 50),
    "clinical": (25, 60),
    "sketch": (30, 60),
}
A_REPORT = Report("A slice through the liver.", Provenance("a model", "describe it", "2026-11-21", False))

printable = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
a_text = printable.filter(lambda text: any(c.isalnum() for c in text))


@pytest.fixture(scope="module")
def bank() -> OrganReports:
    return builtin_reports()


def write(path: Path, content: object) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


# --- the built-in reports ---------------------------------------------------------------------------------------------------------------


def test_every_class_of_every_dataset_has_a_report(bank: OrganReports) -> None:
    names = {*BTCV_NAMES, *SYNAPSE8_NAMES, *FLARE22_NAMES, *(name for label_map in LABEL_MAPS.values() for name in label_map.class_names)}
    assert names == set(bank.organs)
    for name in names:
        assert bank.text(name)
        assert bank.text(name.upper().replace(" ", "_")) == bank.text(name)


def test_wordings_are_complete_of_the_promised_length_and_all_different(bank: OrganReports) -> None:
    assert set(bank.wordings()) == {*WORDS, "name"}
    texts = []
    for organ, reports in bank.organs.items():
        assert set(reports) == set(bank.wordings()), organ
        assert reports["name"].text == organ
        for wording, (fewest, most) in WORDS.items():
            assert fewest <= len(reports[wording].text.split()) <= most, (organ, wording)
        texts += [report.text for report in reports.values()]
    assert len(set(texts)) == len(texts) == 150


def test_every_text_on_a_paired_organ_names_its_side(bank: OrganReports) -> None:
    for organ in ("right kidney", "left kidney", "right adrenal gland", "left adrenal gland"):
        side = organ.split()[0]
        for wording, report in bank.organs[organ].items():
            assert side in report.text.lower(), (organ, wording)
    for wording, report in bank.organs["adrenal glands"].items():
        assert wording == "name" or {"right", "left"} <= set(report.text.lower().replace(",", " ").replace(":", " ").split()), wording


def test_texts_are_plain_and_their_origin_is_known(bank: OrganReports) -> None:
    for reports in bank.organs.values():
        for report in reports.values():
            assert report.text.isascii()
            assert report.text == " ".join(report.text.split())
            assert report.provenance.generator
            assert report.provenance.prompt
            assert date.fromisoformat(report.provenance.created)
    assert not bank.saw_labels
    refuse_label_reports(bank, allowed=False)


def test_held_out_wordings_are_not_for_training(bank: OrganReports) -> None:
    assert bank.held_out == ("clinical", "sketch")
    for organ in bank.organs:
        training = bank.training(organ)
        assert training[0] == bank.text(organ)
        assert set(training) | {bank.text(organ, "clinical"), bank.text(organ, "sketch")} == {bank.text(organ, w) for w in bank.wordings()}
        assert len(training) == len(set(training)) == 8


def test_importing_reads_no_file() -> None:
    audit = (
        "import sys, pgsam.errors; seen = []; "
        "sys.addaudithook(lambda event, args: seen.append(str(args[0])) if event == 'open' else None); "
        "import pgsam.prior.reports; assert not [path for path in seen if path.endswith('.json')], seen"
    )
    subprocess.run([sys.executable, "-c", audit], check=True, cwd=Path(__file__).parents[3])


# --- names ------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("Right_Kidney", "right kidney"),
        ("  left-adrenal  gland ", "left adrenal gland"),
        ("Oesophagus", "esophagus"),
        ("postcava", "inferior vena cava"),
        ("liver_tumour", "liver tumor"),
        ("gall_bladder", "gallbladder"),
        ("kidney_left", "left kidney"),
        ("adrenal_gland_right", "right adrenal gland"),
        ("portal_vein_and_splenic_vein", "portal and splenic vein"),
    ],
)
def test_spelling_variants_are_one_name(written: str, name: str) -> None:
    assert normalise_name(written) == name


@given(printable | st.lists(st.sampled_from(["oesophagus", "postcava", "tumour", "kidney", "right", "_", "-", " "])).map("".join))
def test_a_normalised_name_stays_as_it_is(name: str) -> None:
    assert normalise_name(normalise_name(name)) == normalise_name(name)


def test_right_and_left_stay_apart() -> None:
    assert normalise_name("kidney_right") != normalise_name("kidney_left")
    assert normalise_name("adrenal_gland_right") != normalise_name("adrenal_gland_left")


# --- hash -------------------------------------------------------------------------------------------------------------------------------


def test_hash_is_sha256_of_the_sorted_pairs_as_json() -> None:
    pairs = b'[["liver", "b"], ["spleen", "a\\u00e9"]]'
    assert reports_hash({"spleen": "aé", "liver": "b"}) == hashlib.sha256(pairs).hexdigest()


@given(st.dictionaries(printable, printable), st.randoms())
def test_hash_does_not_depend_on_the_order(texts: dict[str, str], random) -> None:
    pairs = list(texts.items())
    random.shuffle(pairs)
    assert reports_hash(dict(pairs)) == reports_hash(texts)


@given(st.dictionaries(printable, printable), st.dictionaries(printable, printable))
def test_hash_tells_pairs_apart(one: dict[str, str], other: dict[str, str]) -> None:
    assert (reports_hash(one) == reports_hash(other)) == (one == other)


def test_exchanged_texts_and_moved_borders_change_the_hash() -> None:
    assert reports_hash({"liver": "a", "spleen": "b"}) != reports_hash({"liver": "b", "spleen": "a"})
    assert reports_hash({"ab": "c"}) != reports_hash({"a": "bc"})


# --- organ reports of the user ----------------------------------------------------------------------------------------------------------


def test_plain_mapping_and_plain_file_say_the_same_of_the_organs(tmp_path: Path) -> None:
    given_texts = {"Right_Kidney": " The right kidney.\n", "spleen": SPLEEN}
    from_python = read_organ_reports(given_texts)
    from_file = read_organ_reports(write(tmp_path / "plain.json", given_texts))
    for reports in (from_python, from_file):
        assert list(reports.organs) == ["right kidney", "spleen"]
        assert reports.text("right kidney") == "The right kidney."
        assert reports.training("spleen") == ("Spleen, long.", "Spleen, short.", "Spleen, noted.")
        assert reports.held_out == ()
        assert not reports.saw_labels
    assert from_python.organs["spleen"]["long"].provenance == Provenance("given in Python", "", "", False)
    assert from_file.organs["spleen"]["long"].provenance == Provenance("not given", "", "", False)
    assert str(tmp_path / "plain.json") == from_file.source


def test_file_with_provenance_and_what_a_report_says_of_its_own(tmp_path: Path) -> None:
    organs = {"spleen": {**SPLEEN, "long": {"text": "Spleen, by hand.", "generator": "Dr. N.", "saw_labels": True}}}
    reports = read_organ_reports(write(tmp_path / "bank.json", {**BANK, "organs": organs}))
    assert reports.organs["spleen"]["short"].provenance == Provenance("a model", "describe it", "2026-11-21", False)
    assert reports.organs["spleen"]["long"].provenance == Provenance("Dr. N.", "describe it", "2026-11-21", True)
    assert reports.training("spleen") == ("Spleen, by hand.", "Spleen, short.")
    assert reports.saw_labels
    with pytest.raises(UserError, match=r"bank\.json.*spleen \(long\).*--allow_label_reports"):
        refuse_label_reports(reports, allowed=False)
    refuse_label_reports(reports, allowed=True)


def test_held_out_report_made_from_labels_counts_too(tmp_path: Path) -> None:
    organs = {"spleen": {**SPLEEN, "sketch": {"text": "Spleen.", "saw_labels": True}}}
    assert read_organ_reports(write(tmp_path / "bank.json", {**BANK, "organs": organs})).saw_labels


def test_unknown_organ_or_wording_is_answered_with_what_there_is(bank: OrganReports) -> None:
    with pytest.raises(UserError, match=r"'bladder'.*spleen, right kidney.*duodenum"):
        bank.text("bladder")
    with pytest.raises(UserError, match="'bladder'"):
        bank.training("bladder")
    with pytest.raises(UserError, match=r"'poem'.*long, report.*sketch"):
        bank.text("liver", "poem")


def test_organ_that_is_no_class_is_refused_and_a_class_in_another_spelling_is_not() -> None:
    assert read_organ_reports({"Oesophagus": "A tube."}, ["Esophagus"]).text("esophagus") == "A tube."
    assert read_organ_reports({"esophagus": "A tube."}, ["oesophagus", "liver"]).text("oesophagus") == "A tube."
    with pytest.raises(UserError, match="expected reports on liver, spleen; found lever"):
        read_organ_reports({"lever": "A solid organ."}, ["liver", "spleen"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"spleen": "one", "spleen": "two"}', "spleen twice"),
        ('{"spleen": {"long": "one", "long": "two"}}', "long twice"),
        ('{"esophagus": "one", "Oesophagus": "two"}', "'esophagus' in two spellings"),
        ('{"right kidney": "one", "Right_Kidney": "two"}', "'right kidney' in two spellings"),
        ('{"spleen": ""}', "'spleen'.*without a word"),
        ('{"spleen": " \\n\\t"}', "'spleen'.*without a word"),
        ('{"spleen": "..."}', "'spleen'.*without a word"),
        ('{"spleen": {"long": " "}}', "wording 'long'.*without a word"),
        ('{"spleen": {}}', "'spleen'.*an empty object"),
        ('{"spleen": null}', "'spleen'.*null"),
        ('{"spleen": 3}', "'spleen'.*a number"),
        ('{"spleen": ["text"]}', "'spleen'.*a list"),
        ('{"spleen": {"long": 3}}', "wording 'long'.*a number"),
        ('{"spleen": {"text": 3}}', "'spleen'.*a number"),
        ('{"spleen": {"generator": "a model"}}', "'generator'.*needs \"text\""),
        ('{"spleen": {"text": "a", "author": "me"}}', 'also "author"'),
        ('{"spleen": {"text": "a", "saw_labels": "no"}}', "saw_labels.*true or false"),
        ('{"spleen": {"text": "a", "created": "yesterday"}}', "2026-11-21.*yesterday"),
        ('{"spleen": "\\ud800 a"}', "surrogate"),
        ('{"\\ud800": "a"}', "surrogate"),
        ('{" ": "text"}', "name of an organ"),
        ("{}", "found none"),
        ('["spleen"]', "an object.*a list"),
        ("", "expected JSON"),
        ('{"spleen": "cut o', "expected JSON"),
        ('{"spleen": ' + "9" * 5000 + "}", "expected JSON"),
        ("[" * 100_000, "expected JSON"),
    ],
)
def test_damaged_reports_are_refused_by_name(content: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message) as caught:
        read_organ_reports(write(tmp_path / "mine.json", content))
    assert "mine.json" in str(caught.value)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"provenance": {"generator": "a model"}}, 'expected provenance of.*"saw_labels".*found no "created", "prompt", "saw_labels"'),
        ({"provenance": {**PROVENANCE, "seed": 1}}, 'also "seed"'),
        ({"provenance": "a model"}, '"provenance" to be an object'),
        ({"provenance": {**PROVENANCE, "saw_labels": 0}}, "true or false"),
        ({"provenance": {**PROVENANCE, "created": "21.11.2026"}}, "21.11.2026"),
        ({"provenance": {**PROVENANCE, "prompt": None}}, '"prompt" to be a text'),
        ({"format": 2}, '"format" 1'),
        ({"kind": "slice reports"}, '"kind" "organ reports"'),
        ({"organs": {}}, "found none"),
        ({"organs": [SPLEEN]}, '"organs" to be an object'),
        ({"held_out": "sketch"}, '"held_out" to be a list'),
        ({"held_out": ["skecth"]}, "found skecth"),
        ({"held_out": ["short", "sketch", "long"]}, "only held-out ones on spleen"),
        ({"heldout": []}, '"heldout"'),
    ],
)
def test_damaged_file_with_provenance_is_refused(changed: dict, message: str, tmp_path: Path) -> None:
    good = {**BANK, "organs": {"spleen": SPLEEN}}
    read_organ_reports(write(tmp_path / "good.json", good))
    with pytest.raises(UserError, match=message):
        read_organ_reports(write(tmp_path / "bad.json", {**good, **changed}))


@pytest.mark.parametrize("key", ["format", "kind", "provenance", "organs"])
def test_file_without_one_of_its_parts_is_not_taken_for_a_plain_one(key: str, tmp_path: Path) -> None:
    content = {name: value for name, value in {**BANK, "organs": {"spleen": SPLEEN}}.items() if name != key}
    with pytest.raises(UserError, match="expected the keys"):
        read_organ_reports(write(tmp_path / "bank.json", content))


def test_paths_that_hold_no_text_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="found none"):
        read_organ_reports(tmp_path / "absent.json")
    with pytest.raises(UserError, match="found a folder"):
        read_organ_reports(tmp_path)
    (tmp_path / "latin.json").write_bytes('{"spleen": "größer"}'.encode("latin-1"))
    with pytest.raises(UserError, match=r"latin\.json.*UTF-8"):
        read_organ_reports(str(tmp_path / "latin.json"))
    (tmp_path / "marked.json").write_bytes(b'\xef\xbb\xbf{"spleen": "A text."}')
    assert read_organ_reports(tmp_path / "marked.json").text("spleen") == "A text."


@pytest.mark.parametrize("source", [{3: "a"}, {"spleen": {3: "a"}}, {"spleen": {"text": "a", 3: "b", "x": "c"}}, {"spleen": object()}, {}])
def test_mapping_of_the_wrong_kind_is_a_user_error(source: Mapping) -> None:
    with pytest.raises(UserError, match="reports given in Python"):
        read_organ_reports(source)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(max_size=8) | st.sampled_from(["text", "organs", "long", "created"]), inner),
)


@settings(deadline=None)
@given(content=json_values)
def test_any_json_is_read_or_refused_as_a_mistake_of_the_user(content: object, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = write(tmp_path_factory.getbasetemp() / "any.json", content)
    with suppress(UserError):
        reports = read_organ_reports(path)
        assert reports.organs
        assert all(reports.training(organ) for organ in reports.organs)


# --- slice reports ----------------------------------------------------------------------------------------------------------------------


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
