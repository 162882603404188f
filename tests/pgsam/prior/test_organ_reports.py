"""Organ reports: what the built-in ones promise, spellings of names, hashes, and the refusal of every damaged file."""

import hashlib
import json
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
from pgsam.prior.organ_reports import OrganReports, builtin_reports, normalise_name, read_organ_reports, reports_hash, write_organ_reports
from pgsam.prior.provenance import Provenance, Report, refuse_label_reports

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
printable = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)


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
        "import pgsam.prior.organ_reports; assert not [path for path in seen if path.endswith('.json')], seen"
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


def test_what_is_written_is_read_back(bank: OrganReports, tmp_path: Path) -> None:
    """Reports of the file's provenance and of others, in several wordings, of which some are held out."""
    path = tmp_path / "reports.json"
    mixed = {**bank.organs, "liver": {**bank.organs["liver"], "mine": Report("Größer.", Provenance("another", "ask", "2026-11-21", True))}}
    for provenance in (bank.organs["spleen"]["long"].provenance, Provenance("a third", "", "2026-11-22", False)):
        write_organ_reports(path, OrganReports("x", mixed, bank.held_out), provenance)
        again = read_organ_reports(path)
        assert (again.organs, again.held_out) == (mixed, bank.held_out)


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
