"""What :class:`consumers.in_memory.HashEncoder` must say, computed again without it: a judge borrows nothing."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from notellm.messages import Note

__all__ = ["HashReference"]


@dataclass(frozen=True)
class HashReference:
    """See :class:`commands.checker.Reference`."""

    model_version: str = "0123456789abcdef"
    embedding_dim: int = 8
    categories: Sequence[str] = ("test",)

    def text_hash(self, note: Note) -> str:
        return hashlib.sha256(self._text(note)).hexdigest()

    def embed(self, notes: Sequence[Note]) -> NDArray[np.float32]:
        rows = []
        for note in notes:
            seed = int.from_bytes(hashlib.sha256(self._text(note)).digest()[:8], "big")
            row = np.random.default_rng(seed).standard_normal(self.embedding_dim).astype(np.float32)
            rows.append(row / np.linalg.norm(row))
        return np.stack(rows)

    def _text(self, note: Note) -> bytes:
        return "\n".join([note.title, ", ".join(note.hashtags), note.content[:1000]]).encode()
