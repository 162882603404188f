"""scripts/benchmark_retrieval.py on small sizes: it runs, and the sizes that it computes are those of the files' layout."""

import json
from pathlib import Path

import pytest

from scripts import benchmark_retrieval


def test_it_writes_figures_that_fit_together(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    small = ["--vit_name", "vit_tiny", "--img_size", "64", "--rounds", "1"]
    assert benchmark_retrieval.main([*small, "--slices", "140", "--sizes", "130", "1000", "--json", str(tmp_path / "f.json")]) == 0
    figures = json.loads((tmp_path / "f.json").read_text())
    index, (first, second) = figures["index"], figures["search"]["sizes"]
    assert index["query_ms"]["all"] == pytest.approx(sum(index["query_ms"][step] for step in ("search", "reading", "prior")), abs=0.002)
    assert index["share_of_test_time"] == pytest.approx(index["query_ms"]["all"] / (index["query_ms"]["all"] + index["forward_ms"]), rel=0.1)
    # 128 channels on a grid of 4 in half precision; 9 classes on a grid of 16 in bytes; vectors in single precision, checksums of 8 bytes.
    tensors = 140 * (128 * 16 * 2 + 9 * 256 + 128 * 4 + 8)
    assert tensors < index["bytes"] < tensors + 20_000  # the manifest's names
    assert (first["slices"], first["vectors_bytes"], first["token_maps_bytes"], first["counts_bytes"]) == (130, 66_560, 532_480, 299_520)
    assert second["token_maps_bytes"] == 4_096_000
    assert {"product_ms_batch_1", "faiss_ms_batch_8"} <= set(figures["search"]["log_log_slopes"])
    assert "retrieval is" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "words"), [(("--slices", "100"), "--slices 100"), (("--sizes", "50"), "--sizes 50"), (("--img_size", "100"), "--img_size 100")]
)
def test_sizes_that_cannot_be_are_one_line(flags: tuple[str, str], words: str, capsys: pytest.CaptureFixture) -> None:
    assert benchmark_retrieval.main(list(flags)) == 2
    assert words in capsys.readouterr().err
