"""How the values of a scan become [0, 1]: what its file says, what the checkpoint was trained on, and what the user asks for.

A checkpoint knows how its training images were scaled (`ModelCard.image_kind`), and a scan is scaled the same way unless it cannot be: DICOM
and pictures say what they are, other formats do not, and an image without air or fat is hardly in Hounsfield units. Where a scan's modality
is another than the checkpoint's, the labels are worth little; that is said and written down, never passed over.
"""

from dataclasses import dataclass

import numpy as np

from pgsam.errors import UserError
from pgsam.models.card import ModelCard
from pgsam.volume import CT_WINDOW, FAT_HU, check_window, intensity_window, scale_to_window
from pgsam.volume_io import MODALITIES, Scan

Window = tuple[float, float]
MODALITY_OF_KIND = {"ct_window": "ct", "percentile": "mr", "rgb": "picture"}
SCALED = "scaled"  # arrays that preprocessing brought to [0, 1]


@dataclass(frozen=True)
class Intensity:
    """A decision about one scan.

    Args:
        modality: "ct", "mr", "picture", or "scaled" for an array that is in [0, 1] already.
        window: the values that become 0 and 1.
        reason: where the modality was taken from, in words.
        warning: what a user must know before believing the labels, or None.
    """

    modality: str
    window: Window
    reason: str
    warning: str | None = None

    def scale(self, array: np.ndarray) -> np.ndarray:
        """Clips to the window and maps it to float32 [0, 1]."""
        return array.astype(np.float32, copy=False) if self.modality == SCALED else scale_to_window(array, *self.window)


def choose_intensity(scan: Scan, card: ModelCard, *, modality: str | None = None, window: Window | None = None) -> Intensity:
    """How to scale `scan` for the model of `card`.

    Args:
        scan: as its file gives it.
        card: the checkpoint's.
        modality: what the user says it is; None takes the file's word.
        window: (lo, hi) in the scan's units, in place of any other.

    Raises:
        UserError: a modality or window for an array that is scaled already, a window without width, a constant image.
    """
    if scan.modality == SCALED:
        if modality is not None or window is not None:
            raise UserError(
                f"{scan.name}: its values are scaled to [0, 1] already; leave --modality and --window out, or give the scan it was made from"
            )
        return Intensity(SCALED, (0.0, 1.0), "the array is scaled already", _warn_of_scaling(scan, card))
    trained_on = MODALITY_OF_KIND[card.image_kind]
    found, reason = _modality_of(scan, trained_on) if modality is None else (modality, "--modality")
    warning = None
    if found != trained_on:
        warning = f"{scan.name}: read as {found} ({reason}), but the checkpoint was trained on {_in_words(trained_on)}; expect no sensible labels"
        if modality is None and found in ("ct", "mr"):
            warning += f" (--modality {trained_on} if it is one)"
    asked = window is not None
    if window is None:
        # A percentile is defined for every scan, so a checkpoint that was trained with it stays with it unless the user says otherwise.
        by_percentile = found == "mr" or (found == "ct" and trained_on == "mr" and modality is None)
        window = _window_of(scan, card, "percentile" if by_percentile else found)
    check_window(*window, f"{scan.name}: --window" if asked else scan.name)
    return Intensity(found, window, reason, warning)


def _modality_of(scan: Scan, trained_on: str) -> tuple[str, str]:
    if scan.modality in MODALITIES:
        return scan.modality, "its file says so"
    lowest = float(scan.volume.array.min())
    if trained_on == "ct" and lowest >= FAT_HU:
        return "mr", f"no value is below {FAT_HU:g} (minimum {lowest:g}) as fat and air are in Hounsfield units"
    if trained_on == "picture" and (lowest < 0 or scan.volume.array.max() > 255):
        return "mr", f"its values run from {lowest:g} to {scan.volume.array.max():g}, and 8-bit pictures from 0 to 255"
    return trained_on, "its file does not say; as the checkpoint's"


def _warn_of_scaling(scan: Scan, card: ModelCard) -> str | None:
    """For an array that says how it was scaled, when that is not how the training images were."""
    if scan.image_kind is None or (scan.image_kind == card.image_kind and (card.image_kind != "ct_window" or scan.window == card.window)):
        return None
    found, wanted = (
        f"{kind}{'' if window is None else f' {window}'}" for kind, window in ((scan.image_kind, scan.window), (card.image_kind, card.window))
    )
    return f"{scan.name}: was scaled by {found}, the checkpoint was trained on {wanted}; expect no sensible labels"


def _window_of(scan: Scan, card: ModelCard, kind: str) -> Window:
    if kind == "picture":
        return 0.0, scan.white or 255.0
    if kind == "ct":
        return card.window or CT_WINDOW
    try:
        return intensity_window(scan.volume.array, "percentile")
    except UserError as error:
        raise UserError(f"{scan.name}: {error}") from error


def _in_words(modality: str) -> str:
    return {"ct": "CT in Hounsfield units", "mr": "images scaled by percentiles (mr)", "picture": "pictures"}[modality]
