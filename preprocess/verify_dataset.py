r"""A dataset is checked before anything is trained on it: damaged files, labels that do not fit, mirrored scans, scans or patients in two splits.

    python preprocess/verify_dataset.py Dataset001_Liver
    python preprocess/verify_dataset.py RawData --dataset Synapse_12
    python preprocess/verify_dataset.py pairs.csv --label_map flare22 --patient_regex "(P\d+)_"
    python preprocess/verify_dataset.py data/Synapse --output findings.json

takes an nnU-Net or Medical Decathlon folder, raw BTCV or FLARE22, a CSV file of pairs (see preprocess/nifti.py), a folder prepared by us or in
TransUNet's way (train_npz, test_vol_h5, lists), or a folder of scans without labels, each a file or a folder with one DICOM series. What it is
shows in its content; `--kind` says it instead.

Prints a table with a row for everything found and what to do about it, and writes it as JSON with the shape, spacing, orientation and labels
of every case. Exit code: 0 nothing found, 1 something found, 2 the command cannot be carried out. The kinds of findings stand in
preprocess/checks.py. One bad file does not stop the rest.
"""

import argparse
import csv
import json
import multiprocessing
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from datasets.labels import DATASETS, LABEL_MAPS, LabelMap, identity_label_map, load_label_map
from datasets.layout import case_of, find_data, read_manifest
from pgsam.errors import Parser, UserError, reports_user_errors
from pgsam.volume import BTCV_ORIENTATION, IMAGE_KINDS
from pgsam.volume_io import find_scans, replacing, stem_of, suffix_of
from preprocess.checks import Finding, Item, Report, check_case, check_dataset, relative, said
from preprocess.common import SPLITS, default_workers
from preprocess.nifti import patient_rule, read_pairs
from preprocess.published import BTCV, FLARE22, RawLayout
from preprocess.published import SPLITS as PUBLISHED_SPLITS

FORMAT = 1
_TRAIN, _TEST = "train_npz", "test_vol_h5"


@dataclass
class Listing:
    """The cases of a dataset, what is wrong with the listing itself, and one line that says what the dataset is."""

    root: Path
    said: str = ""
    items: list[Item] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    patients_known: bool = False

    def add(self, kind: str, path: Path | None, found: str, advice: str, case: str = "") -> None:
        """Notes a finding."""
        self.findings.append(Finding(kind, case, relative(path, self.root), found, advice))

    def report(self, kind: str, path: Path, error: UserError) -> None:
        """Notes what a reader refused."""
        self.add(kind, path, *said(error, path))


# --- what a source is -------------------------------------------------------------------------------------------------------------------


def recognise(source: Path) -> str:
    """The kind of a source, a key of `LISTINGS`.

    Raises:
        UserError: no such file or folder, or it holds nothing or more than one thing that is known.
    """
    if source.is_file():
        return "csv" if source.suffix.lower() == ".csv" else "scans"
    if not source.is_dir():
        raise UserError(f"{source}: no such file or folder; name a dataset (see --help)")
    kinds = ["prepared"] if source.name in (_TRAIN, _TEST) or (source / _TRAIN).is_dir() or (source / _TEST).is_dir() else []
    kinds += ["nnunet"] if (source / "imagesTr").is_dir() else []
    kinds += [layout.name.lower() for layout in (BTCV, FLARE22) if layout.find(source) is not None]
    if len(kinds) > 1:
        raise UserError(f"{source}: expected one dataset, found {' and '.join(kinds)}; say which with --kind")
    if kinds:
        return kinds[0]
    if find_scans(source):
        return "scans"
    raise UserError(
        f"{source}: expected a dataset, found no imagesTr (nnU-Net), {BTCV.described} (BTCV), {FLARE22.described} (FLARE22), {_TRAIN} or {_TEST} "
        "(prepared), image files or DICOM folders; name the folder that holds them"
    )


