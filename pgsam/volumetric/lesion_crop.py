"""Crops around labelled lesions, to train on and to validate with: `datasets.lesions.Cutter`."""

from dataclasses import dataclass, replace

import numpy as np
from scipy.ndimage import find_objects, label

from pgsam.volume import Volume
from pgsam.volumetric.crop import Canonical, CropGrid, VolumeRecipe

CT_CLAMP = (-1000.0, 1000.0)  # HU


def for_modality(recipe: VolumeRecipe, modality: str) -> VolumeRecipe:
    """`recipe` for scans of a modality: a CT is clamped, nothing else is."""
    return replace(recipe, clamp=CT_CLAMP if modality == "ct" else None)


def grid_on(volume: Canonical, voxel: np.ndarray, size: int, spacing_mm: float | None) -> CropGrid:
    """A crop whose voxel next to its middle, the lower one of two, lies on a voxel `(3,)` of the volume and therefore shows its label."""
    grid = CropGrid.around(volume, voxel, size, spacing_mm)
    return replace(grid, origin=voxel - grid.step * ((size - 1) // 2))


@dataclass(frozen=True, eq=False)
class LesionBlock:
    """The part of a scan that crops around its lesions are made of.

    Args:
        image: the part.
        mask: bool, of the same shape.
        boxes: `(n, 2, 3)`, the first and last index of each connected lesion in it, the one with most voxels first.
        modality: of the scan.
    """

    image: Canonical
    mask: np.ndarray
    boxes: np.ndarray
    modality: str

    @property
    def nbytes(self) -> int:
        """Memory it takes."""
        return self.image.array.nbytes + self.mask.nbytes


class LesionCutter:
    """Makes crops of `size` voxels along a side around one lesion: its bounding box in the middle, as M-SAM, where no `generator` moves it.

    Of several connected lesions the generator chooses one, and without it the largest is taken; all that are in the crop are its target. Where a
    crop around the middle of the box shows no lesion, since it is bent or lies between the crop's voxels, the crop has a voxel on the lesion's
    voxel next to there.

    Args:
        size: of the network's input.
        recipe: spacing and normalisation; the clamp goes by the modality.
        jitter_mm: how far the generator moves the crop along each axis, at most.
    """

    def __init__(self, size: int, recipe: VolumeRecipe, *, jitter_mm: float = 0.0) -> None:
        self.size, self.recipe, self.jitter_mm = size, recipe, jitter_mm

    def prepare(self, image: Volume, mask: Volume, modality: str) -> LesionBlock:
        """See `datasets.lesions.Cutter.prepare`; `mask` is bool, on the image's grid, and not empty."""
        whole = Canonical.of(image)
        lesions = Canonical.of(Volume(mask.array, image.affine)).array
        pieces, _ = label(lesions, np.ones((3, 3, 3)))
        order = np.argsort(-np.bincount(pieces.ravel())[1:], kind="stable")
        found = find_objects(pieces)
        boxes = np.array([[[axis.start for axis in found[i]], [axis.stop - 1 for axis in found[i]]] for i in order])
        step = np.ones(3) if self.recipe.spacing_mm is None else self.recipe.spacing_mm / whole.spacing_mm
        reach = np.ceil(self.size / 2 * step + self.jitter_mm / whole.spacing_mm).astype(int) + 2
        low = (boxes[:, 0].min(axis=0) - reach).clip(0)
        high = np.minimum(boxes[:, 1].max(axis=0) + reach + 1, whole.array.shape)
        part = tuple(slice(int(a), int(b)) for a, b in zip(low, high, strict=True))
        affine = whole.affine.copy()
        affine[:3, 3] = whole.mm_of(low)
        block = Canonical(np.ascontiguousarray(whole.array[part]), affine, whole.turn)
        return LesionBlock(block, np.ascontiguousarray(lesions[part]), boxes - low, modality)

    def cut(self, prepared: LesionBlock, generator: np.random.Generator | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """See `datasets.lesions.Cutter.cut`; the target is never empty."""
        shift, first = np.zeros(3), 0
        if generator is not None:
            first = int(generator.integers(len(prepared.boxes)))
            shift = generator.uniform(-1, 1, 3) * self.jitter_mm / prepared.image.spacing_mm
        low, high = prepared.boxes[first]
        middle = (low + high) / 2
        grid = CropGrid.around(prepared.image, middle + shift, self.size, self.recipe.spacing_mm)
        target = grid.labels(prepared.mask)
        if not target.any():
            own = np.argwhere(prepared.mask[tuple(slice(a, b + 1) for a, b in zip(low, high, strict=True))]) + low
            nearest = own[np.square((own - middle) * prepared.image.spacing_mm).sum(axis=1).argmin()]
            grid = grid_on(prepared.image, nearest, self.size, self.recipe.spacing_mm)
            target = grid.labels(prepared.mask)
        image = for_modality(self.recipe, prepared.modality).crop(prepared.image, grid)
        return image, target, prepared.image.spacing_mm * grid.step
