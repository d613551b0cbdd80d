"""What a model has to beat: systems that need no model, each a :class:`training.evaluation.protocol.Scorer`.

``random``              no knowledge: Recall@k is k / (N - 1), but for rounding
``popularity``          how often a note was clicked before TRAIN_END
``tfidf``               the cosine of title, content and hashtags by :mod:`training.evaluation.note_text`
``cooccurrence``        s(A -> B) + s(B -> A) of the formula, of all pairs; popularity decides among those alike
``cooccurrence_top10``  the same of the pairs that a snapshot keeps, which is what a model learns from

The last two know nothing of a note that nobody clicked: of cold targets they find none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, Literal, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray

from notellm.messages import Note
from training.evaluation.note_text import note_text, tfidf
from training.evaluation.protocol import Floats, Ints, ItemQueries, NoteClicks

__all__ = ["BASELINES", "Baseline", "CooccurrenceScorer", "PopularityScorer", "TfidfScorer", "random_ranks"]

Baseline: TypeAlias = Literal["random", "popularity", "tfidf", "cooccurrence", "cooccurrence_top10"]
BASELINES: Final[tuple[Baseline, ...]] = get_args(Baseline)


def random_ranks(asked: ItemQueries, seed: int) -> Floats:
    """``[Q]``: ranks spread evenly over the N - 1 places of the pool, and drawn to the queries.

    Each rank is as likely as with scores drawn at random, but over all queries they come as often as is expected.
    """
    spread = np.floor((np.arange(len(asked)) + 0.5) * (asked.number_of_notes - 1) / len(asked))
    return np.random.default_rng(seed).permutation(spread)


class PopularityScorer:
    """Clicks of the time that may be learnt from; of one user on one note several count as several."""

    tolerance = 0

    def __init__(self, clicks: NoteClicks) -> None:
        self.clicks = np.bincount(clicks.notes, minlength=clicks.number_of_notes)

    def scores(self, rows: Ints) -> NDArray[Any]:
        return np.broadcast_to(self.clicks, (len(rows), len(self.clicks)))


class TfidfScorer:
    tolerance = 1e-6

    def __init__(self, notes: Sequence[Note]) -> None:
        self._rows = tfidf([note_text(note) for note in notes])
        self._columns = self._rows.T.tocsr()

    def scores(self, rows: Ints) -> NDArray[Any]:
        return np.asarray((self._rows[rows] @ self._columns).toarray())


class CooccurrenceScorer:
    """``pairs``: what :mod:`training.evaluation.pair_scores` makes of ``clicks``."""

    tolerance = 0

    def __init__(self, pairs: Any, clicks: NoteClicks) -> None:
        self._pairs = pairs + pairs.T
        self._popularity = PopularityScorer(clicks).clicks
        # By place among all sums, from 1: units times clicks would not fit into 64 bits.
        places = np.unique(self._pairs.data, return_inverse=True)[1] + 1
        self._pairs.data = places * (int(self._popularity.max(initial=0)) + 1)

    def scores(self, rows: Ints) -> NDArray[Any]:
        return np.asarray(self._pairs[rows].toarray() + self._popularity)
