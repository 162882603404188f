"""The store of reports: what is said of each organ, and of each slice, with the origin of every text.

A report carries who wrote it, what was asked, when, and whether the writer saw the labels: a text made from labels holds the answer, and a
score measured with it is worthless unless that is said (see `refuse_label_reports`).

Organ reports are a JSON file, either with its provenance (`pgsam/prior/data/organs.json` is the example)

    {"format": 1, "kind": "organ reports", "provenance": {"generator": ..., "prompt": ..., "created": "2026-11-21", "saw_labels": false},
     "held_out": ["sketch"], "organs": {"spleen": {"long": "...", "sketch": {"text": "...", "generator": ...}}}}

or plain, `{"spleen": "..."}` or `{"spleen": {"long": "...", "short": "..."}}`; a plain file cannot say where its texts come from, so they count as
made by generator "not given" and without labels. Slice reports are a JSON Lines file, one record a line, or PG-SAM's folder of `text_{idx}.txt`.
Whitespace around a text does not belong to it.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import date
from pathlib import Path
from typing import Any, BinaryIO

from pgsam.errors import UserError

BUILTIN_PATH = Path(__file__).with_name("data") / "organs.json"
DEFAULT_WORDING = "long"  # what the only text of an organ is called

_WORD_SPELLINGS = {"oesophagus": "esophagus", "oesophageal": "esophageal", "tumour": "tumor", "tumours": "tumors"}
_NAME_SPELLINGS = {  # as AMOS, TotalSegmentator and the page of BTCV write them
    "postcava": "inferior vena cava",
    "gall bladder": "gallbladder",
    "portal vein and splenic vein": "portal and splenic vein",
    "kidney right": "right kidney",
    "kidney left": "left kidney",
    "adrenal gland right": "right adrenal gland",
    "adrenal gland left": "left adrenal gland",
}
_BANK_KEYS = {"format", "kind", "provenance", "held_out", "organs"}
_SHOWN = 5  # names an error lists before it goes on with a count


@dataclass(frozen=True)
class Provenance:
    """Where a text comes from.

    Args:
        generator: model or person that wrote it.
        prompt: what was asked.
        created: ISO date, or "" where it is not known.
        saw_labels: the writer was shown the label map, or something made from it.
    """

    generator: str
    prompt: str
    created: str
    saw_labels: bool


_PROVENANCE_KEYS = tuple(field.name for field in fields(Provenance))
_FROM_PYTHON = Provenance("given in Python", "", "", False)
_NOT_GIVEN = Provenance("not given", "", "", False)


@dataclass(frozen=True)
class Report:
    """A text and where it comes from."""

    text: str
    provenance: Provenance


@dataclass(frozen=True)
class OrganReports:
    """Reports on organs, each in one or more wordings.

    Args:
        source: what error messages call the store: a path, or "reports given in Python".
        organs: organ (as `normalise_name` writes it) -> wording -> report.
        held_out: wordings that training never sees.
    """

    source: str
    organs: Mapping[str, Mapping[str, Report]]
    held_out: tuple[str, ...] = ()

    def text(self, organ: str, wording: str = DEFAULT_WORDING) -> str:
        """The report on an organ, in any spelling of its name.

        Raises:
            UserError: there is none, or not in this wording.
        """
        reports = self._reports_on(organ)
        if wording not in reports:
            raise UserError(f"{self.source}: no wording '{wording}' of '{organ}', only {', '.join(reports)}; name one of these or add it")
        return reports[wording].text

    def training(self, organ: str) -> tuple[str, ...]:
        """The texts that are not held out, the wording "long" first where there is one and the others in the order of the store.

        Raises:
            UserError: there is no report on this organ.
        """
        reports = self._reports_on(organ)
        names = sorted((name for name in reports if name not in self.held_out), key=lambda name: name != DEFAULT_WORDING)
        return tuple(reports[name].text for name in names)

    def wordings(self) -> tuple[str, ...]:
        """Every wording that some organ has, in the order of the store."""
        return tuple(dict.fromkeys(wording for reports in self.organs.values() for wording in reports))

    @property
    def saw_labels(self) -> bool:
        """Some report, held out or not, was made from labels."""
        return bool(self.made_from_labels())

    def made_from_labels(self) -> list[str]:
        """The reports that were made from labels, as `liver (long)`."""
        return [f"{o} ({w})" for o, reports in self.organs.items() for w, report in reports.items() if report.provenance.saw_labels]

    def _reports_on(self, organ: str) -> Mapping[str, Report]:
        name = normalise_name(organ)
        if name not in self.organs:
            raise UserError(f"{self.source}: no report on '{organ}', only on {', '.join(self.organs)}; check the name or add the report")
        return self.organs[name]


@dataclass(frozen=True)
class SliceReports:
    """Reports on single images.

    Args:
        source: the file or folder they come from.
        reports: slice name (TransUNet's `<case>_slice<ddd>`) -> report.
    """

    source: str
    reports: Mapping[str, Report]

    def text(self, key: str) -> str | None:
        """The report on a slice, or None."""
        return self.reports[key].text if key in self.reports else None

    def __len__(self) -> int:
        return len(self.reports)

    def missing(self, keys: Iterable[str]) -> list[str]:
        """The slices among `keys` that have no report, in their order."""
        return [key for key in keys if key not in self.reports]

    @property
    def saw_labels(self) -> bool:
        """Some report was made from labels."""
        return bool(self.made_from_labels())

    def made_from_labels(self) -> list[str]:
        """The slices whose reports were made from labels."""
        return [key for key, report in self.reports.items() if report.provenance.saw_labels]


def normalise_name(name: str) -> str:
    """One spelling of an organ's name: `Right_Kidney` -> `right kidney`, `Oesophagus` -> `esophagus`, `postcava` -> `inferior vena cava`."""
    words = re.sub(r"[_-]", " ", name.lower()).split()
    plain = " ".join(_WORD_SPELLINGS.get(word, word) for word in words)
    return _NAME_SPELLINGS.get(plain, plain)


def reports_hash(texts: Mapping[str, str]) -> str:
    """SHA-256 (hex) of the pairs (organ, text), whatever their order; names and texts count as they are written."""
    return hashlib.sha256(json.dumps(sorted(texts.items())).encode("ascii")).hexdigest()


def refuse_label_reports(reports: OrganReports | SliceReports, allowed: bool) -> None:
    """Stops a program that was not told that its texts may hold the answer.

    Raises:
        UserError: a report was made from labels and `allowed` is False.
    """
    found = reports.made_from_labels()
    if found and not allowed:
        raise UserError(
            f"{reports.source}: expected reports written without the labels, found {_listed(found)} made from them; "
            "scores with such texts are no evidence: write them again, or give --allow_label_reports to use them all the same"
        )


# --- organ reports ----------------------------------------------------------------------------------------------------------------------


def builtin_reports() -> OrganReports:
    """The reports that come with the project: the organs of Synapse (8 and 12 classes), BTCV and FLARE22, in ten wordings, two of them held out."""
    return read_organ_reports(BUILTIN_PATH)


def read_organ_reports(source: str | Path | Mapping[str, Any], class_names: Sequence[str] | None = None) -> OrganReports:
    """Reads organ reports from a JSON file, or takes them from a mapping.

    Args:
        source: path of a JSON file of either form in the module's description, or organ -> text or organ -> {wording: text}. The only text of
            an organ is its wording "long".
        class_names: the organs there may be, in any spelling; None for any.

    Raises:
        UserError: no such file, no JSON, a key twice, one organ in two spellings, an organ that is none of `class_names`, an organ without a
            report for training, a text without a word, a value of the wrong kind, provenance that is not complete.
    """
    held_out: tuple[str, ...] = ()
    if isinstance(source, Mapping):
        name, content, provenance = "reports given in Python", dict(source), asdict(_FROM_PYTHON)
    else:
        name, content, provenance = str(source), _read_json(Path(source)), asdict(_NOT_GIVEN)
        if _BANK_KEYS & set(content):
            content, provenance, held_out = _open_bank(content, name)
    if not content:
        raise UserError(f'{name}: expected reports of the form {{"spleen": "text", ...}}, found none; write one for every class')
    organs: dict[str, dict[str, Report]] = {}
    for written, value in content.items():
        if not isinstance(written, str) or not normalise_name(written):
            raise UserError(f"{name}: expected the name of an organ, found {written!r}; correct it")
        _check_unicode(written, name)
        organ = normalise_name(written)
        if organ in organs:
            raise UserError(f"{name}: expected one entry an organ, found '{organ}' in two spellings (the second is '{written}'); remove one")
        organs[organ] = _wordings(value, provenance, f"{name}: '{written}'")
    _check_held_out(organs, held_out, name)
    known = list(organs if class_names is None else dict.fromkeys(map(normalise_name, class_names)))
    unknown = [organ for organ in organs if organ not in known]
    if unknown:
        raise UserError(f"{name}: expected reports on {', '.join(known)}; found {_listed(unknown)}; correct the name or remove the entry")
    return OrganReports(name, organs, held_out)


def _read_json(path: Path) -> dict[str, Any]:
    content = _loads(_read_text(path), str(path))
    if not isinstance(content, dict):
        raise UserError(f'{path}: expected an object such as {{"spleen": "text", ...}}, found {_kind(content)}; see pgsam/prior/data/organs.json')
    return content


def _open_bank(content: dict[str, Any], where: str) -> tuple[dict[str, Any], dict[str, Any], tuple[str, ...]]:
    """Organs, provenance and held-out wordings of a file with provenance."""
    required = _BANK_KEYS - {"held_out"}
    if not required <= set(content) <= _BANK_KEYS:
        raise UserError(f'{where}: expected the keys {_named(required)} and, if wanted, "held_out"; found {_named(content)}; correct the file')
    if content["format"] != 1 or content["kind"] != "organ reports":
        found = f"{content['format']!r} and {content['kind']!r}"
        raise UserError(f'{where}: expected "format" 1 and "kind" "organ reports", found {found}; use a file of organ reports')
    held_out = content.get("held_out", [])
    if not isinstance(held_out, list) or not all(isinstance(wording, str) for wording in held_out):
        raise UserError(f'{where}: expected "held_out" to be a list of wordings, found {held_out!r}; correct it')
    for key in ("provenance", "organs"):
        if not isinstance(content[key], dict):
            raise UserError(f'{where}: expected "{key}" to be an object, found {_kind(content[key])}; see pgsam/prior/data/organs.json')
    _provenance(content["provenance"], f"{where}: provenance")
    return content["organs"], content["provenance"], tuple(held_out)


def _wordings(value: Any, provenance: Mapping[str, Any], where: str) -> dict[str, Report]:
    """An organ's reports by wording; `provenance` is of those that do not say their own."""
    if isinstance(value, str) or (isinstance(value, Mapping) and "text" in value):
        return {DEFAULT_WORDING: _report(value, provenance, where)}
    if not isinstance(value, Mapping) or not value:
        raise UserError(f'{where}: expected a text or an object such as {{"long": "text", ...}}, found {_kind(value)}; write its report')
    bad = [key for key in value if not isinstance(key, str) or not key.strip() or key in _PROVENANCE_KEYS]
    if bad:
        raise UserError(f'{where}: expected the name of a wording, such as "long", found {bad[0]!r}; a report with its provenance also needs "text"')
    return {wording: _report(entry, provenance, f"{where}, wording '{wording}'") for wording, entry in value.items()}


def _report(value: Any, provenance: Mapping[str, Any], where: str) -> Report:
    if isinstance(value, str):
        return Report(_text(value, where), _provenance(provenance, where))
    if not isinstance(value, Mapping) or "text" not in value:
        raise UserError(f'{where}: expected a text or an object with "text", found {_kind(value)}; write the report')
    own = {key: entry for key, entry in value.items() if key != "text"}
    return Report(_text(value["text"], where), _provenance({**provenance, **own}, where))


def _check_held_out(organs: Mapping[str, Mapping[str, Report]], held_out: tuple[str, ...], where: str) -> None:
    wordings = {wording for reports in organs.values() for wording in reports}
    absent = [wording for wording in held_out if wording not in wordings]
    if absent:
        raise UserError(f'{where}: expected "held_out" to name wordings of the file, found {_listed(absent)}; correct the list')
    untrained = [organ for organ, reports in organs.items() if set(reports) <= set(held_out)]
    if untrained:
        raise UserError(f"{where}: expected a report for training on every organ, found only held-out ones on {_listed(untrained)}; add one")


# --- slice reports ----------------------------------------------------------------------------------------------------------------------


def read_slice_reports(path: str | Path) -> SliceReports:
    """Reads slice reports from JSON Lines: `{"key": "case0005_slice012", "text": "...", ...}` and the four fields of `Provenance`.

    A last line that was torn by a kill is left out, and that is said. A file without a record gives no reports: ask `missing`.

    Raises:
        UserError: no such file, or a damaged line, a record that is not complete or a slice that comes twice; the line's number is named.
    """
    path = Path(path)
    reports: dict[str, Report] = {}
    first_line: dict[str, int] = {}
    *lines, last = _read_bytes(path).split(b"\n")
    if not _is_torn(last):
        lines.append(last)
    else:
        print(f"NOTE: {path}: line {len(lines) + 1} is torn (the program that wrote it was stopped) and left out")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path}: line {number}"
        key, report = _parse_record(_loads(_decode(line, where), where), where)
        if key in reports:
            raise UserError(f"{where}: expected every slice once, found {key} again (first in line {first_line[key]}); remove one of the lines")
        reports[key], first_line[key] = report, number
    return SliceReports(str(path), reports)


