"""Fixtures of the whole suite: programs run as by a shell, the shared folder with real data and published numbers, and weights by rule."""

import importlib
import importlib.util
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

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


@pytest.fixture(autouse=True)
def _unchanged_torch() -> Iterator[None]:
    """Training chooses kernels for the whole process; later tests must not notice."""
    yield
    if torch := sys.modules.get("torch"):  # a test without it need not wait for its import
        torch.use_deterministic_algorithms(False)
        torch.backends.cudnn.deterministic = torch.backends.cudnn.benchmark = False
        torch.utils.deterministic.fill_uninitialized_memory = True


class Outcome(NamedTuple):
    """What a program left: exit code and text."""

    code: int
    out: str
    err: str

    def refused(self, *needles: object) -> str:
        """The one line of an error of the user's; every needle must be in it."""
        assert self.code == 2, self
        assert len(self.err.splitlines()) == 1, self.err
        assert self.err.startswith("error: "), self.err
        for needle in needles:
            assert str(needle) in self.err, f"{needle!s} is not in: {self.err}"
        return self.err


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """`call("scripts.compare", "--root_path", folder)` runs that module's `main` with those flags."""

    def run(program: str, *argv: object) -> Outcome:
        capsys.readouterr()
        code = importlib.import_module(program).main([str(a) for a in argv])
        return Outcome(code, *capsys.readouterr())

    return run


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
