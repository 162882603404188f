"""What is said of single slices: a JSON Lines file, one record a line, or PG-SAM's folder of `text_{idx}.txt`."""

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from pgsam.errors import UserError
from pgsam.prior.provenance import (
    PROVENANCE_KEYS,
    Provenance,
    Report,
    check_unicode,
    kind_of,
    listed,
    load_json,
    parse_provenance,
    parse_text,
    quoted,
    read_bytes,
    read_text,
)


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


def read_slice_reports(path: str | Path) -> SliceReports:
    """Reads slice reports from JSON Lines: `{"key": "case0005_slice012", "text": "...", ...}` and the four fields of `Provenance`.

    A last line that was torn by a kill is left out, and that is said. A file without a record gives no reports: ask `missing`.

    Raises:
        UserError: no such file, or a damaged line, a record that is not complete or a slice that comes twice; the line's number is named.
    """
    path = Path(path)
    reports: dict[str, Report] = {}
    first_line: dict[str, int] = {}
    *lines, last = read_bytes(path).split(b"\n")
    if not _is_torn(last):
        lines.append(last)
    else:
        print(f"NOTE: {path}: line {len(lines) + 1} is torn (the program that wrote it was stopped) and left out")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path}: line {number}"
        key, report = _parse_record(load_json(line, where), where)
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
    expected = ("key", "text", *PROVENANCE_KEYS)
    if not isinstance(record, dict) or set(record) != set(expected):
        found = quoted(record) if isinstance(record, dict) else kind_of(record)
        raise UserError(f"{where}: expected an object with {quoted(expected)}; found {found}; correct the line")
    key = record["key"]
    if not isinstance(key, str) or not key or key != key.strip():
        raise UserError(f'{where}: expected "key" to be the name of a slice, such as case0005_slice012, found {key!r}; correct it')
    check_unicode(key, where)
    return key, Report(parse_text(record["text"], where), parse_provenance({name: record[name] for name in PROVENANCE_KEYS}, where))


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
        complaints = [f"{len(names)} {what} ({listed(names)})" for names, what in ((missing, "missing"), (extra, "without a line")) if names]
        raise UserError(
            f"{folder}: expected {expected[0]} to {expected[-1]}, one a line of {list_file} ({len(keys)} lines); found {' and '.join(complaints)}; "
            "use the list the texts were made for"
        )
    provenance = Provenance(generator, "", "", saw_labels)
    texts = [parse_text(read_text(folder / name), str(folder / name)) for name in expected]
    return SliceReports(str(folder), {key: Report(text, provenance) for key, text in zip(keys, texts, strict=True)})


def _read_list(path: Path) -> list[str]:
    names = [line.strip().removesuffix(".npy.h5").removesuffix(".npz") for line in read_text(path).rstrip().split("\n")]
    if "" in names:
        raise UserError(
            f"{path}: expected a name on every line, found line {names.index('') + 1} blank; the texts are numbered by line: correct the list"
        )
    twice = [name for name in dict.fromkeys(names) if names.count(name) > 1] if len(set(names)) < len(names) else []
    if twice:
        raise UserError(f"{path}: expected every name once, found {listed(twice)} more than once; correct the list")
    return names
