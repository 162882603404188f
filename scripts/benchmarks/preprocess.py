"""Stage `preprocess`: from a scan's files to training slices, and from slices to the network's size and back, against the published way.

Published are nibabel, a clip to [-125, 275] HU, classes remapped one after another, an npz a slice (TransUNet's preparation as SAMed uses it), and
`scipy.ndimage.zoom` slice by slice, order 3 for images and 0 for labels. Ours write more (geometry, source), check
what they read, and sync what they write.
"""

import argparse
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from pgsam.errors import UserError
from scripts.benchmarks.framework import Bench, Measured, Program, Ratio, Stage, Watch
from scripts.benchmarks.volumes import image_volume, label_volumes

LOW, HIGH = -125.0, 275.0  # HU
SAME_IMAGE = 1e-6
SMALL = 224
AFFINE = np.diag([-0.75, -0.75, 3.0, 1.0])  # of the written scan, millimetres


def measure_preparation(bench: Bench, shape: list[int]) -> Measured:
    """One case of BTCV: two NIfTI files in, an npz a slice out; arrays are equal but for the last digit of a float32."""
    folder = tempfile.TemporaryDirectory(prefix="benchmark-preprocess-")

    def setup() -> dict[str, Program]:
        from preprocess.common import Case, process_case
        from preprocess.published import published_settings

        root = Path(folder.name)
        image, label = root / "img0001.nii.gz", root / "label0001.nii.gz"
        write_scan(image, label, shape)
        settings = published_settings("Synapse", root)
        case = Case("case0001", "train", "0001", image, label)

        def ours(watch: Watch) -> list[Path]:
            (root / "ours" / "train_npz").mkdir(parents=True)
            process_case(case, settings, root / "ours")
            return sorted((root / "ours" / "train_npz").iterdir())

        def published(watch: Watch) -> list[Path]:
            (root / "published").mkdir()
            return prepare_as_published(image, label, root / "published", settings.label_map.source_to_target, watch)

        return {"ours": ours, "published": published}

    def agree(files: dict[str, Any]) -> dict[str, Any]:
        largest = 0.0
        if len(files["ours"]) != len(files["published"]):
            raise AssertionError(f"preprocess: ours wrote {len(files['ours'])} slices, published {len(files['published'])}")
        for own, other in zip(files["ours"], files["published"], strict=True):
            with np.load(own) as a, np.load(other) as b:
                largest = max(largest, float(np.abs(a["image"] - b["image"]).max()))
                if not (np.array_equal(a["label"], b["label"]) and largest <= SAME_IMAGE):
                    raise AssertionError(f"preprocess: {own.name} differs from the published slice")
        for name in files:  # the next round finds no files to replace
            shutil.rmtree(Path(folder.name) / name)
        return {"largest_difference": largest}

    with folder:
        return bench.measure(f"preprocess, files to slices, {' x '.join(map(str, shape))}", setup, agree)


def write_scan(image: Path, label: Path, shape: list[int]) -> None:
    """A synthetic scan in HU (int16) and BTCV's label values (uint8), as nibabel writes them, [W, H, D]."""
    import nibabel

    from datasets.labels import LABEL_MAPS

    grey = np.round(image_volume(shape) * (HIGH - LOW) * 1.5 + LOW - 100).astype(np.int16)
    classes = label_volumes("good", shape)[1].astype(np.uint8)
    lookup = np.zeros(16, np.uint8)
    for source, target in LABEL_MAPS["synapse8"].source_to_target.items():
        lookup[target] = source if target else 0
    nibabel.save(nibabel.Nifti1Image(grey.transpose(2, 1, 0), AFFINE), image)
    nibabel.save(nibabel.Nifti1Image(lookup[classes].transpose(2, 1, 0), AFFINE), label)


