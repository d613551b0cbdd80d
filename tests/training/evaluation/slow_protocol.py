"""An obvious reading of the protocol of item to item, in plain Python: what the arrays are held against."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from hypothesis import strategies as st

from streams.cooccurrence import PairOptions
from tests.streams.formula import UNIT, Click, formula
from tests.streams.logs import NOTES, click_logs
from training.evaluation.click_file import Clicks

__all__ = ["ALL_PAIRS", "Question", "click_arrays", "notes_and_logs", "pair_units", "questions", "rank"]

ALL_PAIRS = PairOptions(min_score=0, max_score=1000, top=1000)


class Question(NamedTuple):
    user: str
    query: str
    target: str
    cold: bool


def questions(
    log: Collection[Click], notes: Collection[str], *, train_end: int, low: int, high: float
) -> list[Question]:
    """One for each click of ``low <= clicked_at < high`` whose user has a different note before it; in any order."""
    known = {click for click in log if click[1] in notes}
    learnt = {note for _, note, at in known if at < train_end}
    found = []
    for user, target, at in known:
        earlier = [(when, note) for who, note, when in known if who == user and when < at and note != target]
        if low <= at < high and earlier:
            found.append(Question(user, max(earlier)[1], target, target not in learnt))
    return found


def rank(scores: Mapping[str, Any], query: str, target: str) -> float:
    """``scores[note]``: how near each note is to ``query``."""
    pool = [note for note in scores if note not in (query, target)]
    higher = len([note for note in pool if scores[note] > scores[target]])
    ties = len([note for note in pool if scores[note] == scores[target]])
    return higher + ties / 2


def pair_units(log: Collection[Click], options: PairOptions = ALL_PAIRS) -> dict[tuple[str, str], int]:
    """The formula's scores in units of 1e-12; 0 for a pair that has none."""
    return defaultdict(int, {(a, b): round(score * UNIT) for a, b, score, _, _ in formula(log, options)})


def click_arrays(log: Sequence[Click]) -> Clicks:
    """The log as :func:`training.evaluation.click_file.read_clicks` would give it; ids in an order of their own."""
    users, notes = sorted({user for user, _, _ in log}), sorted({note for _, note, _ in log}, reverse=True)
    return Clicks(
        user_ids=tuple(users),
        note_ids=tuple(notes),
        users=np.array([users.index(user) for user, _, _ in log], np.int32),
        notes=np.array([notes.index(note) for _, note, _ in log], np.int32),
        clicked_at=np.array([at for _, _, at in log], np.int64),
    )


@st.composite
def notes_and_logs(draw: st.DrawFn) -> tuple[list[str], list[Click]]:
    """Most of the notes that the clicks are on, in any order, and a log of clicks of the times 0 to 26."""
    notes = draw(st.permutations(NOTES))[: draw(st.integers(10, len(NOTES)))]
    return notes, draw(st.one_of(click_logs(), _dense_logs(notes)))


def _dense_logs(notes: Sequence[str]) -> st.SearchStrategy[list[Click]]:
    """Two persons among four notes: returns to a note, and several clicks of one time, everywhere."""
    clicks = st.tuples(st.sampled_from(["u", "v"]), st.sampled_from(notes[:4]), st.integers(4, 12))
    return st.lists(clicks, min_size=8, max_size=30)
