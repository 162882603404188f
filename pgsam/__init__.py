"""PG-SAM: published ways of adapting SAM to medical images as one research codebase.

`build_model` makes a model to train, `load_model` reads a trained one. They are imported on first use, so that `import pgsam` stays light.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pgsam.engine.checkpoint import load_model
    from pgsam.models import build_model

__all__ = ["build_model", "load_model"]


def __getattr__(name: str) -> Any:
    if name == "build_model":
        from pgsam.models import build_model

        return build_model
    if name == "load_model":
        from pgsam.engine.checkpoint import load_model

        return load_model
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
