"""Imports point one way, as the design's section 2 says."""

import ast
import functools
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("decoding", "prior", "sam", "tuning")
PROGRAMS = ("scripts", "train", "test", "infer_demo", "tests")
GROUND_FLOOR = {"errors", "pretrained", "products", "volume", "volume_io", "resample"}  # what every room may stand on


@functools.cache
def modules_in(path: Path) -> frozenset[str]:
    """Modules that a file imports, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found.add(node.module)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return frozenset(found)


def imports_of(path: Path) -> set[str]:
    """Those of them that are ours."""
    return {name for name in modules_in(path) if name.split(".")[0] in ("pgsam", "datasets", "preprocess", *PROGRAMS)}


def room(name: str) -> str:
    """`pgsam.sam.build` -> `sam`; `datasets.labels` -> `datasets`."""
    parts = name.split(".")
    return parts[1] if parts[0] == "pgsam" and len(parts) > 1 else parts[0]


def files(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("own", ROOMS)
def test_rooms_import_neither_each_other_nor_what_stands_above(own: str) -> None:
    for path in files(f"pgsam/{own}"):
        others = {room(name) for name in imports_of(path)} - {own}
        assert others <= GROUND_FLOOR, path


def test_models_import_rooms_and_never_the_engine_or_another_paper() -> None:
    for path in files("pgsam/models"):
        for name in imports_of(path):
            assert room(name) in {*ROOMS, "models"} | GROUND_FLOOR, (path, name)
            if path.name != "__init__.py" and room(name) == "models":
                assert name in ("pgsam.models.base", "pgsam.models.card"), (path, name)


@pytest.mark.parametrize("own", ["oneshot", "volumetric", "retrieval"])
def test_what_stands_beside_the_models_knows_rooms_and_the_ground_floor(own: str) -> None:
    for path in files(f"pgsam/{own}"):
        allowed = {own, "sam", "tuning", "clicks", "losses", "metrics", "overlay"} | GROUND_FLOOR
        assert {room(name) for name in imports_of(path)} <= allowed, path


@pytest.mark.parametrize(
    "name", ["metrics", "clicks", "losses", "products", "volume", "resample", "errors", "pretrained", "box_plot", "dot_plot", "rater_metrics"]
)
def test_ground_floor_imports_nothing_of_ours(name: str) -> None:
    assert imports_of(ROOT / "pgsam" / f"{name}.py") <= {"pgsam.errors"}


def test_the_report_knows_pictures_and_numbers_only() -> None:
    assert {room(name) for name in imports_of(ROOT / "pgsam" / "report.py")} <= {"errors", "box_plot", "overlay", "protocols", "volume_io"}


def test_files_are_read_by_formats_that_know_what_a_volume_is() -> None:
    assert {room(name) for name in imports_of(ROOT / "pgsam" / "volume_io.py")} == {"errors", "volume", "formats"}
    for path in files("pgsam/formats"):
        assert {room(name) for name in imports_of(path)} <= {"errors", "volume", "formats"}, path


def test_datasets_and_preprocess_know_the_ground_floor_only() -> None:
    for path in files("datasets") + files("preprocess"):
        for name in imports_of(path):
            assert room(name) in {"datasets", "preprocess", "errors", "volume", "volume_io", "formats", "resample"}, (path, name)


def test_the_package_never_imports_programs_or_medpy() -> None:
    package = files("pgsam") + files("datasets") + files("preprocess")
    for path in package:
        assert not {name for name in imports_of(path) if name.split(".")[0] in PROGRAMS}, path
    for path in [*package, *ROOT.glob("*.py"), *(ROOT / "scripts").glob("*.py")]:
        assert "medpy" not in {name.split(".")[0] for name in modules_in(path)}, f"{path} imports MedPy (GPL-3), an oracle of tests and benchmarks"
