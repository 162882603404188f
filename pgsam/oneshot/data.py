"""The three benchmarks of P2SAM: which image is segmented after which reference, and under which name the result is written and scored.

| benchmark | layout | reference |
|---|---|---|
| `perseg` | `Images/<object>/NN.jpg`, `Annotations/<object>/NN.png` | the image called `00` of the object |
| `cvc_clinicdb` | `image/video_NNNN/image_JJJJ.png`, `label/video_NNNN/label_JJJJ.png` | frame 3 of the video |
| `lung_4d` | `{image,label}/<patient>/<MM-DD-YYYY-...>/Gated_00/1-NNN.png` | the patient's whole first visit, slice by slice |

Images and masks belong together by name, never by their order. Names are sorted with their numbers as numbers, visits by date.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from pgsam.errors import UserError
from pgsam.volume_io import is_picture, stem_of

_DATE = re.compile(r"(\d{2})-(\d{2})-(\d{4})(?!\d)")


@dataclass(frozen=True)
class Pair:
    """An image file and its mask file."""

    image: Path
    mask: Path


@dataclass(frozen=True)
class Target:
    """A mask to be found.

    Args:
        groups: what it belongs to, from the outside in, one name a level of the benchmark.
        name: in its group.
        truth: the true mask's file.
        prediction: where the result lies, below the folder of results.
    """

    groups: tuple[str, ...]
    name: str
    truth: Path
    prediction: Path


@dataclass(frozen=True)
class Item(Target):
    """A target with its image, and the reference that it is segmented after."""

    image: Path
    reference: Pair


@dataclass(frozen=True)
class Benchmark:
    """Everything that is segmented and scored.

    Args:
        levels: what the groups of a target are, from the outside in.
        items: group by group; one reference may be that of several.
        left_out: one line for everything that has a reference and nothing to segment after it.
        empty_references: whether a reference without the object is possible; nothing is then found with it.
    """

    levels: tuple[str, ...]
    items: tuple[Item, ...]
    left_out: tuple[str, ...] = ()
    empty_references: bool = False

    @property
    def references(self) -> list[Pair]:
        """Each reference once."""
        return list(self.by_reference())

    def by_reference(self) -> dict[Pair, list[Item]]:
        """The items that are segmented after each reference."""
        found: dict[Pair, list[Item]] = {}
        for item in self.items:
            found.setdefault(item.reference, []).append(item)
        return found


def perseg(root: str | Path, *, reference: str = "00") -> Benchmark:
    """PerSeg (Zhang et al. 2023, arXiv 2305.03048): objects, several photographs each; the reference is the one of that name.

    Raises:
        UserError: the layout is another, an image has no mask or a mask no image, or an object has no such reference.
    """
    objects = _pairs_of_folders(Path(root) / "Images", Path(root) / "Annotations")
    items, left_out = [], []
    for name, pairs in objects.items():
        _require_reference(Path(root) / "Annotations" / name, pairs, reference)
        tested = {stem: pair for stem, pair in pairs.items() if stem != reference}
        if not tested:
            left_out.append(f"{name}: the reference {reference} is its only image")
        for stem, pair in tested.items():
            items.append(Item((name,), stem, pair.mask, Path(name, f"{stem}.png"), pair.image, pairs[reference]))
    return _benchmark(root, ("object",), items, left_out)


def perseg_targets(annotations: str | Path, *, reference: str = "00") -> tuple[list[Target], set[Path]]:
    """What `perseg` scores, from the folder of annotations alone, and the places of predictions that may lie there too: the references'.

    Raises:
        UserError: as `perseg`.
    """
    targets, allowed = [], set()
    for folder in _folders(Path(annotations)):
        masks = _pictures(folder)
        _require_reference(folder, masks, reference)
        allowed.add(Path(folder.name, f"{reference}.png"))
        targets += [Target((folder.name,), stem, path, Path(folder.name, f"{stem}.png")) for stem, path in masks.items() if stem != reference]
    if not targets:
        raise UserError(f"{annotations}: expected masks beside the reference {reference}, found none; check the folder")
    return targets, allowed


def cvc_clinicdb(root: str | Path, *, reference_frame: int = 3) -> Benchmark:
    """CVC-ClinicDB (Bernal et al. 2015) cut into its videos; the reference is a frame of the video, and the frames after it are segmented.

    The frames before the reference are not: the published scores leave out the first three frames of each video, its reference the last of them.

    Args:
        root: folder of `image` and `label`.
        reference_frame: its place in the video, counted from 1.

    Raises:
        UserError: the layout is another, a frame has no mask or a mask no frame, or a video has no such frame.
    """
    videos = _pairs_of_folders(Path(root) / "image", Path(root) / "label", prefixes=("image_", "label_"))
    items, left_out = [], []
    for name, pairs in videos.items():
        frames = list(pairs.items())
        if len(frames) < reference_frame:
            folder = Path(root, "image", name)
            raise UserError(f"{folder}: expected at least {reference_frame} frames, found {len(frames)}; take it out or give another --ref-frame")
        if len(frames) == reference_frame:
            left_out.append(f"{name}: the reference is its last frame")
        for number, pair in frames[reference_frame:]:
            items.append(Item((name,), number, pair.mask, Path(name, f"{stem_of(pair.image)}.png"), pair.image, frames[reference_frame - 1][1]))
    return _benchmark(root, ("video",), items, left_out)


def lung_4d(root: str | Path, *, gate: int = 0) -> Benchmark:
    """4D-Lung (Hugo et al. 2017): patients with several visits; the first is the reference, and the others are segmented slice by slice.

    A slice's reference is the slice of the first visit at the same distance from the middle of the volume, or the last one on that side.

    Args:
        root: folder of `image` and `label`.
        gate: phase of the breath, 0 .. 9.

    Raises:
        UserError: the layout is another, a slice has no mask or a mask no slice, or a visit's name does not begin with its date.
    """
    images, labels = Path(root) / "image", Path(root) / "label"
    phase = f"Gated_{gate:02d}"
    items, left_out = [], []
    for patient in _same_folders(images, labels):
        names = _same_folders(images / patient, labels / patient)
        visits = sorted(names, key=lambda name: (visit_date(images / patient / name), natural_order(name)))
        first, *later = (_pairs(images / patient / name / phase, labels / patient / name / phase) for name in visits)
        if not later:
            left_out.append(f"{patient}: {visits[0]} is the only visit")
        references = list(first.values())
        for visit, slices in zip(visits[1:], later, strict=True):
            for i, (name, pair) in enumerate(slices.items()):
                reference = references[aligned(i, len(slices), len(references))]
                items.append(Item((patient, visit), name, pair.mask, Path(patient, visit, phase, f"{name}.png"), pair.image, reference))
    return _benchmark(root, ("patient", "visit"), items, left_out, empty_references=True)


def visit_date(folder: Path) -> date:
    """The date that a visit's name begins with, `MM-DD-YYYY`.

    Raises:
        UserError: it does not, or there is no such day.
    """
    found = _DATE.match(folder.name)
    try:
        if found is None:
            raise ValueError
        month, day, year = (int(part) for part in found.groups())
        return date(year, month, day)
    except ValueError:
        raise UserError(f"{folder}: expected a visit's folder that begins with its date, MM-DD-YYYY, found {folder.name}; rename it") from None


def aligned(index: int, slices: int, reference_slices: int) -> int:
    """The slice of the reference volume that lies as far from its middle (slice n // 2) as `index` does in its own volume, kept within the volume."""
    return min(max(reference_slices // 2 + index - slices // 2, 0), reference_slices - 1)


def natural_order(name: str) -> list[str | int]:
    """A sorting key in which the numbers of a name are numbers: `1-9` before `1-10`."""
    parts: list[str | int] = list(re.split(r"(\d+)", name))
    parts[1::2] = [int(part) for part in parts[1::2]]
    return parts


# --- folders ------------------------------------------------------------------------------------------------------------------------------


def _benchmark(
    root: str | Path, levels: tuple[str, ...], items: Sequence[Item], left_out: Sequence[str], *, empty_references: bool = False
) -> Benchmark:
    if not items:
        raise UserError(f"{root}: expected images to segment, found references only ({'; '.join(left_out[:3])}); check the data")
    return Benchmark(levels, tuple(items), tuple(left_out), empty_references)


def _pairs_of_folders(images: Path, masks: Path, prefixes: tuple[str, str] = ("", "")) -> dict[str, dict[str, Pair]]:
    """Folder -> name -> pair, of two folders of folders."""
    return {name: _pairs(images / name, masks / name, prefixes) for name in _same_folders(images, masks)}


def _same_folders(images: Path, masks: Path) -> list[str]:
    """Names of the subfolders, which both must have."""
    first, second = ([folder.name for folder in _folders(root)] for root in (images, masks))
    _require_same(first, second, images, masks)
    return first


def _pairs(images: Path, masks: Path, prefixes: tuple[str, str] = ("", "")) -> dict[str, Pair]:
    """Name without its prefix -> image and mask, in natural order."""
    first, second = (_pictures(folder, prefix) for folder, prefix in zip((images, masks), prefixes, strict=True))
    _require_same(first, second, images, masks)
    return {name: Pair(path, second[name]) for name, path in first.items()}


def _require_same(first: Iterable[str], second: Iterable[str], images: Path, masks: Path) -> None:
    for names, others, folder, other in ((set(first), set(second), images, masks), (set(second), set(first), masks, images)):
        if alone := sorted(names - others, key=natural_order):
            shown = ", ".join(alone[:3]) + (f" and {len(alone) - 3} more" if len(alone) > 3 else "")
            raise UserError(f"{folder}: expected the same names as in {other}, found {shown} here only; add what is missing or take it out")


def _require_reference(folder: Path, names: Mapping[str, object], reference: str) -> None:
    if reference not in names:
        shown = ", ".join(list(names)[:5])
        raise UserError(f"{folder}: expected the reference {reference} among its names, found {shown}; give another --ref-idx")


def _folders(root: Path) -> list[Path]:
    """The subfolders, in natural order, hidden ones left out; never none."""
    found = [entry for entry in _entries(root) if entry.is_dir()]
    if not found:
        raise UserError(f"{root}: expected folders in it, found none; check the path and the layout (see --help)")
    return sorted(found, key=lambda folder: natural_order(folder.name))


def _pictures(folder: Path, prefix: str = "") -> dict[str, Path]:
    """Name without suffix and prefix -> file, of the pictures in a folder; never none."""
    found: dict[str, Path] = {}
    for path in sorted((entry for entry in _entries(folder) if is_picture(entry)), key=lambda path: natural_order(path.name)):
        stem = stem_of(path)
        if not stem.startswith(prefix):
            raise UserError(f"{path}: expected a name that begins with {prefix}; rename it or take it out")
        name = stem.removeprefix(prefix)
        if name in found:
            raise UserError(f"{path}: expected one picture called {stem}, found {found[name].name} too; take one out")
        found[name] = path
    if not found:
        raise UserError(f"{folder}: expected pictures in it, found none; check the path and the layout (see --help)")
    return found


def _entries(folder: Path) -> list[Path]:
    try:
        return [entry for entry in folder.iterdir() if not entry.name.startswith(".")]
    except OSError as error:
        raise UserError(f"{folder}: expected a folder, it cannot be listed ({error.strerror}); check the path and the layout (see --help)") from error