def prepare_as_published(image: Path, label: Path, output: Path, targets: Any, watch: Watch) -> list[Path]:
    """The slices of one case, written as TransUNet's preparation does (specs/samed_rag_adapter.md, section 4)."""
    import nibabel

    with watch("read"):
        grey = nibabel.load(image).get_fdata().astype(np.float32)  # type: ignore[attr-defined]
        found = nibabel.load(label).get_fdata().astype(np.float32)  # type: ignore[attr-defined]
    with watch("window and classes"):
        grey = (np.clip(grey, LOW, HIGH) - LOW) / (HIGH - LOW)
        grey, found = grey.transpose(2, 1, 0), found.transpose(2, 1, 0)
        classes = np.zeros_like(found)
        for source, target in targets.items():
            classes[found == source] = target
    with watch("write"):
        paths = []
        for index in range(len(grey)):
            paths.append(output / f"case0001_slice{index:03d}.npz")
            np.savez(paths[-1], image=grey[index], label=classes[index])
    return paths


def measure_resampling(bench: Bench, shape: list[int]) -> Measured:
    """Every slice to 224 px and back, image by cubic splines and labels by nearest neighbour."""

    def setup() -> dict[str, Program]:
        from scipy.ndimage import zoom

        from pgsam.resample import resize_cubic, resize_nearest

        image, label = image_volume(shape), label_volumes("good", shape)[1].astype(np.uint8)
        sizes = ((SMALL, SMALL), (shape[1], shape[2]))

        def ours(watch: Watch) -> list[np.ndarray]:
            results, grey, classes = [], image, label
            for size in sizes:
                with watch("image"):
                    grey = resize_cubic(grey, size)
                with watch("labels"):
                    classes = resize_nearest(classes, size)
                results += [grey, classes]
            return results

        def published(watch: Watch) -> list[np.ndarray]:
            results, grey, classes = [], image, label
            for size in sizes:
                factors = (size[0] / grey.shape[1], size[1] / grey.shape[2])
                with watch("image"):
                    grey = np.stack([zoom(one, factors, order=3) for one in grey])
                with watch("labels"):
                    classes = np.stack([zoom(one, factors, order=0) for one in classes])
                results += [grey, classes]
            return results

        return {"ours": ours, "published": published}

    def agree(found: dict[str, Any]) -> dict[str, Any]:
        pairs = list(zip(found["ours"], found["published"], strict=True))
        largest = max(float(np.abs(a - b).max()) for a, b in pairs[::2])
        wrong = sum(int((a != b).sum()) for a, b in pairs[1::2])
        if wrong or not largest <= 2 * SAME_IMAGE:
            raise AssertionError(f"preprocess, resampling: {wrong} labels differ, images by up to {largest:.2g}")
        return {"largest_difference": largest, "labels_differing": wrong}

    return bench.measure(f"preprocess, resampling, {' x '.join(map(str, shape))}", setup, agree, settings={"small": SMALL})


def run(args: argparse.Namespace, bench: Bench) -> dict[str, Any]:
    """Preparation of files, then resampling."""
    preparation = measure_preparation(bench, list(args.shape))
    preparation.say()
    resampling = measure_resampling(bench, list(args.shape))
    resampling.say()
    together = Ratio.of(*(preparation.seconds(way) + resampling.seconds(way) for way in ("published", "ours")))
    print(f"preprocess, files to slices and resampling together: {together} times the published speed")
    figures = {"together": together.json(), "files": preparation.figures(), "resampling": resampling.figures()}
    for part in ("image", "labels"):
        ratio = resampling.ratio("published", "ours", part)
        figures["resampling"][part] = ratio.json()
        print(f"{resampling.title}: {part}: {ratio} times scipy's speed")
    return figures


def check(args: argparse.Namespace) -> None:
    """Raises a UserError for sizes that cannot be."""
    if min(args.shape) < 8:
        raise UserError("--shape is at least 8 8 8")


STAGE = Stage(
    name="preprocess",
    about="a scan's files to training slices, and slices to 224 px and back, against nibabel, numpy and scipy's zoom",
    run=run,
    defaults={"shape": [40, 512, 512]},
    check=check,
)
