"""Points and boxes as a user says them, in the frame of a patient or of a file, as indices of the scan that crops are cut from."""

from collections.abc import Sequence
from itertools import product

import numpy as np

from pgsam.volume import Volume
from pgsam.volumetric.crop import Canonical

FRAMES = ("lps", "ras", "voxel")
_RAS = np.array([-1.0, -1.0, 1.0])


class Places:
    """Turns what is said of a volume into millimetres and indices.

    Frames: `lps` and `ras` are millimetres in the patient (x to the left or right, y to posterior or anterior, z to superior: ITK's, DICOM's and
    3D Slicer's Python against nibabel's and 3D Slicer's display); `voxel` is the index (i, j, k) in the file, whose array here is [k, j, i], from 0.

    Args:
        volume: of which is spoken.
        canonical: the same, turned.
    """

    def __init__(self, volume: Volume, canonical: Canonical) -> None:
        self.volume, self.canonical = volume, canonical

    def to_lps(self, points: np.ndarray, frame: str) -> np.ndarray:
        """Points `(..., 3)` as LPS millimetres.

        Raises:
            ValueError: there is no such frame.
        """
        if frame not in FRAMES:
            raise ValueError(f"frame is one of {', '.join(FRAMES)}, not {frame!r}")
        if frame == "voxel":
            return points[..., ::-1] @ self.volume.affine[:3, :3].T + self.volume.affine[:3, 3]
        return points * _RAS if frame == "ras" else points

    def from_lps(self, points: np.ndarray, frame: str) -> np.ndarray:
        """The reverse of `to_lps`."""
        if frame == "voxel":
            inverse = np.linalg.inv(self.volume.affine)
            return (points @ inverse[:3, :3].T + inverse[:3, 3])[..., ::-1]
        return points * _RAS if frame == "ras" else points

    def point(self, values: Sequence[float], frame: str) -> tuple[np.ndarray, np.ndarray]:
        """A point in the scan as LPS millimetres and as an index (x, y, z) of the canonical array, not rounded.

        Raises:
            ValueError: it is not three finite numbers, lies outside the scan, or there is no such frame.
        """
        lps = self.to_lps(numbers(values, "a point"), frame)
        index = self.canonical.index_of(lps)
        if not self.canonical.contains(index):
            raise ValueError(self._outside("the point", values, frame, lps))
        return lps, index

    def box(self, low: Sequence[float], high: Sequence[float], frame: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Two opposite corners `(2, 3)` in LPS millimetres, and the first and the last index of the smallest box of the array that holds it all.

        A box in millimetres has its sides along the patient's axes, which in an oblique scan are not the array's.

        Raises:
            ValueError: as `point`, or the box lies beside the scan.
        """
        corners = np.array([numbers(low, "a box's corner"), numbers(high, "a box's corner")])
        all_corners = np.array([[corners[pick[axis], axis] for axis in range(3)] for pick in product((0, 1), repeat=3)])
        index = self.canonical.index_of(self.to_lps(all_corners, frame))
        first, last = index.min(axis=0), index.max(axis=0)
        size = np.array(self.canonical.array.shape)
        if (last < -0.5).any() or (first > size - 0.5).any():
            raise ValueError(self._outside("the box", corners.ravel().tolist(), frame, self.to_lps(corners, frame).mean(axis=0)))
        return self.to_lps(corners, frame), first.clip(0, size - 1), last.clip(0, size - 1)

    def _outside(self, what: str, values: Sequence[float], frame: str, lps: np.ndarray) -> str:
        """What a user needs to see why a place is outside."""
        voxel = ", ".join(f"{value:.1f}" for value in self.from_lps(lps, "voxel"))
        last = ", ".join(str(side - 1) for side in self.volume.array.shape[::-1])
        said = ", ".join(f"{value:g}" for value in values)
        middle = f", its middle is voxel ({voxel})" if what == "the box" else f", it is voxel ({voxel})"
        inside = []
        for other in FRAMES:
            index = self.canonical.index_of(self.to_lps(np.reshape(np.asarray(values, dtype=np.float64), (-1, 3)).mean(axis=0), other))
            if other != frame and self.canonical.contains(index):
                inside.append(other)
        hint = f"; in the frame {' or '.join(inside)} it would lie in the scan" if inside else ""
        return f"{what} ({said}) in the frame {frame} lies outside the scan{middle} (i, j, k), and the scan has (0, 0, 0) to ({last}){hint}"


def numbers(values: Sequence[float], what: str) -> np.ndarray:
    """Three finite numbers, float64; a ValueError says what was found."""
    try:
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{what} is three numbers, not {values!r}") from error
    if array.shape != (3,) or not np.isfinite(array).all():
        raise ValueError(f"{what} is three finite numbers, not {array.tolist()}")
    return array