def _scans_by_name(listing: Listing, folder: Path, name_of: Callable[[Path], str | None] = stem_of) -> dict[str, Path]:
    """Name -> file or DICOM folder of what can be read in a folder; {} where there is no such folder. Hidden files are left out."""
    found: dict[str, Path] = {}
    for path in _entries(folder):
        name = name_of(path)
        if name is None:
            listing.add("unexpected file", path, "found a name that the dataset does not know", "rename it or take it out of the folder")
        elif name in found:
            listing.add("listed twice", path, f"found {found[name].name} and {path.name} for one case", "keep one", name)
        else:
            found[name] = path
    return found


def _entries(folder: Path) -> list[Path]:
    """Like `find_scans`, and folders that have a file's name with the file in it, as some programs unpack FLARE22's archive."""
    if not folder.is_dir():
        return []
    named = [path for path in folder.iterdir() if path.is_dir() and suffix_of(path) and not path.name.startswith(".")]
    return sorted({path for path in find_scans(folder) if path != folder} | set(named))


def _unwrapped(path: Path) -> Path:
    inside = [entry for entry in path.iterdir() if not entry.name.startswith(".")] if path.is_dir() and suffix_of(path) else []
    return inside[0] if len(inside) == 1 else path


def _pairs(images: dict[str, Path], labels: dict[str, Path], **common: Any) -> list[Item]:
    names = sorted({*images, *labels})
    return [Item(name, images.get(name), labels.get(name), **common) for name in names]


# --- the six kinds ----------------------------------------------------------------------------------------------------------------------


def list_csv(source: Path, args: argparse.Namespace) -> Listing:
    """A CSV file of pairs; a patient in it goes before --patients and --patient_regex, as in preprocess/nifti.py."""
    listing = Listing(source.parent, patients_known=True)
    label_map, kind = _chosen_label_map(args), args.image_kind or "ct_window"
    seen: set[str] = set()
    for case in read_pairs(source, patient_of_flags(args)):
        if case.name in seen:
            listing.add("listed twice", source, f"case {case.name} stands in two rows; only the first was checked", "give each a name", case.name)
            continue
        seen.add(case.name)
        if case.split not in SPLITS:
            listing.add("bad list", source, f"expected split {' or '.join(SPLITS)}, found {case.split!r}", "correct the row", case.name)
        item = Item(case.name, case.image, case.label, split=case.split, patient=case.patient)
        listing.items.append(replace(item, label_map=case.label_map or label_map, image_kind=kind))
    listing.said = f"a list of pairs, {_label_words(label_map)}, {_image_words(kind)}"
    return listing


def list_nnunet(source: Path, args: argparse.Namespace) -> Listing:
    """imagesTr and labelsTr, imagesTs and perhaps labelsTs; names with nnU-Net's channel number or without, as in the Medical Decathlon."""
    listing = Listing(source)
    description = _description(listing)
    label_map = _chosen_label_map(args)
    if label_map is None and "labels" in description:
        label_map = _described_labels(listing, description["labels"])
    channels = description.get("channel_names", description.get("modality"))
    channels = channels if isinstance(channels, dict) else {}
    ct = [str(name).strip().lower() for name in channels.values()] == ["ct"]
    kind = args.image_kind or ("ct_window" if ct else "percentile")
    numbers = {"0000"}
    plain = False
    for part, split, key in (("Tr", "train", "training"), ("Ts", "test", "test")):
        found, labels = (_scans_by_name(listing, source / f"{folder}{part}") for folder in ("images", "labels"))
        plain = plain or bool(found.keys() & labels.keys())  # the Decathlon's names, without a channel's number
        images: dict[str, Path] = {}
        for name, path in found.items():
            match = None if plain else re.fullmatch(r"(.+)_(\d{4})", name)
            if match is None or match[2] == "0000":
                images[match[1] if match else name] = path
            else:
                numbers.add(match[2])
        _add_described_files(source, description.get(key), images, labels)
        common = {"split": split, "label_map": label_map, "image_kind": kind, "labelled": part == "Tr" or (source / "labelsTs").is_dir()}
        listing.items += [replace(item, patient=item.case) for item in _pairs(images, labels, **common)]
    if len(channels) > 1 or len(numbers) > 1:
        count = max(len(channels), len(numbers))
        text = f"found {count} channels a case; only the first was checked"
        listing.add("several channels", source / "dataset.json", text, "choose one and list its files in a CSV file of pairs")
    _compare_count(listing, description)
    listing.said = f"an nnU-Net dataset, {_label_words(label_map)}, {_image_words(kind)}"
    return listing


