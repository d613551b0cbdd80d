"""Which notes run together: batches by token budget, of rows of like length."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["plan_batches"]


def plan_batches(lengths: Sequence[int], *, token_budget: int, max_rows: int) -> list[list[int]]:
    """Indices of ``lengths`` in batches, the shortest first.

    Sorted by length, rows of a batch differ little and padding is small. A batch holds at most ``max_rows`` rows and
    ``rows x longest <= token_budget`` padded tokens; a row that is longer than the budget runs alone.
    """
    batches: list[list[int]] = []
    current: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        # Ascending order: the row that joins is the longest of its batch.
        if current and (len(current) == max_rows or (len(current) + 1) * lengths[index] > token_budget):
            batches.append(current)
            current = []
        current.append(index)
    if current:
        batches.append(current)
    return batches
