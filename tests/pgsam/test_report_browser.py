"""report.html in headless Chromium: its numbers, its style sheet, its pictures and its width, at desktop and phone size."""

import html
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pgsam.report import write_report

PLACES = (
    "chromium",
    "chromium-browser",
    "google-chrome",
    "google-chrome-stable",
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
    "/Applications/Chromium.app/Contents/MacOS/Chromium",
)
QUIET = ("--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync")
# The page lies in a frame of the wanted width, because a headless window has a least width. The frame has the origin of the page around it, whose
# script may look into it; scripts of the report itself stay forbidden by its own policy.
AROUND = """<!DOCTYPE html><title>around</title><body>
<iframe id="frame" width="{width}" height="900" srcdoc="{page}"></iframe><pre id="found"></pre>
<script>
document.getElementById("frame").addEventListener("load", event => {{
  const page = event.target.contentDocument, root = page.documentElement, found = document.getElementById("found");
  const boxes = [...page.querySelectorAll(".scroll")];
  const right = element => element.getBoundingClientRect().right;
  found.textContent = JSON.stringify({{
    client: root.clientWidth,
    scroll: root.scrollWidth,
    bodyScroll: page.body.scrollWidth,
    outside: [...page.body.querySelectorAll("*")].filter(e => right(e) > root.clientWidth + 1 && !e.closest(".scroll")).map(e => e.outerHTML),
    wideBoxes: boxes.filter(box => box.scrollWidth > box.clientWidth + 1).length,
    boxesThatScroll: boxes.filter(box => ["auto", "scroll"].includes(getComputedStyle(box).overflowX)).length,
    boxes: boxes.length,
    pictures: [...page.images].map(image => image.complete && image.naturalWidth),
    collapse: getComputedStyle(page.querySelector("table")).borderCollapse,
    ground: getComputedStyle(page.body).backgroundColor,
    title: page.title,
    scriptRan: root.dataset.scriptRan || "no",
  }});
}});
</script></body>"""


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """`chromium(path, *flags)` opens a file in a headless browser and returns what it prints."""
    wanted = os.environ.get("CHROMIUM")
    program = next((found for place in ([wanted] if wanted else PLACES) if (found := shutil.which(place))), None)
    if program is None:
        pytest.skip(f"no Chromium at {wanted} (CHROMIUM)" if wanted else "no Chromium on this machine; name one in the variable CHROMIUM")

    def run(path: Path, *flags: str) -> str:
        profile = tmp_path_factory.mktemp("profile")
        command = [program, "--headless", *QUIET, f"--user-data-dir={profile}", *flags, path.as_uri()]
        return subprocess.run(command, capture_output=True, encoding="utf-8", timeout=120, check=True).stdout

    return run


@pytest.fixture(scope="module")
def report(example: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "report.html"
    write_report(path, example.results, colours=example.colours, pictures=example.pictures)
    return path


def look(chromium: Callable[..., str], read: Callable, page: str, width: int, folder: Path, *flags: str) -> dict[str, Any]:
    """What a page in a frame of that width finds out about itself."""
    around = folder / "around.html"
    around.write_text(AROUND.format(width=width, page=html.escape(page)), encoding="utf-8")
    (found,) = (
        e.text for e in read(chromium(around, f"--window-size={width + 100},1000", "--dump-dom", *flags)) if e.attributes.get("id") == "found"
    )
    return json.loads(found)


def test_the_browser_reads_the_numbers_of_metrics_json(chromium, report: Path, example: SimpleNamespace, read) -> None:
    cells = [e for e in read(chromium(report, "--window-size=1280,2000", "--dump-dom")) if e.tag == "td" and "data-value" in e.attributes]
    found = {}
    for cell in cells:
        names = tuple(cell.attributes.get(f"data-{name}") for name in ("protocol", "case", "organ", "metric"))
        text = cell.attributes["data-value"]
        found[names] = None if text == "" else float(text)
    for case, organs in example.results["cases"].items():
        for organ, row in organs.items():
            for metric, value in row.items():
                assert found["strict", case, organ, metric] == value
    for protocol, summary in example.results["summary"].items():
        for organ, row in [*summary["organs"].items(), (None, summary["mean"])]:
            for metric in summary["mean"]:
                assert found[protocol, None, organ, metric] == row[metric]["mean"]


@pytest.mark.parametrize("width", [1280, 390])
def test_it_fits_its_window(width: int, chromium, report: Path, read, tmp_path: Path) -> None:
    """Also with everything unfolded; wide tables scroll in boxes of their own."""
    page = report.read_text(encoding="utf-8").replace("<details", "<details open")
    found = look(chromium, read, page, width, tmp_path)
    assert width - 20 <= found["client"] <= width  # less a scroll bar
    assert found["scroll"] <= found["client"]
    assert found["bodyScroll"] <= found["client"]
    assert found["outside"] == []
    assert found["boxesThatScroll"] == found["boxes"] >= 10
    if width == 390:
        assert found["wideBoxes"] >= 3
    assert len(found["pictures"]) == 12
    assert all(found["pictures"])
    assert found["collapse"] == "collapse"  # the policy lets the style sheet through
    assert found["title"] == "Test of final.safetensors on 7 cases"


def test_its_policy_stops_scripts_and_other_styles(chromium, report: Path, read, tmp_path: Path) -> None:
    """Were a name ever let through as it is, it still could do nothing."""
    bad = '<style>body{background-color:rgb(1,2,3)}</style><script>document.documentElement.dataset.scriptRan="yes"</script>'
    page = report.read_text(encoding="utf-8").replace("<body>", f"<body>{bad}")
    found = look(chromium, read, page, 600, tmp_path)
    assert found["scriptRan"] == "no"
    assert found["ground"] == "rgb(255, 255, 255)"
    without = page.replace('http-equiv="Content-Security-Policy"', "")
    found = look(chromium, read, without, 600, tmp_path)
    assert (found["scriptRan"], found["ground"]) == ("yes", "rgb(1, 2, 3)")


def test_light_and_dark(chromium, report: Path, read, tmp_path: Path) -> None:
    """The ground is white or nearly black, and the text on it is the other."""
    for scheme, bright in (("1", True), ("0", False)):
        picture = tmp_path / f"{scheme}.png"
        flags = ("--hide-scrollbars", "--window-size=1280,700", f"--blink-settings=preferredColorScheme={scheme}")
        chromium(report, *flags, f"--screenshot={picture}")
        grey = np.asarray(Image.open(picture).convert("L")).astype(int)
        assert grey.shape == (700, 1280)
        assert (np.median(grey) > 250) if bright else (np.median(grey) < 40)
        assert np.abs(grey - np.median(grey)).max() > 180
