"""Raw datasets given to train.py and test.py: what a folder is, and its prepared form, made once by the code of the scripts.

| raw folder | prepared as by | split |
|---|---|---|
| BTCV (`Training/img`, `Training/label`) | synapse.py, `--dataset Synapse` unless given | published |
| FLARE22 (`images`, `labels`) | flare22.py | published |
| nnU-Net, Medical Segmentation Decathlon (`imagesTr`, `labelsTr`, `dataset.json`) | nifti.py `--nnunet` | labelsTs, or a fifth of the cases |

The draw of that fifth depends on no flag, so train.py and test.py see one split.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets.labels import DEFAULT_DATASET
from datasets.layout import FILES, DataFolder, find_data, read_manifest
from pgsam.errors import UserError
from pgsam.volume import BTCV_ORIENTATION, CT_WINDOW
from preprocess.common import Case, Settings, preprocess, summary
from preprocess.jobs import default_workers
from preprocess.nnunet import read_nnunet, split_cases
from preprocess.published import LAYOUTS, SPLITS, find_cases, published_settings

NNUNET = "nnU-Net"


def open_data(
    root: str | Path, split: str, *, list_dir: str | Path | None = None, dataset: str | None = None, prepared: str | Path | None = None
) -> DataFolder:
    """The slices ("train") or volumes ("test") of a prepared folder with their list; a raw dataset is prepared first.

    Args:
        root: a prepared folder, or a raw one.
        split: "train" or "test".
        list_dir, dataset: as in `datasets.layout.find_data`; None where they were not given.
        prepared: where the prepared form of a raw folder goes; by default `data/<its name>` of the working folder.

    Raises:
        UserError: the folder is neither or both, the dataset is another than the files', `prepared` is given for nothing or was prepared
            otherwise, the preparation fails, the raw dataset has no case of this split, or as `find_data`.
    """
    root = Path(root)
    if recognise(root) is None:
        if prepared is not None:
            raise UserError(f"--prepared {prepared}: {root} is no raw dataset, so nothing is to be prepared; leave the flag out")
        return find_data(root, *FILES[split], list_dir=list_dir, dataset=dataset or DEFAULT_DATASET)
    output = Path(prepared) if prepared is not None else default_output(root)
    if output.resolve() == root.resolve():
        raise UserError(f"--prepared {output}: expected another folder than the raw dataset's; name a new one")
    prepare_raw(root, dataset, output, needed=split)
    return find_data(output, *FILES[split], list_dir=list_dir)


def prepare_raw(root: Path, dataset: str | None, output: Path, *, needed: str | None = None, num_workers: int | None = None) -> dict[str, Any]:
    """Makes what is not up to date of a raw folder's prepared form, says what it is and where it lies, and returns the manifest.

    Args:
        dataset: as in `--dataset`; None for the default of the files' layout.
        needed: a split that must have a case, "train" or "test".
        num_workers: processes; None for one a core.

    Raises:
        UserError: the folder is not raw, the dataset is another than the files', no case is in the split that is needed, `output` was
            prepared otherwise, or as the scripts.
    """
    kind = recognise(root)
    if kind is None:
        raise UserError(f"{root}: expected a raw dataset ({_looked_for()}), found none")
    dataset = _dataset_of(root, kind, dataset)
    if kind == NNUNET:
        folder = read_nnunet(root)
        print(folder.explain())
        assert folder.label_map is not None
        window = CT_WINDOW if folder.image_kind == "ct_window" else None
        settings = Settings(root, folder.label_map, folder.image_kind, window, BTCV_ORIENTATION, dataset=dataset)
        cases = split_cases([folder])
    else:
        print(f"{root}: raw data of {kind}; split and classes of {dataset}")
        settings, cases = published_settings(dataset, root), find_cases(SPLITS[dataset], root)
    if needed is not None and all(case.split != needed for case in cases):
        what = {"train": "training", "test": "testing"}[needed]
        raise UserError(f"{root}: expected cases for {what} in the split of {dataset}, found none; add their files")
    _refuse_other(output, cases, settings)
    manifest = preprocess(cases, settings, output, num_workers=default_workers() if num_workers is None else num_workers)
    print(f"prepared: {summary(manifest, output)}")
    return manifest


def recognise(root: Path) -> str | None:
    """The raw layout of a folder: a name of `LAYOUTS` or "nnU-Net"; None for a folder that is prepared or does not exist.

    Raises:
        UserError: the folder has several layouts, or none of those that are looked for.
    """
    if not root.is_dir():
        return None
    raw = _raw_layouts(root)
    prepared = [name for name, _ in FILES.values() if (root / name).is_dir()]
    if not raw and (prepared or any(path.suffix in (".npz", ".h5") for path in root.iterdir())):
        return None
    if not raw:
        raw = [layout.name for layout in LAYOUTS if layout.find(root) is not None]
    if len(raw) + bool(prepared) > 1:
        found = " and ".join([*(f"raw data of {name}" for name in raw), *(f"prepared data ({name})" for name in prepared)])
        raise UserError(f"{root}: expected one dataset, raw or prepared, found {found}; put them into folders of their own")
    if raw:
        return raw[0]
    inside = sorted(path.name for path in root.iterdir() if (path / "imagesTr").is_dir())
    hint = f"{', '.join(inside[:5])} in it: name that folder" if inside else "see preprocess/ for other data"
    raise UserError(f"{root}: expected a prepared folder (with train_npz/ or test_vol_h5/) or a raw dataset ({_looked_for()}), found neither; {hint}")


def find_prepared(root: str | Path, split: str, *, list_dir: str | Path | None = None) -> DataFolder:
    """`find_data` for programs that prepare nothing: a raw dataset is refused by its name.

    Raises:
        UserError: as `find_data`.
    """
    try:
        return find_data(root, *FILES[split], list_dir=list_dir)
    except UserError as error:
        raw = _raw_layouts(Path(root))
        if not raw:
            raise
        how = "prepare it first (preprocess/), or name the folder that train.py made of it"
        raise UserError(f"{root}: expected a prepared folder, found raw data of {raw[0]}; {how}") from error


def _raw_layouts(root: Path) -> list[str]:
    """The raw layouts that the folder itself has."""
    published = [layout.name for layout in LAYOUTS if layout.find(root, below=False) is not None]
    return [*published, NNUNET] if (root / "imagesTr").is_dir() else published


def _looked_for() -> str:
    return "; ".join([*(f"{layout.name}: {layout.described}" for layout in LAYOUTS), f"{NNUNET}: dataset.json, imagesTr, labelsTr"])


def default_output(root: Path) -> Path:
    """`data/<name of the raw folder>`, or beside it where that is the raw folder itself."""
    output = Path("data") / root.resolve().name
    return output.with_name(f"{output.name}_prepared") if output.resolve() == root.resolve() else output


def _dataset_of(root: Path, kind: str, dataset: str | None) -> str:
    """The dataset's name, in agreement with the layout of its files."""
    if kind == NNUNET:
        if dataset is not None:
            raise UserError(
                f"--dataset {dataset}: {root} has nnU-Net's layout, whose dataset.json names the classes; leave it out, "
                "or map the labels with preprocess/nifti.py --nnunet --label_map"
            )
        return root.resolve().name
    fitting = [name for name, split in SPLITS.items() if split.layout.name == kind]
    if dataset is not None and dataset not in fitting:
        raise UserError(f"--dataset {dataset}: {root} holds raw data of {kind}; give one of {', '.join(fitting)}")
    return dataset or fitting[0]


def _refuse_other(output: Path, cases: Sequence[Case], settings: Settings) -> None:
    """Raises a UserError if the folder was prepared with other settings or another split: that work is not undone by the way."""
    manifest = read_manifest(output)
    if manifest is None:
        return
    known = {name: entry.get("split") for name, entry in manifest["cases"].items() if isinstance(entry, dict)}
    window = list(settings.window) if settings.window else None
    facts: dict[str, Any] = {"dataset": settings.dataset, "label_map": settings.label_map.name, "class_names": list(settings.label_map.class_names)}
    facts |= {"image_kind": settings.image_kind, "window": window}
    if settings.orientation is not None and known:
        facts["orientation"] = settings.orientation
    other = [f"{name} {manifest.get(name)}" for name, value in facts.items() if manifest.get(name) != value]
    other += [
        f"case {case.name} for {'training' if known[case.name] == 'train' else 'testing'}"
        for case in cases
        if known.get(case.name, case.split) != case.split
    ]
    if other:
        raise UserError(
            f"{output}: expected {settings.source_root} as prepared by default, found it prepared otherwise (manifest.json: {other[0]}); "
            "name the prepared folder in place of the raw one, or another one with --prepared"
        )
