"""The co-occurrence formula of the baseline against the project's independent reading of it, to the last unit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_array

from streams.cooccurrence import PairOptions
from tests.streams.formula import Click
from tests.training.evaluation.slow_protocol import click_arrays, notes_and_logs, pair_units
from training.evaluation import pair_scores as module
from training.evaluation.pair_scores import UNIT, keep_pairs, pair_scores
from training.evaluation.protocol import clicks_on_notes, order_of_ids

quickly = settings(max_examples=20, deadline=None, derandomize=True)


def units_of(matrix: Any, notes: Sequence[str]) -> dict[tuple[str, str], int]:
    found = matrix.tocoo()
    places = zip(found.row, found.col, found.data, strict=True)
    units = {(notes[a], notes[b]): int(unit) for a, b, unit in places}
    assert len(units) == found.nnz
    return units


def scored(log: Sequence[Click], notes: Sequence[str]) -> Any:
    return pair_scores(clicks_on_notes(click_arrays(log), notes))


@quickly
@given(drawn=notes_and_logs(), candidates=st.sampled_from([1, 20, 8_000_000]))
@example(drawn=(["a", "b"], []), candidates=1)
@example(drawn=(["a", "b"], [("u", "a", 1), ("u", "b", 1)]), candidates=1)
def test_all_pairs_are_those_of_the_formula_in_whatever_parts(
    drawn: tuple[list[str], list[Click]], candidates: int
) -> None:
    notes, log = drawn
    known = [click for click in log if click[1] in notes]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_CANDIDATES", candidates)
        assert units_of(scored(log, notes), notes) == pair_units(known)


@quickly
@given(drawn=notes_and_logs())
def test_pairs_to_learn_from_are_those_of_a_snapshot(drawn: tuple[list[str], list[Click]]) -> None:
    notes, log = drawn
    known = [click for click in log if click[1] in notes]
    kept = keep_pairs(scored(log, notes), order_of_ids(notes))
    assert units_of(kept, notes) == pair_units(known, PairOptions())


def test_by_hand() -> None:
    # u: a, then b, then a again, of 2 notes: 1/2 both ways. v: a, then b, then c, of 3 notes.
    log = [("u", "a", 1), ("u", "b", 2), ("u", "a", 3), ("v", "a", 1), ("v", "b", 2), ("v", "c", 3)]
    third = UNIT // 3
    assert units_of(scored(log, "abc"), "abc") == {
        ("a", "b"): UNIT // 2 + third,
        ("b", "a"): UNIT // 2,
        ("a", "c"): third,
        ("b", "c"): third,
    }


def kept_of(row: Sequence[int], id_order: Sequence[int] | None = None) -> list[int]:
    """Which columns are kept of one row of scores; the ids are ordered as the columns, unless ``id_order`` says how."""
    matrix = csr_array(np.array([row] + [[0] * len(row)] * (len(row) - 1), np.int64))
    return sorted(keep_pairs(matrix, np.array(id_order or range(len(row)))).tocoo().col.tolist())


def test_bounds_are_themselves_kept() -> None:
    low, high = UNIT // 100, 30 * UNIT
    assert kept_of([0, low - 1, low, high, high + 1]) == [2, 3]


def test_ten_are_kept_the_best_and_of_those_alike_the_smaller_ids() -> None:
    assert kept_of([0, *[UNIT] * 12, 2 * UNIT]) == [*range(1, 10), 13]
    assert kept_of([0, *[UNIT] * 12, 2 * UNIT], [*range(13, -1, -1)]) == [*range(4, 13), 13]
