"""Every dataset's organ table: which label values its files use, which classes a model learns from them, and each organ's colour.

A `LabelMap` turns the label values of a file (source) into the classes of a task (target, 0 is background) through a lookup table. The
released preprocessing of SAMed and RAG-SAM rewrites the array in place instead, value after value, so a target that is also a later source
is rewritten twice; in FLARE22 that destroys liver, pancreas and aorta unless the values happen to be visited in one lucky order.
"""

import colorsys
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pgsam.errors import UserError

BTCV_NAMES = (
    "spleen",
    "right kidney",
    "left kidney",
    "gallbladder",
    "esophagus",
    "liver",
    "stomach",
    "aorta",
    "inferior vena cava",
    "portal and splenic vein",
    "pancreas",
    "right adrenal gland",
    "left adrenal gland",
)  # BTCV label 1 .. 13
SYNAPSE8_NAMES = ("spleen", "right kidney", "left kidney", "gallbladder", "liver", "stomach", "aorta", "pancreas")
FLARE22_NAMES = (
    "liver",
    "right kidney",
    "spleen",
    "pancreas",
    "aorta",
    "inferior vena cava",
    "right adrenal gland",
    "left adrenal gland",
    "gallbladder",
    "esophagus",
    "stomach",
    "duodenum",
    "left kidney",
)  # FLARE22 label 1 .. 13

_COLOURS = {
    "spleen": (186, 104, 200),
    "right kidney": (255, 202, 40),
    "left kidney": (255, 138, 51),
    "gallbladder": (76, 175, 80),
    "esophagus": (214, 228, 120),
    "liver": (205, 92, 72),
    "stomach": (79, 195, 247),
    "aorta": (244, 20, 60),
    "inferior vena cava": (48, 79, 220),
    "portal and splenic vein": (0, 191, 165),
    "pancreas": (255, 128, 190),
    "right adrenal gland": (174, 234, 0),
    "left adrenal gland": (0, 230, 118),
    "adrenal glands": (150, 245, 60),
    "duodenum": (161, 136, 127),
    "tumor": (255, 255, 0),
}
_SPELLINGS = {"oesophagus": "esophagus", "tumour": "tumor", "postcava": "inferior vena cava"}

_BLOCK = 1 << 18  # labels that are looked up at a time, so that they stay in the cache


@dataclass(frozen=True)
class LabelMap:
    """Label values of a dataset's files -> classes of a task.

    Args:
        name: what error messages call the map.
        class_names: the target classes in label order; class `i` of a label map is `class_names[i - 1]`.
        source_to_target: source value -> target class, 0 for "background"; source 0 is always background and need not be listed.
        source_names: source value -> organ, for reports; may be empty.
        default: class of source values that are not listed; None makes such a value an error.
    """

    name: str
    class_names: tuple[str, ...]
    source_to_target: Mapping[int, int]
    source_names: Mapping[int, str]
    default: int | None = None

    @property
    def num_classes(self) -> int:
        """Number of foreground classes."""
        return len(self.class_names)

    def apply(self, labels: np.ndarray) -> np.ndarray:
        """Returns the target labels of an array of source labels.

        Args:
            labels: any shape; integers, booleans, or floats that are whole numbers (as many NIfTI files store them).

        Returns:
            A new uint8 array of the same shape, values 0 .. `num_classes`.

        Raises:
            UserError: a value is not a whole number or not in the map. The message names value and map; the caller adds the file.
        """
        labels = np.asarray(labels)
        whole = labels if labels.dtype == np.uint8 else _as_bytes(labels)
        found = None if whole is None else self._look_up(whole)
        return self._look_up_any(labels) if found is None else found

    def _look_up(self, labels: np.ndarray) -> np.ndarray | None:
        """The target labels of uint8, as bytes, which Python looks up faster than numpy; None if one is not in the map."""
        targets = {0: 0} | {source: target for source, target in self.source_to_target.items() if 0 <= source < 256}
        known = bytes(targets)
        table = bytes(targets.get(source, self.default or 0) for source in range(256))
        flat, found = labels.reshape(-1), np.empty(labels.size, np.uint8)
        for start in range(0, labels.size, _BLOCK):
            raw = flat[start : start + _BLOCK].tobytes()
            if self.default is None and raw.translate(None, known):
                return None
            found[start : start + _BLOCK] = np.frombuffer(raw.translate(table), np.uint8)
        return found.reshape(labels.shape)

    def _look_up_any(self, labels: np.ndarray) -> np.ndarray:
        """The target labels of any numbers, and the error that says which are unknown."""
        if labels.dtype.kind == "f":
            fractional = labels[~(np.isfinite(labels) & (labels == np.round(labels)))]
            if fractional.size:
                raise UserError(
                    f"label value {fractional.flat[0]:g} is not a whole number, so label map '{self.name}' cannot read it; "
                    "labels must be resampled with nearest neighbour"
                )
        elif labels.dtype.kind not in "iub":
            raise ValueError(f"labels must be integers or whole floats, not {labels.dtype}")
        top = max(self.source_to_target, default=0)
        table = np.full(top + 2, -1 if self.default is None else self.default, np.int16)  # the last entry stands for all other values
        table[0] = 0
        for source, target in self.source_to_target.items():
            table[source] = target
        known = (labels >= 0) & (labels <= top)
        target_labels = table[np.where(known, labels, top + 1).astype(np.int64)]
        if (target_labels < 0).any():
            values = np.unique(labels[target_labels < 0])
            found = ", ".join(f"{value:g}" for value in values[:5]) + (", ..." if values.size > 5 else "")
            allowed = ", ".join(str(value) for value in sorted({0, *self.source_to_target}))
            raise UserError(f"unexpected label value {found}: label map '{self.name}' knows {allowed}; use the map of this dataset")
        return target_labels.astype(np.uint8)


