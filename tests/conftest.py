"""Fixtures of the whole suite: the shared folder with real data and published numbers, weights by rule, and a prepared phantom dataset."""

import importlib.util
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
LONGEST = ("test_readme_commands_run", "test_from_the_archive_to_the_table_and_again")  # minutes each


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest tests begin first, or one process still runs them when the other has nothing left."""
    items.sort(key=lambda item: not item.name.startswith(LONGEST))


def require_shared(relative: str) -> Path:
    """A file or folder of ../shared; skips the test by name where it is absent."""
    path = SHARED / relative
    if not path.exists():
        pytest.skip(f"../shared/{relative} is not on this machine")
    return path


@pytest.fixture(scope="session", autouse=True)
def _ctrl_c_is_heard() -> None:
    """A shell starts background jobs deaf to Ctrl-C, and their children too; tests of what Ctrl-C does must not depend on that."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def shared() -> Callable[[str], Path]:
    """`shared("data/polyps")` is that file or folder of ../shared; the test is skipped by name where it is absent."""
    return require_shared


@pytest.fixture(scope="session")
def parity() -> Path:
    """The folder of numbers that the published implementations gave."""
    return require_shared("parity")


@pytest.fixture(scope="session")
def synthetic(parity: Path) -> ModuleType:
    """The rule that fills the layouts of published checkpoints with numbers."""
    spec = importlib.util.spec_from_file_location("synthetic_weights", parity / "synthetic_weights.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    before, sys.dont_write_bytecode = sys.dont_write_bytecode, True  # the folder is not ours to write in
    spec.loader.exec_module(module)
    sys.dont_write_bytecode = before
    return module


@pytest.fixture(scope="session")
def sam_vit_b_file(synthetic: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file in the layout of Meta's sam_vit_b_01ec64.pth, filled by rule."""
    import torch

    path = tmp_path_factory.mktemp("sam") / "sam_vit_b_01ec64.pth"
    torch.save(synthetic.synthetic_sam("vit_b"), path)
    return path