def _description(listing: Listing) -> dict[str, Any]:
    path = listing.root / "dataset.json"
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(description, dict):
            return description
        found = f"expected a JSON object, found {type(description).__name__}"
    except FileNotFoundError:
        listing.add("absent file", path, "there is no dataset.json", "restore it, nnU-Net and preprocess/nifti.py need it")
        return {}
    except (OSError, ValueError) as error:
        found = f"expected JSON, found something else ({error})"
    listing.add("bad list", path, found, "restore the file")
    return {}


def _described_labels(listing: Listing, labels: Any) -> LabelMap | None:
    """{"background": 0, "liver": 1} (nnU-Net 2) or {"0": "background", "1": "liver"} (nnU-Net 1, Decathlon); None after a finding."""
    path = listing.root / "dataset.json"
    names: dict[int, str] = {}
    try:
        numbered = all(str(key).isdigit() for key in labels)
        pairs = [(key, name) if numbered else (name, key) for key, name in labels.items()]
        names = {int(value): str(name) for value, name in sorted(pairs, key=lambda pair: int(pair[0])) if int(value)}
        understood = 0 < len(names) == len(set(names.values()))
    except (TypeError, ValueError, AttributeError):
        understood = False
    if not understood:
        found = f"expected labels as {{'background': 0, 'liver': 1}} (no regions), found {labels!r}"
        listing.add("bad list", path, found, "correct it or give --label_map")
        return None
    if "ignore" in names.values():
        found = "found an 'ignore' label, which preprocessing does not know"
        listing.add("bad list", path, found, "relabel it or leave those cases out")
    return LabelMap("dataset.json", tuple(names.values()), {value: target for target, value in enumerate(names, start=1)}, names)


def _add_described_files(root: Path, entries: Any, images: dict[str, Path], labels: dict[str, Path]) -> None:
    """Adds files that dataset.json names and that are not there, so that they are missed."""
    for entry in entries if isinstance(entries, list) else ():
        pair = entry if isinstance(entry, dict) else {"image": entry}
        for key, found in (("image", images), ("label", labels)):
            if not isinstance(pair.get(key), str):
                continue
            path = root / pair[key]
            found.setdefault(stem_of(path), path)


def _compare_count(listing: Listing, description: dict[str, Any]) -> None:
    count = description.get("numTraining")
    found = sum(item.split == "train" for item in listing.items)
    if isinstance(count, int) and count != found:
        listing.add("bad list", listing.root / "dataset.json", f"numTraining says {count} cases, found {found}", "restore the cases or correct it")


def list_published(source: Path, args: argparse.Namespace, layout: RawLayout) -> Listing:
    """Raw BTCV or FLARE22 with the split of `--dataset`."""
    dataset = args.dataset or next(name for name, split in PUBLISHED_SPLITS.items() if split.layout is layout)
    split = PUBLISHED_SPLITS[dataset]
    folders = layout.find(source)
    if split.layout is not layout or folders is None:
        raise UserError(f"{source}: expected the raw files of {dataset} ({split.layout.described}), found others; leave out --dataset or --kind")
    listing = Listing(source)
    label_map = _chosen_label_map(args) or DATASETS[dataset].label_map
    part_of = {number: part for part, numbers in (("train", split.train), ("test", split.test)) for number in numbers}
    names = {split.case_name.format(number): number for number in part_of}

    def name_by(template: str) -> Callable[[Path], str | None]:
        before, after = (re.escape(part) for part in template.split("{:04d}"))

        def name_of(path: Path) -> str | None:
            match = re.fullmatch(rf"{before}(\d{{4}}){after}", path.name[: -len(suffix_of(path) or "") or None])
            return split.case_name.format(int(match[1])) if match else None

        return name_of

    images, labels = (
        {name: _unwrapped(path) for name, path in _scans_by_name(listing, folder, name_by(template)).items()}
        for folder, template in zip(folders, (layout.image_name, layout.label_name), strict=True)
    )
    for item in _pairs(images, labels, label_map=label_map, image_kind=args.image_kind or "ct_window"):
        if item.case not in names:
            advice = "take the case out or use preprocess/nifti.py"
            listing.add("unexpected file", item.image or item.label, f"found a case that is not in the split of {dataset}", advice, item.case)
        listing.items.append(replace(item, split=part_of.get(names.get(item.case, -1)), patient=item.case))
    listing.said = f"raw {layout.name} ({len(listing.items)} of {len(names)} cases), split and classes of {dataset}, {_label_words(label_map)}"
    return listing


