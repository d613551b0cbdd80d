"""Cosines, and the two ways to make an untrained model's embeddings usable, against another way to find them."""

from __future__ import annotations

import numpy as np
import pytest

from training.errors import TrainingDataError
from training.evaluation.embedding_scores import EmbeddingScorer, centre, normalise, whiten

MATRIX = np.random.default_rng(7).normal(size=(30, 6)) @ np.diag([9, 3, 1, 0.5, 0.1, 0.01]) + 20


def test_scores_are_cosines_whatever_the_lengths() -> None:
    scores = EmbeddingScorer(np.array([[2, 0], [0, 5], [0.3, 0.3], [-1, 0], [0, 0]])).scores(np.array([2, 0]))
    half = 0.5**0.5
    np.testing.assert_allclose(scores, np.array([[half, half, 1, -half, 0], [1, 0, half, -1, 0]]), atol=1e-6)


def test_rows_have_length_one_and_zeros_stay() -> None:
    found = normalise(np.array([[3, 4], [0, 0], [1e-30, 0], [1e30, 1e30]]))
    np.testing.assert_allclose(found, np.array([[0.6, 0.8], [0, 0], [1, 0], [0.5**0.5, 0.5**0.5]]), atol=1e-7)
    assert found.dtype == np.float32


def test_centred_is_without_the_mean_by_hand() -> None:
    # The mean is (10, 1).
    found = centre(np.array([[13, 5], [7, 1], [10, -3]]))
    np.testing.assert_allclose(found, np.array([[0.6, 0.8], [-1, 0], [0, -1]]), atol=1e-6)


@pytest.mark.parametrize("dim", [1, 3, 6])
def test_whitened_are_the_left_singular_vectors(dim: int) -> None:
    left = np.linalg.svd(MATRIX - MATRIX.mean(axis=0), full_matrices=False)[0][:, :dim]
    unit = left / np.linalg.norm(left, axis=1, keepdims=True)
    found = whiten(MATRIX, dim)
    assert found.shape == (30, dim)
    # A direction has no sign: cosines are compared.
    np.testing.assert_allclose(found @ found.T, unit @ unit.T, atol=1e-4)


def test_directions_without_variance_give_zeros() -> None:
    line = np.outer(np.arange(5.0), [1, 2, 3])
    np.testing.assert_allclose(
        np.abs(whiten(line, 3)), [[1, 0, 0], [1, 0, 0], [0, 0, 0], [1, 0, 0], [1, 0, 0]], atol=1e-6
    )
    assert not whiten(np.ones((4, 3)), 2).any()


@pytest.mark.parametrize("dim", [0, 7])
def test_more_dimensions_than_there_are_are_refused(dim: int) -> None:
    with pytest.raises(TrainingDataError, match=f"whiten: {dim} dimensions are not allowed: 1 to 6 are"):
        whiten(MATRIX, dim)


@pytest.mark.parametrize(
    ("matrix", "notes", "words"),
    [
        (np.zeros(3), None, r"base: a matrix of \[3\]; allowed is \[N, D\]"),
        (np.zeros((3, 2)), 4, r"base: a matrix of \[3, 2\]; allowed is \[4, D\]"),
        (np.array([[1, np.inf]]), 1, "base: a row holds a number that is not finite; all must be"),
    ],
)
def test_what_is_no_embedding_is_refused(matrix: np.ndarray, notes: int | None, words: str) -> None:
    with pytest.raises(TrainingDataError, match=words):
        EmbeddingScorer(matrix, name="base", notes=notes)
