"""Scans with labelled lesions, in M-SAM's folders or nnU-Net's, and crops of them to train on.

    <root>/<organ>/<modality_dataset>/imagesTr/NAME.nii.gz, labelsTr/NAME.nii.gz         M-SAM's (and SAM-Med3D's); `ct_...` is a CT
    <root>/dataset.json, imagesTr/NAME_0000.nii.gz, labelsTr/NAME.nii.gz                 nnU-Net's raw dataset

Of a scan with several channels one is taken. Scans of one NAME are one patient's in whatever folders, so that no patient is on both sides of a split.
"""

import json
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import Dataset

from pgsam.errors import UserError
from pgsam.volume import GRID_TOLERANCE_MM, Volume, corner_distance_mm
from pgsam.volume_io import read_volume, stem_of, suffix_of

IMAGES, LABELS = "imagesTr", "labelsTr"
CT_PREFIX = "ct_"  # of the name of M-SAM's folder of a CT dataset
_CHANNEL = re.compile(r"(?P<name>.+)_(?P<channel>\d{4})$")
_GIB = 2**30


@dataclass(frozen=True)
class LesionCase:
    """One labelled scan.

    Args:
        name: unique in its dataset.
        patient: whose it is.
        image, label: the files.
        modality: `ct` where the folder says so, else `other`, or what it is said to be.
        value: the label that is the lesion; None for every label above 0.
    """

    name: str
    patient: str
    image: Path
    label: Path
    modality: str = "other"
    value: int | None = None


# --- listing ------------------------------------------------------------------------------------------------------------------------------


def find_lesions(
    root: str | Path, *, modality: str | None = None, value: int | None = None, channel: int | None = None, patient_pattern: str | None = None
) -> list[LesionCase]:
    """Every labelled scan under a folder, sorted by name.

    Args:
        root: a raw dataset of nnU-Net's, or M-SAM's `<root>`, `<organ>` or `<modality_dataset>`.
        modality: of all scans, whatever their folders say.
        value: the label that is the lesion.
        channel: of nnU-Net's scans; needed where they have several.
        patient_pattern: regular expression that finds the patient in a scan's NAME, by its first group if it has one.

    Raises:
        UserError: there are none, a label has no scan, or the choice of channel or pattern does not fit.
    """
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"{root}: expected a folder with {IMAGES}/ and {LABELS}/, or with such folders in it, found no folder; check the path")
    folders = [labels.parent for depth in ("", "*/", "*/*/") for labels in sorted(root.glob(f"{depth}{LABELS}")) if labels.is_dir()]
    if not folders:
        raise UserError(
            f"{root}: expected nnU-Net's raw dataset ({IMAGES}/, {LABELS}/) or M-SAM's <organ>/<modality_dataset>/{LABELS}/, found neither; give the "
            "folder that holds them"
        )
    cases: list[LesionCase] = []
    for folder in folders:
        prefix = folder.relative_to(root).as_posix()
        kind = modality or _modality_of(folder, channel or 0)
        for name, image, label in _pairs(folder, channel):
            whole = name if prefix == "." else f"{prefix}/{name}"
            cases.append(LesionCase(whole, _patient(name, patient_pattern, label), image, label, kind, value))
    if not cases:
        raise UserError(f"{folders[0] / LABELS}: expected labelled scans (.nii.gz, .nii, .nrrd, .mha), found none; give the folder that holds them")
    return sorted(cases, key=lambda case: case.name)


def _files(folder: Path) -> dict[str, Path]:
    """NAME -> file, of the scans or labels in a folder."""
    found: dict[str, Path] = {}
    for file in sorted(folder.iterdir()):
        if file.is_file() and suffix_of(file) and not file.name.startswith("."):
            name = stem_of(file)
            if name in found:
                raise UserError(f"{file}: expected one file called {name}, found {found[name].name} too; take one out")
            found[name] = file
    return found


