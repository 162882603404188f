"""The nearest vectors against a search by sorting in float64, for both ways of finding candidates."""

import numpy as np
import pytest

from pgsam.retrieval import search
from pgsam.retrieval.search import NearestVectors

NOBODY = np.empty(0, dtype=np.int64)


def unit(x: np.ndarray) -> np.ndarray:
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


def by_sorting(vectors: np.ndarray, query: np.ndarray, k: int, left_out: np.ndarray) -> list[int]:
    """The definition: largest inner product in float64 first, then the smallest index."""
    products = [
        (-float(np.sum(v.astype(np.float64) * query.astype(np.float64))), i) for i, v in enumerate(vectors) if i not in set(left_out.tolist())
    ]
    return [i for _, i in sorted(products)[:k]]


@pytest.mark.parametrize("faiss", [False, True])
@pytest.mark.parametrize("k", [1, 5, 40])
def test_both_ways_give_what_sorting_gives(faiss: bool, k: int) -> None:
    rng = np.random.default_rng(0)
    vectors, queries = unit(rng.normal(size=(300, 24))), unit(rng.normal(size=(6, 24)))
    left_out = [NOBODY, np.arange(0, 60), np.array([299]), np.arange(0, 300, 2), NOBODY, np.arange(50, 250)]
    indices, similarities = NearestVectors(vectors, faiss=faiss).find(queries, k, left_out)
    for row, hidden in enumerate(left_out):
        assert indices[row].tolist() == by_sorting(vectors, queries[row], k, hidden)
        np.testing.assert_allclose(similarities[row], vectors[indices[row]].astype(float) @ queries[row].astype(float), rtol=0, atol=1e-12)


@pytest.mark.parametrize("faiss", [False, True])
def test_of_exact_copies_the_first_comes_first(faiss: bool) -> None:
    """More copies than FAISS is asked for at first, in an order of places that no heap keeps."""
    rng = np.random.default_rng(1)
    original = unit(rng.normal(size=16))
    vectors = unit(rng.normal(size=(400, 16)))
    copies = rng.permutation(400)[:90]
    vectors[copies] = original
    nearest = NearestVectors(vectors, faiss=faiss)
    indices, similarities = nearest.find(original[None], 7, [NOBODY])
    assert indices[0].tolist() == sorted(copies.tolist())[:7]
    np.testing.assert_allclose(similarities, 1, atol=1e-6)
    hidden = np.sort(copies)[:3]
    assert nearest.find(original[None], 7, [hidden])[0][0].tolist() == sorted(copies.tolist())[3:10]


@pytest.mark.parametrize("faiss", [False, True])
def test_differences_below_the_rounding_of_float32_are_ranked_in_float64(faiss: bool) -> None:
    """Vectors that differ in one last bit of one small number: their float32 products with the query are all alike."""
    rng = np.random.default_rng(2)
    base = unit(np.abs(rng.normal(size=32)) + 0.1)
    vectors = np.repeat(base[None], 200, axis=0)
    for row in range(200):
        for _ in range(int(rng.integers(0, 9))):
            vectors[row, 5] = np.nextafter(vectors[row, 5], np.float32(0))
    indices, _ = NearestVectors(vectors, faiss=faiss).find(base[None], 50, [NOBODY])
    assert indices[0].tolist() == by_sorting(vectors, base, 50, NOBODY)


@pytest.mark.parametrize("faiss", [False, True])
def test_all_that_is_left_can_be_asked_for(faiss: bool) -> None:
    vectors = unit(np.random.default_rng(3).normal(size=(9, 4)))
    indices, _ = NearestVectors(vectors, faiss=faiss).find(vectors[:1], 4, [np.array([0, 2, 4, 6, 8])])
    assert sorted(indices[0].tolist()) == [1, 3, 5, 7]


def test_faiss_is_used_from_its_threshold_on_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = unit(np.random.default_rng(4).normal(size=(30, 4)))
    monkeypatch.setattr(search, "FAISS_FROM", 31)
    assert NearestVectors(vectors)._flat is None
    monkeypatch.setattr(search, "FAISS_FROM", 30)
    assert NearestVectors(vectors)._flat is not None
    monkeypatch.setattr(search.importlib.util, "find_spec", lambda name: None)
    assert NearestVectors(vectors)._flat is None
