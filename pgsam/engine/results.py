"""Folders of results: complete or absent where all is done at once, and files that are whole where they grow case by case."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pgsam.errors import UserError
from pgsam.volume_io import replacing

RESULTS = ("metrics.json", "metrics.csv", "report.html", "test_log", "predictions", "overlays", "neighbours")


@contextmanager
def results_folder(output_dir: str | Path) -> Iterator[Path]:
    """Gives a folder to write into, whose content moves to `output_dir` at the end; after an error nothing is left behind.

    Raises:
        UserError: `output_dir` already holds results, or cannot be made.
    """
    output_dir = Path(output_dir)
    taken = [name for name in RESULTS if (output_dir / name).exists()]
    if taken:
        raise UserError(f"{output_dir}: holds results already ({', '.join(taken)}); give another --output_dir or remove them")
    made = [folder for folder in (output_dir, *output_dir.parents) if not folder.exists()]
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=".unfinished-", dir=output_dir))
    except OSError as error:
        raise UserError(f"{output_dir}: cannot be written ({error}); give another --output_dir") from error
    try:
        yield staging
        for entry in sorted(staging.iterdir()):
            entry.rename(output_dir / entry.name)
    except BaseException:
        shutil.rmtree(staging)
        for folder in made:  # only what this call made, and only while it is empty
            if not any(folder.iterdir()):
                folder.rmdir()
        raise
    staging.rmdir()


def make_folder(folder: Path) -> None:
    """Makes a folder for results, unless it is there; a UserError if it cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be made ({error}); give another folder for the results (-o)") from error


def write_text(path: Path, text: str) -> None:
    """Writes a text file in the place of what is there."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
