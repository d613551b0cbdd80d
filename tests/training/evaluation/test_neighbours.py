"""Precision of neighbours, on vectors that were drawn by hand."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from training.evaluation.neighbours import NEIGHBOURS, neighbour_precision


def at(degrees: Sequence[float], lengths: Sequence[float]) -> np.ndarray:
    angles = np.radians(degrees)
    return np.asarray(np.stack([np.cos(angles), np.sin(angles)], axis=1) * np.array(lengths)[:, None])


def test_of_five_by_hand() -> None:
    # Six side by side and one opposite, of lengths that say nothing.
    vectors = at([0, 1, 2, 3, 4, 5, 180], [1, 9, 1, 0.1, 3, 1, 5])
    assert NEIGHBOURS == 5
    # The five neighbours of each a are the other a's, those of the one b are a's.
    assert neighbour_precision(vectors, [*"aaaaaa", "b"], seed=1).value == pytest.approx(6 / 7)
    # Each of the six finds two of its kind, b none.
    assert neighbour_precision(vectors, [*"acacac", "b"], seed=1).value == pytest.approx(6 * (2 / 5) / 7)


def test_of_one_by_hand() -> None:
    # 0 finds 10, 10 finds 12, 12 finds 10, 90 finds 12.
    assert neighbour_precision(at([0, 10, 12, 90], [1, 2, 3, 4]), [*"aabb"], seed=1, count=1).value == 2 / 4


def test_a_note_is_not_its_own_neighbour_but_its_copy_is() -> None:
    vectors = at([0, 0, 90, 90], [1, 1, 1, 1])
    assert neighbour_precision(vectors, [*"aabb"], seed=1, count=1).value == 1
    assert neighbour_precision(vectors, [*"abab"], seed=1, count=1).value == 0


def test_of_those_alike_the_first_counts() -> None:
    # The three zeros are alike to all: each finds the first that it is not itself.
    assert neighbour_precision(np.zeros((4, 2)), [*"abba"], seed=1, count=1).value == 1 / 4


@pytest.mark.parametrize(("number", "names"), [(5, 5), (6, 7)])
def test_too_few_notes_are_refused(number: int, names: int) -> None:
    words = f"{number} embeddings and {names} categories; as many, and more than 5, are needed"
    with pytest.raises(ValueError, match=words):
        neighbour_precision(np.eye(number), ["a"] * names, seed=1)
