"""From a volume to labels: SAMed's slice protocol, in batches, and a whole scan in and out on its own grid.

A slice goes by cubic splines to `input_size`, by cubic splines to the network's size, through the network, through arg-max over the upsampled
logits, and by nearest neighbour back (SAMed's test program, spec section 3). Soft-max is left out: it moves no maximum.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from scipy.ndimage import find_objects
from scipy.ndimage import label as connected_components

from pgsam.engine.intensity import Intensity, choose_intensity
from pgsam.errors import UserError
from pgsam.models.base import SliceModel, without_memory
from pgsam.models.card import ModelCard
from pgsam.resample import resize_cubic, resize_nearest
from pgsam.tuning.lora import lora_merged
from pgsam.volume import Volume, turn_to
from pgsam.volume_io import Scan

Progress = Callable[[int], object]
SliceTexts = torch.Tensor | Sequence[str]
# (model, images (B, 3, S, S), what the model is told beside them) -> logits (B, K + 1, S, S): in the place of the model's own `masks`.
Respond = Callable[[SliceModel, torch.Tensor, dict[str, Any]], torch.Tensor]


def default_batch_size(img_size: int, device: torch.device) -> int:
    """Slices at a time: what a CPU's cache likes (8 at 224 px, 1 at 512 px), 16 times that on an accelerator."""
    on_cpu = max(1, 8 * 224**2 // img_size**2)
    return on_cpu if device.type == "cpu" else 16 * on_cpu


def texts_to(texts: SliceTexts, device: torch.device) -> SliceTexts:
    """Reports on slices on `device`; those that are still words stay as they are."""
    return texts.to(device, non_blocking=True) if isinstance(texts, torch.Tensor) else texts


@torch.inference_mode()
def segment_slices(
    model: SliceModel,
    volume: np.ndarray,
    *,
    input_size: int,
    batch_size: int | None = None,
    texts: SliceTexts | None = None,
    progress: Progress | None = None,
    respond: Respond | None = None,
) -> np.ndarray:
    """Labels `[D, H, W]` uint8 of a volume in [0, 1] whose slices lie as in training.

    Args:
        model: in evaluation mode; takes `(B, 3, S, S)` and gives `masks`. One that looks at neighbouring slices (`depth_slices`) gets them, and for
            those beyond the ends of the volume its first or last slice.
        volume: float32, scaled to [0, 1]: `[D, H, W]`, or in colour `[D, 3, H, W]`.
        input_size: see `ModelCard`; every slice goes through this size, as in training.
        batch_size: slices at a time; `default_batch_size`, of slices that go through the encoder, if None.
        texts: a report on each slice as `PGSam.forward` takes it, for models that read such; without it every slice gets the learned null text.
        progress: called with the number of slices of each finished batch.
        respond: gives the logits of each batch, in the order of the slices, in the place of the model's own `masks`.

    Example:
        >>> import numpy as np
        >>> from pgsam import build_model
        >>> from pgsam.engine.predict import segment_slices
        >>> model = build_model("sam_lora_image_encoder", vit_name="vit_tiny", img_size=64, verbose=False).eval()
        >>> labels = segment_slices(model, np.zeros((3, 50, 40), dtype=np.float32), input_size=64)
        >>> labels.shape, labels.dtype, bool(labels.max() <= 8)
        ((3, 50, 40), dtype('uint8'), True)
    """
    device = next(model.parameters()).device
    size, depth_slices = model.img_size, getattr(model, "depth_slices", 1)
    batch_size = batch_size or max(1, default_batch_size(size, device) // depth_slices)
    shape = volume.shape[-2:]
    labels = np.empty((len(volume), *shape), dtype=np.uint8)
    with lora_merged(model):
        for start in range(0, len(volume), batch_size):
            images = _to_images(_cut(volume, start, start + batch_size, depth_slices), input_size, size, device)
            told = {} if texts is None else {"text": texts_to(texts[start : start + batch_size], device)}
            masks = model(images, **told)["masks"] if respond is None else respond(model, images, told)
            found = masks.argmax(dim=1).to(torch.uint8).cpu().numpy()
            labels[start : start + batch_size] = resize_nearest(found, shape)
            if progress is not None:
                progress(len(images))
    return labels


def _cut(volume: np.ndarray, start: int, stop: int, depth_slices: int) -> np.ndarray:
    """The slices from `start` to `stop`; with `depth_slices` above 1 each with its neighbours, `[slices, depth_slices, H, W]`, ends repeated."""
    if depth_slices == 1:
        return volume[start:stop]
    if volume.ndim != 3:
        raise UserError("this model looks at neighbouring grey slices (--depth_slices); the image is in colour: give a grey one, or another model")
    offsets = np.arange(depth_slices) - depth_slices // 2
    places = np.arange(start, min(stop, len(volume)))[:, None] + offsets
    return volume[places.clip(0, len(volume) - 1)]


def _to_images(slices: np.ndarray, input_size: int, size: int, device: torch.device) -> torch.Tensor:
    """Slices `[D, H, W]` or `[D, C, H, W]` as the network's input, `(D, 3 or C, size, size)`: by cubic splines to `input_size`, then to `size`."""
    resized = resize_cubic(resize_cubic(slices.astype(np.float32, copy=False), (input_size, input_size)), (size, size))
    images = torch.from_numpy(np.ascontiguousarray(resized)).to(device)
    return images if images.ndim == 4 else images[:, None].expand(-1, 3, -1, -1)


@torch.inference_mode()
def similarity_maps(model: SliceModel, slices: np.ndarray, *, input_size: int) -> np.ndarray | None:
    """Cosine of every place of `slices` [D, H, W] and every organ's report, `[D, K, H, W]` in [-1, 1], bilinear from the token grid.

    None for a model without an aligner. `slices`, also in colour [D, 3, H, W], are scaled to [0, 1] and lie as in training.
    """
    if getattr(model, "aligner", None) is None:
        return None
    images = _to_images(slices, input_size, model.img_size, next(model.parameters()).device)
    with without_memory(model):  # which reads no text
        maps = model(images, upscale=False).get("similarity")
    if maps is None:
        return None
    return torch.nn.functional.interpolate(maps, slices.shape[-2:], mode="bilinear", align_corners=False).clamp(-1, 1).cpu().numpy()


def segment_scan(
    model: SliceModel,
    scan: Scan,
    card: ModelCard,
    *,
    intensity: Intensity | None = None,
    largest_component: bool = False,
    batch_size: int | None = None,
    texts: SliceTexts | None = None,
    progress: Progress | None = None,
    respond: Respond | None = None,
) -> tuple[Volume, Volume]:
    """Segments a scan in its own units (HU for a CT) and orientation.

    Args:
        model, card: of one checkpoint.
        scan: in any orientation; its slices are cut as the checkpoint's were.
        intensity: how its values become [0, 1]; `choose_intensity` if None.
        largest_component: keep only the largest piece of every organ.
        batch_size, progress, respond: as `segment_slices`.
        texts: as `segment_slices`, in the order of the slices in the checkpoint's orientation.

    Returns:
        The labels on exactly the grid of `scan`, and the grey image as the network saw it (in [0, 1], in the checkpoint's orientation).
    """
    intensity = intensity or choose_intensity(scan, card)
    turn = turn_to(scan.volume, card.orientation)
    turned = turn.apply(scan.volume)
    image = Volume(intensity.scale(turned.array), turned.affine)
    slices = image.array
    if scan.colour is not None and card.image_kind == "rgb":
        slices = intensity.scale(np.moveaxis(turn.array(scan.colour), -1, 1))
    labels = segment_slices(model, slices, input_size=card.input_size, batch_size=batch_size, texts=texts, progress=progress, respond=respond)
    if largest_component:
        labels = keep_largest(labels)
    return Volume(turn.undo(labels), scan.volume.affine), image


def keep_largest(labels: np.ndarray) -> np.ndarray:
    """Labels `[D, H, W]` with only the largest connected piece of every organ; voxels that share a corner are connected.

    Of pieces of one size the first in array order stays.

    Example:
        >>> import numpy as np
        >>> from pgsam.engine.predict import keep_largest
        >>> keep_largest(np.array([[[1, 1, 0, 1, 2]]], dtype=np.uint8))
        array([[[1, 1, 0, 0, 2]]], dtype=uint8)
    """
    cleaned = labels.copy()
    for value, window in enumerate(find_objects(labels), start=1):
        if window is None:
            continue
        pieces, count = connected_components(labels[window] == value, np.ones((3,) * labels.ndim))
        if count > 1:
            sizes = np.bincount(pieces.ravel())
            sizes[0] = 0
            cleaned[window][(pieces > 0) & (pieces != sizes.argmax())] = 0
    return cleaned
