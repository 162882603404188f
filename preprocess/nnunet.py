"""nnU-Net's raw folders, in the three forms that are found in practice, and their cases with a split by patients.

| form | labels in dataset.json | image of case `liver_1` |
|---|---|---|
| nnU-Net, version 2 | `{"background": 0, "liver": 1}`, `channel_names` | `imagesTr/liver_1_0000.nii.gz`, or another `file_ending` |
| nnU-Net, version 1 | `{"0": "background", "1": "liver"}`, `modality` | `imagesTr/liver_1_0000.nii.gz` |
| Medical Segmentation Decathlon | as version 1 | `imagesTr/liver_1.nii.gz` |

A label is `labelsTr/liver_1.nii.gz` in all of them. Files whose name begins with a dot (the Decathlon's `._liver_1.nii.gz`) are no cases.
"""

import json
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from datasets.labels import LabelMap, identity_label_map
from pgsam.errors import UserError
from pgsam.volume_io import SUFFIXES
from preprocess.common import Case

DEFAULT_TEST_FRACTION = 0.2  # of a folder without labelsTs, as one of nnU-Net's five folds
DEFAULT_SEED = 1234
FIRST_CHANNEL = "0000"
MOST_LABELS = 255  # labels are uint8 between reading and writing

Pairs = dict[str, tuple[Path, Path]]  # case -> (image, label)

_PARTS = "expected a dataset folder of nnU-Net with dataset.json, imagesTr and labelsTr"
_COLOURS = ({"r", "g", "b"}, {"red", "green", "blue"})


@dataclass(frozen=True)
class NnunetFolder:
    """A raw folder as it was understood.

    Args:
        root: the dataset's folder.
        form: which of the three it is, in words.
        channel: name of the one channel, as "CT".
        train, test: labelled cases of imagesTr and of imagesTs; `test` is None without labelsTs.
        label_map: labels as dataset.json names them; None where they were not asked for.
        notes: what else is to be said.
    """

    root: Path
    form: str
    channel: str
    train: Pairs
    test: Pairs | None
    label_map: LabelMap | None
    notes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The folder's own name, also of `.`."""
        return self.root.resolve().name

    @property
    def image_kind(self) -> str:
        """As `pgsam.volume.scale_intensity`."""
        return image_kind_of(self.channel)

    def explain(self) -> str:
        """One line on what was recognised."""
        tests = "no labelsTs" if self.test is None else f"{len(self.test)} in labelsTs"
        labels = "" if self.label_map is None else f"; labels {', '.join(self.label_map.class_names)}"
        kind = "Hounsfield units" if self.image_kind == "ct_window" else "no CT, so its grey values are scaled image by image"
        notes = "".join(f"; {note}" for note in self.notes)
        return f"{self.root}: {self.form}, {len(self.train)} labelled cases in imagesTr, {tests}; channel {self.channel}: {kind}{labels}{notes}"


def image_kind_of(channel: str) -> str:
    """nnU-Net's convention: the channel "CT" holds Hounsfield units, any other is scaled image by image."""
    return "ct_window" if channel.strip().casefold() == "ct" else "percentile"


def read_nnunet(root: Path, *, own_labels: bool = True) -> NnunetFolder:
    """Reads dataset.json and pairs the files; with `own_labels`, the labels as they are must be usable.

    Raises:
        UserError: no dataset.json or one not understood, several channels, a file without its partner.
    """
    path = root / "dataset.json"
    description = read_description(root)
    version = 2 if "channel_names" in description else 1
    channel = _one_channel(path, description.get("channel_names", description.get("modality")), version)
    label_map = _labels(path, description.get("labels")) if own_labels else None
    suffixes = (_file_ending(path, description),) if "file_ending" in description else (".nii.gz", ".nii")
    train, plain = _pairs(root, "Tr", suffixes)
    test = _pairs(root, "Ts", suffixes)[0] if (root / "labelsTs").is_dir() else None
    notes = []
    promised = description.get("numTraining")
    if isinstance(promised, int) and promised != len(train):
        notes.append(f"numTraining in dataset.json says {promised}")
    if test is None and (root / "imagesTs").is_dir():
        notes.append("imagesTs has no labels and is not used")
    form = f"nnU-Net raw data, version {version}"
    if plain:
        form = "Medical Segmentation Decathlon (names without _0000)" if version == 1 else f"{form}, but names without _0000"
    return NnunetFolder(root, form, channel, train, test, label_map, tuple(notes))


