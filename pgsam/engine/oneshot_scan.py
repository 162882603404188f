"""Volumes for the one-shot methods: which slices are given, which of them each slice of a scan learns from, and labels on the scan's own grid.

Slices are cut and scaled as the checkpoint's training images were where its card says so, else as everywhere in this project
(`pgsam.volume.BTCV_ORIENTATION` for axial ones, CT where the values are Hounsfield units). A reference and a scan in two orientations so look alike,
and labels go back by undoing that turn exactly. The numbers of slices that a user reads or gives count along the file's own axis from 0. A labelled
slice is taken to be labelled completely: an object without a label in it is not there.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from datasets.labels import LabelMap
from pgsam.engine.infer import Reference
from pgsam.engine.intensity import SCALED, Intensity, choose_intensity
from pgsam.errors import UserError
from pgsam.models.card import ModelCard
from pgsam.oneshot.propagate import Fitted, Series, SliceResult, segment_series
from pgsam.oneshot.result import OneShotResult
from pgsam.sam.backbone import Backbone
from pgsam.sam.geometry import Frame
from pgsam.volume import BTCV_ORIENTATION, GRID_TOLERANCE_MM, Turn, Volume, check_orientation, corner_distance_mm, turn_to
from pgsam.volume_io import MODALITIES, Scan, read_scan

# Orientations whose [H, W] are the slices: axial as BTCV's; the other two with superior on top, as they are looked at.
AXES = {"axial": BTCV_ORIENTATION, "coronal": "LIA", "sagittal": "PIL"}
_PLANES = {"S": "axial", "I": "axial", "A": "coronal", "P": "coronal", "L": "sagittal", "R": "sagittal"}  # by an orientation's last letter
MATCHES = ("relative", "middle")
LARGEST_LABEL = 255
_ANY_SCAN = ModelCard(module="", vit_name="", img_size=0, input_size=0, class_names=())  # of no checkpoint: CT where the values are Hounsfield units


@dataclass(frozen=True)
class Cutting:
    """How scans are read and cut.

    Args:
        axis: of `AXES`; None takes the checkpoint's, else axial.
        modality: what scans are; None takes the file's word, else that of their values.
        window: the values that become 0 and 1; by checkpoint and modality if None.
        series: which DICOM series, where there are several.
        card: the checkpoint's, if it has one.
        turned_to: orientation of the slices that a saved reference was fitted on, in place of `axis`.
        read_as: their modality.
    """

    axis: str | None = None
    modality: str | None = None
    window: tuple[float, float] | None = None
    series: str | None = None
    card: ModelCard | None = None
    turned_to: str | None = None
    read_as: str | None = None

    @property
    def orientation(self) -> str:
        """Of the slices: a saved reference's, else the checkpoint's unless another plane is asked for."""
        if self.turned_to is not None:
            return self.turned_to
        trained_on = BTCV_ORIENTATION if self.card is None else self.card.orientation
        return trained_on if self.axis in (None, _PLANES[trained_on[2]]) else AXES[str(self.axis)]

    @property
    def plane(self) -> str:
        """The one of `AXES` that the slices are."""
        return _PLANES[self.orientation[2]]

    def facts_of(self, reference: "Slices") -> dict[str, Any]:
        """What a saved reference keeps of how its scan was cut, in JSON's types."""
        given = {"modality": self.modality, "window": None if self.window is None else list(self.window)}
        return {"orientation": self.orientation, "read_as": reference.intensity.modality, "scaled_by": list(reference.intensity.window), **given}

    def as_saved(self, facts: Mapping[str, Any], path: Path) -> "Cutting":
        """This cutting for a saved reference: what its `facts` say stands in for what is not given.

        Args:
            facts: of `facts_of`; empty, as those of a picture, they change nothing.
            path: of the reference, for messages.

        Raises:
            UserError: the facts are damaged, or what is given contradicts them.
        """
        if not facts:
            return self
        try:
            orientation, read_as, modality = check_orientation(facts["orientation"]), facts["read_as"], facts["modality"]
            scaled_by, window = (None if value is None else (float(value[0]), float(value[1])) for value in (facts["scaled_by"], facts["window"]))
            if modality not in (None, read_as) or read_as not in (*MODALITIES, SCALED):
                raise ValueError(f"modality {modality!r}, read as {read_as!r}")
        except (KeyError, TypeError, ValueError, IndexError, UserError) as error:
            raise UserError(f"{path}: expected how its scan was cut, found damaged facts ({error}); fit it again") from error
        plane = _PLANES[orientation[2]]
        fixed = scaled_by if window is not None or read_as == "ct" else None  # percentiles are those of every scan
        for flag, given, was, same in (
            ("axis", self.axis, f"{plane} slices", self.axis == plane),
            ("modality", self.modality, read_as, self.modality == read_as),
            ("window", self.window, f"a window of {fixed[0]:g} {fixed[1]:g}" if fixed else "the values of each scan", self.window == fixed),
        ):
            if given is not None and not same:
                shown = " ".join(f"{value:g}" for value in given) if isinstance(given, tuple) else given
                raise UserError(f"--{flag} {shown}: {path} was fitted on {was}; leave the flag out, or fit a reference so")
        return replace(self, modality=self.modality or modality, window=self.window or window, turned_to=orientation, read_as=read_as)


