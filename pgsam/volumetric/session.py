"""Segments one object in a scan of any size by clicks, boxes and masks, without a reference.

    session = InteractiveSession(model, recipe, read_volume("ct.nii.gz"))
    mask = session.click((-12.5, 3.0, 40.0))                    # LPS millimetres; frame="ras", or "voxel": (i, j, k) of the file
    mask = session.click((-20.0, 8.0, 44.0), positive=False)
    session.save("ct.session")
    session = InteractiveSession.load("ct.session", model, read_volume("ct.nii.gz"))

Where crops lie. The first prompt puts a crop around itself, which is encoded once. A click that lies in crops there are is told to all of them, one
that does not to a crop of its own. A box or a mask is told to the crop that holds all of it, else to one with it in the middle or, where it is
larger, to several that overlap by half. While the answer to a click or a mask touches a face of its crop beyond which the scan goes on, a crop half
a side further is opened: its mask prompt is what the crops before say there, its click the voxel deepest in that mask. One prompt opens at most
`max_crops`; that the object may go on is then a warning, and the next prompt goes on with it.

What a crop is told. As trained: the newest prompt, and the logits of the answer before, zeros where there is none. `point_memory="all"` tells it all
of its points, which M-SAM and SAM-Med3D do not learn from. A model without embeddings of a box's corners gets the filled box as mask prompt in place
of the answer before.

The answer. The logits of the crops that hold a voxel are averaged, a crop counting the less the nearer the voxel is to its faces (`tiles.weight`);
the object is where the mean is above 0, a probability of one half. Outside all crops there is none.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pgsam.clicks import Click, centre_click
from pgsam.volume import Volume
from pgsam.volumetric.crop import Canonical, CropGrid, VolumeRecipe
from pgsam.volumetric.model import VolumetricSam
from pgsam.volumetric.places import Places
from pgsam.volumetric.refine import MEMORIES, as_points, joined
from pgsam.volumetric.tiles import Face, beyond, blended, coarser, extent, face_places, inner_faces, object_in, sees_beyond, tiles

Result = TypeVar("Result")

MAX_CROPS = 8
_GOES_ON = "the object may go on"
SURE = 6.0  # the logit where a box or mask fills a voxel: a probability of 0.9975


@dataclass
class Prompt:
    """What was said, and what came of it; `run.json` and a session's file hold it.

    Args:
        kind: `click`, `box` or `mask`.
        frame: of `values`; None for a mask.
        values: a point, or two opposite corners one after the other; nothing for a mask.
        lps_mm: the same in LPS millimetres.
        positive: of a click.
        opened: crops that were encoded for it.
        asked: how often the decoder was asked.
        encode_seconds, decode_seconds: for all of them.
        voxels: of the object after it, on the input's grid.
    """

    kind: str
    frame: str | None = None
    values: list[float] = field(default_factory=list)
    lps_mm: list[float] = field(default_factory=list)
    positive: bool | None = None
    opened: int = 0
    asked: int = 0
    encode_seconds: float = 0.0
    decode_seconds: float = 0.0
    voxels: int = 0


@dataclass(eq=False)
class Crop:
    """One crop of a session.

    Args:
        grid: where it lies.
        embedding: `(1, C, g, g, g)`.
        logits: the last answer, `(1, 1, L, L, L)`.
        points: it was told, in its voxels.
        bounded: it was told a box last, so that the object is not followed out of it.
    """

    grid: CropGrid
    embedding: Tensor
    logits: Tensor
    points: list[Click] = field(default_factory=list)
    bounded: bool = False

    @property
    def low_res(self) -> np.ndarray:
        """The last logits, `(L, L, L)`."""
        return self.logits[0, 0].cpu().numpy()


class InteractiveSession:
    """A conversation about one object of one scan. See the module's first lines.

    Args:
        model: put into evaluation mode.
        recipe: how its crops are made.
        volume: the scan, in its own units.
        device: where to compute; None where the model is.
        point_memory: `last` or `all`.
        max_crops: that one prompt may open.

    Attributes:
        prompts: what was said so far.
        warnings: what a user should know, in whole sentences.

    Example:
        >>> import numpy as np
        >>> from pgsam.volume import Volume
        >>> from pgsam.volumetric.crop import VolumeRecipe
        >>> from pgsam.volumetric.model import build_volumetric
        >>> from pgsam.volumetric.session import InteractiveSession
        >>> model = build_volumetric("nano3d_32")  # at a random start; load_volumetric opens trained files
        >>> scan = Volume(np.zeros((8, 24, 24), dtype=np.int16), np.eye(4)[[2, 1, 0, 3]])  # 1 mm, d along z
        >>> session = InteractiveSession(model, VolumeRecipe(spacing_mm=None), scan)
        >>> mask = session.click((12.0, 10.0, 4.0))  # x, y, z in LPS millimetres
        >>> mask.shape, mask.dtype, session.prompts[0].opened
        ((8, 24, 24), dtype('bool'), 1)
    """

    def __init__(
        self,
        model: VolumetricSam,
        recipe: VolumeRecipe,
        volume: Volume,
        *,
        device: torch.device | str | None = None,
        point_memory: str = "last",
        max_crops: int = MAX_CROPS,
    ) -> None:
        if point_memory not in MEMORIES:
            raise ValueError(f"point_memory is one of {', '.join(MEMORIES)}, not {point_memory!r}")
        if max_crops < 1:
            raise ValueError(f"max_crops is 1 or more, not {max_crops}")
        self.model = model.eval() if device is None else model.eval().to(device)
        self.recipe, self.volume, self.point_memory, self.max_crops = recipe, volume, point_memory, max_crops
        self.canonical = Canonical.of(volume)
        self.places = Places(volume, self.canonical)
        self.crops: list[Crop] = []
        self.prompts: list[Prompt] = []
        self.warnings: list[str] = []
        self._mask = np.zeros(volume.array.shape, dtype=bool)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    # --- prompts --------------------------------------------------------------------------------------------------------------------------

    def click(self, point: Sequence[float], positive: bool = True, frame: str = "lps") -> np.ndarray:
        """Says that a point is in the object, or outside it.

        Args:
            point: `(3,)`.
            positive: in the object.
            frame: of `pgsam.volumetric.places.FRAMES`.

        Returns:
            The object, bool [D, H, W] on the grid of the input; so for `box` and `mask`.

        Raises:
            ValueError: not three finite numbers, no such frame, a point outside the scan, or an answer that is no number.
        """
        lps, index = self.places.point(point, frame)
        said = Prompt("click", frame, [float(value) for value in point], lps.tolist(), bool(positive))
        asked = [crop for crop in self.crops if crop.grid.holds(index)]
        if not asked and not positive:
            self._warn("a click outside the object changed nothing: where it lies nothing had been segmented")
        elif not asked:
            asked = [self._open(CropGrid.around(self.canonical, index, self.model.img_size, self.recipe.spacing_mm), said)]
        for crop in asked:
            self._ask(crop, said, click=_click_in(crop.grid, index, positive))
        self._grow(said)
        return self._finish(said)

    def box(self, low: Sequence[float], high: Sequence[float], frame: str = "lps") -> np.ndarray:
        """Says that the object is what a box holds.

        Args:
            low, high: `(3,)`, two opposite corners, in the outermost voxels of the object.
            frame: as for `click`.

        Raises:
            ValueError: as `click`, or more crops than `max_crops` are needed.
        """
        corners, first, last = self.places.box(low, high, frame)
        said = Prompt("box", frame, [float(value) for value in (*low, *high)], corners.ravel().tolist())
        filled = not (self.model.prompt_encoder.takes_boxes and self.model.knows_boxes)
        if filled:
            lacks = "was trained without boxes" if self.model.prompt_encoder.takes_boxes else "has no embeddings of a box's corners"
            self._warn(f"the model {lacks}: the filled box was its mask prompt")
        for crop in self._crops_for(first, last, said):
            side = self.model.img_size
            inner = np.floor(crop.grid.to_crop(np.array([first, last])) + 0.5 + 1e-6).clip(0, side - 1)
            if not filled:
                self._ask(crop, said, box=inner)
                continue
            share = np.zeros((side,) * 3, dtype=np.float32)
            share[tuple(slice(int(a), int(b) + 1) for a, b in inner.T)] = 1
            self._ask(crop, said, mask=self._as_logits(share))
        return self._finish(said)

    def mask(self, array: np.ndarray) -> np.ndarray:
        """Gives an earlier segmentation of the object, to be corrected.

        Args:
            array: [D, H, W] on the grid of the input: booleans, or 0 and one other number.

        Raises:
            ValueError: another shape, other values, an empty mask, or more crops than `max_crops` are needed.
        """
        if array.shape != self.volume.array.shape:
            raise ValueError(f"the mask has the shape {array.shape}, the scan {self.volume.array.shape}; resample it onto the scan")
        values = array[array != 0]
        if not values.size:
            raise ValueError("the mask is empty: there is nothing to start from")
        if values.min() != values.max() or values.size == array.size:
            found = f"values from {values.min():g} to {values.max():g}" if values.size < array.size else "no 0"
            raise ValueError(f"the mask has {found}; it must be 0 outside the object and one other number in it")
        inside = self.canonical.turn.array(array != 0).transpose(2, 1, 0)
        said = Prompt("mask")
        for crop in self._crops_for(*extent(inside), said):
            self._ask(crop, said, mask=self._as_logits(crop.grid.image(inside)))
        self._grow(said)
        return self._finish(said)

    # --- results --------------------------------------------------------------------------------------------------------------------------

    def result(self) -> Volume:
        """The object, uint8 0 and 1, on the grid of the input."""
        return Volume(self._mask.astype(np.uint8), self.volume.affine)

    @property
    def reason(self) -> str | None:
        """Why the object is empty; None where it is not."""
        if self._mask.any():
            return None
        if not self.crops:
            return "nothing was pointed at"
        best = max(float(crop.logits.max()) for crop in self.crops)
        if best <= 0:
            return f"the model finds no object: its largest probability is {1 / (1 + np.exp(-best)):.2f}, not above 0.5"
        return "what the model finds is outside the scan, or smaller than its voxels, or outvoted by another crop"

    def save(self, path: str | Path) -> None:
        """Writes all that is needed to go on, but for the model and the scan; see `pgsam.volumetric.session_file`.

        Raises:
            UserError: the file cannot be written.
        """
        from pgsam.volumetric.session_file import write_session  # it needs this class

        write_session(path, self)

    @classmethod
    def load(cls, path: str | Path, model: VolumetricSam, volume: Volume, *, device: torch.device | str | None = None) -> "InteractiveSession":
        """A session as it was saved; on the same machine its next answer is that of the session itself, bit for bit.

        Raises:
            UserError: the file is damaged or none of ours, or was made with another model or scan.
        """
        from pgsam.volumetric.session_file import read_session

        return read_session(path, model, volume, device=device)

    # --- crops ----------------------------------------------------------------------------------------------------------------------------

    def _before(self, grid: CropGrid) -> np.ndarray:
        """What the crops there are say at the low-resolution voxels of another, logits `(L, L, L)`; NaN where they say nothing."""
        size = self.model.low_res_size
        return blended([(coarser(crop.grid, size), crop.low_res) for crop in self.crops], coarser(grid, size))

    def _open(self, grid: CropGrid, said: Prompt) -> Crop:
        """Encodes a crop; its logits are what the crops there are say of it, zeros where they say nothing."""
        before = torch.from_numpy(np.nan_to_num(self._before(grid)))[None, None].to(self.device)
        image = torch.from_numpy(self.recipe.crop(self.canonical, grid))[None, None].to(self.device)
        embedding, seconds = self._timed(lambda: self.model.encode(image))
        crop = Crop(grid, embedding, before)
        self.crops.append(crop)
        said.opened += 1
        said.encode_seconds += seconds
        return crop

    def _ask(self, crop: Crop, said: Prompt, *, click: Click | None = None, box: np.ndarray | None = None, mask: Tensor | None = None) -> None:
        """Tells a crop one prompt and keeps its answer."""
        told: list[Click | None] = [*crop.points] if self.point_memory == "all" else []
        if click is not None:
            told.append(click)
        if not told and box is None:
            told = [None]  # SAM's "no point", as in training where nothing is left to click on
        points = joined([as_points([point], self.device) for point in told]) if told else None
        boxes = None if box is None else torch.from_numpy(box.astype(np.float32))[None].to(self.device)
        before = crop.logits if mask is None else mask
        answer, seconds = self._timed(lambda: self.model.decode(crop.embedding, points, boxes, before))
        if not bool(torch.isfinite(answer.logits).all()):
            raise ValueError("the model's answer is not a number; are its weights damaged, or the values of the scan out of all bounds?")
        crop.logits, crop.embedding, crop.bounded = answer.logits[:, :1], answer.embedding, said.kind == "box"
        if click is not None:
            crop.points.append(click)
        said.asked += 1
        said.decode_seconds += seconds

    def _crops_for(self, first: np.ndarray, last: np.ndarray, said: Prompt) -> list[Crop]:
        """The crop that holds a box of the scan, or new ones over it."""
        holding = [crop for crop in self.crops if crop.grid.holds(first) and crop.grid.holds(last)]
        if holding:
            middle = (first + last) / 2
            return [min(holding, key=lambda crop: float(np.abs(crop.grid.to_crop(middle) - (crop.grid.size - 1) / 2).max()))]
        grids = tiles(self.canonical, first, last, self.model.img_size, self.recipe.spacing_mm)
        if len(grids) > self.max_crops:
            raise ValueError(f"it is so large that it takes {len(grids)} crops, and max_crops is {self.max_crops}; point at a part, or allow more")
        return [self._open(grid, said) for grid in grids]

    def _grow(self, said: Prompt) -> None:
        """Opens crops beyond the faces that the object touches, until it touches none or the limit is reached."""
        self.warnings = [warning for warning in self.warnings if not warning.startswith(_GOES_ON)]
        waiting = [crop for crop in self.crops if not crop.bounded]
        while waiting:
            crop = waiting.pop(0)
            for face in inner_faces(crop.grid, self.canonical.array.shape):
                grid = beyond(crop.grid, face)
                if not self._is_cut(crop, face) or (click := self._core(grid)) is None:
                    continue
                if said.opened >= self.max_crops:
                    self._warn(f"{_GOES_ON}: it touches the edge of the {len(self.crops)} crops, and one prompt opens {self.max_crops}")
                    return
                waiting.append(self._open(grid, said))
                self._ask(waiting[-1], said, click=click)

    def _is_cut(self, crop: Crop, face: Face) -> bool:
        """Whether the object touches a face of a crop where no other crop sees beyond it."""
        places = face_places(coarser(crop.grid, self.model.low_res_size), face, crop.low_res > 0)
        places = places[((places >= -0.5) & (places <= np.array(self.canonical.array.shape) - 0.5)).all(axis=1)]
        for other in self.crops:
            places = places[~sees_beyond(other.grid, face, places)]
        return len(places) > 0

    def _core(self, grid: CropGrid) -> Click | None:
        """A click for a new crop on the deepest voxel of what the crops there are hold for the object in it; None where that is nothing."""
        deepest = centre_click(self._before(grid) > 0)
        ratio = grid.size / self.model.low_res_size
        return deepest and Click(tuple(int((place + 0.5) * ratio) for place in deepest.place), True)

    def _as_logits(self, share: np.ndarray) -> Tensor:
        """How much of each voxel of a crop the object fills, `(S, S, S)` in [0, 1], as a mask prompt."""
        filled = F.adaptive_avg_pool3d(torch.from_numpy(share)[None, None], self.model.low_res_size)
        return (SURE * (2 * filled - 1)).to(self.device)

    def put_together(self) -> None:
        """Makes the object of the last answers of all crops; every prompt ends in it."""
        spoken = [(crop.grid, self.model.upscale(crop.logits)[0, 0].cpu().numpy()) for crop in self.crops]
        self._mask = self.canonical.back(object_in(spoken, self.canonical.array.shape))

    def _finish(self, said: Prompt) -> np.ndarray:
        self.put_together()
        said.voxels = int(np.count_nonzero(self._mask))
        self.prompts.append(said)
        return self._mask.copy()

    def _warn(self, text: str) -> None:
        if text not in self.warnings:
            self.warnings.append(text)

    def _timed(self, compute: Callable[[], Result]) -> tuple[Result, float]:
        """What `compute` gives, without gradients, and its seconds."""
        started = time.perf_counter()
        with torch.no_grad():
            result = compute()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return result, time.perf_counter() - started


def _click_in(grid: CropGrid, index: np.ndarray, positive: bool) -> Click:
    """A click on the voxel of a crop that is nearest to an index of the volume; of two, such as around the centre, the higher."""
    voxel = np.floor(grid.to_crop(index) + 0.5 + 1e-6).astype(int).clip(0, grid.size - 1)
    return Click(tuple(voxel.tolist()), positive)
