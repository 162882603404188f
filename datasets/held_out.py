"""Cases that are held out of a training to watch it: named in a list, or a share of the patients.

A case is a volume of `test_vol_h5`, or is put together from its slices in `train_npz`, which then are not trained on: all that lie there, whether
or not the list of the training names each of them, since what is measured is the whole volume.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from datasets.layout import DataFolder, case_of, read_names
from datasets.slices import read_slice, slices_of_cases
from datasets.volumes import Case, make_case, read_case
from pgsam.errors import UserError
from pgsam.formats.arrays import DAMAGE
from pgsam.volume import GRID_TOLERANCE_MM, Volume, corner_distance_mm, from_attributes, take_slice

_GEOMETRY = ("spacing", "origin", "direction")
_COMMON = ("source_orientation", "image_kind", "window")  # what all slices of a case have alike


@dataclass(frozen=True)
class HeldOutCase:
    """One case: `paths` is its volume's file, or those of its slices in their order."""

    name: str
    paths: tuple[Path, ...]

    @property
    def slices(self) -> tuple[str, ...]:
        """The names of the slices it is put together from; none where it is a volume."""
        return tuple(path.stem for path in self.paths if path.suffix == ".npz")

    @property
    def place(self) -> Path:
        """What an error names: the volume, or the first slice."""
        return self.paths[0]

    def read(self, num_classes: int) -> Case:
        """Reads and checks the case; a UserError names file and case if it is not valid."""
        return join_slices(self.paths, self.name, num_classes) if self.slices else read_case(self.place, self.name, num_classes)


@dataclass(frozen=True)
class HeldOut:
    """What is held out of a training, and why.

    Args:
        cases: in the order of the list, or of their names.
        patients: theirs, sorted.
        of_patients: patients of the training before.
        source: the list, or the share as it was asked for.
        tested: those of `patients` who are in the test list too.
    """

    cases: tuple[HeldOutCase, ...]
    patients: tuple[str, ...]
    of_patients: int
    source: str
    tested: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the cases."""
        return tuple(case.name for case in self.cases)

    def describe(self) -> list[str]:
        """Lines for the log."""
        lines = [f"validation on {len(self.cases)} cases of {len(self.patients)} patients ({self.source}): {', '.join(self.names)}"]
        if self.tested:
            lines.append(
                f"NOTE: {len(self.tested)} of the validation patients are in the test list too ({', '.join(self.tested[:5])}): best.safetensors is "
                "chosen on them, so its test scores are no evidence"
            )
        return lines


def hold_out_list(folder: DataFolder, list_file: str | Path, *, allow_overlap: bool = False) -> tuple[DataFolder, HeldOut]:
    """The training without the cases named in a file, one a line, and those cases.

    A name is a case of the training list, else a volume in `test_vol_h5` beside the slices, else a case whose slices lie there unlisted.

    Args:
        folder: the slices and their list.
        list_file: the file.
        allow_overlap: let a patient of the list stay in the training with other cases.

    Raises:
        UserError: the list is absent or empty, a name is unknown, nothing or a patient of the list is left to train on, slices are missing.
    """
    path = Path(list_file)
    cases = listed_cases(folder, path)
    names = tuple(case.name for case in cases)
    training = _without(folder, names)
    if not training.names:
        raise UserError(f"{path}: expected cases to be left to train on, found all {len(folder.cases())} of {folder.list_file} in it; name fewer")
    patients = tuple(sorted({folder.patient_of(name) for name in names}))
    both = sorted(set(patients) & set(training.patients()))
    if both and not allow_overlap:
        raise UserError(
            f"{path}: {len(both)} of the patients stay in the training with other cases ({', '.join(both[:5])}); name those cases too, or give "
            "--allow_overlap"
        )
    return training, HeldOut(cases, patients, len(folder.patients()), str(path), patients_of_tests(folder, patients))


def listed_cases(folder: DataFolder, path: Path) -> tuple[HeldOutCase, ...]:
    """The cases named in a file, one a line, as `hold_out_list` finds them.

    Raises:
        UserError: the list is absent or empty, a name is unknown, or slices are missing.
    """
    if not path.is_file():
        raise UserError(f"{path}: expected a list of cases for --val_list, one a line, found no such file")
    return named_cases(folder, read_names(path), path)


def named_cases(folder: DataFolder, names: Sequence[str], source: Path) -> tuple[HeldOutCase, ...]:
    """As `listed_cases`, of names that `source` gave."""
    listed = set(folder.cases())
    volumes, on_disk = folder.files.parent / "test_vol_h5", slices_of_cases(folder.files)
    cases, unknown = [], []
    for name in names:
        volume = volumes / f"{name}.npy.h5"
        if name not in listed and volume.is_file():
            cases.append(HeldOutCase(name, (volume,)))
        elif name in on_disk or name in listed:
            cases.append(_case_of_slices(folder, name, on_disk))
        else:
            unknown.append(name)
    if unknown:
        raise UserError(
            f"{source}: expected cases of {folder.list_file} or volumes in {volumes}, found {', '.join(unknown[:5])} ({len(unknown)} unknown of "
            f"{len(names)}); write one case a line, as {folder.cases()[0]}"
        )
    return tuple(cases)


def hold_out_share(folder: DataFolder, share: float, seed: int) -> tuple[DataFolder, HeldOut]:
    """The training without a share of its patients, at least one, drawn by the seed, and their cases.

    Raises:
        UserError: the share is not between 0 and 1, or leaves nothing to train on; slices are missing.
    """
    patients = folder.patients()
    check_share(share)
    count = max(1, round(share * len(patients)))
    if count >= len(patients):
        raise UserError(
            f"--val_share {share:g}: expected patients to be left to train on, found {count} of the {len(patients)} in {folder.list_file} held out; "
            "give a smaller share or more cases"
        )
    drawn = {patients[i] for i in np.random.default_rng(seed).permutation(len(patients))[:count]}
    names = [case for case in folder.cases() if folder.patient_of(case) in drawn]
    on_disk = slices_of_cases(folder.files)
    cases = tuple(_case_of_slices(folder, name, on_disk) for name in names)
    chosen = tuple(sorted(drawn))
    return _without(folder, names), HeldOut(cases, chosen, len(patients), f"--val_share {share:g}", patients_of_tests(folder, chosen))


def check_share(share: float) -> None:
    """Raises a UserError unless a share is above 0 and below 1."""
    if not 0 < share < 1:
        raise UserError(f"--val_share {share:g}: expected a number above 0 and below 1")


def _without(folder: DataFolder, cases: Iterable[str]) -> DataFolder:
    left_out = set(cases)
    return dataclasses.replace(folder, names=tuple(name for name in folder.names if case_of(name) not in left_out))


def patients_of_tests(folder: DataFolder, patients: Iterable[str]) -> tuple[str, ...]:
    """Those of the patients who are in the test list beside the training's."""
    tests = folder.list_file.with_name("test_vol.txt")
    if not tests.is_file() or not tests.read_bytes().strip():
        return ()
    return tuple(sorted(set(patients) & {folder.patient_of(name) for name in read_names(tests)}))


