"""The text log of a training or a test: lines on stdout, and in a file with SAMed's time stamp."""

import sys
from datetime import datetime
from pathlib import Path

from tqdm import tqdm


class Log:
    """Prints messages and appends each of their lines to a file as `[HH:MM:SS.mmm] line`; makes the file's folder."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path

    def __call__(self, message: str) -> None:  # noqa: D102
        tqdm.write(message, file=sys.stdout)  # above a progress bar, where there is one
        sys.stdout.flush()
        stamp = datetime.now().strftime("%H:%M:%S.%f")[:-3]
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(f"[{stamp}] {line}\n" for line in message.splitlines())
