"""Categories against the author's, with numbers that were worked out by hand."""

from __future__ import annotations

import pytest

from training.evaluation.category_scores import category_metrics

CATEGORIES = {"a", "b", "c"}


def test_by_hand() -> None:
    found = category_metrics(["a", "a", "b", "x"], ["a", "b", "b", "b"], categories=CATEGORIES, seed=1)
    assert found["accuracy"].value == 2 / 4
    assert found["illegal"].value == 1 / 4
    # a: 1 right, 1 too many, F1 2/3. b: 1 right, 2 missed, 1/2. x: 0. Nobody names c, which counts for nothing.
    assert found["macro_f1"].value == pytest.approx((2 / 3 + 1 / 2 + 0) / 3)
    assert found["macro_f1"].low == found["macro_f1"].high == found["macro_f1"].value


def test_a_category_that_no_author_names_is_legal_and_one_that_only_they_name_is_not() -> None:
    found = category_metrics(["c", "c", "old"], ["old", "a", "a"], categories=CATEGORIES, seed=1)
    assert (found["accuracy"].value, found["illegal"].value) == (0, 1 / 3)


def test_letters_and_blanks_count() -> None:
    found = category_metrics(["A", "b "], ["a", "b"], categories=CATEGORIES, seed=1)
    assert (found["accuracy"].value, found["illegal"].value) == (0, 1)


def test_all_right() -> None:
    found = category_metrics(["a", "b"], ["a", "b"], categories=CATEGORIES, seed=1)
    assert {name: interval.value for name, interval in found.items()} == {"accuracy": 1, "macro_f1": 1, "illegal": 0}


def test_one_category_and_an_empty_answer() -> None:
    found = category_metrics(["", "a"], ["a", "a"], categories=CATEGORIES, seed=1)
    assert (found["accuracy"].value, found["illegal"].value) == (1 / 2, 1 / 2)
    assert found["macro_f1"].value == pytest.approx((0 + 2 / 3) / 2)


def test_intervals_are_over_notes() -> None:
    found = category_metrics(["a", "x"] * 20, ["a"] * 40, categories=CATEGORIES, seed=1)
    assert found["accuracy"].low < 0.5 < found["accuracy"].high
    assert found["illegal"].low < 0.5 < found["illegal"].high


@pytest.mark.parametrize(("generated", "author"), [([], []), (["a"], ["a", "b"])])
def test_lists_that_do_not_fit_are_refused(generated: list[str], author: list[str]) -> None:
    words = f"{len(generated)} generated categories for {len(author)} notes; one each, at least one"
    with pytest.raises(ValueError, match=words):
        category_metrics(generated, author, categories=CATEGORIES, seed=1)
