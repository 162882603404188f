"""One scene of two parts, in an image that is not square."""

import pytest

from tests.pgsam.oneshot.scenes import Scene, scenes


@pytest.fixture(scope="session")
def scene() -> Scene:
    return scenes()["two parts, wide"]
