"""The co-occurrence formula in numpy, for the baseline: what streams/cooccurrence.py says in SQL.

s(A -> B) is the sum, over the users who clicked A and later B, of 1 / N_u, with N_u the number of distinct notes that
the user clicked. To learn from, pairs of 0.01 <= s <= 30 are kept, and of those the 10 best B of each A (of two alike
the one with the smaller note_id). As there, scores are whole numbers of units of 1e-12: the two agree to the last one.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from scipy.sparse import csr_array

from training.evaluation.protocol import Ints, NoteClicks

__all__ = ["UNIT", "keep_pairs", "pair_scores"]

UNIT: Final = 10**12
_LEAST: Final = UNIT // 100
_MOST: Final = 30 * UNIT
_TOP: Final = 10
_CANDIDATES: Final = 8_000_000  # in one part: some 500 MB on the way


def pair_scores(clicks: NoteClicks) -> Any:
    """A ``csr_array [N, N]`` of int64: the units of every pair, row A, column B."""
    users, notes, first, last = _visits(clicks)
    number = clicks.number_of_notes
    scores = csr_array((number, number), dtype=np.int64)
    if not len(users):
        return scores
    # Who clicked n notes has n rows side by side, from ``begins`` on, and each of them meets all of them.
    begins = np.flatnonzero(np.diff(users, prepend=-1))
    sizes = np.diff(begins, append=len(users))
    begins, sizes = np.repeat(begins, sizes), np.repeat(sizes, sizes)
    units = UNIT // sizes
    until = np.cumsum(sizes)
    row = 0
    while row < len(users):
        done = until[row] - sizes[row]
        stop = max(row + 1, int(np.searchsorted(until, done + _CANDIDATES, side="right")))
        a = np.repeat(np.arange(row, stop), sizes[row:stop])
        b = begins[a] + np.arange(len(a)) - (until[a] - sizes[a] - done)
        later = (first[a] < last[b]) & (notes[a] != notes[b])
        a, b = a[later], b[later]
        # Pairs that come several times are added up, as whole numbers.
        scores = scores + csr_array((units[a], (notes[a], notes[b])), shape=scores.shape)
        row = stop
    return scores


def keep_pairs(scores: Any, id_order: Ints) -> Any:
    """Those of ``scores`` to learn from. ``id_order [N]``: each row's place by note_id."""
    found = scores.tocoo()
    fit = (found.data >= _LEAST) & (found.data <= _MOST)
    a, b, units = found.row[fit], found.col[fit], found.data[fit]
    order = np.lexsort((id_order[b], -units, a))
    a, b, units = a[order], b[order], units[order]
    begins = np.flatnonzero(np.diff(a, prepend=-1))
    place = np.arange(len(a)) - np.repeat(begins, np.diff(begins, append=len(a)))
    top = place < _TOP
    return csr_array((units[top], (a[top], b[top])), shape=scores.shape)


def _visits(clicks: NoteClicks) -> tuple[Ints, Ints, Ints, Ints]:
    """One row for each user and note: both, and when it was first and last."""
    order = np.lexsort((clicks.clicked_at, clicks.notes, clicks.users))
    users, notes, times = clicks.users[order], clicks.notes[order], clicks.clicked_at[order]
    begins = np.flatnonzero((np.diff(users, prepend=-1) != 0) | (np.diff(notes, prepend=-1) != 0))
    ends = np.append(begins[1:], len(users))[: len(begins)] - 1
    return users[begins], notes[begins], times[begins], times[ends]
