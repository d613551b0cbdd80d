"""Which pairs and tasks each step learns from: a pure function of seed and step, so that a resumed run is the same."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from notellm.messages import Note
from notellm.settings import TrainingSettings
from training.note_rows import NoteRows, RowBuilder, Task, pad_rows
from training.note_table import NoteTable
from training.pair_draws import PairDraws
from training.pairs import PairTable

__all__ = ["PairBatch", "PairBatches"]


@dataclass(frozen=True)
class PairBatch:
    """2N notes: ``partner [2N]`` is each one's partner, ``not_negative [2N, 2N]`` as in the contrastive loss.

    Rows ``first`` to ``first + len(rows)`` are this process's own, and only those are in ``rows``; the other two say
    what the whole batch is, over all processes. ``tokens`` are all of its ids but the shared prefix.
    """

    rows: NoteRows
    first: int
    partner: Tensor
    not_negative: Tensor
    answer_tokens: int
    tokens: int

    @property
    def pairs(self) -> int:
        return len(self.partner) // 2


class PairBatches(torch.utils.data.Dataset[PairBatch]):
    """Item s is the batch of step s.

    Pairs are those of :class:`training.pair_draws.PairDraws`. Of the notes ``asked_share`` are asked for one task each:
    hashtags with the share ``hashtag_share``, else its category; for what it has no answer for, the other one, or none.
    ``redraw_partners`` is a control: partners are drawn anew at every step, so that there is nothing to learn.
    """

    def __init__(
        self,
        notes: NoteTable,
        pairs: PairTable,
        builder: RowBuilder,
        settings: TrainingSettings,
        *,
        categories: frozenset[str],
        rank: int = 0,
        processes: int = 1,
        redraw_partners: bool = False,
    ) -> None:
        self._notes, self._builder = notes, builder
        self._settings = settings
        self._categories = categories
        self._draws = PairDraws(pairs, settings, settings.batch_pairs * processes)
        own = 2 * settings.batch_pairs
        self._own = slice(own * rank, own * (rank + 1))
        self._redraw_partners = redraw_partners

    def __len__(self) -> int:
        return self._settings.steps

    def __getitem__(self, step: int) -> PairBatch:
        draw = np.random.default_rng([self._settings.seed, step])
        rows = self._draws.draw(draw)
        if self._redraw_partners:
            rows[1::2] = draw.choice(np.array(self._notes.live_rows()), size=len(rows) // 2)
        built = []
        for row in rows.tolist():
            note = self._notes.note(row)
            built.append(self._builder.row(note, self._task(note, draw), draw))
        own = pad_rows(built[self._own], self._builder.prefix_ids)
        partner = np.arange(len(rows)) ^ 1
        return PairBatch(
            rows=own,
            first=self._own.start,
            partner=torch.from_numpy(partner),
            not_negative=torch.from_numpy(self._draws.not_negative(rows)),
            answer_tokens=sum(len(row.ids) - row.answer_from for row in built),
            tokens=sum(len(row.ids) for row in built),
        )

    def _task(self, note: Note, draw: np.random.Generator) -> Task | None:
        wants_hashtags = draw.random() < self._settings.hashtag_share
        is_asked = self._settings.asked_share == 1 or draw.random() < self._settings.asked_share
        # With its hashtags held back, a note must still have something to be read.
        can_hashtags = bool(note.hashtags) and bool(note.title.strip() or note.content.strip())
        can_category = note.category in self._categories
        if not (self._settings.generative_weight and is_asked and (can_hashtags or can_category)):
            return None
        return "hashtags" if can_hashtags and (wants_hashtags or not can_category) else "category"
