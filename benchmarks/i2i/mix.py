"""NoteLLM and co-occurrence together, for notes that people clicked already: a sum, and one weight for both.

``score(A, B) = cosine(A, B) + w * s(A, B) / max over B of s(A, B)``, with s the formula's score in both directions, of
all pairs. A note without clicks has no s, so that its cosine stands alone. The weight is chosen on validation targets.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from training.evaluation.embedding_scores import EmbeddingScorer
from training.evaluation.protocol import Ints, ItemQueries, rank_targets

__all__ = ["WEIGHTS", "MixScorer", "choose_weight"]

WEIGHTS: Final = (0.05, 0.1, 0.2, 0.3, 0.5, 0.8)


class MixScorer:
    """``pairs``: a ``csr_array [N, N]`` of :func:`training.evaluation.pair_scores.pair_scores`."""

    tolerance = 1e-6

    def __init__(self, embeddings: NDArray[Any], pairs: Any, weight: float) -> None:
        self._cosines = EmbeddingScorer(embeddings)
        self._pairs = (pairs + pairs.T).astype(np.float32)
        self._weight = weight

    def scores(self, rows: Ints) -> NDArray[np.float32]:
        known = self._pairs[rows].toarray()
        highest = known.max(axis=1, keepdims=True)
        share = np.divide(known, highest, out=np.zeros_like(known), where=highest > 0)
        return np.asarray(self._cosines.scores(rows) + np.float32(self._weight) * share)


def choose_weight(embeddings: NDArray[Any], pairs: Any, asked: ItemQueries, tell: Callable[[str], None]) -> float:
    """That of the best Recall@10 on ``asked``, which are to be validation targets."""
    found = {}
    for weight in WEIGHTS:
        ranks = rank_targets(MixScorer(embeddings, pairs, weight), asked)
        found[weight] = float((ranks < 10).mean())
        tell(f"mixing weight {weight}: recall@10 {found[weight]:.4f} on validation targets")
    return max(found, key=found.__getitem__)
