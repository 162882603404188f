"""On which side of the patient organs lie: names as datasets spell them, pairs of which one is always right of the other, and their places."""

import re
from collections.abc import Iterable, Mapping
from itertools import product

import numpy as np
import scipy.ndimage

from pgsam.volume import Volume

_RIGHT_ORGANS = ("liver", "gallbladder", "right kidney", "right adrenal gland")
_LEFT_ORGANS = ("spleen", "stomach", "left kidney", "left adrenal gland")
_SPELLINGS = {"postcava": "inferior vena cava", "ivc": "inferior vena cava", "gall bladder": "gallbladder"}
_SIDE_WORDS = {"right": "right", "r": "right", "left": "left", "l": "left"}


def normal_name(name: str) -> str:
    """`Kidney_R` -> `right kidney`, `postcava` -> `inferior vena cava`: lower case, the side first and in full."""
    words = re.split(r"[\s_()\[\],-]+", name.strip(" ()[]").lower())
    sides = [_SIDE_WORDS[word] for word in words if word in _SIDE_WORDS]
    rest = " ".join(word for word in words if word not in _SIDE_WORDS)
    rest = _SPELLINGS.get(rest, rest)
    if rest in ("adrenal", "suprarenal gland"):
        rest = "adrenal gland"
    return " ".join([*sides, rest])


def side_pairs(names: Iterable[str]) -> list[tuple[str, str]]:
    """Pairs of normal names of which the first lies to the patient's right of the second."""
    known = set(names)
    pairs = [*product(_RIGHT_ORGANS, _LEFT_ORGANS), ("inferior vena cava", "aorta")]
    pairs += [(name, f"left {name[6:]}") for name in sorted(known) if name.startswith("right ")]
    return [pair for pair in dict.fromkeys(pairs) if known.issuperset(pair)]


def centres_x_mm(label: Volume, names: Mapping[int, str]) -> dict[str, float]:
    """Organ -> x of its centre in LPS mm, larger to the patient's left; several values of one name are one organ."""
    top = max(names, default=0)
    whole = np.where(label.array <= top, label.array, 0).clip(0).astype(np.int32)  # find_objects takes signed integers
    boxes = scipy.ndimage.find_objects(whole, max_label=top)
    sums: dict[str, np.ndarray] = {}
    for value, name in names.items():
        box = boxes[value - 1] if value > 0 else None
        if box is None:
            continue
        index = np.argwhere(whole[box] == value) + [part.start for part in box]  # (n, 3)
        x = index @ label.affine[0, :3] + label.affine[0, 3]
        sums[name] = sums.get(name, np.zeros(2)) + np.array((x.sum(), len(x)))
    return {name: float(total / count) for name, (total, count) in sums.items()}
