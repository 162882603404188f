"""A test's results with everything that can go wrong in them, its report, and a reader of the numbers in the page."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from html.parser import HTMLParser
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from pgsam.metrics import class_metrics
from pgsam.overlay import WorstSlices
from pgsam.protocols import summarise

HOSTILE_ORGAN = """<script>document.title="owned"</script> & "left" 'x'"""
HOSTILE_CASE = """case"><img src=x onerror="document.title='owned'">"""
ORGANS = ("liver", HOSTILE_ORGAN, "aorta", "never")
COLOURS = {"liver": (205, 92, 72), HOSTILE_ORGAN: (12, 34, 56), "aorta": (244, 20, 60), "never": (1, 2, 3)}
SPACING = (3.0, 0.7, 1.4)
VOID = {"meta", "img", "br", "hr", "link", "input", "rect", "line", "circle"}  # elements without a text of their own


@dataclass
class Element:
    """One element of a page: its tag, its attributes and the text inside it."""

    tag: str
    attributes: dict[str, str]
    text: str = ""
    inside: list[str] = field(default_factory=list)  # tags around it, outermost first


class PageReader(HTMLParser):
    """All elements of a page in order."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[Element] = []
        self._open: list[Element] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = Element(tag, {name: value or "" for name, value in attrs}, inside=[outer.tag for outer in self._open])
        self.elements.append(element)
        if tag not in VOID:
            self._open.append(element)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self._open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag in VOID:  # a browser writes them out with an end
            return
        assert self._open.pop().tag == tag, f"</{tag}> closes something else"

    def handle_data(self, data: str) -> None:
        for element in self._open:
            element.text += data


def read_page(page: str) -> list[Element]:
    """The elements of a page; every one that is opened must be closed."""
    reader = PageReader()
    reader.feed(page)
    reader.close()
    assert reader._open == []
    return reader.elements


def example_volumes() -> dict[str, tuple[np.ndarray, np.ndarray, tuple[float, float, float] | None]]:
    """Case -> reference, prediction, spacing. The fourth organ is nowhere."""
    shape = (9, 30, 40)
    reference = np.zeros(shape, dtype=np.uint8)
    reference[1:7, 4:14, 5:17], reference[2:8, 18:27, 8:20], reference[1:8, 6:12, 25:33] = 1, 2, 3
    good = np.roll(reference, 1, axis=2)
    poor = np.roll(reference, (1, 4, -3), axis=(0, 1, 2))
    missed, unasked = good.copy(), reference.copy()
    missed[missed == 3] = 0
    unasked[unasked == 2] = 0
    nothing = np.zeros_like(reference)
    return {
        "good": (reference, good, SPACING),
        HOSTILE_CASE: (reference, poor, SPACING),
        "missed": (reference, missed, SPACING),
        "false positive": (unasked, good, SPACING),
        "no spacing": (reference, poor, None),
        "no spacing, missed": (reference, missed, None),
        "empty": (nothing, nothing, SPACING),
    }


def example_results(volumes: dict[str, Any]) -> dict[str, Any]:
    """The content of metrics.json for them, through JSON as a reader gets it."""
    cases = {}
    for name, (reference, prediction, spacing) in volumes.items():
        rows = class_metrics(prediction, reference, len(ORGANS), spacing)
        cases[name] = {
            organ: {metric: None if isinstance(value, float) and math.isnan(value) else value for metric, value in rows[i + 1].items()}
            for i, organ in enumerate(ORGANS)
        }
    settings = {
        "flags": {"checkpoint": "runs/<b>x</b>/final.safetensors", "batch_size": None, "is_savenii": False, "seed": 1234},
        "data": {"files": "data/test_vol_h5", "list": "data/lists/test_vol.txt"},
        "model": {"module": "pg_sam", "vit_name": "vit_b", "img_size": 224, "class_names": list(ORGANS), "reports": {"liver": "A <i>report</i>."}},
        "notes": ["NOTE: some reports were made from labels & <u>read</u>"],
        "run": {"device": "cpu", "seconds": 12.345, "finished": "2031-02-03 04:05:06+00:00", "packages": {"torch": "2.11"}},
    }
    summary = {protocol: summarise(cases, ORGANS, protocol) for protocol in ("strict", "transunet")}
    return json.loads(json.dumps({"settings": settings, "cases": cases, "summary": summary}, allow_nan=False))


@pytest.fixture(scope="session")
def example() -> SimpleNamespace:
    """`results` (metrics.json), `pictures`, `colours`, `volumes`, and the hostile `case` and `organ`."""
    volumes = example_volumes()
    worst = WorstSlices(ORGANS, list(COLOURS.values()))
    image = np.random.default_rng(0).random((9, 30, 40)).astype(np.float32)
    for name, (reference, prediction, spacing) in volumes.items():
        worst.add(name, image, reference, prediction, orientation="LAS", spacing_mm=spacing)
    return SimpleNamespace(
        results=example_results(volumes), pictures=worst.pictures, colours=COLOURS, volumes=volumes, case=HOSTILE_CASE, organ=HOSTILE_ORGAN
    )


@pytest.fixture(scope="session")
def read() -> Callable[[str], list[Element]]:
    """`read(page)` gives the elements of an HTML page."""
    return read_page