def list_scans(source: Path, args: argparse.Namespace) -> Listing:
    """Scans without labels: files and DICOM folders."""
    listing = Listing(source if source.is_dir() else source.parent)
    paths = find_scans(source) if source.is_dir() else [source]
    stems = Counter(stem_of(path) for path in paths)
    for path in paths:
        name = stem_of(path) if stems[stem_of(path)] == 1 else path.name
        listing.items.append(Item(name, path, labelled=False, patient=name, image_kind=args.image_kind))
    listing.said = "scans without labels" + (f", {_image_words(args.image_kind)}" if args.image_kind else "")
    return listing


# --- prepared folders -------------------------------------------------------------------------------------------------------------------


def list_prepared(source: Path, args: argparse.Namespace) -> Listing:
    """train_npz and test_vol_h5 with their lists and manifest, ours or TransUNet's."""
    root = source.parent if source.name in (_TRAIN, _TEST) else source
    listing = Listing(root)
    readable, manifest = True, {}
    try:
        manifest = read_manifest(root) or {}
    except UserError as error:
        readable = False
        listing.report("bad list", root / "manifest.json", error)
    known: dict[str, Any] = {name: entry for name, entry in manifest.get("cases", {}).items() if isinstance(entry, dict)}
    label_map, words = _prepared_labels(args, manifest)
    for split, folder in (("train", _TRAIN), ("test", _TEST)):
        if not (root / folder).is_dir():
            continue
        files = _prepared_files(listing, root / folder)
        names = _listed(listing, root, folder, args) if readable else None  # lists are read together with the manifest
        wanted: dict[str, set[int]] = {}
        for name in names or ():
            wanted.setdefault(case_of(name), set()).add(_number(name))
        listed = None if names is None else set(wanted)
        for case, entry in known.items():
            if entry.get("split") == split:
                count = entry.get("n_slices") if split == "train" else 0
                wanted.setdefault(case, set()).update(range(count if isinstance(count, int) else 0))
        for case in sorted({*files, *wanted}):
            found = files.get(case, {})
            patient = str(known.get(case, {}).get("patient") or case)
            part = split if listed is None or case in listed else None
            item = Item(case, labelled=False, split=part, patient=patient, label_map=label_map, prepared=True)
            if split == "test":
                listing.items.append(replace(item, image=found.get(-1, root / folder / f"{case}.npy.h5")))
            else:
                listing.items.append(replace(item, slices=tuple(found[number] for number in sorted(found))))
                _compare_slices(listing, case, root / folder, found, wanted.get(case, set()))
    listing.said = f"prepared slices and volumes, {words}"
    return listing


def _prepared_labels(args: argparse.Namespace, manifest: dict[str, Any]) -> tuple[LabelMap, str]:
    chosen = _chosen_label_map(args)
    if chosen is not None:
        return identity_label_map(chosen.class_names, chosen.name), f"classes of {chosen.name}"
    if manifest.get("class_names"):
        return identity_label_map([str(name) for name in manifest["class_names"]], "manifest.json"), "classes of manifest.json"
    names = LABEL_MAPS["synapse8"].class_names
    return identity_label_map(names, "synapse8"), "no manifest.json, so the 8 classes of Synapse (others: --dataset, --label_map)"


def _number(name: str) -> int:
    """The slice number of `case0005_slice012`; -1 for the name of a volume."""
    match = re.search(r"_slice(\d+)$", name)
    return int(match[1]) if match else -1


