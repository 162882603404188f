"""Test volumes: TransUNet's `<case>.npy.h5` (`image` in [0, 1], `label`, both [D, H, W]), with the geometry that our preprocessing adds.

A case in colour has an `image` [D, H, W, 3]; a picture is one slice.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from datasets.layout import COLOURS, DataFolder
from datasets.slices import KEYS, check_shapes, check_values
from pgsam.errors import UserError
from pgsam.formats.pictures import LUMINANCE
from pgsam.volume import Volume, from_attributes, reorient, spacing_of, text_of, unplaced_affine, window_of

_DAMAGE = (OSError, RuntimeError, KeyError, ValueError)  # what h5py raises on damaged files


@dataclass(frozen=True, eq=False)
class Case:
    """One test case: `image` float32 and `label` uint8, both [D, H, W] in the stored orientation; a colour image is [D, H, W, 3].

    `geometry` is None for files that do not tell; `source_orientation` is that of the scan the file was made from. `image_kind` and `window`
    say which source values became 0 and 1, where that is known.
    """

    name: str
    image: np.ndarray
    label: np.ndarray
    geometry: Volume | None
    source_orientation: str | None
    spacing_mm: tuple[float, float, float] | None = None
    image_kind: str | None = None
    window: tuple[float, float] | None = None

    @property
    def is_colour(self) -> bool:
        """Whether the image has colours."""
        return self.image.ndim == 4

    @property
    def grey(self) -> np.ndarray:
        """[D, H, W]: the image, or its luminance."""
        return self.image @ LUMINANCE.astype(np.float32) if self.is_colour else self.image

    @property
    def orientation(self) -> str | None:
        """nibabel's axis codes of the stored (W, H, D) array, None where no geometry is known."""
        return self.geometry.orientation if self.geometry is not None else None

    def on_source_grid(self, array: np.ndarray) -> Volume:
        """`array` [D, H, W] as a volume on the grid of the original scan; where that is not known, at the origin with the known or unit spacing."""
        if self.geometry is None:
            return Volume(array, unplaced_affine(self.spacing_mm or (1.0, 1.0, 1.0)))
        volume = Volume(array, self.geometry.affine)
        return reorient(volume, self.source_orientation) if self.source_orientation else volume


def case_path(folder: DataFolder, name: str) -> Path:
    """Where the volume of a case lies."""
    return folder.files / f"{name}.npy.h5"


def check_case_header(path: Path, name: str) -> tuple[int, ...]:
    """Checks a volume without reading its voxels and returns its shape [D, H, W]; a UserError names file and case."""
    if not path.is_file():
        raise UserError(f"{path}: {name} is in the list but has no file; run the preprocessing again or correct the list")
    try:
        with h5py.File(path, "r") as file:
            missing = [key for key in KEYS if not isinstance(file.get(key), h5py.Dataset)]
            if missing:
                raise UserError(f"{path} ({name}): expected the datasets image and label, found {', '.join(map(str, file)) or 'none'}")
            for key in KEYS:
                if file[key].dtype.kind not in "fiub":
                    raise UserError(f"{path} ({name}): expected numbers in {key}, found {file[key].dtype}; save it again")
            shapes = [file[key].shape for key in KEYS]
    except _DAMAGE as error:
        raise UserError(f"{path} ({name}): expected an h5 file, found a damaged or truncated one ({error}); make it again") from error
    image, label = shapes
    check_shapes(path, name, image[:3] if len(image) == 4 and image[3] == COLOURS else image, label, 3)
    return label


def read_case(path: Path, name: str, num_classes: int) -> Case:
    """Reads and checks a volume; a UserError names file and case if it is not valid.

    Example:
        >>> from pathlib import Path
        >>> from datasets.volumes import read_case
        >>> case = read_case(Path("checkpoints/demo_case.npy.h5"), "demo_case", num_classes=8)
        >>> case.image.shape, case.orientation, case.window
        ((40, 224, 224), 'LAS', (-125.0, 275.0))
    """
    check_case_header(path, name)
    try:
        with h5py.File(path, "r") as file:
            image, label = (file[key][()] for key in KEYS)
            attributes = dict(file.attrs)
    except _DAMAGE as error:
        raise UserError(f"{path} ({name}): expected an h5 file, found a damaged one ({error}); make it again") from error
    label = check_values(path, name, image, label, num_classes)
    return make_case(name, image.astype(np.float32, copy=False), label, attributes, path)


def make_case(name: str, image: np.ndarray, label: np.ndarray, attributes: Mapping[str, Any], path: Path) -> Case:
    """A case of its arrays, as `Case` has them, and of what its file says beside them (see `pgsam.volume.to_attributes`).

    Raises:
        UserError: the place, the spacing or the window is impossible; `path` is named.
    """
    geometry = from_attributes(attributes, image if image.ndim == 3 else image[..., 0], str(path))
    return Case(
        name,
        image,
        label,
        geometry,
        source_orientation=text_of(attributes, "source_orientation"),
        spacing_mm=geometry.spacing_mm if geometry is not None else spacing_of(attributes, str(path)),
        image_kind=text_of(attributes, "image_kind"),
        window=window_of(attributes, str(path)),
    )