def _case_of_slices(folder: DataFolder, name: str, on_disk: Mapping[str, Mapping[int, str]]) -> HeldOutCase:
    """A case of slices, after a check that none is missing between the first and the last, nor any that list or manifest know of."""
    found = on_disk.get(name, {})
    absent = [listed for listed in folder.names if case_of(listed) == name and listed not in found.values()]
    if absent:
        raise UserError(
            f"{folder.files / absent[0]}.npz: {absent[0]} is in the list but has no file; run the preprocessing again or correct the list"
        )
    count = (folder.manifest or {}).get("cases", {}).get(name, {}).get("n_slices")
    wanted = range(int(count)) if count is not None else range(min(found), max(found) + 1)
    gaps = [number for number in wanted if number not in found]
    if gaps or len(found) != len(wanted):
        what = f"without {', '.join(map(str, gaps[:5]))}" if gaps else "with more"
        raise UserError(
            f"{folder.files} ({name}): expected the slices {wanted[0]} to {wanted[-1]} for a whole validation volume, found {len(found)}, {what}; "
            "run the preprocessing again, or validate on another case"
        )
    return HeldOutCase(name, tuple(folder.files / f"{found[number]}.npz" for number in wanted))


def join_slices(paths: Iterable[Path], name: str, num_classes: int) -> Case:
    """One volume from the slices of a case in their order, in colour if they are, with the geometry that their entries tell.

    Raises:
        UserError: a slice is not valid, or does not continue the one before: another size, place or window.
    """
    slices = [(path, *read_slice(path, path.stem, num_classes), _entries(path, name)) for path in paths]
    first, image, _, entries = slices[0]
    for path, other, _, told in slices[1:]:
        if other.shape != image.shape:
            raise UserError(
                f"{path} ({name}): expected {list(image.shape)} pixels as in {first.name}, found {list(other.shape)}; make the case again"
            )
        unlike = [key for key in (*_COMMON, *_GEOMETRY) if (key in told) != (key in entries)]
        unlike += [key for key in _COMMON if key in told and key in entries and not np.array_equal(told[key], entries[key])]
        if unlike:
            raise UserError(f"{path} ({name}): expected the same {unlike[0]} as in {first.name}, found another; make the case again")
    images, labels = (np.stack(arrays) for arrays in zip(*((image, label) for _, image, label, _ in slices), strict=True))
    case = make_case(name, images if images.ndim == 3 else np.ascontiguousarray(np.moveaxis(images, 1, -1)), labels, entries, first)
    if case.geometry is not None:
        for index, (path, _, other, told) in enumerate(slices):
            place = from_attributes(told, other, str(path))
            assert place is not None  # it has the entries that the first slice has
            distance = corner_distance_mm(take_slice(case.geometry, index), Volume(place.array, place.affine))
            if distance > GRID_TOLERANCE_MM:
                raise UserError(
                    f"{path} ({name}): expected slice {index} of the stack that begins with {first.name}, found it {distance:.3g} mm off that place; "
                    "make the case again"
                )
    return case


def _entries(path: Path, name: str) -> dict[str, Any]:
    """What a slice's file tells beside its pixels."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            return {key: archive[key] for key in (*_GEOMETRY, *_COMMON) if key in archive}
    except DAMAGE as error:
        raise UserError(f"{path} ({name}): expected plain geometry entries, found damaged ones ({error}); make it again") from error
