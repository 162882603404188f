"""Stage `load`: what a training sample costs before the network: reading a slice, and SAMed's augmentation with the way to the network's size.

Published: npz files that numpy opens; numpy's turns and scipy's `rotate` and `zoom`, a slice at a time. Ours: `datasets.store`, and index maps and
matrix products (`datasets.slices`), also for whole batches (`datasets.device_augment`). Both draw the same numbers: labels are equal, images within
1e-6, and what is read is equal bit for bit. Files lie in the page cache after the warm-up, so no disk is measured.
"""

import argparse
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pgsam.errors import UserError
from scripts.benchmarks.framework import Bench, Measured, Program, Stage, Watch, slope
from scripts.benchmarks.train import speeds

LIMIT = 1e-6  # between images
CLASSES = 8
SCALING_SIZES, SCALING_SIDE = (64, 128, 256, 512, 1024), 128  # slices of a training set, and their side


def example(index: int, side: int) -> tuple[np.ndarray, np.ndarray]:
    """A noisy image in [0, 1] and blocks of labels, float32 as in SAMed's files."""
    rng = np.random.default_rng(index)
    cells = rng.integers(0, CLASSES + 1, (8, 8)).astype(np.float32)
    label = np.kron(cells, np.ones((-(-side // 8),) * 2, np.float32))[:side, :side]
    return np.clip(label / CLASSES + rng.normal(0, 0.1, label.shape), 0, 1).astype(np.float32), np.ascontiguousarray(label)


def write_folder(root: Path, count: int, side: int) -> Any:
    """A prepared folder of `count` slices with its store, and what training opens."""
    from datasets.layout import DataFolder
    from preprocess.store import make_store

    files = root / "train_npz"
    files.mkdir(parents=True)
    names = tuple(f"case{i // 64:04d}_slice{i % 64:03d}" for i in range(count))
    for i, name in enumerate(names):
        image, label = example(i, side)
        np.savez(files / f"{name}.npz", image=image, label=label)
    make_store(root)
    return DataFolder(files, root / "train.txt", names, None)


def published_sample(image: np.ndarray, label: np.ndarray, size: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Image, label and low-resolution label of a sample as SAMed makes them; the draws are those of `datasets.augment.samed_augmentation`."""
    from scipy.ndimage import rotate, zoom

    if rng.random() > 0.5:
        turns, axis = int(rng.integers(0, 4)), int(rng.integers(0, 2))
        image, label = (np.flip(np.rot90(array, turns), axis).copy() for array in (image, label))
    elif rng.random() > 0.5:
        degrees = int(rng.integers(-20, 20))
        image, label = (rotate(array, degrees, order=0, reshape=False) for array in (image, label))
    rows, columns = image.shape
    if (rows, columns) != (size, size):
        image = zoom(image, (size / rows, size / columns), order=3)
        label = zoom(label, (size / rows, size / columns), order=0)
    return image, label, zoom(label, 0.25, order=0)


def measure_augmentation(bench: Bench, args: argparse.Namespace, size: int) -> Measured:
    """Samples of `args.input_size` brought to `size`."""
    count, side = args.slices, args.input_size

    def setup() -> Mapping[str, Program]:
        import torch

        from datasets.augment import samed_augmentation, samed_move
        from datasets.device_augment import DeviceAugmentation
        from pgsam.resample import resize_cubic, resize_nearest

        slices = [example(i, side) for i in range(count)]
        small = [label.astype(np.uint8) for _, label in slices]  # as they are read
        on_device = DeviceAugmentation(side, size, torch.device(args.device))

        def published(watch: Watch) -> Any:
            return [published_sample(image, label, size, np.random.default_rng(i)) for i, (image, label) in enumerate(slices)]

        def ours(watch: Watch) -> Any:
            found = []
            for i, (image, _) in enumerate(slices):
                moved = samed_augmentation(image, small[i], np.random.default_rng(i))
                image, label = (np.ascontiguousarray(array) for array in moved)
                label = resize_nearest(label, (size, size))
                found.append((resize_cubic(image, (size, size)), label, resize_nearest(label, (size // 4, size // 4))))
            return found

        def batches(watch: Watch) -> Any:
            found: list[Any] = []
            for start in range(0, count, args.batch_size):
                own = range(start, min(start + args.batch_size, count))
                batch = {
                    "image": torch.from_numpy(np.stack([slices[i][0] for i in own]))[:, None],
                    "label": torch.from_numpy(np.stack([small[i] for i in own])),
                    "move": torch.tensor([samed_move(np.random.default_rng(i)) for i in own]),
                }
                found.append(on_device(batch))
            return found

        return {"published": published, "ours": ours, "in batches": batches}

    def agree(results: dict[str, Any]) -> dict[str, Any]:
        of_batches = [
            tuple(batch[name][i].squeeze(0).cpu().numpy() for name in ("image", "label", "low_res_label"))
            for batch in results["in batches"]
            for i in range(len(batch["image"]))
        ]
        largest = 0.0
        for way, samples in (("ours", results["ours"]), ("in batches", of_batches)):
            assert len(samples) == len(results["published"])
            for (image, *labels), (their_image, *their_labels) in zip(samples, results["published"], strict=True):
                largest = max(largest, float(np.abs(image - their_image).max()))
                if not largest <= LIMIT:
                    raise AssertionError(f"load, {way}: an image differs from scipy's by {largest:.2g}")
                if not all(np.array_equal(own, theirs) for own, theirs in zip(labels, their_labels, strict=True)):
                    raise AssertionError(f"load, {way}: a label differs from scipy's")
        return {"largest_difference": largest}

    settings = {"slices": count, "batch_size": args.batch_size}
    return bench.measure(f"load, augmentation {side} to {size}", setup, agree, settings=settings)


def measure_reading(bench: Bench, count: int, side: int) -> Measured:
    """Reading `count` slices: by numpy as published, our checked reading of npz files, and the store."""
    with tempfile.TemporaryDirectory() as folder:

        def setup() -> Mapping[str, Program]:
            from datasets.slices import read_slice
            from datasets.store import open_store

            found = write_folder(Path(folder), count, side)
            paths = [found.files / f"{name}.npz" for name in found.names]
            store = open_store(found.files, found.names, CLASSES)
            assert store is not None

            def published(watch: Watch) -> Any:
                opened = [np.load(path) for path in paths]
                return [(file["image"], file["label"]) for file in opened]

            def checked(watch: Watch) -> Any:
                return [read_slice(path, path.stem, CLASSES) for path in paths]

            def ours(watch: Watch) -> Any:
                return [store.read(name) for name in found.names]

            return {"published": published, "npz, checked": checked, "ours": ours}

        def agree(results: dict[str, Any]) -> dict[str, Any]:
            for way in ("npz, checked", "ours"):
                for own, theirs in zip(results[way], results["published"], strict=True):
                    if not all(np.array_equal(a, b) for a, b in zip(own, theirs, strict=True)):
                        raise AssertionError(f"load, {way}: a slice differs from the npz file's")
            return {"slices": len(results["ours"])}

        return bench.measure(f"load, reading slices of {side} x {side}", setup, agree, settings={"slices": count})


def run(args: argparse.Namespace, bench: Bench) -> dict[str, Any]:
    """Augmentation to every size and reading; or how opening and an epoch's loading grow with the training set."""
    if args.scaling:
        return scaling(bench)
    figures: dict[str, Any] = {}
    for size in args.img_size:
        measured = measure_augmentation(bench, args, size)
        figures[f"augmentation, {args.input_size} to {size}"] = {**measured.figures(), **speeds(measured, "ours", "in batches")}
        for way in ("ours", "in batches"):
            within = measured.largest("largest_difference")
            print(f"{measured.title}: {way}: {measured.ratio('published', way)} times the published speed; labels equal, images within {within:.1g}")
    for side in dict.fromkeys((args.input_size, *args.img_size)):
        measured = measure_reading(bench, args.slices, side)
        figures[f"reading, {side}"] = {**measured.figures(), **speeds(measured, "npz, checked", "ours")}
        for way in ("npz, checked", "ours"):
            print(f"{measured.title}: {way}: {measured.ratio('published', way)} times the published speed; equal bit for bit")
    return figures


def scaling(bench: Bench) -> dict[str, Any]:
    """Seconds to open a training set and to load an epoch of it, for growing sets, and the exponents of the growth.

    Both are one pass over the slices, so the exponents are 1: a sample does not know how many others there are.
    """
    seconds: dict[str, list[float]] = {"opening": [], "an epoch": []}
    for count in SCALING_SIZES:
        with tempfile.TemporaryDirectory() as folder:

            def setup(count: int = count, folder: str = folder) -> Mapping[str, Program]:
                from datasets.slices import SliceDataset

                found = write_folder(Path(folder), count, SCALING_SIDE)

                def ours(watch: Watch) -> Any:
                    with watch("opening"):
                        dataset = SliceDataset(found, num_classes=CLASSES, img_size=SCALING_SIDE, input_size=SCALING_SIDE)
                    with watch("an epoch"):
                        for index in range(count):
                            dataset[0, index]

                return {"ours": ours}

            measured = bench.measure(f"load, scaling, {count} slices", setup)
            for part, found in seconds.items():
                found.append(float(np.median(measured.seconds("ours", part))))
    slopes = {part: round(slope(SCALING_SIZES, found), 3) for part, found in seconds.items()}
    for part, exponent in slopes.items():
        span = f"from {SCALING_SIZES[0]} to {SCALING_SIZES[-1]} slices"
        print(f"load, scaling: {part}: cost ~ slices^{exponent:.2f} {span}; one pass over them, so 1 is due")
    return {"slices": list(SCALING_SIZES), "seconds": {part: [round(s, 5) for s in taken] for part, taken in seconds.items()}, "slopes": slopes}


def check(args: argparse.Namespace) -> None:
    """Raises a UserError for sizes that cannot be."""
    if min(args.input_size, *args.img_size) < 16 or any(size % 4 for size in args.img_size) or args.slices < 1 or args.batch_size < 1:
        raise UserError("--input_size and --img_size are at least 16, --img_size a multiple of 4, --slices and --batch_size at least 1")


STAGE = Stage(
    name="load",
    about="SAMed's augmentation against scipy, and slices from a memory-mapped store against npz files",
    run=run,
    defaults={"device": "cpu", "input_size": 224, "img_size": [512], "slices": 48, "batch_size": 12, "scaling": False},
    flags={"input_size": {"type": int, "help": "side of the slices as they are read"}},
    check=check,
)