def _as_bytes(labels: np.ndarray) -> np.ndarray | None:
    """The same values as uint8; None if one of them is not a whole number from 0 to 255."""
    with np.errstate(invalid="ignore"):
        whole = labels.astype(np.uint8)
    return whole if np.array_equal(whole, labels) else None


def identity_label_map(class_names: Sequence[str], name: str = "identity") -> LabelMap:
    """The map of a dataset whose files already hold the classes 1 .. K, in the order of `class_names`."""
    ids = range(1, len(class_names) + 1)
    return LabelMap(name, tuple(class_names), {i: i for i in ids}, dict(zip(ids, class_names, strict=True)))


def _map_by_name(name: str, source_names: Sequence[str], class_names: Sequence[str], renamed: Mapping[str, str] | None = None) -> LabelMap:
    """A map that sends each source organ to the class of the same name (after `renamed`), and to background where there is none."""
    target_of = {organ: i for i, organ in enumerate(class_names, start=1)}
    renamed = renamed or {}
    sources = dict(enumerate(source_names, start=1))
    return LabelMap(name, tuple(class_names), {i: target_of.get(renamed.get(organ, organ), 0) for i, organ in sources.items()}, sources)


_ADRENALS = {"right adrenal gland": "adrenal glands", "left adrenal gland": "adrenal glands"}

LABEL_MAPS: dict[str, LabelMap] = {
    label_map.name: label_map
    for label_map in (
        identity_label_map(BTCV_NAMES, "btcv13"),
        _map_by_name("synapse8", BTCV_NAMES, SYNAPSE8_NAMES),
        _map_by_name("synapse12", BTCV_NAMES, (*BTCV_NAMES[:11], "adrenal glands"), _ADRENALS),
        _map_by_name("flare22", FLARE22_NAMES, SYNAPSE8_NAMES),
    )
}


DEFAULT_DATASET = "Synapse"  # of data that say nothing themselves

DATASETS = {  # `--dataset` -> the map of its raw files
    "Synapse": LABEL_MAPS["synapse8"],
    "Synapse_12": LABEL_MAPS["synapse12"],
    "BTCV": LABEL_MAPS["btcv13"],
    "FLARE": LABEL_MAPS["flare22"],
    "FLARE22": LABEL_MAPS["flare22"],
}


