"""Batches: every row once, within the budget, rows of like length together."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from notellm.batching import plan_batches

_lengths = st.lists(st.integers(1, 300), max_size=60)


@given(_lengths, st.integers(1, 2000), st.integers(1, 20))
def test_every_row_runs_once_within_the_limits(lengths: list[int], token_budget: int, max_rows: int) -> None:
    batches = plan_batches(lengths, token_budget=token_budget, max_rows=max_rows)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    for batch in batches:
        assert 1 <= len(batch) <= max_rows
        assert len(batch) == 1 or len(batch) * max(lengths[index] for index in batch) <= token_budget


@given(_lengths, st.integers(1, 2000), st.integers(1, 20))
def test_shorter_rows_run_first_and_no_batch_could_take_the_next_row(
    lengths: list[int], token_budget: int, max_rows: int
) -> None:
    batches = plan_batches(lengths, token_budget=token_budget, max_rows=max_rows)
    in_order = [lengths[index] for batch in batches for index in batch]
    assert in_order == sorted(in_order)
    for batch, following in pairwise(batches):
        assert len(batch) == max_rows or (len(batch) + 1) * lengths[following[0]] > token_budget


def test_row_beyond_the_budget_runs_alone() -> None:
    assert plan_batches([5, 999, 5], token_budget=100, max_rows=8) == [[0, 2], [1]]


def test_nothing_to_run_makes_no_batch() -> None:
    assert plan_batches([], token_budget=100, max_rows=8) == []
