"""Where prepared slices and volumes lie, and what their lists and manifest say.

A prepared folder `O` holds `train_npz/`, `test_vol_h5/`, `lists/{train,test_vol}.txt` and `manifest.json` (TransUNet's layout and our manifest).
Folders made by others have no manifest: their settings are SAMed's.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pgsam.errors import UserError

FILES = {"train": ("train_npz", "train.txt"), "test": ("test_vol_h5", "test_vol.txt")}  # split -> its folder and the name of its list
IMAGE_RANGE = (-0.5, 1.5)  # of images in [0, 1], since cubic down-sampling may overshoot; raw Hounsfield units never fit in here
COLOURS = 3  # red, green and blue: the last axis of a colour slice, whose manifest has the image_kind "rgb"

_SLICE_NAME = re.compile(r"(?P<case>.+)_slice(?P<number>\d+)$")


@dataclass(frozen=True)
class DataFolder:
    """One of the two folders of a prepared dataset, with its list.

    `manifest` is None where the dataset was not prepared by us.
    """

    files: Path
    list_file: Path
    names: tuple[str, ...]
    manifest: dict[str, Any] | None

    def patients(self) -> tuple[str, ...]:
        """The patient key of every case in the list, sorted; a case is its own patient where nothing else is known."""
        return tuple(sorted({self.patient_of(case) for case in self.cases()}))

    def patient_of(self, case: str) -> str:
        """The patient key of a case, in the list or not."""
        return str((self.manifest or {}).get("cases", {}).get(case, {}).get("patient") or case)

    def cases(self) -> tuple[str, ...]:
        """The cases in the list, sorted; the name of a slice is `<case>_slice<number>`."""
        return tuple(sorted({case_of(name) for name in self.names}))


def case_of(name: str) -> str:
    """`case0005_slice012` -> `case0005`; a name without a slice number is the case itself."""
    match = _SLICE_NAME.match(name)
    return match["case"] if match else name


def slice_number(name: str) -> int | None:
    """`case0005_slice012` -> 12; None for a name without a slice number."""
    match = _SLICE_NAME.match(name)
    return int(match["number"]) if match else None


def find_data(root: str | Path, subfolder: str, list_name: str, *, list_dir: str | Path | None = None, dataset: str = "Synapse") -> DataFolder:
    """Finds a folder of slices or volumes and its list.

    Args:
        root: the prepared folder, or its subfolder of that name.
        subfolder: `train_npz` or `test_vol_h5`.
        list_name: `train.txt` or `test_vol.txt`.
        list_dir: folder of the lists; by default `lists` beside the subfolder, then `lists/lists_<dataset>` below the working folder.
        dataset: as in `--dataset`.

    Raises:
        UserError: the folder or the list is absent, or the list is empty or names something twice.
    """
    root = Path(root)
    files = root / subfolder if (root / subfolder).is_dir() else root
    if not files.is_dir():
        raise UserError(f"{root}: expected a prepared folder (with {subfolder}/) or {subfolder} itself, found no folder; see preprocess/")
    candidates = [Path(list_dir)] if list_dir else [files.parent / "lists", files / "lists", Path("lists") / f"lists_{dataset}"]
    found = [folder / list_name for folder in candidates if (folder / list_name).is_file()]
    if not found:
        raise UserError(f"{list_name}: expected a list in {' or '.join(map(str, candidates))}, found none; give its folder with --list_dir")
    return DataFolder(files, found[0], read_names(found[0]), read_manifest(files.parent))


def read_names(path: Path) -> tuple[str, ...]:
    """The names in a list file, one a line; a suffix `.npz` or `.npy.h5` is left out.

    Raises:
        UserError: the file is no text, is empty, or names something twice.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()  # Windows editors put a mark before the first name
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: expected one name a line, found no UTF-8 text ({error}); write the list again") from error
    names = tuple(line.strip().removesuffix(".npy.h5").removesuffix(".npz") for line in lines if line.strip())
    if not names:
        raise UserError(f"{path}: expected one name a line, found an empty list; run the preprocessing again")
    twice = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
    if twice:
        raise UserError(f"{path}: expected every name once, found {twice[0]} more than once ({len(twice)} such names); remove the copies")
    return names


def read_manifest(folder: str | Path) -> dict[str, Any] | None:
    """`manifest.json` of a prepared folder, or None if it has none."""
    path = Path(folder) / "manifest.json"
    if not path.is_file():
        return None
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: expected the manifest of a prepared dataset, found damaged JSON ({error}); run the preprocessing again") from error
    if not isinstance(manifest, dict) or not isinstance(manifest.get("class_names"), list) or not isinstance(manifest.get("cases"), dict):
        raise UserError(f"{path}: expected a manifest with class_names and cases; run the preprocessing again")
    return manifest
