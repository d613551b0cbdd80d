"""Embeddings as a system: near is what has a high cosine; and two ways to make an untrained model's usable.

An untrained model's embeddings share one large direction, which hides all others: without their mean (Mu and Viswanath,
All-but-the-Top, 2018), or whitened (Su et al., Whitening Sentence Representations, 2021), their cosines say more.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from training.errors import TrainingDataError

__all__ = ["EmbeddingScorer", "centre", "normalise", "whiten"]

Matrix: TypeAlias = NDArray[np.float32]
# Of a variance that is only rounding, a direction would be made up.
_LEAST_VARIANCE = 1e-10


class EmbeddingScorer:
    """``matrix [N, D]``, of any length: cosines are compared, to a millionth. Raises :class:`TrainingDataError`."""

    tolerance = 1e-6

    def __init__(self, matrix: NDArray[Any], *, name: str = "embeddings", notes: int | None = None) -> None:
        if matrix.ndim != 2 or (notes is not None and len(matrix) != notes):
            wanted = "N" if notes is None else str(notes)
            raise TrainingDataError(f"{name}: a matrix of {list(matrix.shape)}; allowed is [{wanted}, D], a row a note")
        if not np.isfinite(matrix).all():
            raise TrainingDataError(f"{name}: a row holds a number that is not finite; all must be")
        self._unit = normalise(matrix)

    def scores(self, rows: NDArray[np.int64]) -> Matrix:
        return np.asarray(self._unit[rows] @ self._unit.T)


def centre(matrix: NDArray[Any]) -> Matrix:
    """``[N, D]`` -> ``[N, D]``: the mean of these rows taken off, each row of length 1 again."""
    return normalise(matrix - matrix.mean(axis=0, dtype=np.float64))


def whiten(matrix: NDArray[Any], dim: int) -> Matrix:
    """``[N, D]`` -> ``[N, dim]``: the ``dim`` strongest principal components, each of variance 1; rows of length 1.

    Directions without variance give zeros. Raises :class:`TrainingDataError` unless 1 <= dim <= D.
    """
    if not 1 <= dim <= matrix.shape[1]:
        raise TrainingDataError(f"whiten: {dim} dimensions are not allowed: 1 to {matrix.shape[1]} are")
    centred = matrix - matrix.mean(axis=0, dtype=np.float64)
    variances, directions = np.linalg.eigh(centred.T @ centred / len(matrix))
    variances, directions = variances[::-1][:dim], directions[:, ::-1][:, :dim]
    real = variances > _LEAST_VARIANCE * max(float(variances[0]), np.finfo(np.float64).tiny)
    return normalise(centred @ (directions * np.where(real, 1 / np.sqrt(np.where(real, variances, 1)), 0)))


def normalise(matrix: NDArray[Any]) -> Matrix:
    """Each row to length 1; one that is all zeros stays so."""
    wide = matrix.astype(np.float64)
    lengths = np.linalg.norm(wide, axis=1, keepdims=True)
    unit: Matrix = np.divide(wide, lengths, out=np.zeros_like(wide), where=lengths > 0).astype(np.float32)
    return unit
