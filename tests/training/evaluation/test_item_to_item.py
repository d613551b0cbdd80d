"""Every system of item to item on random logs, against the obvious reading of protocol, formula and metrics."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from notellm.messages import Note
from streams.cooccurrence import PairOptions
from tests.streams.formula import Click
from tests.training.evaluation.slow_protocol import (
    ALL_PAIRS,
    click_arrays,
    notes_and_logs,
    pair_units,
    questions,
    rank,
)
from training.errors import TrainingDataError
from training.evaluation.item_to_item import RetrievalRow, evaluate_item_to_item, paired_difference

quickly = settings(max_examples=15, deadline=None, derandomize=True)
VECTORS = [[x, y, z] for x in range(-1, 2) for y in range(-1, 2) for z in range(-1, 2)]
Scores = Callable[[str], dict[str, Any]]


def bare(ids: Sequence[str]) -> list[Note]:
    return [Note(note_id=note_id, title=f"word{place % 4} another") for place, note_id in enumerate(ids)]


# One person's walk over six notes, and another's; f is cold.
LOG = [("u", note, at) for at, note in enumerate("abcde")] + [
    ("v", "a", 2),
    ("v", "b", 8),
    ("v", "f", 9),
    ("w", "a", 1),
]


def evaluated(
    embeddings: dict[str, Any], log: Sequence[Click] = LOG, notes: Sequence[str] = "abcdef", **changes: Any
) -> list[RetrievalRow]:
    options: dict[str, Any] = {"train_end": 6, "test_start": 8, "seed": 1, "resamples": 200, **changes}
    return evaluate_item_to_item(bare(notes), click_arrays(log), embeddings=embeddings, **options)


def slow_systems(notes: Sequence[str], learnt: Sequence[Click], vectors: Sequence[Sequence[int]]) -> dict[str, Scores]:
    """Exact: tuples, whole numbers and fractions."""
    clicks = Counter(note for _, note, _ in set(learnt))
    of_note = dict(zip(notes, vectors, strict=True))

    def cooccurrence(options: PairOptions) -> Scores:
        units = pair_units(learnt, options)
        return lambda query: {note: (units[query, note] + units[note, query], clicks[note]) for note in notes}

    def cosine(query: str) -> dict[str, Any]:
        a = of_note[query]
        found = {}
        for note, b in of_note.items():
            dot = sum(x * y for x, y in zip(a, b, strict=True))
            lengths = sum(x * x for x in a) * sum(x * x for x in b)
            # Squared, with its sign: in the same order as the cosine itself.
            found[note] = Fraction(dot * abs(dot), lengths) if lengths else Fraction(0)
        return found

    return {
        "mine": cosine,
        "popularity": lambda query: {note: clicks[note] for note in notes},
        "cooccurrence": cooccurrence(ALL_PAIRS),
        "cooccurrence_top10": cooccurrence(PairOptions()),
    }


def slow_metrics(ranks: Sequence[float]) -> dict[str, float]:
    found = {f"recall_at_{k}": sum(each < k for each in ranks) / len(ranks) for k in (1, 10, 100, 1000)}
    return {**found, "mrr": sum(1 / (each + 1) for each in ranks) / len(ranks)}


@quickly
@given(drawn=notes_and_logs(), data=st.data())
def test_every_system_ranks_as_the_obvious_reading(drawn: tuple[list[str], list[Click]], data: st.DataObject) -> None:
    notes, log = drawn
    known = [click for click in log if click[1] in notes]
    wanted = questions(known, notes, train_end=6, low=8, high=10**9)
    assume(wanted)
    vectors = data.draw(st.lists(st.sampled_from(VECTORS), min_size=len(notes), max_size=len(notes)))
    systems = slow_systems(notes, [click for click in known if click[2] < 6], vectors)
    embeddings = {"mine": np.array(vectors)}
    rows = evaluated(embeddings, log, notes, baselines=set(systems) - {"mine"}, resamples=2)
    assert [row.name for row in rows] == list(systems)
    for row in rows:
        asked = zip(row.asked.queries, row.asked.targets, strict=True)
        by_question = {
            (notes[query], notes[target]): each for (query, target), each in zip(asked, row.ranks, strict=True)
        }
        scores = systems[row.name]
        slow = {(query, target): rank(scores(query), query, target) for _, query, target, _ in wanted}
        assert by_question == slow
        assert (row.queries, row.warm + row.cold) == (len(wanted), len(wanted))
        assert row.cold == sum(cold for *_, cold in wanted)
        for group, members in {"all": (True, False), "warm": (False,), "cold": (True,)}.items():
            ranks = [slow[query, target] for _, query, target, cold in wanted if cold in members]
            found = {name: interval.value for name, interval in row.metrics[group].items()}  # type: ignore[index]
            assert found == (pytest.approx(slow_metrics(ranks)) if ranks else {})


def test_models_come_first_then_the_baselines_in_their_own_order() -> None:
    names = [row.name for row in evaluated({"second": np.eye(6), "first": np.eye(6)}, baselines=["tfidf", "random"])]
    assert names == ["second", "first", "random", "tfidf"]


def test_the_validation_asks_of_the_time_between() -> None:
    [row] = evaluated({"mine": np.eye(6)}, baselines=(), train_end=3, test_start=5, targets="validation")
    assert [
        ("abcdef"[query], "abcdef"[target]) for query, target in zip(row.asked.queries, row.asked.targets, strict=True)
    ] == [
        ("c", "d"),
        ("d", "e"),
    ]


def test_intervals_are_of_people() -> None:
    # All of the test's queries are one person's: there is nobody else to be drawn.
    for row in evaluated({"mine": np.eye(6)}):
        for interval in row.metrics["all"].values():
            assert interval.low == interval.high == pytest.approx(interval.value)


def test_the_difference_is_that_of_the_values_query_by_query() -> None:
    near, far = np.array([[1, place] for place in range(6)]), np.eye(6)[::-1]
    first, second = evaluated({"near": near, "far": far}, baselines=(), train_end=1, test_start=1)
    found = paired_difference(first, second, seed=1)
    assert first.metrics["all"]["mrr"].value != second.metrics["all"]["mrr"].value
    for group, metrics in found.items():
        for name, interval in metrics.items():
            wanted = first.metrics[group][name].value - second.metrics[group][name].value
            assert interval.value == pytest.approx(wanted)
    same = paired_difference(first, first, seed=1)
    assert {interval for metrics in same.values() for interval in metrics.values()} == {(0, 0, 0)}


def test_rows_of_other_questions_are_not_compared() -> None:
    [first] = evaluated({"mine": np.eye(6)}, baselines=())
    [second] = evaluated({"yours": np.eye(6)}, baselines=(), train_end=1, test_start=3)
    with pytest.raises(TrainingDataError, match="mine and yours were asked different questions"):
        paired_difference(first, second, seed=1)


@pytest.mark.parametrize(
    ("embeddings", "changes", "words"),
    [
        ({}, {"baselines": ["tfidf", "luck"]}, r"--baselines: 'luck' is not allowed: random, popularity, tfidf, cooc"),
        ({"mine": np.eye(5)}, {}, r"mine: a matrix of \[5, 5\]; allowed is \[6, D\], a row a note"),
        ({"good": np.eye(6), "bad": np.full((6, 2), np.nan)}, {}, "bad: a row holds a number that is not finite"),
        ({}, {"train_end": 9}, "--train-end: 9 is not allowed: --test-start is 8"),
    ],
)
def test_refusals_come_before_anything_is_scored(embeddings: Any, changes: Any, words: str) -> None:
    told: list[str] = []
    with pytest.raises(TrainingDataError, match=words):
        evaluated(embeddings, progress=lambda name, share: told.append(name), **changes)
    assert told == []


def test_progress_of_each_system_ends_at_one() -> None:
    told: dict[str, float] = {}
    rows = evaluated({"mine": np.eye(6)}, progress=told.__setitem__)
    assert told == dict.fromkeys([row.name for row in rows], 1.0)
    assert len(told) == 6
