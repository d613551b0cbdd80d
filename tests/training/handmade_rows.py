"""Rows as no note would make them: every length, and every place of quote and answer."""

from __future__ import annotations

import torch

from training.note_rows import NoteRow

__all__ = ["PREFIX", "ROWS", "with_emb"]


def _ids(seed: int, size: int) -> list[int]:
    return [int(each) for each in torch.randint(2, 399, (size,), generator=torch.Generator().manual_seed(seed))]


# Longer than the window of the families that have one, as is the second row.
PREFIX = _ids(1, 31)
# The shortest there can be, a long one, one that is asked nothing, one that is nearly all answer.
ROWS = [
    NoteRow(_ids(2, 3), 0, 2),
    NoteRow(_ids(3, 40), 20, 33),
    NoteRow(_ids(4, 9), 8, 9),
    NoteRow(_ids(5, 23), 1, 4),
]


def with_emb(emb: int) -> list[NoteRow]:
    """The same rows with ``[EMB]`` after the quote."""
    return [
        NoteRow([*row.ids[: row.embed_at + 1], emb, *row.ids[row.embed_at + 1 :]], row.embed_at, row.answer_from + 1)
        for row in ROWS
    ]
