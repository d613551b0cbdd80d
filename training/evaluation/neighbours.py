"""Whether a note's nearest neighbours are of its category.

Easy for a model that learnt the categories, as NoteLLM does: it says that the space is in order, not that people would
go from one note to the other, which item to item measures.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from training.evaluation.bootstrap import Interval, bootstrap_means
from training.evaluation.embedding_scores import normalise

__all__ = ["NEIGHBOURS", "neighbour_precision"]

NEIGHBOURS: Final = 5


def neighbour_precision(
    embeddings: NDArray[Any], categories: Sequence[str], *, seed: int, count: int = NEIGHBOURS
) -> Interval:
    """Precision@count by cosine: ``embeddings [N, D]`` are both the queries and the pool, a query left out.

    Raises :class:`ValueError` where there are not more notes than neighbours.
    """
    if len(embeddings) != len(categories) or len(categories) <= count:
        raise ValueError(
            f"{len(embeddings)} embeddings and {len(categories)} categories; as many, and more than {count}, are needed"
        )
    unit = normalise(embeddings)
    cosine = unit @ unit.T
    np.fill_diagonal(cosine, -np.inf)
    # Stable, so that of two alike the first counts wherever this runs.
    nearest = np.argsort(-cosine, axis=1, kind="stable")[:, :count]
    names = np.array(categories)
    [interval] = bootstrap_means((names[nearest] == names[:, None]).mean(axis=1), seed=seed)
    assert interval is not None
    return interval
