"""Imports point one way, as the design's section 2 says."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("decoding", "prior", "sam", "tuning")


def imports_of(path: Path) -> set[str]:
    """Modules of ours that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found.add(node.module)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name for name in found if name.split(".")[0] in ("pgsam", "datasets", "preprocess", "scripts", "train", "test", "infer_demo", "tests")}


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
        assert others <= {"errors", "products", "volume", "volume_io", "resample"}, path


def test_models_import_rooms_and_never_the_engine_or_another_paper() -> None:
    for path in files("pgsam/models"):
        for name in imports_of(path):
            assert room(name) in {*ROOMS, "models", "errors", "products", "volume", "volume_io"}, (path, name)
            if path.name != "__init__.py" and room(name) == "models":
                assert name in ("pgsam.models.base", "pgsam.models.card"), (path, name)


@pytest.mark.parametrize("own", ["oneshot", "volumetric", "retrieval"])
def test_what_stands_beside_the_models_knows_rooms_and_the_ground_floor(own: str) -> None:
    for path in files(f"pgsam/{own}"):
        allowed = {own, "sam", "tuning", "clicks", "errors", "losses", "products", "volume", "volume_io", "resample", "metrics", "overlay"}
        assert {room(name) for name in imports_of(path)} <= allowed, path


@pytest.mark.parametrize("name", ["metrics", "clicks", "losses", "products", "volume", "resample", "errors", "box_plot"])
def test_ground_floor_imports_nothing_of_ours(name: str) -> None:
    assert imports_of(ROOT / "pgsam" / f"{name}.py") <= {"pgsam.errors"}


def test_the_report_knows_pictures_and_numbers_only() -> None:
    assert {room(name) for name in imports_of(ROOT / "pgsam" / "report.py")} <= {"errors", "box_plot", "overlay", "volume_io"}


def test_files_are_read_by_formats_that_know_what_a_volume_is() -> None:
    assert {room(name) for name in imports_of(ROOT / "pgsam" / "volume_io.py")} == {"errors", "volume", "formats"}
    for path in files("pgsam/formats"):
        assert {room(name) for name in imports_of(path)} <= {"errors", "volume", "formats"}, path


def test_datasets_and_preprocess_know_the_ground_floor_only() -> None:
    for path in files("datasets") + files("preprocess"):
        for name in imports_of(path):
            assert room(name) in {"datasets", "preprocess", "errors", "volume", "volume_io", "formats", "resample"}, (path, name)


def test_the_package_never_imports_programs_or_medpy() -> None:
    for path in files("pgsam") + files("datasets") + files("preprocess"):
        assert not {name for name in imports_of(path) if name.split(".")[0] in ("train", "test", "infer_demo", "scripts", "tests")}, path
    for path in [p for p in ROOT.rglob("*.py") if not {".venv", "tests", "benchmarks"} & set(p.relative_to(ROOT).parts)]:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        modules = {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        modules |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        assert not any(module.split(".")[0] == "medpy" for module in modules), f"{path} imports MedPy (GPL-3), an oracle of tests and benchmarks"
