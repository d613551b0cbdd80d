"""How far a mean may be trusted: intervals by drawing the people (or the notes) again, with replacement.

Several values of one person are not independent of each other, so that people are drawn, each with all that is theirs
(the cluster bootstrap; Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapters 8 and 13): of U units, U
are drawn, the mean over what they bring is taken, and of many such means the interval runs from the 2.5th to the 97.5th
percentile.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["LEVEL", "RESAMPLES", "Interval", "bootstrap_means"]

RESAMPLES: Final = 1000
LEVEL: Final = 0.95
_DRAWS: Final = 4_000_000  # at once: a few times 32 MB


class Interval(NamedTuple):
    """A mean, and the interval around it."""

    value: float
    low: float
    high: float


def bootstrap_means(
    values: ArrayLike, units: ArrayLike | None = None, *, seed: int, resamples: int = RESAMPLES
) -> list[Interval | None]:
    """The mean of each column of ``values [Q, M]`` (or of ``[Q]``, one column), with its 95 % interval.

    A NaN takes no part in its column's mean; a column of nothing else gives None. ``units [Q]`` says whose each row is
    (integers of any kind); None: each row stands for itself, which suits notes. One seed gives the same draws for
    whatever columns, so that the interval of a *paired* difference of two systems is that of the column ``first -
    second``.
    """
    table = np.asarray(values, np.float64)
    table = table[:, None] if table.ndim == 1 else table
    counts = ~np.isnan(table)
    owners = np.arange(len(table)) if units is None else np.unique(np.asarray(units), return_inverse=True)[1]
    number = int(owners.max(initial=-1)) + 1
    sums = _sum_by(owners, np.where(counts, table, 0.0), number)
    sizes = _sum_by(owners, counts.astype(np.float64), number)
    means = np.concatenate(_draw_means(sums, sizes, seed, resamples)) if number else sums
    intervals: list[Interval | None] = []
    for column in range(table.shape[1]):
        size = sizes[:, column].sum()
        if not size:
            intervals.append(None)
            continue
        drawn = means[:, column]
        low, high = np.quantile(drawn[~np.isnan(drawn)], [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        intervals.append(Interval(float(sums[:, column].sum() / size), float(low), float(high)))
    return intervals


def _sum_by(owners: NDArray[np.intp], table: NDArray[np.float64], number: int) -> NDArray[np.float64]:
    """``[Q, M]`` -> ``[U, M]``."""
    columns = [np.bincount(owners, weights=column, minlength=number) for column in table.T]
    return np.stack(columns, axis=1) if columns else np.zeros((number, 0))


def _draw_means(
    sums: NDArray[np.float64], sizes: NDArray[np.float64], seed: int, resamples: int
) -> list[NDArray[np.float64]]:
    """Parts of ``[resamples, M]``; NaN where nobody who was drawn has a value."""
    draw = np.random.default_rng(seed)
    number = len(sums)
    parts = []
    at_once = max(1, _DRAWS // number)
    for begin in range(0, resamples, at_once):
        times = np.empty((min(at_once, resamples - begin), number))
        for row in times:
            row[:] = np.bincount(draw.integers(number, size=number), minlength=number)
        drawn_sizes = times @ sizes
        drawn_sums = times @ sums
        parts.append(np.divide(drawn_sums, drawn_sizes, out=np.full_like(drawn_sums, np.nan), where=drawn_sizes > 0))
    return parts
