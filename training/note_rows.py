"""Notes as the model reads them in training: prompt, ``[EMB]``, guidance and answer in one row of ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal, TypeAlias

import msgspec
import numpy as np
import torch
from torch import Tensor

from notellm.messages import Note
from notellm.prompt import PromptBuilder

__all__ = [
    "ANSWER_TOKENS",
    "NO_LABEL",
    "HeldBack",
    "NoteRow",
    "NoteRows",
    "RowBuilder",
    "Task",
    "in_order_of_rows",
    "pad_rows",
]

NO_LABEL: Final = -100
# Hashtags are written by strangers: 32 of 64 Chinese characters are thousands of tokens, and a batch is as wide as its
# widest row. The encoder writes fewer than these.
ANSWER_TOKENS: Final = 48
Task: TypeAlias = Literal["hashtags", "category"]
HeldBack: TypeAlias = Literal["one", "some", "all"]


class NoteRow(msgspec.Struct, frozen=True):
    """``ids`` follow the shared prefix; ``embed_at`` is the opening quote; from ``answer_from`` on they are the answer.

    ``answer_from`` is ``len(ids)`` where there is no answer.
    """

    ids: list[int]
    embed_at: int
    answer_from: int


@dataclass(frozen=True)
class NoteRows:
    """B rows padded on the right to S ids: ``prefix [P]``, ``ids``, ``mask`` and ``labels [B, S]``, ``embed_at [B]``.

    ``labels`` holds the id where the answer is, and :data:`NO_LABEL` elsewhere; None asks for embeddings only.
    """

    prefix: Tensor
    ids: Tensor
    mask: Tensor
    embed_at: Tensor
    labels: Tensor | None

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def answer_tokens(self) -> int:
        return 0 if self.labels is None else int((self.labels != NO_LABEL).sum())

    @property
    def tokens(self) -> int:
        """Ids that the model reads, the prefix once, no padding."""
        return int(self.mask.sum()) + len(self.prefix)

    def to(self, device: torch.device) -> NoteRows:
        return NoteRows(
            self.prefix.to(device),
            self.ids.to(device),
            self.mask.to(device),
            self.embed_at.to(device),
            None if self.labels is None else self.labels.to(device),
        )

    def by_length(self, count: int) -> list[Tensor]:
        """All rows' indices in parts of ``count``, those of like length together: a part is as wide as its longest."""
        order = self.mask.sum(dim=1).argsort(stable=True)
        return [order[start : start + count] for start in range(0, len(order), count)]

    def part(self, rows: Tensor | slice, *, embeddings_only: bool = False) -> NoteRows:
        """Some rows, without the padding and, for embeddings only, without the answers that they do not need."""
        embed_at = self.embed_at[rows]
        longest = int(embed_at.max() + 1 if embeddings_only else self.mask[rows].sum(dim=1).max())
        part = replace(
            self,
            ids=self.ids[rows, :longest],
            mask=self.mask[rows, :longest],
            embed_at=embed_at,
            labels=None if embeddings_only or self.labels is None else self.labels[rows, :longest],
        )
        if embeddings_only:
            before = torch.arange(longest, device=embed_at.device) <= embed_at[:, None]
            part = replace(part, mask=part.mask * before)
        return part


def in_order_of_rows(parts: Sequence[Tensor], found: Sequence[Tensor]) -> Tensor:
    """What was found for the rows of each part of :meth:`NoteRows.by_length`, ``[B, ...]`` in the rows' own order."""
    return torch.cat(list(found))[torch.cat(list(parts)).argsort()]


class RowBuilder:
    """Turns a note and a task into a :class:`NoteRow`, just as the encoder will read and ask."""

    def __init__(
        self,
        prompts: PromptBuilder,
        answer_prefix: str,
        end_id: int,
        held_back: HeldBack,
        category_hashtags: float = 1.0,
    ) -> None:
        self._prompts = prompts
        self._answer_prefix = answer_prefix
        self._end_id = end_id
        self._held_back = held_back
        self._category_hashtags = category_hashtags
        self.prefix_ids = prompts.prefix_ids

    @property
    def longest_question(self) -> int:
        """No row has more ids before its answer."""
        return self._prompts.max_ids + max(len(self._prompts.hashtags_ids), len(self._prompts.category_ids))

    def row(self, note: Note, task: Task | None, draw: np.random.Generator) -> NoteRow:
        """The row of ``note``. Of its hashtags, those that are asked for are drawn, and do not stand in its prompt.

        An answer longer than :data:`ANSWER_TOKENS` loses its last hashtags; a row without any answer is left to embed.
        """
        answers: list[str] = []
        if task == "hashtags":
            kept, answers = self._hold_back(note.hashtags, draw)
            note = msgspec.structs.replace(note, hashtags=kept)
        elif task == "category":
            answers = [note.category]
            note = self._without_hashtags(note, draw)
        prompt = self._prompts.build(note)
        told = self._tell(answers)
        if not told:
            return NoteRow(prompt.ids, prompt.last_index, len(prompt.ids))
        guidance = self._prompts.hashtags_ids if task == "hashtags" else self._prompts.category_ids
        asks = [*prompt.ids, *guidance]
        return NoteRow([*asks, *told], prompt.last_index, len(asks))

    def _tell(self, answers: list[str]) -> list[int]:
        """Ids of as many of them as fit, and the end's; none where not even the first does."""
        while answers:
            told = [*self._prompts.encode_answer(self._answer_prefix + ", ".join(answers)), self._end_id]
            if len(told) <= ANSWER_TOKENS:
                return told
            answers = answers[:-1]
        return []

    def _without_hashtags(self, note: Note, draw: np.random.Generator) -> Note:
        """Now and then; never where they are all that there is to read."""
        keeps = draw.random() < self._category_hashtags
        return note if keeps or not (note.title + note.content).strip() else msgspec.structs.replace(note, hashtags=[])

    def _hold_back(self, hashtags: list[str], draw: np.random.Generator) -> tuple[list[str], list[str]]:
        """Those that stay in the prompt, and those that are the answer (the paper: one), each in the author's order."""
        most = {"one": 1, "some": int(draw.integers(1, len(hashtags) + 1)), "all": len(hashtags)}[self._held_back]
        asked = set(draw.choice(len(hashtags), size=most, replace=False).tolist())
        kept = [tag for place, tag in enumerate(hashtags) if place not in asked]
        return kept, [tag for place, tag in enumerate(hashtags) if place in asked]


def pad_rows(rows: Sequence[NoteRow], prefix_ids: Sequence[int]) -> NoteRows:
    """One batch of ``rows``. Padding is id 0, which the mask hides."""
    longest = max(len(row.ids) for row in rows)
    ids = np.zeros((len(rows), longest), np.int64)
    mask = np.zeros((len(rows), longest), np.int64)
    labels = np.full((len(rows), longest), NO_LABEL, np.int64)
    for place, row in enumerate(rows):
        size = len(row.ids)
        ids[place, :size] = row.ids
        mask[place, :size] = 1
        labels[place, row.answer_from : size] = row.ids[row.answer_from :]
    return NoteRows(
        prefix=torch.tensor(list(prefix_ids)),
        ids=torch.from_numpy(ids),
        mask=torch.from_numpy(mask),
        embed_at=torch.tensor([row.embed_at for row in rows]),
        labels=torch.from_numpy(labels),
    )