def _prepared_files(listing: Listing, folder: Path) -> dict[str, dict[int, Path]]:
    """Case -> number of the slice (-1 for a volume) -> file."""
    suffix = ".npz" if folder.name == _TRAIN else ".npy.h5"
    found: dict[str, dict[int, Path]] = {}
    for path in sorted(folder.iterdir()):
        name = path.name.removesuffix(suffix)
        if path.name.startswith("."):
            continue
        if name == path.name or (_number(name) >= 0) != (folder.name == _TRAIN):
            example = "case0005_slice000.npz" if folder.name == _TRAIN else "case0008.npy.h5"
            listing.add("unexpected file", path, f"expected names as {example}", "rename it or take it out of the folder")
            continue
        found.setdefault(case_of(name), {})[_number(name)] = path
    return found


def _listed(listing: Listing, root: Path, folder: str, args: argparse.Namespace) -> Sequence[str] | None:
    """The names in the list of a folder, None where it cannot be used."""
    name = "train.txt" if folder == _TRAIN else "test_vol.txt"
    try:
        return find_data(root, folder, name, list_dir=args.list_dir, dataset=args.dataset or "Synapse").names
    except UserError as error:
        listing.report("bad list", root / "lists" / name, error)
        return None


def _compare_slices(listing: Listing, case: str, folder: Path, found: Iterable[int], wanted: set[int]) -> None:
    """Slices that list or manifest name must be there; what neither names may only be absent at the ends."""
    numbers = set(found)
    absent = wanted - numbers
    if absent:
        text = f"list or manifest name slices {_numbers(absent)}, and there are no such files"
        listing.add("absent file", folder / f"{case}_slice{min(absent):03d}.npz", text, "prepare the case again or correct the list", case)
    gaps = set(range(min(numbers, default=0), max(numbers, default=-1))) - numbers - absent
    if gaps:
        listing.add("missing slice", folder, f"slices {_numbers(gaps)} are missing between others", "prepare the case again", case)


def _numbers(numbers: Iterable[int]) -> str:
    ordered = sorted(numbers)
    return ", ".join(f"{number:03d}" for number in ordered[:5]) + (f" and {len(ordered) - 5} more" if len(ordered) > 5 else "")


LISTINGS: dict[str, Callable[[Path, argparse.Namespace], Listing]] = {
    "nnunet": list_nnunet,
    "btcv": lambda source, args: list_published(source, args, BTCV),
    "flare22": lambda source, args: list_published(source, args, FLARE22),
    "csv": list_csv,
    "prepared": list_prepared,
    "scans": list_scans,
}


def _chosen_label_map(args: argparse.Namespace) -> LabelMap | None:
    if args.label_map:
        return load_label_map(args.label_map)
    return DATASETS[args.dataset].label_map if args.dataset else None


def _label_words(label_map: LabelMap | None) -> str:
    return f"label map {label_map.name}" if label_map else "labels of unknown names (--label_map)"


def _image_words(kind: str) -> str:
    return "images in Hounsfield units" if kind == "ct_window" else "images in units of their own"


# --- patients ---------------------------------------------------------------------------------------------------------------------------


PatientRule = Callable[[str], str]  # case -> patient, "" where it knows none


def patient_of_flags(args: argparse.Namespace) -> PatientRule | None:
    """The rule of --patient_regex or --patients; None without them.

    Raises:
        UserError: the expression has not one group, or the file has not the columns case and patient.
    """
    if args.patients is not None:
        table = _read_patients(args.patients)
        return lambda case: table.get(case, "")
    strict = patient_rule(args.patient_regex)
    if strict is None:
        return None

    def tolerant(case: str) -> str:
        try:
            return strict(case)
        except UserError:
            return ""  # becomes a finding

    return tolerant


def with_patients(listing: Listing, rule: PatientRule | None) -> None:
    """Gives every case its patient; those of a CSV file of pairs were asked for as it was read, since its own column goes first."""
    for index, item in enumerate(listing.items):
        if rule is not None and not listing.patients_known:
            item = listing.items[index] = replace(item, patient=rule(item.case))
        if not item.patient:
            advice = "let --patients or --patient_regex cover every case"
            listing.add("no patient", item.image or item.label, "no patient is known for this name", advice, item.case)


