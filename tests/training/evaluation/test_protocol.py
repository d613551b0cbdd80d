"""What is asked of item to item, and at which rank an answer stands, against an obvious reading of the protocol."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from tests.streams.formula import Click
from tests.training.evaluation.slow_protocol import Question, click_arrays, notes_and_logs, questions, rank
from training.errors import TrainingDataError
from training.evaluation import protocol
from training.evaluation.click_file import Clicks
from training.evaluation.protocol import (
    Ints,
    ItemQueries,
    Targets,
    ask_items,
    clicks_on_notes,
    order_of_ids,
    rank_targets,
)

quickly = settings(max_examples=30, deadline=None, derandomize=True)
FOREVER = 10**9


def asked_of(clicks: Clicks, notes: Sequence[str], found: ItemQueries) -> list[Question]:
    rows = zip(found.users, found.queries, found.targets, found.cold, strict=True)
    return [
        Question(clicks.user_ids[user], notes[query], notes[target], bool(cold)) for user, query, target, cold in rows
    ]


def ask(log: Sequence[Click], notes: Sequence[str], *times: int, targets: Targets = "test") -> list[Question]:
    clicks = click_arrays(log)
    train_end, test_start = times
    on_notes = clicks_on_notes(clicks, notes)
    return asked_of(clicks, notes, ask_items(on_notes, train_end=train_end, test_start=test_start, targets=targets))


class TestQuestions:
    @quickly
    @given(drawn=notes_and_logs(), train_end=st.integers(0, 8), pause=st.integers(0, 4), part=st.booleans())
    def test_are_those_of_the_obvious_reading(
        self, drawn: tuple[list[str], list[Click]], train_end: int, pause: int, part: bool
    ) -> None:
        notes, log = drawn
        test_start = train_end + pause
        low, high = (test_start, FOREVER) if part else (train_end, test_start)
        wanted = questions(log, notes, train_end=train_end, low=low, high=high)
        if not wanted:
            with pytest.raises(TrainingDataError, match="nothing can be asked"):
                ask(log, notes, train_end, test_start, targets="test" if part else "validation")
            return
        found = ask(log, notes, train_end, test_start, targets="test" if part else "validation")
        assert sorted(found) == sorted(wanted)

    def test_the_query_is_the_last_different_note_however_often_the_target_was_opened_since(self) -> None:
        log = [("u", "a", 1), ("u", "b", 2), ("u", "c", 3), ("u", "c", 4), ("u", "c", 5)]
        assert ask(log, "abc", 0, 5) == [Question("u", "b", "c", True)]

    def test_another_person_s_clicks_are_never_the_query(self) -> None:
        log = [("t", "z", 8), ("u", "a", 1), ("u", "b", 9), ("v", "z", 8)]
        assert ask(log, "abz", 0, 9) == [Question("u", "a", "b", True)]

    def test_of_one_millisecond_neither_comes_before_the_other_and_the_larger_id_is_the_last(self) -> None:
        log = [("u", "b", 1), ("u", "a", 1), ("u", "c", 2)]
        # With rows in another order than the ids have.
        assert ask(log, "cba", 0, 1) == [Question("u", "b", "c", True)]

    def test_a_target_is_cold_if_nobody_clicked_it_before_the_end_of_training(self) -> None:
        log = [("v", "b", 99), ("v", "c", 100), ("u", "a", 1), ("u", "b", 200), ("u", "c", 201)]
        assert ask(log, "abc", 100, 200) == [Question("u", "a", "b", False), Question("u", "b", "c", True)]

    def test_both_borders_belong_to_what_comes_after_them(self) -> None:
        log = [("u", note, at) for at, note in enumerate("abcdef")]
        assert [found.target for found in ask(log, "abcdef", 2, 4)] == ["e", "f"]
        assert [found.target for found in ask(log, "abcdef", 2, 4, targets="validation")] == ["c", "d"]

    def test_clicks_on_other_notes_and_repeated_ones_are_counted_and_left_out(self) -> None:
        log = [("u", "a", 1), ("u", "gone", 2), ("u", "b", 3), ("u", "b", 3), ("v", "gone", 4)]
        found = clicks_on_notes(click_arrays(log), "ab")
        assert (len(found), found.unknown, found.repeated) == (2, 2, 1)
        assert ask(log, "ab", 0, 0) == [Question("u", "a", "b", True)]

    def test_ids_are_ordered_by_code_points(self) -> None:
        # In UTF-16, the cup of tea comes before U+FFEE.
        assert order_of_ids(["🍵", "\uffee", "b", "B", "10", "9"]).tolist() == [5, 4, 3, 2, 0, 1]


class TestRefusals:
    def test_a_training_that_ends_after_the_test_began(self) -> None:
        with pytest.raises(TrainingDataError, match=r"--train-end: 7 is not allowed: --test-start is 5; training ends"):
            ask([("u", "a", 1), ("u", "b", 9)], "ab", 7, 5)

    def test_nothing_to_ask_says_what_there_is(self) -> None:
        log = [("u", "a", 1), ("u", "a", 9), ("u", "gone", 9)]
        with pytest.raises(TrainingDataError, match=r"at or after 5 .*\(2 clicks on the notes, 1 on others\)"):
            ask(log, "ab", 2, 5)
        with pytest.raises(TrainingDataError, match=r"from 2 to before 5 has a different note"):
            ask(log, "ab", 2, 5, targets="validation")

    def test_no_clicks_at_all(self) -> None:
        with pytest.raises(TrainingDataError, match="0 clicks on the notes"):
            ask([], "ab", 2, 5)

    def test_a_note_that_is_there_twice(self) -> None:
        with pytest.raises(TrainingDataError, match="notes: 'b' is there twice"):
            clicks_on_notes(click_arrays([]), ["a", "b", "c", "b"])


class TableScorer:
    """``table[a, b]``: how near b is to a."""

    def __init__(self, table: NDArray[Any], tolerance: float = 0) -> None:
        self.table, self.tolerance = table, tolerance
        self.blocks: list[int] = []

    def scores(self, rows: Ints) -> NDArray[Any]:
        self.blocks.append(len(rows))
        return np.asarray(self.table[rows])


def asked(pairs: Sequence[tuple[int, int]], number_of_notes: int) -> ItemQueries:
    queries, targets = (np.array(column, np.int64) for column in zip(*pairs, strict=True))
    return ItemQueries(np.zeros(len(pairs), np.int64), queries, targets, np.zeros(len(pairs), bool), number_of_notes)


@st.composite
def scored_questions(draw: st.DrawFn) -> tuple[NDArray[np.int64], list[tuple[int, int]]]:
    number = draw(st.integers(2, 7))
    places = st.integers(0, number - 1)
    row = st.lists(st.integers(0, 3), min_size=number, max_size=number)
    table = np.array(draw(st.lists(row, min_size=number, max_size=number)))
    pairs = st.tuples(places, places).filter(lambda pair: pair[0] != pair[1])
    return table, draw(st.lists(pairs, min_size=1, max_size=9))


class TestRanks:
    @quickly
    @given(drawn=scored_questions(), block=st.integers(1, 30))
    @example(drawn=(np.zeros((2, 2), np.int64), [(0, 1)]), block=1)
    def test_are_those_of_the_obvious_reading_whatever_the_block(
        self, drawn: tuple[NDArray[np.int64], list[tuple[int, int]]], block: int
    ) -> None:
        table, pairs = drawn
        by_note = [{str(note): int(score) for note, score in enumerate(row)} for row in table]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(protocol, "_SCORES", block)
            scorer = TableScorer(table)
            found = rank_targets(scorer, asked(pairs, len(table)))
        assert found.tolist() == [rank(by_note[query], str(query), str(target)) for query, target in pairs]
        assert max(scorer.blocks) <= max(1, block // len(table))

    def test_by_hand(self) -> None:
        # Of notes 0 to 5, asked from 0: its own score counts for nothing; 2 is higher, 3 and 5 are alike.
        table = np.array([[9, 4, 7, 4, 1, 4]] * 6)
        assert rank_targets(TableScorer(table), asked([(0, 1), (0, 2), (0, 4)], 6)).tolist() == [2, 0, 4]

    def test_a_system_that_scores_all_alike_stands_in_the_middle(self) -> None:
        assert rank_targets(TableScorer(np.zeros((101, 101))), asked([(3, 4)], 101)).tolist() == [49.5]

    def test_scores_within_the_tolerance_are_the_same(self) -> None:
        table = np.array([[0, 0.5, 0.5 + 1e-7, 0.5 - 1e-7, 0.6]] * 5)
        assert rank_targets(TableScorer(table, 1e-6), asked([(0, 1)], 5)).tolist() == [2]
        assert rank_targets(TableScorer(table, 0), asked([(0, 1)], 5)).tolist() == [2]
        assert rank_targets(TableScorer(table, 1e-6), asked([(0, 2)], 5)).tolist() == [2]
        assert rank_targets(TableScorer(table, 0), asked([(0, 2)], 5)).tolist() == [1]

    def test_progress_ends_at_one(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(protocol, "_SCORES", 4)
        shares: list[float] = []
        rank_targets(TableScorer(np.zeros((2, 2))), asked([(0, 1)] * 5, 2), shares.append)
        assert shares == [0.4, 0.8, 1.0]
