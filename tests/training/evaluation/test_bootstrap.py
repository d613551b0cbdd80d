"""Intervals by drawing people again: against every draw that there is, and against a formula."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from training.evaluation import bootstrap
from training.evaluation.bootstrap import Interval, bootstrap_means

quickly = settings(max_examples=15, deadline=None, derandomize=True)
values_of_people = arrays(np.float64, st.integers(1, 8), elements=st.integers(0, 8).map(float))


def only(found: list[Interval | None]) -> Interval:
    [interval] = found
    assert interval is not None
    return interval


def test_the_mean_is_over_values_not_over_people() -> None:
    found = only(bootstrap_means([1, 1, 1, 0], ["u", "u", "u", "v"], seed=1))
    assert found.value == 0.75


def test_people_are_drawn_each_with_all_that_is_theirs() -> None:
    # Three people of unequal many values: all 27 draws, each as likely, give the quantiles.
    people = [[1.0, 1.0, 1.0, 0.0], [0.0, 0.0], [5.0]]
    drawn = [list(itertools.chain(*three)) for three in itertools.product(people, repeat=3)]
    draws = sorted(sum(values) / len(values) for values in drawn)
    values = list(itertools.chain(*people))
    found = only(bootstrap_means(values, [0, 0, 0, 0, 1, 1, 2], seed=1, resamples=4_000))
    # The first and the last of 27 are beyond the 2.5th and 97.5th percentile (1/27 is 3.7 %), so both are reached.
    assert (found.low, found.high) == (draws[0], draws[-1]) == (0.0, 5.0)
    # Had values been drawn, nobody would have seen seven times 5 in 2.5 % of the draws.
    assert only(bootstrap_means(values, seed=1, resamples=4_000)).high < 4


def test_quantiles_are_those_of_all_draws() -> None:
    # Two people: means 0, 1/2 and 1 with 1/4, 1/2 and 1/4; ten people of 0 or 1: the binomial's quantiles.
    two = only(bootstrap_means([0, 1], seed=3))
    assert two == (0.5, 0.0, 1.0)
    ten = only(bootstrap_means([0] * 5 + [1] * 5, seed=3, resamples=4_000))
    assert ten == (0.5, 0.2, 0.8)


def test_of_many_values_it_is_the_interval_of_the_normal_distribution() -> None:
    values = np.random.default_rng(5).normal(3, 2, 2_000)
    found = only(bootstrap_means(values, seed=1, resamples=4_000))
    half = 1.96 * values.std() / np.sqrt(len(values))
    assert found == pytest.approx((values.mean(), values.mean() - half, values.mean() + half), abs=half * 0.08)


@quickly
@given(values=values_of_people, times=st.integers(1, 4))
def test_values_that_somebody_repeats_tell_nothing_new(values: np.ndarray, times: int) -> None:
    people = np.arange(len(values))
    once = only(bootstrap_means(values, people, seed=2, resamples=50))
    again = only(bootstrap_means(np.tile(values, times), np.tile(people, times), seed=2, resamples=50))
    assert again == pytest.approx(once)


@quickly
@given(values=values_of_people, more=st.integers(-3, 3))
def test_one_seed_draws_the_same_for_every_column_so_that_differences_are_paired(values: np.ndarray, more: int) -> None:
    first, second, difference = bootstrap_means(np.stack([values + more, values, values * 0 + more], axis=1), seed=4)
    assert first is not None
    assert second is not None
    assert np.subtract(first, second) == pytest.approx([more] * 3)
    assert difference == (more, more, more)


def test_the_same_seed_gives_the_same_and_another_one_another() -> None:
    values = np.random.default_rng(1).random(30)
    assert bootstrap_means(values, seed=1) == bootstrap_means(values, seed=1) != bootstrap_means(values, seed=2)


def test_a_nan_takes_no_part() -> None:
    table = np.array([[1.0, np.nan, np.nan], [3.0, 5.0, np.nan], [np.nan, 5.0, np.nan]])
    first, second, third = bootstrap_means(table, seed=1)
    assert first == (2.0, 1.0, 3.0)
    # In one of 27 draws only the first is drawn, who has no value here.
    assert second == (5.0, 5.0, 5.0)
    assert third is None


def test_of_nobody_there_is_no_mean() -> None:
    assert bootstrap_means(np.zeros((0, 2)), seed=1) == [None, None]
    assert bootstrap_means([], seed=1) == [None]


def test_draws_in_parts_are_the_same_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(1).random((20, 2))
    whole = bootstrap_means(values, seed=1, resamples=101)
    monkeypatch.setattr(bootstrap, "_DRAWS", 20 * 7)
    assert bootstrap_means(values, seed=1, resamples=101) == [pytest.approx(interval) for interval in whole]
