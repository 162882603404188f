"""Models of transformers in folders on this machine: read in silence, with one error for whatever is wrong with a folder."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from pgsam.errors import UserError


@contextmanager
def reading_pretrained(folder: Path, expected: str) -> Iterator[None]:
    """Within it transformers shows no progress bars and load reports; what is wrong is found and said here.

    Args:
        folder: the model's.
        expected: what it should hold, for the message.

    Raises:
        UserError: the folder made the library raise, whatever that was.
    """
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{folder}: expected {expected}, found one that cannot be loaded ({error}); copy it anew") from error
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def require_all_weights(folder: Path, model: str, missing: Collection[str]) -> None:
    """Raises a UserError if weights of `model` are `missing` from its files: the library would take random numbers for them."""
    if missing:
        raise UserError(f"{folder}: expected all weights of {model}, found {len(missing)} missing, as {min(missing)}; copy it anew")
