"""The systems that need no model, by hand; on random logs they are held against the formula in test_item_to_item."""

from __future__ import annotations

import numpy as np
import pytest

from notellm.messages import Note
from tests.streams.formula import Click
from tests.training.evaluation.slow_protocol import click_arrays
from training.evaluation.pair_scores import UNIT, pair_scores
from training.evaluation.protocol import ItemQueries, NoteClicks, clicks_on_notes
from training.evaluation.retrieval_baselines import CooccurrenceScorer, PopularityScorer, TfidfScorer, random_ranks

EVERY = np.arange(4)


def clicks(log: list[Click]) -> NoteClicks:
    return clicks_on_notes(click_arrays(log), "abcd")


def asked(number: int, notes: int) -> ItemQueries:
    zeros = np.zeros(number, np.int64)
    return ItemQueries(zeros, zeros, zeros + 1, np.zeros(number, bool), notes)


@pytest.mark.parametrize(("number", "notes"), [(1000, 101), (7, 1001), (1, 2), (5, 4)])
def test_random_ranks_are_spread_evenly_over_the_pool(number: int, notes: int) -> None:
    ranks = random_ranks(asked(number, notes), seed=1)
    assert len(ranks) == number
    assert ranks.min() >= 0
    assert ranks.max() <= notes - 2
    for k in range(notes):
        assert abs((ranks < k).sum() - number * k / (notes - 1)) <= 1


def test_random_ranks_are_drawn_by_the_seed() -> None:
    first, again, other = (random_ranks(asked(50, 500), seed).tolist() for seed in (1, 1, 2))
    assert first == again != other
    assert sorted(first) == sorted(other) != first


def test_popularity_counts_clicks_several_of_one_person_too() -> None:
    scorer = PopularityScorer(clicks([("u", "b", 1), ("u", "b", 2), ("v", "b", 1), ("v", "d", 5), ("v", "gone", 6)]))
    assert scorer.scores(EVERY[:2]).tolist() == [[0, 3, 0, 1]] * 2


def test_tfidf_is_the_cosine_of_title_content_and_hashtags() -> None:
    notes = [
        Note(note_id="a", title="maple kyoto"),
        Note(note_id="b", content="kyoto maple"),
        Note(note_id="c", hashtags=["maple"]),
        Note(note_id="d", title="ramen"),
    ]
    scores = TfidfScorer(notes).scores(EVERY)
    # Of 4 notes, 3 have maple and 2 kyoto.
    maple, kyoto = np.log(5 / 4) + 1, np.log(5 / 3) + 1
    near = maple / np.hypot(maple, kyoto)
    np.testing.assert_allclose(scores, [[1, 1, near, 0], [1, 1, near, 0], [near, near, 1, 0], [0, 0, 0, 1]], atol=1e-6)


def test_cooccurrence_counts_both_ways_and_popularity_only_among_those_alike() -> None:
    # u went from a to b (1/2), v from c to a (1/2); d is popular, and knows nobody.
    log = [("u", "a", 1), ("u", "b", 2), ("v", "c", 1), ("v", "a", 2), *((f"w{place}", "d", 1) for place in range(9))]
    log += [("x", "c", 1)]
    on_notes = clicks(log)
    scores = CooccurrenceScorer(pair_scores(on_notes), on_notes).scores(EVERY)
    assert scores[0, 2] > scores[0, 1] > scores[0, 3]
    assert scores[1].argsort().tolist()[-2:] == [3, 0]
    assert scores[3].tolist() == [2, 1, 2, 9]


def test_sums_of_many_units_and_clicks_do_not_overflow() -> None:
    on_notes = clicks([("u", "a", 1), ("u", "b", 2)])
    pairs = pair_scores(on_notes)
    pairs.data[:] = 4_000_000 * UNIT
    scores = CooccurrenceScorer(pairs, on_notes).scores(EVERY)
    assert scores[0, 1] > scores[0, 2] >= 0
