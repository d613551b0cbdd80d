"""What the updater and its encoder's process say to each other: MessagePack over a socket pair, one message a frame."""

from __future__ import annotations

from typing import Literal

import msgspec
import numpy as np

from consumers.protocols import Floats
from notellm.encoder import EncodedBatch, Tags
from notellm.messages import Note
from notellm.prompt import Prompt

__all__ = [
    "Answer",
    "Batch",
    "BuildPrompts",
    "Done",
    "Encode",
    "Failed",
    "Prompts",
    "Ready",
    "Refused",
    "Request",
    "Wire",
]


class BuildPrompts(msgspec.Struct, tag=True, frozen=True):
    """Answered by :class:`Prompts` and :class:`Done`, or :class:`Refused`."""

    notes: list[Note]


class Encode(msgspec.Struct, tag=True, frozen=True):
    """Answered by any number of :class:`Batch` and :class:`Done`, or :class:`Refused`."""

    prompts: list[Prompt]


class Ready(msgspec.Struct, tag=True, frozen=True):
    """The model is loaded, and has encoded a note of its own."""

    model_version: str
    embedding_dim: int
    provider: str


class Prompts(msgspec.Struct, tag=True, frozen=True):
    prompts: list[Prompt]


class Batch(msgspec.Struct, tag=True, frozen=True):
    """An :class:`notellm.encoder.EncodedBatch`; ``embeddings`` is its float32 matrix, row by row."""

    indices: list[int]
    embeddings: bytes
    tags: list[Tags] | None

    @classmethod
    def of(cls, batch: EncodedBatch) -> Batch:
        rows = np.ascontiguousarray(batch.embeddings, np.float32)
        return cls(batch.indices, rows.tobytes(), batch.tags)

    def matrix(self) -> Floats:
        """``[rows, D]``."""
        return np.frombuffer(self.embeddings, np.float32).reshape(len(self.indices), -1)


class Done(msgspec.Struct, tag=True, frozen=True):
    """The request is answered whole."""


class Refused(msgspec.Struct, tag=True, frozen=True):
    """See :class:`notellm.errors.NoteRefused`."""

    index: int
    detail: str


class Failed(msgspec.Struct, tag=True, frozen=True):
    """The last words of a process that ends by itself. ``refused``: an error made for people to read."""

    cause: Literal["refused", "memory", "error"]
    detail: str


Request = BuildPrompts | Encode
Answer = Ready | Prompts | Batch | Done | Refused | Failed


class Wire:
    """Bytes <-> messages."""

    encode = staticmethod(msgspec.msgpack.Encoder().encode)
    request = staticmethod(msgspec.msgpack.Decoder(Request).decode)
    answer = staticmethod(msgspec.msgpack.Decoder(Answer).decode)
