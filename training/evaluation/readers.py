"""Asking a model: anything that reads notes as :class:`notellm.encoder.NoteEncoder` does, whatever runs below it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray

from notellm.encoder import EncodedBatch, Tags
from notellm.messages import Note
from notellm.prompt import Prompt

__all__ = ["NoteReader", "Progress", "read_embeddings", "read_tags"]

# Of a long list, so that the prompts of all notes never stand in memory at once.
_AT_ONCE = 512

Progress = Callable[[float], None]


class NoteReader(Protocol):
    def build_prompts(self, notes: Sequence[Note]) -> list[Prompt]: ...

    def stream(self, prompts: Sequence[Prompt], *, embed_only: bool = False) -> Iterator[EncodedBatch]: ...


def read_tags(reader: NoteReader, notes: Sequence[Note], progress: Progress = lambda share: None) -> list[Tags]:
    """What the model says of each note, its author's hashtags withheld: it cannot copy what it does not see."""
    found: list[Tags | None] = [None] * len(notes)
    withheld = [msgspec.structs.replace(note, hashtags=[]) for note in notes]
    for begin, batch in _batches(reader, withheld, progress, embed_only=False):
        for index, tags in zip(batch.indices, batch.tags or (), strict=bool(batch.tags)):
            found[begin + index] = tags
    return [tags for tags in found if tags is not None]


def read_embeddings(
    reader: NoteReader, notes: Sequence[Note], progress: Progress = lambda share: None
) -> NDArray[np.float32]:
    """``[N, D]``: the notes as they were published, as the updater embeds them. ``[0, 0]`` of no notes."""
    parts: list[NDArray[np.float32]] = [np.zeros((0, 0), np.float32)] * len(notes)
    for begin, batch in _batches(reader, notes, progress, embed_only=True):
        for index, embedding in zip(batch.indices, batch.embeddings, strict=True):
            parts[begin + index] = embedding
    return np.stack(parts) if parts else np.zeros((0, 0), np.float32)


def _batches(
    reader: NoteReader, notes: Sequence[Note], progress: Progress, *, embed_only: bool
) -> Iterator[tuple[int, EncodedBatch]]:
    done = 0
    for begin in range(0, len(notes), _AT_ONCE):
        for batch in reader.stream(reader.build_prompts(notes[begin : begin + _AT_ONCE]), embed_only=embed_only):
            yield begin, batch
            if embed_only or batch.tags is not None:
                done += len(batch.indices)
                progress(done / len(notes))
