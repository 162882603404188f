"""One kind of error for everything a user can cause: a single line that says which file, what was expected, what was found, what to do.

Programs turn it into that line on stderr and exit code 2; anything else that is raised is a bug of ours and keeps its traceback.
"""

import argparse
import functools
import re
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn


class UserError(Exception):
    """Something the user can put right. The message is one line; line breaks in quoted causes are folded into spaces."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(str(message).split()))


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises a `UserError` instead of printing its usage and exiting, and never guesses abbreviated flags."""

    def __init__(self, description: str | None, *, add_help: bool = True) -> None:
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, add_help=add_help)
        # Python 3.11's own takes -1e9 for a flag.
        self._negative_number_matcher = re.compile(r"-(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?$")

    def error(self, message: str) -> NoReturn:
        """Raises `message` as a UserError."""
        raise UserError(f"{message} (see --help)")


def reports_user_errors(main: Callable[..., int]) -> Callable[..., int]:
    """Makes `main(argv=None) -> int` print a `UserError` as one line on stderr and return 2."""

    @functools.wraps(main)
    def wrapper(argv: Sequence[str] | None = None) -> int:
        try:
            return main(argv)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2

    return wrapper