def split_cases(
    folders: Sequence[NnunetFolder],
    *,
    patient_of: Callable[[str], str] | None = None,
    test_cases: Path | None = None,
    test_fraction: float | None = None,
    seed: int = DEFAULT_SEED,
) -> list[Case]:
    """All labelled cases of the folders with their split, folder by folder and in the order of their names.

    labelsTs names the test cases; in a folder without it they are those of the file `test_cases`, else a share `test_fraction` of its patients,
    drawn by `seed`. A patient who is in several folders is in one split. With several folders a case is called `<folder>_<case>`.

    Args:
        patient_of: case -> patient; by default every case is a patient.

    Raises:
        UserError: two folders of one name, `test_cases` or `test_fraction` where labelsTs decides or out of range, an unknown case.
    """
    names = [folder.name for folder in folders]
    twice = [folder.root for folder in folders if names.count(folder.name) > 1]
    if twice:
        raise UserError(f"{', '.join(map(str, twice))}: expected folders of different names, which go before their cases' names; rename one")
    open_folders = [folder for folder in folders if folder.test is None]
    if not open_folders and (test_cases is not None or test_fraction is not None):
        raise UserError(f"{folders[0].root}: its labelsTs names the test cases; leave --test_cases and --test_fraction out")
    if test_cases is not None and test_fraction is not None:
        raise UserError("--test_fraction: --test_cases names the test cases; give one of the two")
    if test_fraction is not None and not 0 <= test_fraction < 1:
        raise UserError(f"--test_fraction: expected a number from 0 to below 1, found {test_fraction:g}")
    cases = {folder.name: _cases_of(folder, len(folders) > 1, patient_of or str) for folder in folders}
    if test_cases is not None:
        named = _named_tests(test_cases, {case.name for folder in open_folders for case in cases[folder.name]})
        for folder in open_folders:
            cases[folder.name] = [replace(case, split="test" if case.name in named else "train") for case in cases[folder.name]]
    else:
        split_of = {case.patient: case.split for folder in folders if folder.test is not None for case in cases[folder.name]}
        for folder in open_folders:
            split_of |= _draw({case.patient for case in cases[folder.name]} - split_of.keys(), folder, test_fraction, seed)
            cases[folder.name] = [replace(case, split=split_of[case.patient]) for case in cases[folder.name]]
    return [case for listed in cases.values() for case in listed]


def _cases_of(folder: NnunetFolder, prefixed: bool, patient_of: Callable[[str], str]) -> list[Case]:
    """The cases of one folder; those of imagesTr count as training cases until the split is drawn."""
    cases = []
    for split, pairs in (("train", folder.train), ("test", folder.test or {})):
        for name, (image, label) in sorted(pairs.items()):
            full = f"{folder.name}_{name}" if prefixed else name
            cases.append(Case(full, split, patient_of(full), image, label, folder.label_map if prefixed else None))
    return cases


def _draw(patients: set[str], folder: NnunetFolder, fraction: float | None, seed: int) -> dict[str, str]:
    """Patient -> split; with a fraction above 0 and two patients or more, both splits have one."""
    if fraction is None:
        fraction = DEFAULT_TEST_FRACTION
        how = f"{fraction:.0%} of the cases are drawn for testing (seed {seed}); preprocess/nifti.py has --test_cases and --test_fraction"
        print(f"{folder.root}: no labelsTs; {how}")
    order = sorted(patients)
    random.Random(seed).shuffle(order)
    n_test = min(max(round(fraction * len(order)), 1), len(order) - 1) if fraction else 0
    return {patient: "test" if index < n_test else "train" for index, patient in enumerate(order)}


def _named_tests(path: Path, known: set[str]) -> set[str]:
    if not path.is_file():
        raise UserError(f"{path}: no such file; --test_cases is a text file with one case name a line")
    try:
        names = set(path.read_text(encoding="utf-8-sig").split())
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: expected one case name a line, found no UTF-8 text ({error}); write the file again") from error
    unknown = sorted(names - known)
    if unknown or not names:
        raise UserError(f"{path}: expected names of cases in imagesTr, found {', '.join(unknown[:5]) or 'none'}")
    return names


# --- dataset.json -----------------------------------------------------------------------------------------------------------------------


def read_description(root: Path) -> dict[str, Any]:
    """dataset.json of a raw folder.

    Raises:
        UserError: there is none, or it is no JSON object.
    """
    path = root / "dataset.json"
    if not path.is_file():
        inside = sorted(entry.parent.name for entry in root.glob("*/dataset.json")) if root.is_dir() else []
        hint = f"; {', '.join(inside[:5])} in it {'is one' if len(inside) == 1 else 'are some: name them'}" if inside else ""
        raise UserError(f"{path}: no such file; {_PARTS}{hint}")
    try:
        description = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: expected JSON, found something else ({error}); restore the file") from error
    if not isinstance(description, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(description).__name__}; restore the file")
    return description