def _pairs(folder: Path, channel: int | None) -> list[tuple[str, Path, Path]]:
    """NAME, scan and label of every label in a folder."""
    if not (folder / IMAGES).is_dir():
        raise UserError(f"{folder}: expected {IMAGES}/ beside {LABELS}/, found none; put the scans there")
    images = _files(folder / IMAGES)
    channels: dict[str, dict[int, Path]] = {}
    for stem, file in images.items():
        found = _CHANNEL.match(stem)
        if found:
            channels.setdefault(found["name"], {})[int(found["channel"])] = file
    return [(name, _image_of(name, label, images, channels.get(name, {}), channel), label) for name, label in _files(folder / LABELS).items()]


def _image_of(name: str, label: Path, images: dict[str, Path], channels: dict[int, Path], channel: int | None) -> Path:
    """The scan of a label: that of its own name, else the chosen channel of it."""
    if name in images:
        if channel:
            raise UserError(f"{label}: expected channel {channel} of its scan, found {images[name]}, which has one only; leave --channel out")
        return images[name]
    if channel is None and len(channels) > 1:
        raise UserError(f"{label}: its scan has {len(channels)} channels ({', '.join(map(str, sorted(channels)))}); say which to take with --channel")
    found = channels.get(channel) if channel is not None else next(iter(channels.values()), None)
    if found is None:
        wanted = f"{name}_{channel or 0:04d}" if channels else f"{name} or {name}_0000"
        raise UserError(f"{label}: expected its scan {wanted} in {label.parents[1] / IMAGES}, found none; put it there, or remove the label")
    return found


def _modality_of(folder: Path, channel: int) -> str:
    """`ct` or `other`: what nnU-Net's dataset.json says of the channel or, where it says nothing, whether the name of the folder begins so."""
    path = folder / "dataset.json"
    if path.is_file():
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            names = content.get("channel_names") or content.get("modality") or {}
            found = str(names.get(str(channel)) or "").strip().lower()
        except (OSError, ValueError, AttributeError) as error:
            raise UserError(f"{path}: expected nnU-Net's description of a dataset, found a damaged one ({error}); correct it") from error
        if found:
            return "ct" if found == "ct" else "other"
    return "ct" if folder.name.lower().startswith(CT_PREFIX) else "other"


def _patient(name: str, pattern: str | None, label: Path) -> str:
    if pattern is None:
        return name
    try:
        found = re.search(pattern, name)
    except re.error as error:
        raise UserError(f"--patient_pattern {pattern}: expected a regular expression, it is none ({error})") from error
    if found is None:
        raise UserError(f"{label}: --patient_pattern {pattern} finds no patient in {name}; correct one of them")
    return found[1] if found.groups() else found[0]


def split_patients(cases: Sequence[LesionCase], share: float, seed: int) -> tuple[list[LesionCase], list[LesionCase]]:
    """Cases to train on, and those of a share of the patients, at least one, drawn by the seed.

    Raises:
        UserError: nothing is left to train on.
    """
    patients = sorted({case.patient for case in cases})
    count = max(1, round(share * len(patients)))
    if count >= len(patients):
        raise UserError(
            f"--val_share {share:g}: of {len(patients)} patients it leaves none to train on; give a smaller share, or 0 for no validation"
        )
    drawn = {patients[i] for i in np.random.default_rng((seed, len(patients))).permutation(len(patients))[:count]}
    return [case for case in cases if case.patient not in drawn], [case for case in cases if case.patient in drawn]


# --- reading ------------------------------------------------------------------------------------------------------------------------------


def read_label(case: LesionCase) -> Volume:
    """The lesions of a case as a bool volume; one without any is all False.

    Raises:
        UserError: the file is damaged, or holds fractions.
    """
    volume = read_volume(case.label, key="label")
    if volume.array.dtype.kind == "f" and not np.array_equal(volume.array, np.round(volume.array)):
        raise UserError(f"{case.label}: expected whole numbers as labels, found fractions; was the label interpolated?")
    mask = volume.array > 0 if case.value is None else volume.array == case.value
    return Volume(mask, volume.affine)