@dataclass(frozen=True, eq=False)
class Slices:
    """A scan as a stack of slices.

    Args:
        scan: as its file gives it.
        turn: from its array to `image`.
        image: the volume of the slices, in [0, 1].
        intensity: how its values became that.
    """

    scan: Scan
    turn: Turn
    image: Volume
    intensity: Intensity

    def __len__(self) -> int:
        return len(self.image.array)

    def picture(self, number: int) -> np.ndarray:
        """Slice `number` as the methods take it, `(H, W, 3)` float32."""
        return np.repeat(self.image.array[number][..., None], 3, axis=2)

    def in_file(self, number: int) -> int:
        """The number along the file's own axis of slice `number`, and the other way round: it is its own inverse."""
        return len(self) - 1 - number if 0 in self.turn.flipped else number


def cut(path: Path, cutting: Cutting) -> Slices:
    """Reads a scan, cuts and scales it; a file without a third axis is one slice, as it lies.

    Raises:
        UserError: as `read_scan` and `choose_intensity`.
    """
    scan = read_scan(path, series=cutting.series)
    turn = Turn((0, 1, 2), ()) if scan.axes == 2 else turn_to(scan.volume, cutting.orientation)
    intensity = choose_intensity(scan, cutting.card or _ANY_SCAN, modality=cutting.modality, window=cutting.window)
    if cutting.card is None:
        intensity = replace(intensity, warning=None)  # about the images of a training that nobody knows
    turned = turn.apply(scan.volume)
    return Slices(scan, turn, Volume(intensity.scale(turned.array), turned.affine), intensity)


# --- what is given ------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class LabelledScan:
    """A scan with labelled slices.

    Args:
        slices: the scan.
        labels: `[D, H, W]` uint8, cut as `slices`; 0 in slices that are not given.
        given: the given slices, rising.
        path: of the labels.
    """

    slices: Slices
    labels: np.ndarray
    given: tuple[int, ...]
    path: Path


def read_labelled(
    scan: Path, mask: Path, cutting: Cutting, *, label_map: LabelMap | None = None, chosen: Sequence[int] | None = None
) -> LabelledScan:
    """Reads a scan and its labels.

    Args:
        scan, mask: files on one grid.
        cutting: how.
        label_map: from the values in `mask` to classes; None keeps the values.
        chosen: the given slices, in the file's numbers; None takes all that hold a label.

    Raises:
        UserError: as `cut`; the labels are not on the scan's grid or hold other values; there is no such slice, or one without a label.
    """
    slices = cut(scan, cutting)
    labels = slices.turn.array(Reference(mask, label_map).read(slices.scan, LARGEST_LABEL)).copy()
    labelled = [number for number in range(len(slices)) if labels[number].any()]
    if not labelled:
        raise UserError(f"{mask}: expected at least one slice with a label, found none in {len(slices)} {cutting.plane} slices; label one")
    if chosen is None:
        return LabelledScan(slices, labels, tuple(labelled), mask)
    there = sorted(slices.in_file(number) for number in labelled)
    if absent := sorted(set(chosen) - set(there)):
        span = f"{len(there)} slices with labels ({', '.join(map(str, there[:8]))}{', ...' if len(there) > 8 else ''})"
        raise UserError(f"--slices {','.join(map(str, absent))}: no label there; {mask} has {span}, counted from 0 along the {cutting.plane} axis")
    given = tuple(sorted(slices.in_file(number) for number in set(chosen)))
    labels[np.setdiff1d(np.arange(len(slices)), given)] = 0
    return LabelledScan(slices, labels, given, mask)


def fit_slices(
    reference: LabelledScan, objects: Mapping[str, int], make: Callable[[], Any], backbone: Backbone
) -> tuple[dict[str, dict[int, Fitted]], Frame]:
    """A method for every object (name -> label) and every given slice that shows it, and the frame of the slices; each is encoded once."""
    fitted: dict[str, dict[int, Fitted]] = {name: {} for name in objects}
    for number in reference.given:
        embedding = backbone.encode(reference.slices.picture(number))
        for name, label in objects.items():
            mask = reference.labels[number] == label
            if mask.any():
                fitted[name][number] = make().fit(embedding, mask)
    return fitted, embedding.frame