def _one_channel(path: Path, channels: Any, version: int) -> str:
    """The name of the one channel; a UserError says what is to be decided where there are several."""
    if not isinstance(channels, dict) or not channels:
        raise UserError(f"{path}: expected channel_names (or modality) as {{'0': 'CT'}}, found {channels!r}")
    names = [str(name) for _, name in sorted(channels.items())]
    if len(names) == 1:
        return names[0]
    if {name.casefold() for name in names} in _COLOURS:
        raise UserError(f"{path}: expected one channel, found pictures in colour, which are not prepared yet; convert them to grey, as one channel")
    last = len(names) - 1
    how = f"list its files, as NAME_{last:04d} for {names[last]}, with preprocess/nifti.py --pairs"
    if version == 1:
        how += f"; where a file holds all channels (4-D), write that one to a file of its own first (nibabel: image.slicer[..., {last}])"
    raise UserError(
        f"{path}: expected one channel, found {len(names)} ({', '.join(names)}); a model here sees one grey image, so choose the channel that "
        f"shows what is to be found and {how}"
    )


def _file_ending(path: Path, description: dict[str, Any]) -> str:
    ending = description["file_ending"]
    if not isinstance(ending, str) or ending.lower() not in SUFFIXES:
        raise UserError(f"{path}: expected one of {', '.join(SUFFIXES)} as file_ending, found {ending!r}; convert the images")
    return ending.lower()


def label_names(path: Path, labels: Any) -> dict[int, str]:
    """Value -> name of {"background": 0, "liver": 1} (version 2) or {"0": "background", "1": "liver"} (version 1).

    Raises:
        UserError: it is neither.
    """
    try:
        if all(str(key).isdigit() for key in labels):
            return {int(key): str(name) for key, name in labels.items()}
        return {int(value): name for name, value in labels.items()}
    except (TypeError, ValueError, AttributeError) as error:
        found = f"found {labels!r}; correct it or give --label_map"
        raise UserError(f"{path}: expected labels as {{'background': 0, 'liver': 1}} (no regions), {found}") from error


def _labels(path: Path, labels: Any) -> LabelMap:
    names = label_names(path, labels)
    if "ignore" in names.values():
        raise UserError(f"{path}: expected every voxel to be labelled, found an 'ignore' label; relabel it or leave those cases out")
    if sorted(names) != list(range(len(names))) or len(names) < len(labels) or not 2 <= len(names) <= MOST_LABELS + 1:
        raise UserError(f"{path}: expected labels 0, 1, 2 ... without a gap, found {labels}; map them with preprocess/nifti.py --label_map")
    return identity_label_map([names[value] for value in range(1, len(names))], f"{path.resolve().parent.name}/dataset.json")


# --- files ------------------------------------------------------------------------------------------------------------------------------


def _pairs(root: Path, part: str, suffixes: Sequence[str]) -> tuple[Pairs, bool]:
    """The pairs of imagesTr and labelsTr, or of imagesTs and labelsTs, and whether images are named as their labels (without _0000)."""
    image_folder, label_folder = root / f"images{part}", root / f"labels{part}"
    found, labels = _files(image_folder, suffixes), _files(label_folder, suffixes)
    plain = bool(found.keys() & labels.keys())
    images: dict[str, Path] = {}
    for name, path in found.items():
        case, channel = (name, None) if plain else split_channel(name)
        if not plain and channel != FIRST_CHANNEL:
            raise UserError(f"{path}: expected one channel, named NAME_0000, or NAME as its label; choose one and list its files with --pairs")
        images[case] = path
    alone = sorted(images.keys() ^ labels.keys())
    if alone or not images:
        what = f"alone: {', '.join(alone[:5])}" if alone else f"nothing that ends in {', '.join(suffixes)}"
        raise UserError(f"{root}: expected an image in {image_folder.name} and a label in {label_folder.name} for every case, found {what}")
    return {name: (images[name], labels[name]) for name in images}, plain


def split_channel(name: str) -> tuple[str, str | None]:
    """`liver_1_0000` -> (`liver_1`, `0000`): an image's case and the number of its channel; None for a name without one."""
    match = re.fullmatch(r"(.+)_(\d{4})", name)
    return (match[1], match[2]) if match else (name, None)


def _files(folder: Path, suffixes: Sequence[str]) -> dict[str, Path]:
    """Name without suffix -> file, for files with one of the suffixes (the longer ones first)."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; {_PARTS}")
    files: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        suffix = next((suffix for suffix in suffixes if path.name.lower().endswith(suffix)), None)
        if suffix is None or path.name.startswith(".") or not path.is_file():
            continue
        name = path.name[: -len(suffix)]
        if name in files:
            raise UserError(f"{folder}: {files[name].name} and {path.name} are one case; keep one")
        files[name] = path
    return files
