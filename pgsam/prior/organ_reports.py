"""What is said of each organ: reports in one or more wordings, the built-in ones or the user's.

They are a JSON file, either with its provenance (`pgsam/prior/data/organs.json` is the example)

    {"format": 1, "kind": "organ reports", "provenance": {"generator": ..., "prompt": ..., "created": "2026-11-21", "saw_labels": false},
     "held_out": ["sketch"], "organs": {"spleen": {"long": "...", "sketch": {"text": "...", "generator": ...}}}}

or plain, `{"spleen": "..."}` or `{"spleen": {"long": "...", "short": "..."}}`; a plain file cannot say where its texts come from, so they count as
made by generator "not given" and without labels.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

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
)

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
_FROM_PYTHON = Provenance("given in Python", "", "", False)
_NOT_GIVEN = Provenance("not given", "", "", False)


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


def normalise_name(name: str) -> str:
    """One spelling of an organ's name: `Right_Kidney` -> `right kidney`, `Oesophagus` -> `esophagus`, `postcava` -> `inferior vena cava`."""
    words = re.sub(r"[_-]", " ", name.lower()).split()
    plain = " ".join(_WORD_SPELLINGS.get(word, word) for word in words)
    return _NAME_SPELLINGS.get(plain, plain)


def reports_hash(texts: Mapping[str, str]) -> str:
    """SHA-256 (hex) of the pairs (organ, text), whatever their order; names and texts count as they are written."""
    return hashlib.sha256(json.dumps(sorted(texts.items())).encode("ascii")).hexdigest()


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
        check_unicode(written, name)
        organ = normalise_name(written)
        if organ in organs:
            raise UserError(f"{name}: expected one entry an organ, found '{organ}' in two spellings (the second is '{written}'); remove one")
        organs[organ] = _wordings(value, provenance, f"{name}: '{written}'")
    _check_held_out(organs, held_out, name)
    known = list(organs if class_names is None else dict.fromkeys(map(normalise_name, class_names)))
    unknown = [organ for organ in organs if organ not in known]
    if unknown:
        raise UserError(f"{name}: expected reports on {', '.join(known)}; found {listed(unknown)}; correct the name or remove the entry")
    return OrganReports(name, organs, held_out)


def write_organ_reports(path: str | Path, reports: OrganReports, provenance: Provenance) -> None:
    """Writes a JSON file of which `read_organ_reports` gives the same reports; each entry names what differs from the file's `provenance`."""
    from pgsam.volume_io import replacing  # not above: it brings SimpleITK and scipy, which readers of reports do without

    of_the_file = asdict(provenance)
    organs = {
        organ: {
            wording: {"text": report.text, **{key: value for key, value in asdict(report.provenance).items() if of_the_file[key] != value}}
            for wording, report in wordings.items()
        }
        for organ, wordings in reports.organs.items()
    }
    content = {"format": 1, "kind": "organ reports", "provenance": of_the_file, "held_out": list(reports.held_out), "organs": organs}
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _read_json(path: Path) -> dict[str, Any]:
    content = load_json(read_bytes(path), str(path))
    if not isinstance(content, dict):
        raise UserError(f'{path}: expected an object such as {{"spleen": "text", ...}}, found {kind_of(content)}; see pgsam/prior/data/organs.json')
    return content


def _open_bank(content: dict[str, Any], where: str) -> tuple[dict[str, Any], dict[str, Any], tuple[str, ...]]:
    """Organs, provenance and held-out wordings of a file with provenance."""
    required = _BANK_KEYS - {"held_out"}
    if not required <= set(content) <= _BANK_KEYS:
        raise UserError(f'{where}: expected the keys {quoted(required)} and, if wanted, "held_out"; found {quoted(content)}; correct the file')
    if content["format"] != 1 or content["kind"] != "organ reports":
        found = f"{content['format']!r} and {content['kind']!r}"
        raise UserError(f'{where}: expected "format" 1 and "kind" "organ reports", found {found}; use a file of organ reports')
    held_out = content.get("held_out", [])
    if not isinstance(held_out, list) or not all(isinstance(wording, str) for wording in held_out):
        raise UserError(f'{where}: expected "held_out" to be a list of wordings, found {held_out!r}; correct it')
    for key in ("provenance", "organs"):
        if not isinstance(content[key], dict):
            raise UserError(f'{where}: expected "{key}" to be an object, found {kind_of(content[key])}; see pgsam/prior/data/organs.json')
    parse_provenance(content["provenance"], f"{where}: provenance")
    return content["organs"], content["provenance"], tuple(held_out)


def _wordings(value: Any, provenance: Mapping[str, Any], where: str) -> dict[str, Report]:
    """An organ's reports by wording; `provenance` is of those that do not say their own."""
    if isinstance(value, str) or (isinstance(value, Mapping) and "text" in value):
        return {DEFAULT_WORDING: _report(value, provenance, where)}
    if not isinstance(value, Mapping) or not value:
        raise UserError(f'{where}: expected a text or an object such as {{"long": "text", ...}}, found {kind_of(value)}; write its report')
    bad = [key for key in value if not isinstance(key, str) or not key.strip() or key in PROVENANCE_KEYS]
    if bad:
        raise UserError(f'{where}: expected the name of a wording, such as "long", found {bad[0]!r}; a report with its provenance also needs "text"')
    return {wording: _report(entry, provenance, f"{where}, wording '{wording}'") for wording, entry in value.items()}


def _report(value: Any, provenance: Mapping[str, Any], where: str) -> Report:
    if isinstance(value, str):
        return Report(parse_text(value, where), parse_provenance(provenance, where))
    if not isinstance(value, Mapping) or "text" not in value:
        raise UserError(f'{where}: expected a text or an object with "text", found {kind_of(value)}; write the report')
    own = {key: entry for key, entry in value.items() if key != "text"}
    return Report(parse_text(value["text"], where), parse_provenance({**provenance, **own}, where))


def _check_held_out(organs: Mapping[str, Mapping[str, Report]], held_out: tuple[str, ...], where: str) -> None:
    wordings = {wording for reports in organs.values() for wording in reports}
    absent = [wording for wording in held_out if wording not in wordings]
    if absent:
        raise UserError(f'{where}: expected "held_out" to name wordings of the file, found {listed(absent)}; correct the list')
    untrained = [organ for organ, reports in organs.items() if set(reports) <= set(held_out)]
    if untrained:
        raise UserError(f"{where}: expected a report for training on every organ, found only held-out ones on {listed(untrained)}; add one")