def load_label_map(spec: str | Path) -> LabelMap:
    """A registered map by name, or one from a JSON file.

    The file reads `{"class_names": ["spleen", ...], "map": {"6": 5, ...}}`, source value -> class; a source value that is not listed (other
    than 0) is an error when it turns up in a label file, unless the JSON says `"default": 0`.

    Raises:
        UserError: no such name or file, not JSON, a key missing or of the wrong kind, a target outside 0 .. K, a class without a source.

    Example:
        >>> import numpy as np
        >>> from datasets.labels import load_label_map
        >>> btcv = load_label_map("synapse8")
        >>> btcv.apply(np.array([0, 5, 6, 11])).tolist()  # background, esophagus, liver, pancreas
        [0, 0, 5, 8]
        >>> btcv.class_names[5 - 1], btcv.class_names[8 - 1]
        ('liver', 'pancreas')
    """
    path = Path(spec)
    if str(spec) in LABEL_MAPS:
        return LABEL_MAPS[str(spec)]
    if not path.is_file():
        known = ", ".join(LABEL_MAPS)
        if path.suffix != ".json":
            raise UserError(f"unknown label map '{spec}': expected one of {known}, or the path of a JSON file")
        raise UserError(f"{path}: label map not found; expected a JSON file or one of {known}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=lambda pairs: _unique_keys(path, pairs))
    except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: expected a label map in valid JSON, found none ({error}); correct the file") from error
    return _parse_label_map(path, content)


def _unique_keys(path: Path, pairs: list[tuple[str, object]]) -> dict[str, object]:
    """JSON keeps the last of two equal keys without a word; in a label map that would be a silent loss."""
    keys = [key for key, _ in pairs]
    for key in keys:
        if keys.count(key) > 1:
            raise UserError(f'{path}: "{key}" is listed twice')
    return dict(pairs)


def _parse_label_map(path: Path, content: object) -> LabelMap:
    form = '{"class_names": ["spleen", ...], "map": {"6": 5, ...}, "default": 0 (optional)}'
    if not isinstance(content, dict) or not {"class_names", "map"} <= set(content) <= {"class_names", "map", "default"}:
        found = ", ".join(content) if isinstance(content, dict) else type(content).__name__
        raise UserError(f"{path}: expected a label map of the form {form}, found {found or 'an empty object'}")
    names, table, default = content["class_names"], content["map"], content.get("default")
    if not isinstance(names, list) or not names or not all(isinstance(name, str) and name.strip() for name in names):
        raise UserError(f'{path}: "class_names" must be a non-empty list of names')
    if len(set(names)) < len(names):
        raise UserError(f'{path}: "class_names" lists a name twice')
    if not isinstance(table, dict):
        raise UserError(f'{path}: "map" must be an object from source label to class, such as {{"6": 5}}')
    if "default" in content and default is not None and (default != 0 or isinstance(default, bool)):
        raise UserError(f'{path}: "default" must be 0 (background), found {default!r}; list the labels of a class in "map"')
    source_to_target: dict[int, int] = {}
    for key, target in table.items():
        if not (key.isascii() and key.isdigit() and int(key) <= 65535):
            raise UserError(f'{path}: source label "{key}" must be a whole number from 0 to 65535')
        if isinstance(target, bool) or not isinstance(target, int) or not 0 <= target <= len(names):
            raise UserError(f'{path}: source label "{key}" goes to {target!r}, expected a class from 0 to {len(names)}')
        if int(key) in source_to_target:
            raise UserError(f"{path}: source label {int(key)} is listed twice")
        source_to_target[int(key)] = target
    if source_to_target.get(0, 0) != 0:
        raise UserError(f'{path}: source label "0" is background and cannot go to class {source_to_target[0]}')
    without = [name for i, name in enumerate(names, start=1) if i not in source_to_target.values()]
    if without:
        raise UserError(f'{path}: no source label goes to class {", ".join(without)}; add it to "map" or drop the class')
    return LabelMap(path.name, tuple(names), source_to_target, {}, default)


def colour_of(name: str, index: int) -> tuple[int, int, int]:
    """RGB colour (0 .. 255) of an organ: the same in every dataset; for an unknown name the `index`-th of a fixed, endless palette."""
    key = " ".join(name.lower().replace("_", " ").split())
    key = _SPELLINGS.get(key, key)
    if key in _COLOURS:
        return _COLOURS[key]
    hue = (0.07 + 0.618034 * index) % 1.0  # golden section: neighbours in the list are far apart in hue
    red, green, blue = colorsys.hsv_to_rgb(hue, (0.62, 0.85, 0.45)[index % 3], 1.0)
    return round(255 * red), round(255 * green), round(255 * blue)
