"""What preprocess/verify_dataset.py can check: which of six kinds a dataset is of, and the cases in it.

The readers of preprocess/nnunet.py, published.py and of prepared folders refuse a dataset at the first thing that is wrong. These list what is
there all the same, and what is wrong becomes a `Finding`, so that one look shows all of it.
"""

import argparse
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from datasets.labels import DATASETS, DEFAULT_DATASET, LABEL_MAPS, LabelMap, identity_label_map, load_label_map
from datasets.layout import FILES, case_of, find_data, read_manifest
from pgsam.errors import UserError
from pgsam.volume_io import find_scans, stem_of, suffix_of
from preprocess.checks import Finding, Item, relative, said
from preprocess.common import SPLITS
from preprocess.nifti import patient_rule, read_pairs, read_table
from preprocess.nnunet import FIRST_CHANNEL, image_kind_of, label_names, read_description, split_channel
from preprocess.published import BTCV, FLARE22, RawLayout, file_in, number_of
from preprocess.published import SPLITS as PUBLISHED_SPLITS

_TRAIN, _TEST = (folder for folder, _ in FILES.values())


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
    try:
        entries = _entries(folder)
    except UserError as error:  # DICOM files among the others
        listing.report("unexpected file", folder, error)
        entries = sorted(path for path in folder.iterdir() if suffix_of(path) and not path.name.startswith("."))
    for path in entries:
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
    """`file_in`; a folder with another content stays, and is found to be damaged."""
    try:
        return file_in(path)
    except UserError:
        return path


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
    channels = [str(name) for _, name in sorted(channels.items())] if isinstance(channels, dict) else []
    kind = args.image_kind or (image_kind_of(channels[0]) if channels else "percentile")
    numbers = {FIRST_CHANNEL}
    plain = False
    for part, split, key in (("Tr", "train", "training"), ("Ts", "test", "test")):
        found, labels = (_scans_by_name(listing, source / f"{folder}{part}") for folder in ("images", "labels"))
        plain = plain or bool(found.keys() & labels.keys())  # the Decathlon's names, without a channel's number
        images: dict[str, Path] = {}
        for name, path in found.items():
            case, channel = (name, None) if plain else split_channel(name)
            numbers.add(channel or FIRST_CHANNEL)
            if channel in (None, FIRST_CHANNEL):
                images[case] = path
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
    """dataset.json, {} after a finding."""
    path = listing.root / "dataset.json"
    if not path.is_file():
        listing.add("absent file", path, "there is no dataset.json", "restore it, nnU-Net and preprocess/nifti.py need it")
        return {}
    try:
        return read_description(listing.root)
    except UserError as error:
        listing.report("bad list", path, error)
        return {}


def _described_labels(listing: Listing, labels: Any) -> LabelMap | None:
    """The labels of dataset.json, also with gaps between the values; None after a finding."""
    path = listing.root / "dataset.json"
    try:
        named = label_names(path, labels)
    except UserError as error:
        listing.report("bad list", path, error)
        return None
    names = {value: name for value, name in sorted(named.items()) if value}
    if len(named) < len(labels) or not names or len(set(names.values())) < len(names):
        text = f"expected a value of its own for every label, and one or more of them, found {labels}"
        listing.add("bad list", path, text, "correct it or give --label_map")
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
    label_map = _chosen_label_map(args) or DATASETS[dataset]
    part_of = {number: part for part, numbers in (("train", split.train), ("test", split.test)) for number in numbers}
    names = {split.case_name.format(number): number for number in part_of}

    def scans(folder: Path, template: str) -> dict[str, Path]:
        def name_of(path: Path) -> str | None:
            number = number_of(path.name, template)
            return None if number is None else split.case_name.format(number)

        return {name: _unwrapped(path) for name, path in _scans_by_name(listing, folder, name_of).items()}

    images, labels = scans(folders[0], layout.image_name), scans(folders[1], layout.label_name)
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
    for split, (folder, list_name) in FILES.items():
        if not (root / folder).is_dir():
            continue
        files = _prepared_files(listing, root / folder)
        names = _listed(listing, root, folder, list_name, args) if readable else None  # lists are read together with the manifest
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


def _listed(listing: Listing, root: Path, folder: str, list_name: str, args: argparse.Namespace) -> Sequence[str] | None:
    """The names in the list of a folder, None where it cannot be used."""
    try:
        return find_data(root, folder, list_name, list_dir=args.list_dir, dataset=args.dataset or DEFAULT_DATASET).names
    except UserError as error:
        listing.report("bad list", root / "lists" / list_name, error)
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
    return DATASETS[args.dataset] if args.dataset else None


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
        table = {cells["case"]: cells["patient"] for _, cells in read_table(args.patients, "--patients", ("case", "patient"))}
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