def append_slice_report(path: str | Path, key: str, report: Report) -> None:
    """Adds one record to a file of slice reports, made if it is not there, and returns when it is on the disk.

    A last line that was torn by a kill is cut off first, and that is said. Whether the slice is there already is not looked up here (reading
    refuses it), and only one process at a time may write.

    Raises:
        UserError: the file cannot be written, or the record could not be read again (no key, a text without a word, a date that is none).
    """
    path = Path(path)
    record = {"key": key, "text": report.text, **asdict(report.provenance)}
    _parse_record(record, f"{path}: the report on {key!r}")
    try:
        with path.open("ab+") as file:  # makes the file if need be, and writes at its end only
            _mend_last_line(file, path)
            file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error}); check the folder, its rights and the free space") from error


def _mend_last_line(file: BinaryIO, path: Path) -> None:
    """Makes the file end with a whole line: a record that lacks only its line break gets it, a torn one is cut off."""
    start = end = file.seek(0, os.SEEK_END)
    tail = b""
    while start > 0 and b"\n" not in tail:
        step = min(start, 1 << 16)
        start = file.seek(start - step)
        tail = file.read(step) + tail
    last = tail[tail.rfind(b"\n") + 1 :]
    if _is_torn(last):
        file.truncate(end - len(last))
        print(f"NOTE: {path}: the last line was torn (the program that wrote it was stopped) and is cut off")
    elif last:
        file.write(b"\n")


