"""Random logs of clicks that are full of what a log may hold."""

from __future__ import annotations

import random

from hypothesis import strategies as st

from streams.cooccurrence import PairOptions
from tests.streams.formula import Click

__all__ = ["NOTES", "OVERFLOWING", "all_options", "click_logs", "many_logs", "random_logs"]

# Ids whose order differs between code points, UTF-16, a dictionary and upper case.
NOTES = ("a", "B", "b", "é", "z", "笔", "\uffee", "🍵", "10", "9", "n'1", 'n"2', "a b", "ß", "Ω")
USERS = ("u1", "u2", "U1", "Ü", "用户", "🙂")
# SQL of a table of moments in which five people went from note 0 to note 1, with 2**62 units each.
OVERFLOWING = """
    SELECT person, note, note AS first_at, note AS last_at, 4611686018427387904 AS units
    FROM (VALUES (1), (2), (3), (4), (5)) AS people (person), (VALUES (0), (1)) AS notes (note)
    """
_few_times = st.integers(0, 12)


@st.composite
def click_logs(draw: st.DrawFn) -> list[Click]:
    """Few users, notes and times, so that returns, duplicates, ties and same-time clicks are the rule."""
    notes = st.sampled_from(NOTES)
    log = draw(st.lists(st.tuples(st.sampled_from(USERS), notes, _few_times), max_size=40))
    if draw(st.booleans()):  # one who clicked everything: ties at the border of the top
        begin, step = draw(_few_times), draw(st.integers(0, 1))
        log += [("huge", note, begin + step * place) for place, note in enumerate(draw(st.permutations(NOTES)))]
    if draw(st.booleans()):  # who clicked one note, again and again
        log += [("one-note", draw(notes), at) for at in draw(st.lists(_few_times, min_size=1, max_size=3))]
    if log:
        log += draw(st.lists(st.sampled_from(log), max_size=10))  # duplicates
    return draw(st.permutations(log))


def many_logs(most: int = 8) -> st.SearchStrategy[list[Click]]:
    """Several logs as one."""
    return st.lists(click_logs(), max_size=most).map(_apart)


def random_logs(seed: int, number: int = 60) -> list[Click]:
    """The same without hypothesis, for an engine that takes seconds for one look."""
    chance = random.Random(seed)
    logs = []
    for _ in range(number):
        log = [
            (chance.choice(USERS), chance.choice(NOTES), chance.randint(0, 12)) for _ in range(chance.randint(0, 40))
        ]
        step = chance.randint(0, 1)
        log += [("huge", note, 3 + step * place) for place, note in enumerate(chance.sample(NOTES, len(NOTES)))]
        logs.append(log + chance.choices(log, k=5))
    return _apart(logs)


def _apart(logs: list[list[Click]]) -> list[Click]:
    """They know nothing of each other: no user and no note is in two of them."""
    return [
        (f"{number:02}{user}", f"{number:02}{note}", at) for number, log in enumerate(logs) for user, note, at in log
    ]


def all_options() -> st.SearchStrategy[PairOptions]:
    # One person of 15 notes adds 0.0666...: bounds in the middle of what happens.
    bounds = st.sampled_from([(0.01, 30.0), (0.0, 0.5), (0.2, 30.0), (0.1, 0.333333333333), (0.5, 0.5)])
    return st.builds(
        lambda bounds, **others: PairOptions(min_score=bounds[0], max_score=bounds[1], **others),
        bounds,
        top=st.sampled_from([1, 2, 10]),
        max_distance=st.sampled_from([None, 1, 2, 5]),
        session_gap_ms=st.sampled_from([None, 0, 1, 3]),
        symmetric=st.booleans(),
        max_notes_per_user=st.sampled_from([None, 2, 14, 15]),
    )
