"""From a volume to labels: SAMed's slice protocol, in batches, and a whole scan in and out on its own grid.

A slice goes by cubic splines to `input_size`, by cubic splines to the network's size, through the network, through arg-max over the upsampled
logits, and by nearest neighbour back (SAMed's test program, spec section 3). Soft-max is left out: it moves no maximum.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch

from pgsam.models.base import SliceModel
from pgsam.models.card import ModelCard
from pgsam.resample import resize_cubic, resize_nearest
from pgsam.tuning.lora import lora_merged
from pgsam.volume import Volume, reorient, scale_intensity

Progress = Callable[[int], object]
SliceTexts = torch.Tensor | Sequence[str]


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
) -> np.ndarray:
    """Labels `[D, H, W]` uint8 of a volume `[D, H, W]` float32 in [0, 1] whose slices lie as in training.

    Args:
        model: in evaluation mode; takes `(B, 3, S, S)` and gives `masks`.
        volume: float32, scaled to [0, 1].
        input_size: see `ModelCard`; every slice goes through this size, as in training.
        batch_size: slices at a time; `default_batch_size` if None.
        texts: a report on each slice as `PGSam.forward` takes it, for models that read such; without it every slice gets the learned null text.
        progress: called with the number of slices of each finished batch.
    """
    device = next(model.parameters()).device
    size = model.img_size
    batch_size = batch_size or default_batch_size(size, device)
    labels = np.empty(volume.shape, dtype=np.uint8)
    with lora_merged(model):
        for start in range(0, len(volume), batch_size):
            images = _to_images(volume[start : start + batch_size], input_size, size, device)
            told = {} if texts is None else {"text": texts_to(texts[start : start + batch_size], device)}
            masks = model(images, **told)["masks"]
            found = masks.argmax(dim=1).to(torch.uint8).cpu().numpy()
            labels[start : start + batch_size] = resize_nearest(found, volume.shape[1:])
            if progress is not None:
                progress(len(images))
    return labels


def _to_images(slices: np.ndarray, input_size: int, size: int, device: torch.device) -> torch.Tensor:
    """Slices `[D, H, W]` as the network's input, `(D, 3, size, size)`: by cubic splines to `input_size`, then to `size`."""
    resized = resize_cubic(resize_cubic(slices.astype(np.float32, copy=False), (input_size, input_size)), (size, size))
    return torch.from_numpy(np.ascontiguousarray(resized)).to(device)[:, None].expand(-1, 3, -1, -1)


@torch.inference_mode()
def similarity_maps(model: SliceModel, slices: np.ndarray, *, input_size: int) -> np.ndarray | None:
    """Cosine of every place of `slices` [D, H, W] and every organ's report, `[D, K, H, W]` in [-1, 1], bilinear from the token grid.

    None for a model without an aligner. `slices` are scaled to [0, 1] and lie as in training.
    """
    images = _to_images(slices, input_size, model.img_size, next(model.parameters()).device)
    maps = model(images, upscale=False).get("similarity")
    if maps is None:
        return None
    return torch.nn.functional.interpolate(maps, slices.shape[1:], mode="bilinear", align_corners=False).clamp(-1, 1).cpu().numpy()


def segment_scan(
    model: SliceModel,
    scan: Volume,
    card: ModelCard,
    *,
    batch_size: int | None = None,
    texts: SliceTexts | None = None,
    progress: Progress | None = None,
) -> tuple[Volume, Volume]:
    """Segments a scan in its own units (HU for a CT) and orientation; `texts` are in the order of the slices in the checkpoint's orientation.

    Returns:
        The labels on exactly the grid of `scan`, and the image as the network saw it (in [0, 1], in the checkpoint's orientation).
    """
    turned = reorient(scan, card.orientation)
    image = Volume(scale_intensity(turned.array, card.image_kind, card.window), turned.affine)
    labels = segment_slices(model, image.array, input_size=card.input_size, batch_size=batch_size, texts=texts, progress=progress)
    back = reorient(Volume(labels, turned.affine), scan.orientation)
    return Volume(np.ascontiguousarray(back.array), scan.affine), image