# --- which given slice each slice learns from ---------------------------------------------------------------------------------------------


def is_same_scan(first: Slices, second: Slices) -> bool:
    """Whether two files hold the same voxels in the same place."""
    one, other = first.image, second.image
    if one.array.shape != other.array.shape or corner_distance_mm(one, other) > GRID_TOLERANCE_MM:
        return False
    return np.array_equal(first.turn.array(first.scan.volume.array), second.turn.array(second.scan.volume.array))


def positions_in(reference: Slices, scan: Slices, match: str) -> np.ndarray:
    """Where every slice of `scan` lies among the slices of `reference`, `(D,)` in their numbers.

    `relative`: at the same share of the whole length. `middle`: at the same distance from the middle slice, in mm where both files know it and in
    slices otherwise (P2SAM pairs the visits of a patient so, in slices).

    Raises:
        ValueError: another `match`.
    """
    numbers = np.arange(len(scan))
    if match == "relative":
        return (numbers + 0.5) * len(reference) / len(scan) - 0.5
    if match != "middle":
        raise ValueError(f"match is one of {', '.join(MATCHES)}, not {match!r}")
    known = reference.scan.spacing_known and scan.scan.spacing_known
    scale = scan.image.spacing_mm[0] / reference.image.spacing_mm[0] if known else 1.0
    return (numbers - (len(scan) - 1) / 2) * scale + (len(reference) - 1) / 2


# --- a scan -------------------------------------------------------------------------------------------------------------------------------


def segment_scan(
    slices: Slices,
    objects: Mapping[str, int],
    methods: Mapping[str, Mapping[int, Fitted]],
    backbone: Backbone,
    *,
    reference: LabelledScan | None = None,
    match: str = "relative",
    below: float | None = None,
    seen: Callable[[SliceResult], object] | None = None,
) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """Finds the objects in every slice of a scan.

    Where masks of two objects overlap, a pixel goes to the one of the larger logit. In slices of the reference itself that are given, the user's
    labels stay.

    Args:
        slices: the scan.
        objects: name -> label.
        methods: name -> given slice -> fitted method, as `fit_slices`.
        backbone: encodes the slices.
        reference: whose slices the methods were fitted to; None for methods that know of no slices, one for each name under the number 0.
        match: see `positions_in`; for another scan than the reference.
        below: see `segment_series`.
        seen: called with every result.

    Returns:
        The labels on the grid of the scan's file `[D, H, W]` uint8, and a row for every slice and object in the order of the file.
    """
    own = reference is not None and is_same_scan(reference.slices, slices)
    positions: np.ndarray = np.zeros(len(slices))
    if reference is not None:
        positions = np.arange(len(slices)) if own else positions_in(reference.slices, slices, match)
    known = frozenset(reference.given) if reference is not None and own else frozenset[int]()
    series = {name: Series(methods[name], positions, known) for name in objects}
    labels = np.zeros(slices.image.array.shape, np.uint8)
    for number in known:
        assert reference is not None
        labels[number] = np.where(np.isin(reference.labels[number], list(objects.values())), reference.labels[number], 0)
    best = np.full(labels.shape, -np.inf, np.float32)
    found: dict[tuple[int, str], dict[str, Any]] = {}
    for item in segment_series(lambda number: backbone.encode(slices.picture(number)), series, below=below):
        won = item.result.mask & (item.result.logits > best[item.number])
        best[item.number][won] = item.result.logits[won]
        labels[item.number][won] = objects[item.name]
        if seen is not None:
            seen(item)
        found[item.number, item.name] = {
            "source": "predicted",
            "reference": None if reference is None else reference.slices.scan.name,
            "reference_slice": None if reference is None else reference.slices.in_file(item.given),
            "second_reference_slice": None if item.second is None else slices.in_file(item.second),
            **numbers_of(item.result),
        }
    rows = []
    for number in sorted(range(len(slices)), key=slices.in_file):
        for name, label in objects.items():
            row = {"slice": slices.in_file(number), "object": name, "label": label, "pixels": int((labels[number] == label).sum())}
            rows.append({**row, **({"source": "given"} if number in known else found[number, name])})
    return slices.turn.undo(labels), rows


def numbers_of(result: OneShotResult) -> dict[str, Any]:
    """What a table says of a result; None where a method knows no such thing."""
    return {
        "n_parts": result.n_parts,
        "n_negatives": result.n_negatives,
        "distance": result.distance,
        "similarity_max": None if math.isnan(result.similarity_max) else result.similarity_max,
        "iou_predicted": result.iou_predicted,
        "reason": result.reason,
        "note": result.note,
    }
