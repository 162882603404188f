"""What the readers of file formats share: from a SimpleITK image to a volume, and words for files that are something else."""

from pathlib import Path

import numpy as np
import SimpleITK as sitk

from pgsam.errors import UserError
from pgsam.volume import Volume, affine_of

_SPACING_LIMITS_MM = (0.01, 100.0)  # outside it the header's unit is wrong


def volume_of(image: sitk.Image, path: Path) -> Volume:
    """The volume of an image as SimpleITK read it; a UserError names the file if its spacing is impossible. 2-D images get z = 0 and 1 mm slices."""
    array = sitk.GetArrayFromImage(image)
    spacing, origin = np.array(image.GetSpacing()), np.array(image.GetOrigin())
    direction = np.array(image.GetDirection()).reshape(len(spacing), len(spacing))  # columns i, j, k
    if len(spacing) == 2:
        array, spacing, origin = array[None], np.append(spacing, 1.0), np.append(origin, 0.0)
        direction = np.block([[direction, np.zeros((2, 1))], [np.zeros((1, 2)), np.ones((1, 1))]])
    lowest, highest = _SPACING_LIMITS_MM
    if not (np.isfinite(spacing).all() and spacing.min() >= lowest and spacing.max() <= highest):
        found = " x ".join(f"{value:g}" for value in spacing)
        raise UserError(f"{path}: expected voxels of {lowest:g} to {highest:g} mm, found {found}; put the header's spacing or unit right")
    return Volume(array, affine_of(spacing[::-1], origin, direction[:, ::-1]))


def describe(raw: bytes) -> str:
    """What a file that begins with `raw` is, if not what was expected, and what to do."""
    if raw.startswith(b"version https://git-lfs"):
        return "a git-lfs pointer; run `git lfs pull` to fetch the image"
    if raw.lstrip()[:1] == b"<":
        return "a web page (HTML or XML); download the file again, after signing in where that is needed"
    if raw[:4] in (b"\x1c\x02\x00\x00", b"\x00\x00\x02\x1c") or raw[344:347] == b"ni1":
        return "NIfTI-2 or a header with a separate .img; save it as a NIfTI-1 .nii.gz"
    return f"{len(raw)} bytes of another kind, beginning with {raw[:8]!r}; convert or download it again"
