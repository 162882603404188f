"""The examples in docstrings run, and print what they say."""

import doctest
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# What a user imports, and so what shows its use.
MODULES = (
    "datasets.labels",
    "datasets.phantom",
    "datasets.slices",
    "datasets.volumes",
    "pgsam.clicks",
    "pgsam.engine.checkpoint",
    "pgsam.engine.predict",
    "pgsam.engine.schedule",
    "pgsam.losses",
    "pgsam.metrics",
    "pgsam.models",
    "pgsam.oneshot.p2sam",
    "pgsam.oneshot.parts",
    "pgsam.oneshot.transport",
    "pgsam.products",
    "pgsam.protocols",
    "pgsam.resample",
    "pgsam.retrieval.prior",
    "pgsam.sam.build",
    "pgsam.sam.geometry",
    "pgsam.tuning.adapter",
    "pgsam.tuning.lora",
    "pgsam.volume",
    "pgsam.volume_io",
    "pgsam.volumetric.session",
)


@pytest.mark.parametrize("name", MODULES)
def test_examples_print_what_they_say(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.chdir(ROOT)  # examples name the bundled files as a user in the checkout would
    found = doctest.DocTestFinder(exclude_empty=True).find(importlib.import_module(name))
    runner, results = doctest.DocTestRunner(), []
    for example in found:
        example.globs = {}  # as typed into a fresh interpreter: whatever an example uses, it imports
        results.append(runner.run(example))
    assert sum(result.attempted for result in results) > 0, f"{name} has no example"
    assert sum(result.failed for result in results) == 0, capsys.readouterr().out


def test_every_module_with_an_example_is_listed() -> None:
    files = [path for folder in ("pgsam", "datasets", "preprocess") for path in (ROOT / folder).rglob("*.py")]
    shown = {path.relative_to(ROOT) for path in files if ">>> " in path.read_text(encoding="utf-8")}
    assert {".".join(path.with_suffix("").parts).removesuffix(".__init__") for path in shown} == set(MODULES)