def _is_torn(last: bytes) -> bool:
    """Whether what follows the last line break is the beginning of a record; no beginning of a JSON object is JSON itself."""
    try:
        json.loads(last.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return last.lstrip(b"\xef\xbb\xbf \t").startswith(b"{")
    return False


def _parse_record(record: Any, where: str) -> tuple[str, Report]:
    expected = ("key", "text", *_PROVENANCE_KEYS)
    if not isinstance(record, dict) or set(record) != set(expected):
        found = _named(record) if isinstance(record, dict) else _kind(record)
        raise UserError(f"{where}: expected an object with {_named(expected)}; found {found}; correct the line")
    key = record["key"]
    if not isinstance(key, str) or not key or key != key.strip():
        raise UserError(f'{where}: expected "key" to be the name of a slice, such as case0005_slice012, found {key!r}; correct it')
    _check_unicode(key, where)
    return key, Report(_text(record["text"], where), _provenance({name: record[name] for name in _PROVENANCE_KEYS}, where))


def read_text_folder(folder: str | Path, list_file: str | Path, *, generator: str = "unknown", saw_labels: bool = False) -> SliceReports:
    """Reads PG-SAM's texts: `text_{idx}.txt` belongs to line idx (from 0) of the list the texts were made for.

    The file names do not say which slice they mean, so where folder and list disagree, every text may belong to a neighbour: refused.

    Args:
        folder: where the texts lie; files whose names do not begin with `text_` are not looked at.
        list_file: one slice (or volume) a line.
        generator: what wrote them, as far as known.
        saw_labels: it was shown the labels.

    Raises:
        UserError: no such folder or list, a blank line in the list or a name twice, a line without its file, a file without its line or with
            another way of numbering, a text that is not UTF-8 or without a word.
    """
    folder, list_file = Path(folder), Path(list_file)
    if not folder.is_dir():
        raise UserError(f"{folder}: expected a folder of text_0.txt, text_1.txt, ..., found none; check the path")
    keys = _read_list(list_file)
    expected = [f"text_{i}.txt" for i in range(len(keys))]
    found = {path.name for path in folder.iterdir() if path.name.lower().startswith("text_")}
    missing = [name for name in expected if name not in found]
    extra = sorted(found - set(expected))
    if missing or extra:
        complaints = [f"{len(names)} {what} ({_listed(names)})" for names, what in ((missing, "missing"), (extra, "without a line")) if names]
        raise UserError(
            f"{folder}: expected {expected[0]} to {expected[-1]}, one a line of {list_file} ({len(keys)} lines); found {' and '.join(complaints)}; "
            "use the list the texts were made for"
        )
    provenance = Provenance(generator, "", "", saw_labels)
    texts = [_text(_read_text(folder / name), str(folder / name)) for name in expected]
    return SliceReports(str(folder), {key: Report(text, provenance) for key, text in zip(keys, texts, strict=True)})


def _read_list(path: Path) -> list[str]:
    names = [line.strip().removesuffix(".npy.h5").removesuffix(".npz") for line in _read_text(path).rstrip().split("\n")]
    if "" in names:
        raise UserError(
            f"{path}: expected a name on every line, found line {names.index('') + 1} blank; the texts are numbered by line: correct the list"
        )
    twice = [name for name in dict.fromkeys(names) if names.count(name) > 1] if len(set(names)) < len(names) else []
    if twice:
        raise UserError(f"{path}: expected every name once, found {_listed(twice)} more than once; correct the list")
    return names


# --- values -----------------------------------------------------------------------------------------------------------------------------


def _provenance(values: Mapping[str, Any], where: str) -> Provenance:
    if set(values) != set(_PROVENANCE_KEYS):
        missing, unknown = [key for key in _PROVENANCE_KEYS if key not in values], [key for key in values if key not in _PROVENANCE_KEYS]
        wrong = [f"{what} {_named(keys)}" for keys, what in ((missing, "no"), (unknown, "also")) if keys]
        raise UserError(f"{where}: expected provenance of {_named(_PROVENANCE_KEYS)}, found {' and '.join(wrong)}; correct it")
    for key in ("generator", "prompt", "created"):
        if not isinstance(values[key], str):
            raise UserError(f'{where}: expected "{key}" to be a text, found {_kind(values[key])}; correct it')
        _check_unicode(values[key], where)
    if not isinstance(values["saw_labels"], bool):
        raise UserError(f'{where}: expected "saw_labels" to be true or false, found {values["saw_labels"]!r}; correct it')
    try:
        date.fromisoformat(values["created"] or "2000-01-01")
    except ValueError as error:
        raise UserError(f'{where}: expected "created" to be a date such as 2026-11-21 or empty, found {values["created"]!r}; correct it') from error
    return Provenance(**{key: values[key] for key in _PROVENANCE_KEYS})


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"{where}: expected the report to be a text, found {_kind(value)}; write the report")
    if not any(character.isalnum() for character in value):
        raise UserError(f"{where}: expected a report, found a text without a word; write the report or remove the entry")
    _check_unicode(value, where)
    return value.strip()


