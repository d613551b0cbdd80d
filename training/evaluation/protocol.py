"""The protocol of item to item: what is asked, and at which rank a system puts the answer.

Temporal: what a system may learn from ends at TRAIN_END. For each click of the time that is asked about the *target* is
its note, and the *query* is the same user's last different note before it. All notes are the pool, without the query; a
target's rank is the number of notes scored strictly higher plus half of those scored the same, so that 0 is the best,
and a system that scores all notes alike is put in the middle, not first.

A user's clicks stand by clicked_at. Two of the same millisecond have no order, as in the co-occurrence formula: neither
comes before the other, and for a later target the one with the larger note_id (by code points) counts as the last. A
click that is in the log twice is one click.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from training.errors import TrainingDataError
from training.evaluation.click_file import Clicks

__all__ = [
    "ItemQueries",
    "NoteClicks",
    "Scorer",
    "Targets",
    "ask_items",
    "clicks_on_notes",
    "order_of_ids",
    "rank_targets",
]

Ints: TypeAlias = NDArray[np.int64]
Floats: TypeAlias = NDArray[np.float64]
Targets: TypeAlias = Literal["test", "validation"]
_SCORES: Final = 4_000_000  # in one block: 16 MB of float32


class Scorer(Protocol):
    """A system. ``tolerance``: two scores that differ by no more are the same, as floating-point sums vary a little."""

    @property
    def tolerance(self) -> float: ...

    def scores(self, rows: Ints) -> NDArray[Any]:
        """``[B]`` rows of notes as queries -> how near each of the N notes is, ``[B, N]``; more is nearer."""
        ...


@dataclass(frozen=True)
class NoteClicks:
    """C clicks on N notes by user, time and note_id: ``users``, ``notes`` (rows of notes) and ``clicked_at``, ``[C]``.

    ``unknown`` counts the clicks on notes that are not among the notes, ``repeated`` those that were in the log twice;
    both are left out.
    """

    users: Ints
    notes: Ints
    clicked_at: Ints
    number_of_notes: int
    unknown: int
    repeated: int

    def __len__(self) -> int:
        return len(self.users)

    def before(self, moment: int) -> NoteClicks:
        kept = self.clicked_at < moment
        users, notes, clicked_at = self.users[kept], self.notes[kept], self.clicked_at[kept]
        return NoteClicks(users, notes, clicked_at, self.number_of_notes, self.unknown, self.repeated)


@dataclass(frozen=True)
class ItemQueries:
    """Q questions over N notes: ``users``, ``queries``, ``targets`` and ``cold``, each ``[Q]``.

    Queries and targets are rows of notes. A target is cold when nobody clicked it before TRAIN_END, else warm.
    """

    users: Ints
    queries: Ints
    targets: Ints
    cold: NDArray[np.bool_]
    number_of_notes: int

    def __len__(self) -> int:
        return len(self.users)


def clicks_on_notes(clicks: Clicks, note_ids: Sequence[str]) -> NoteClicks:
    """``note_ids [N]``: each row's id, no id twice. Raises :class:`TrainingDataError` where one is."""
    rows = {note_id: row for row, note_id in enumerate(note_ids)}
    if len(rows) < len(note_ids):
        twice = next(note_id for row, note_id in enumerate(note_ids) if rows[note_id] != row)
        raise TrainingDataError(f"notes: {twice!r} is there twice; each note may be there once")
    of_place = np.array([rows.get(note_id, -1) for note_id in clicks.note_ids], np.int64)
    notes = of_place[clicks.notes]
    known = notes >= 0
    users, notes, clicked_at = clicks.users[known].astype(np.int64), notes[known], clicks.clicked_at[known]
    by_id = order_of_ids(note_ids)
    order = np.lexsort((by_id[notes], clicked_at, users))
    users, notes, clicked_at = users[order], notes[order], clicked_at[order]
    new = np.ones(len(users), bool)
    new[1:] = (np.diff(users) != 0) | (np.diff(notes) != 0) | (np.diff(clicked_at) != 0)
    return NoteClicks(
        users=users[new],
        notes=notes[new],
        clicked_at=clicked_at[new],
        number_of_notes=len(note_ids),
        unknown=int((~known).sum()),
        repeated=int((~new).sum()),
    )


