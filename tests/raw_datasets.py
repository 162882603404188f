"""Raw datasets for tests, as they are on disks: nnU-Net, the Medical Segmentation Decathlon, BTCV and FLARE22, of random voxels."""

import json

import nibabel as nib
import numpy as np
import SimpleITK as sitk

SHAPE = (8, 7, 5)
LAS = np.diag([-0.8, 0.7, 3.0, 1.0])
V2 = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "liver": 1, "tumour": 2}, "file_ending": ".nii.gz", "numTraining": 6}
V1 = {"modality": {"0": "CT"}, "labels": {"0": "background", "1": "liver", "2": "tumour"}, "numTraining": 6}


def pair(seed=0, top=3):
    """Image and label (i, j, k) of the case of a number; labels below `top`."""
    rng = np.random.default_rng(seed)
    return rng.integers(-1024, 1500, SHAPE).astype(np.int16), rng.integers(0, top, SHAPE).astype(np.uint8)


def make_nnunet(root, description=V2, train=6, test=0, *, ending=".nii.gz", channel="_0000", names="{part}_{number:03d}", top=3):
    """Cases Tr_000, Tr_001 ... of imagesTr and Ts_000 ... of imagesTs."""
    root.mkdir(parents=True)
    (root / "dataset.json").write_text(json.dumps(description))
    for part, count in (("Tr", train), ("Ts", test)):
        for number in range(count):
            for folder, suffix, array in zip((f"images{part}", f"labels{part}"), (channel, ""), pair(number, top), strict=True):
                (root / folder).mkdir(exist_ok=True)
                save(array, root / folder / f"{names.format(part=part, number=number)}{suffix}{ending}")
    return root


def save(array, path, affine=LAS):
    """One array in any format: SimpleITK converts what nibabel wrote."""
    if path.name.endswith((".nii", ".nii.gz")):
        nib.save(nib.Nifti1Image(array, affine), path)
        return
    between = path.with_name("between.nii.gz")
    nib.save(nib.Nifti1Image(array, affine), between)
    sitk.WriteImage(sitk.ReadImage(str(between)), str(path))
    between.unlink()


def change(root, **values):
    """Other values in dataset.json; None removes one."""
    path = root / "dataset.json"
    description = json.loads(path.read_text()) | values
    path.write_text(json.dumps({key: value for key, value in description.items() if value is not None}))


def make_decathlon(root, train=3, test=2, **more):
    """As on the Decathlon's disks: the lists in dataset.json, imagesTs without labels, and the Mac's hidden files."""
    names = [f"liver_{number}" for number in range(train)]
    description = V1 | {
        "name": "Liver",
        "numTraining": train,
        "numTest": test,
        "training": [{"image": f"./imagesTr/{name}.nii.gz", "label": f"./labelsTr/{name}.nii.gz"} for name in names],
        "test": [f"./imagesTs/liver_{100 + number}.nii.gz" for number in range(test)],
        **more,
    }
    make_nnunet(root, description, train, channel="", names="liver_{number}")
    (root / "imagesTs").mkdir()
    for number in range(test):
        save(pair(number)[0], root / "imagesTs" / f"liver_{100 + number}.nii.gz")
    for folder in ("imagesTr", "labelsTr", "imagesTs"):
        (root / folder / "._liver_0.nii.gz").write_bytes(b"\0\5\x16\7")
    return root


def btcv_pair(number):
    """As `pair`, with labels 0 to 13 and two slices."""
    rng = np.random.default_rng(number)
    return rng.integers(-1024, 1500, (7, 6, 2)).astype(np.int16), rng.integers(0, 14, (7, 6, 2)).astype(np.uint8)


def write_btcv(src, numbers):
    """BTCV's raw layout."""
    for number in numbers:
        for array, kind in zip(btcv_pair(number), ("img", "label"), strict=True):
            path = src / "Training" / kind / f"{kind}{number:04d}.nii.gz"
            path.parent.mkdir(parents=True, exist_ok=True)
            save(array, path)


def write_flare(src, numbers, *, images="images", labels="labels", form="{name}.nii.gz"):
    """FLARE22's raw layout; `form` is the path of a file below its folder: `{name}.nii/{name}.nii` is what some programs make of the archive."""
    for number in numbers:
        name = f"FLARE22_Tr_{number:04d}"
        for array, folder, stem in zip(btcv_pair(number), (images, labels), (f"{name}_0000", name), strict=True):
            path = src / folder / form.format(name=stem)
            path.parent.mkdir(parents=True, exist_ok=True)
            save(array, path)