def _read_patients(path: Path) -> dict[str, str]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = csv.DictReader(file, skipinitialspace=True)
            columns = [column.strip() for column in rows.fieldnames or ()]
            if not {"case", "patient"} <= set(columns):
                raise UserError(f"{path}: expected the columns case, patient, found {', '.join(columns) or 'none'}; correct the first line")
            rows.fieldnames = columns
            return {(row["case"] or "").strip(): (row["patient"] or "").strip() for row in rows}
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: expected a CSV file with the columns case, patient, found none that can be read ({error}); check it") from error


# --- work and results -------------------------------------------------------------------------------------------------------------------


def check_all(listing: Listing, num_workers: int) -> list[Report]:
    """The reports on all cases, in the order of the listing whatever the number of processes."""
    items = listing.items
    with tqdm(total=len(items), unit="case", desc="checked", disable=None) as progress:
        if num_workers <= 1:
            reports = []
            for item in items:
                reports.append(check_case(item, listing.root))
                progress.update()
            return reports
        context = multiprocessing.get_context("spawn")  # the same on every system, and safe whatever threads the parent runs
        with ProcessPoolExecutor(min(num_workers, max(len(items), 1)), mp_context=context) as pool:
            futures = [pool.submit(check_case, item, listing.root) for item in items]
            try:
                for future in as_completed(futures):
                    future.result()
                    progress.update()
            except BrokenProcessPool as error:
                raise UserError("a worker process died, most likely for lack of memory; use fewer --num_workers") from error
            return [future.result() for future in futures]


def table(findings: Sequence[Finding]) -> str:
    """A row a finding, the first three columns aligned."""
    rows = [("finding", "case", "file", "found", "what to do")]
    rows += [(finding.kind, finding.case or "-", finding.file or "-", finding.found, finding.advice) for finding in findings]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)) + f"  {row[3]} | {row[4]}" for row in rows)


def summary(reports: Sequence[Report], findings: Sequence[Finding]) -> str:
    """One line: cases, files, in how many labels the sides of the body could be told, findings of each kind."""
    kinds = Counter(finding.kind for finding in findings)
    listed = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
    by_kind = f"{len(findings)} finding{'s' if len(findings) > 1 else ''}: {listed}" if findings else "no findings"
    labels = sum(report.labels is not None for report in reports)
    told = sum(report.sides is not None and report.sides != (0, 0) for report in reports)
    sides = f"left and right could be told in {told} of {labels} labels" if labels else "no labels"
    assumed = sum(report.orientation_assumed for report in reports)
    if assumed:
        sides += f" (BTCV's orientation {BTCV_ORIENTATION} assumed in {assumed}, whose files tell none)"
    return f"{len(reports)} cases, {sum(report.n_files for report in reports)} files, {sides}; {by_kind}"


def as_json(args: argparse.Namespace, kind: str, reports: Sequence[Report], findings: Sequence[Finding]) -> dict[str, Any]:
    """What is written to `--output`; geometry in array order (D, H, W), undefined values are null."""
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items() if key not in ("output", "num_workers")}
    return {
        "format": FORMAT,
        "settings": settings | {"kind": kind},
        "counts": {
            "cases": len(reports),
            "files": sum(report.n_files for report in reports),
            "findings": len(findings),
            "by_kind": dict(sorted(Counter(finding.kind for finding in findings).items())),
        },
        "findings": [asdict(finding) for finding in findings],
        "cases": [_case_entry(report) | {"findings": [row.kind for row in findings if row.case == report.item.case]} for report in reports],
    }


