"""A report: a text and where it comes from, and the reading of both from files, whose every mistake is answered with its place.

A report carries who wrote it, what was asked, when, and whether the writer saw the labels: a text made from labels holds the answer, and a
score measured with it is worthless unless that is said (see `refuse_label_reports`). Whitespace around a text does not belong to it.

In what follows `where` is the place that a message begins with: a file, perhaps with a line or an organ.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import date
from pathlib import Path
from typing import Any, Protocol

from pgsam.errors import UserError

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


PROVENANCE_KEYS = tuple(field.name for field in fields(Provenance))


@dataclass(frozen=True)
class Report:
    """A text and where it comes from."""

    text: str
    provenance: Provenance


class ReportStore(Protocol):
    """Reports of one file, folder or mapping: `OrganReports` or `SliceReports`."""

    @property
    def source(self) -> str:
        """What error messages call it."""
        ...

    def made_from_labels(self) -> list[str]:
        """The names of the reports that were made from labels."""
        ...


def refuse_label_reports(reports: ReportStore, allowed: bool) -> None:
    """Stops a program that was not told that its texts may hold the answer.

    Raises:
        UserError: a report was made from labels and `allowed` is False.
    """
    found = reports.made_from_labels()
    if found and not allowed:
        raise UserError(
            f"{reports.source}: expected reports written without the labels, found {listed(found)} made from them; "
            "scores with such texts are no evidence: write them again, or give --allow_label_reports to use them all the same"
        )


# --- texts and provenance ---------------------------------------------------------------------------------------------------------------


def parse_provenance(values: Mapping[str, Any], where: str) -> Provenance:
    """The provenance with exactly these fields. Raises a UserError where one is absent, unknown or of the wrong kind."""
    if set(values) != set(PROVENANCE_KEYS):
        missing, unknown = [key for key in PROVENANCE_KEYS if key not in values], [key for key in values if key not in PROVENANCE_KEYS]
        wrong = [f"{what} {quoted(keys)}" for keys, what in ((missing, "no"), (unknown, "also")) if keys]
        raise UserError(f"{where}: expected provenance of {quoted(PROVENANCE_KEYS)}, found {' and '.join(wrong)}; correct it")
    for key in ("generator", "prompt", "created"):
        if not isinstance(values[key], str):
            raise UserError(f'{where}: expected "{key}" to be a text, found {kind_of(values[key])}; correct it')
        check_unicode(values[key], where)
    if not isinstance(values["saw_labels"], bool):
        raise UserError(f'{where}: expected "saw_labels" to be true or false, found {values["saw_labels"]!r}; correct it')
    try:
        date.fromisoformat(values["created"] or "2000-01-01")
    except ValueError as error:
        raise UserError(f'{where}: expected "created" to be a date such as 2026-11-21 or empty, found {values["created"]!r}; correct it') from error
    return Provenance(**{key: values[key] for key in PROVENANCE_KEYS})


def parse_text(value: Any, where: str) -> str:
    """The text of a report. Raises a UserError where it is none, or has no word."""
    if not isinstance(value, str):
        raise UserError(f"{where}: expected the report to be a text, found {kind_of(value)}; write the report")
    if not any(character.isalnum() for character in value):
        raise UserError(f"{where}: expected a report, found a text without a word; write the report or remove the entry")
    check_unicode(value, where)
    return value.strip()


def check_unicode(value: str, where: str) -> None:
    r"""Raises a UserError for half a character (`"\ud800"`), which JSON can spell, and no file and no tokenizer takes."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: expected text, found half a surrogate pair ({error}); write it again") from error


# --- files ------------------------------------------------------------------------------------------------------------------------------


def read_bytes(path: Path) -> bytes:
    """What a file holds. Raises a UserError where there is none, or it cannot be read."""
    if path.is_dir() or not path.exists():
        raise UserError(f"{path}: expected a file, found {'a folder' if path.is_dir() else 'none'}; check the path")
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error}); check its rights and the disk") from error


def _decode(content: bytes, where: str) -> str:
    try:
        return content.decode("utf-8-sig")  # Windows editors put a mark before the first letter
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: expected UTF-8 text, found other bytes ({error}); save it again as UTF-8") from error


def read_text(path: Path) -> str:
    """The text of a file in UTF-8. Raises a UserError as `read_bytes`, or where it is none."""
    return _decode(read_bytes(path), str(path))


def load_json(content: bytes, where: str) -> Any:
    """What JSON in UTF-8 says. Raises a UserError where it is none, or has a key twice."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        """JSON keeps the last of two equal keys without a word, which would be a silent loss."""
        keys = [key for key, _ in pairs]
        twice = [key for key in dict.fromkeys(keys) if keys.count(key) > 1]
        if twice:
            raise UserError(f"{where}: expected every key once, found {listed(twice)} twice; remove one")
        return dict(pairs)

    try:
        return json.loads(_decode(content, where), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:  # ValueError: also a number of thousands of digits
        raise UserError(f"{where}: expected JSON, found a damaged or other text ({error}); correct it") from error


# --- words of messages ------------------------------------------------------------------------------------------------------------------


def kind_of(value: object) -> str:
    """What JSON calls a value: `a list`, `an empty object`."""
    kinds = {dict: "an object", list: "a list", str: "a text", bool: "true or false", int: "a number", float: "a number", type(None): "null"}
    name = kinds.get(type(value), type(value).__name__)
    return f"an empty {name.split()[-1]}" if isinstance(value, dict | list) and not value else name


def quoted(keys: Iterable[str]) -> str:
    """Keys of an object, sorted: `"key", "text"`."""
    return ", ".join(f'"{key}"' for key in sorted(map(str, keys))) or "no key"


def listed(names: Sequence[str]) -> str:
    """The first names, and how many there are."""
    shown = ", ".join(names[:_SHOWN])
    return shown if len(names) <= _SHOWN else f"{shown}, ... ({len(names)} in all)"