def _check_unicode(value: str, where: str) -> None:
    r"""JSON can spell half a character (`"\ud800"`), which no file and no tokenizer takes."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: expected text, found half a surrogate pair ({error}); write it again") from error


def _read_bytes(path: Path) -> bytes:
    if path.is_dir() or not path.exists():
        raise UserError(f"{path}: expected a file, found {'a folder' if path.is_dir() else 'none'}; check the path")
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error})") from error


def _decode(content: bytes, where: str) -> str:
    try:
        return content.decode("utf-8-sig")  # Windows editors put a mark before the first letter
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: expected UTF-8 text, found other bytes ({error}); save it again as UTF-8") from error


def _read_text(path: Path) -> str:
    return _decode(_read_bytes(path), str(path))


def _loads(text: str, where: str) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        """JSON keeps the last of two equal keys without a word, which would be a silent loss."""
        keys = [key for key, _ in pairs]
        twice = [key for key in dict.fromkeys(keys) if keys.count(key) > 1]
        if twice:
            raise UserError(f"{where}: expected every key once, found {_listed(twice)} twice; remove one")
        return dict(pairs)

    try:
        return json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:  # ValueError: also a number of thousands of digits
        raise UserError(f"{where}: expected JSON, found a damaged or other text ({error}); correct it") from error


def _kind(value: object) -> str:
    kinds = {dict: "an object", list: "a list", str: "a text", bool: "true or false", int: "a number", float: "a number", type(None): "null"}
    name = kinds.get(type(value), type(value).__name__)
    return f"an empty {name.split()[-1]}" if isinstance(value, dict | list) and not value else name


def _named(keys: Iterable[str]) -> str:
    return ", ".join(f'"{key}"' for key in sorted(map(str, keys))) or "no key"


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_SHOWN])
    return shown if len(names) <= _SHOWN else f"{shown}, ... ({len(names)} in all)"