def _case_entry(report: Report) -> dict[str, Any]:
    item = report.item
    classes = item.label_map.class_names if item.label_map else ()
    names = None if report.classes is None else [classes[i - 1] if classes else f"label {i}" for i in report.classes]
    return {
        "case": item.case,
        "split": item.split,
        "patient": item.patient or None,
        "image": relative(item.slices[0] if item.slices else item.image, report.root) or None,
        "label": relative(item.slices[0] if item.slices else item.image if item.prepared else item.label, report.root) or None,
        "shape": report.shape,
        "spacing_mm": report.spacing_mm,
        "orientation": report.orientation,
        "orientation_assumed": report.orientation_assumed,
        "intensity": report.intensity,
        "labels_present": report.labels,
        "classes_present": names,
        "sides": None if report.sides is None else dict(zip(("as expected", "reversed"), report.sides, strict=True)),
        "voxels_sha256": report.voxels,
    }


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = Parser(__doc__)
    parser.add_argument("source", type=Path, help="the dataset: a folder, or a CSV file of pairs")
    parser.add_argument("--kind", choices=LISTINGS, help="what the source is (default: seen from its content)")
    parser.add_argument("--label_map", help="name in datasets/labels.py or a JSON file (default: dataset.json's, the dataset's or the manifest's)")
    parser.add_argument("--dataset", choices=PUBLISHED_SPLITS, help="label map and, of raw BTCV and FLARE22, the split (default Synapse or FLARE22)")
    parser.add_argument(
        "--image_kind", choices=IMAGE_KINDS, help="ct_window: raw images are in Hounsfield units (default: by the dataset; CSV: ct_window)"
    )
    patients = parser.add_mutually_exclusive_group()
    patients.add_argument("--patient_regex", help="regular expression with one group: the patient in a case's name")
    patients.add_argument("--patients", type=Path, help="CSV file with the columns case, patient")
    parser.add_argument("--list_dir", type=Path, help="folder of the lists of a prepared dataset (default: lists in it)")
    parser.add_argument("--output", type=Path, default=Path("findings.json"), help="JSON file (default %(default)s in the working folder)")
    parser.add_argument("--num_workers", type=int, default=default_workers(), help="processes, 0 or 1 for none of its own (default %(default)s)")
    return parser


def _check_flags(args: argparse.Namespace, kind: str) -> None:
    """Raises a UserError for a source that cannot be of this kind, and for flags that would change nothing."""
    if not args.source.exists() or (kind == "csv" and not args.source.is_file()) or (kind not in ("csv", "scans") and not args.source.is_dir()):
        raise UserError(f"{args.source}: expected {'a CSV file' if kind == 'csv' else 'a folder'}, found none; check the path and --kind")
    if args.list_dir is not None and kind != "prepared":
        raise UserError("--list_dir is for prepared datasets; leave it out")
    if args.image_kind is not None and kind == "prepared":
        raise UserError("--image_kind is for raw images, and these are prepared; leave it out")
    if (args.label_map or args.dataset) and kind == "scans":
        raise UserError("--label_map and --dataset are for datasets with labels; leave them out")
    if args.label_map and args.dataset and kind in ("csv", "nnunet"):
        raise UserError("--label_map and --dataset both choose the label map here; give one of them")
    if not args.output.parent.is_dir():
        raise UserError(f"{args.output}: no such folder; make it first")


@reports_user_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the script; returns its exit code."""
    args = build_parser().parse_args(argv)
    kind = recognise(args.source) if args.kind is None else args.kind
    _check_flags(args, kind)
    rule = patient_of_flags(args)
    listing = LISTINGS[kind](args.source, args)
    if not listing.items:
        raise UserError(f"{args.source}: expected at least one case of kind {kind}, found none; name the folder that holds them")
    print(f"{args.source}: {listing.said}", flush=True)
    with_patients(listing, rule)
    reports = check_all(listing, args.num_workers)
    order = {"": -1} | {item.case: index for index, item in enumerate(listing.items)}
    findings = [*listing.findings, *(finding for report in reports for finding in report.findings), *check_dataset(reports, listing.root)]
    findings.sort(key=lambda finding: order.get(finding.case, len(order)))
    content = json.dumps(as_json(args, kind, reports, findings), indent=1, allow_nan=False) + "\n"
    with replacing(args.output) as temporary:
        temporary.write_text(content, encoding="utf-8")
    if findings:
        print(table(findings))
    print(f"{summary(reports, findings)}; written to {args.output}")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