def order_of_ids(note_ids: Sequence[str]) -> Ints:
    """``[N]``: the place of each row's id among all ids in the order of code points."""
    places = np.empty(len(note_ids), np.int64)
    places[sorted(range(len(note_ids)), key=note_ids.__getitem__)] = np.arange(len(note_ids))
    return places


def ask_items(clicks: NoteClicks, *, train_end: int, test_start: int, targets: Targets = "test") -> ItemQueries:
    """The questions of the test (clicks at or after TEST_START) or of the validation (from TRAIN_END to before it).

    Raises :class:`TrainingDataError` where the times are the wrong way round, or nothing is to be asked.
    """
    if train_end > test_start:
        raise TrainingDataError(
            f"--train-end: {train_end} is not allowed: --test-start is {test_start}; "
            "training ends before the test, or as it starts"
        )
    low, high = (test_start, np.inf) if targets == "test" else (train_end, test_start)
    before = last_different(clicks)
    asked = (clicks.clicked_at >= low) & (clicks.clicked_at < high) & (before >= 0)
    if not asked.any():
        when = f"at or after {test_start}" if targets == "test" else f"from {train_end} to before {test_start}"
        raise TrainingDataError(
            f"--clicks: no click {when} has a different note of the same user before it; nothing can be asked "
            f"({len(clicks)} clicks on the notes, {clicks.unknown} on others)"
        )
    clicked = np.zeros(clicks.number_of_notes, bool)
    clicked[clicks.before(train_end).notes] = True
    found = clicks.notes[asked]
    return ItemQueries(clicks.users[asked], clicks.notes[before[asked]], found, ~clicked[found], clicks.number_of_notes)


def last_different(clicks: NoteClicks) -> Ints:
    """``[C]``: for each click, the place of the same user's last earlier click on another note, or -1."""
    if not len(clicks):
        return np.zeros(0, np.int64)
    new_user = np.diff(clicks.users, prepend=-1) != 0
    moments = _begin(new_user | (np.diff(clicks.clicked_at, prepend=-1) != 0))
    runs = _begin(new_user | (np.diff(clicks.notes, prepend=-1) != 0))
    begins = _begin(new_user)
    # The click before all of this millisecond; where its note is ours, the one before its run of the same note.
    before = moments - 1
    same = clicks.notes[before] == clicks.notes
    before = np.where((before >= 0) & same, runs[before] - 1, before)
    return np.where(before >= begins, before, -1)


def _begin(starts: NDArray[np.bool_]) -> Ints:
    """For each place, where its group began."""
    return np.maximum.accumulate(np.where(starts, np.arange(len(starts)), 0))


def rank_targets(scorer: Scorer, asked: ItemQueries, progress: Callable[[float], None] = lambda share: None) -> Floats:
    """The rank of each target, ``[Q]``, from 0 to N - 2. The scores are made in blocks, never all at once."""
    ranks = np.empty(len(asked))
    size = max(1, _SCORES // asked.number_of_notes)
    for begin in range(0, len(asked), size):
        part = slice(begin, begin + size)
        ranks[part] = _ranks(scorer, asked.queries[part], asked.targets[part])
        progress(min(begin + size, len(asked)) / len(asked))
    return ranks


def _ranks(scorer: Scorer, queries: Ints, targets: Ints) -> Floats:
    scores = scorer.scores(queries)
    every = np.arange(len(queries))
    wanted = scores[every, targets][:, None]
    above = scores > wanted + scorer.tolerance
    same = scores >= wanted - scorer.tolerance
    # Out of the pool: the query; and a target does not compete with itself.
    for mask in (above, same):
        mask[every, queries] = False
        mask[every, targets] = False
    higher = above.sum(axis=1)
    return np.asarray(higher + (same.sum(axis=1) - higher) / 2)