def read_lesion(case: LesionCase) -> tuple[Volume, Volume]:
    """Scan and lesions (bool) of a case, on one grid.

    Raises:
        UserError: a file is damaged, they lie on different grids, or there is no lesion.
    """
    image, mask = read_volume(case.image), read_label(case)
    if image.array.shape != mask.array.shape or corner_distance_mm(image, mask) > GRID_TOLERANCE_MM:
        raise UserError(
            f"{case.label}: expected the grid of {case.image} {image.array.shape}, found {mask.array.shape}"
            f"{'' if image.array.shape != mask.array.shape else ' in another place'}; resample one to the other"
        )
    if not mask.array.any():
        raise UserError(f"{case.label}: {_nothing(case)}; leave the case out, or choose another --label")
    return image, mask


def _nothing(case: LesionCase) -> str:
    return "expected a lesion, found every label 0" if case.value is None else f"expected a lesion labelled {case.value}, found none"


def without_lesion(cases: Sequence[LesionCase]) -> list[LesionCase]:
    """The cases whose label shows no lesion; reads every label."""
    return [case for case in cases if not read_label(case).array.any()]


# --- crops --------------------------------------------------------------------------------------------------------------------------------


class Cutter(Protocol):
    """Makes crops of a scan around its lesions; `pgsam.volumetric.lesion_crop.LesionCutter`."""

    def prepare(self, image: Volume, mask: Volume, modality: str) -> Any:
        """What of a scan crops are made of, to be kept; its `nbytes` says how much memory it takes."""
        ...

    def cut(self, prepared: Any, generator: np.random.Generator | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Image `(S, S, S)` float32, lesion `(S, S, S)` bool and never empty, spacing `(3,)` mm; the generator chooses where, None is one place."""
        ...


class LesionCrops(Dataset):
    """Crops around lesions, one a case and epoch.

    Args:
        cases: with a lesion each.
        cutter: makes the crops.
        seed: with the epoch and the case, determines place and flips.
        augment: at a place that the cutter chooses anew in each epoch; without, the crop is always the same.
        flips: and each axis flipped half the time.
        cache_gib: memory, in each process that loads data, for what was read; beyond it cases are read again.

    An item, by `(epoch, index)`: `image` `(1, S, S, S)` float32, `target` `(S, S, S)` bool, `spacing` `(3,)` mm, `case`, and `key` `(2,)`: the epoch
    and a number of the case that no other case of the list changes.
    """

    unit = "crop"

    def __init__(
        self, cases: Sequence[LesionCase], cutter: Cutter, *, seed: int, augment: bool = True, flips: bool = True, cache_gib: float = 2.0
    ) -> None:
        self.lesions = list(cases)
        self.names = tuple(case.name for case in cases)
        self.paths = [case.image for case in cases]
        self.cutter, self.seed, self.augment, self.flips = cutter, seed, augment, flips
        self._room = int(cache_gib * _GIB)
        self._kept: dict[int, Any] = {}

    def cases(self) -> tuple[str, ...]:
        """The scans, sorted."""
        return tuple(sorted(self.names))

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        epoch, index = key
        case = self.lesions[index]
        number = case_number(case.name)
        generator = np.random.default_rng((self.seed, epoch, number)) if self.augment else None
        image, target, spacing = self.cutter.cut(self._prepared(index), generator)
        if generator is not None and self.flips:
            axes = tuple(axis for axis in range(3) if generator.random() < 0.5)
            image, target = np.flip(image, axes), np.flip(target, axes)
        return {
            "image": torch.from_numpy(np.ascontiguousarray(image))[None],
            "target": torch.from_numpy(np.ascontiguousarray(target)),
            "spacing": torch.from_numpy(np.array(spacing, dtype=np.float64)),
            "case": case.name,
            "key": torch.tensor([epoch, number]),
        }

    def _prepared(self, index: int) -> Any:
        if index in self._kept:
            return self._kept[index]
        case = self.lesions[index]
        prepared = self.cutter.prepare(*read_lesion(case), case.modality)
        if prepared.nbytes <= self._room:
            self._room -= prepared.nbytes
            self._kept[index] = prepared
        return prepared


def case_number(name: str) -> int:
    """A number of a case that depends on its name only."""
    return zlib.crc32(name.encode())
