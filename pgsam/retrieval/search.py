"""Exact search of the nearest vectors, by one matrix product or by FAISS (Douze et al. 2024, arXiv 2401.08281); both give the same result.

Inner products in float32 differ in their last digits with the size of a batch and the library, and labelled slices do have exact copies. So float32
only finds the candidates, all that rounding could have put behind the k-th; they are ranked in float64, of equal ones the first in the index first.
"""

import importlib
import importlib.util
from collections.abc import Sequence
from typing import Any

import numpy as np

# Vectors; below that one matrix product takes about 2 ms and needs no second copy of them. On one core FAISS's exact index is no faster at 200,000
# either (scripts/benchmark_retrieval.py): what it brings is OpenMP over the queries of a batch, and no B x N products in memory.
FAISS_FROM = 50_000
_SPARE = 16  # neighbours that FAISS is asked for beyond k, so that it is rarely asked twice


class NearestVectors:
    """Finds the vectors with the largest inner products.

    Args:
        vectors: `(N, C)` float32 of length 1.
        faiss: use FAISS's flat index; by default from `FAISS_FROM` vectors on, where it is installed.
    """

    def __init__(self, vectors: np.ndarray, *, faiss: bool | None = None) -> None:
        self.vectors = vectors
        if faiss is None:
            faiss = len(vectors) >= FAISS_FROM and importlib.util.find_spec("faiss") is not None
        self._flat: Any = _flat_index(vectors) if faiss else None
        # A sum of C products of unit vectors is off by at most C u, u = 2^-24 (Higham 2002, section 3.1); two are compared.
        self._rounding = vectors.shape[1] * 2.0**-23

    def find(self, queries: np.ndarray, k: int, left_out: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """The k nearest of each query, the nearest first.

        Args:
            queries: `(B, C)` float32 of length 1.
            k: at most the number of vectors that are left.
            left_out: of each query, the indices that it must not get.

        Returns:
            Indices `(B, k)` int64 and inner products `(B, k)` float64.
        """
        found = np.empty((len(queries), k), dtype=np.int64)
        similarities = np.empty((len(queries), k))
        candidates = self._by_product if self._flat is None else self._by_faiss
        for row, chosen in enumerate(candidates(queries, k, left_out)):
            exact = (self.vectors[chosen].astype(np.float64) * queries[row].astype(np.float64)).sum(axis=1)
            best = np.lexsort((chosen, -exact))[:k]
            found[row], similarities[row] = chosen[best], exact[best]
        return found, similarities

    def _by_product(self, queries: np.ndarray, k: int, left_out: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Of each query, the indices that may be among its k nearest."""
        products = queries @ self.vectors.T  # (B, N)
        chosen = []
        for row, hidden in zip(products, left_out, strict=True):
            row[hidden] = -np.inf
            last = np.partition(row, len(row) - k)[len(row) - k]
            chosen.append(np.flatnonzero(row >= last - self._rounding))
        return chosen

    def _by_faiss(self, queries: np.ndarray, k: int, left_out: Sequence[np.ndarray]) -> list[np.ndarray]:
        """As `_by_product`."""
        faiss: Any = importlib.import_module("faiss")
        chosen: list[np.ndarray] = [np.empty(0)] * len(queries)
        alike: dict[bytes, list[int]] = {}  # queries that leave out the same are searched together
        for row, hidden in enumerate(left_out):
            alike.setdefault(hidden.tobytes(), []).append(row)
        for rows in alike.values():
            hidden = left_out[rows[0]]
            ids = faiss.IDSelectorBatch(hidden)  # FAISS keeps no hold of its selectors: these names do
            selector = faiss.IDSelectorNot(ids)
            parameters = faiss.SearchParameters(sel=selector)
            allowed = len(self.vectors) - len(hidden)
            count = min(k + _SPARE, allowed)
            products, indices = self._flat.search(queries[rows], count, params=parameters)
            for place, row in enumerate(rows):
                chosen[row] = indices[place]
                bound = products[place, k - 1] - self._rounding
                if products[place, -1] >= bound and count < allowed:
                    _, _, chosen[row] = self._flat.range_search(queries[row : row + 1], float(bound), params=parameters)
        return chosen


def _flat_index(vectors: np.ndarray) -> Any:
    faiss: Any = importlib.import_module("faiss")
    index = faiss.IndexFlatIP(vectors.shape[1])
    index.add(vectors)
    return index
