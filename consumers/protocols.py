"""The updater's seams: what it needs of Kafka, of the model and of Milvus. ``in_memory.py`` has a fake of each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from notellm.encoder import EncodedBatch
from notellm.messages import Note, Scalar
from notellm.prompt import Prompt

__all__ = ["DeadLetters", "Encoder", "NoteVectors", "Record", "Row", "Sink", "Source", "SourceEvents"]

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Record:
    """One Kafka record, as it came. ``timestamp_ms`` is the time Kafka gives it."""

    topic: str
    partition: int
    offset: int
    timestamp_ms: int
    key: bytes | None
    value: bytes | None
    headers: tuple[tuple[str, bytes | None], ...] = ()


@dataclass(frozen=True)
class Row:
    """One row of the collection; its fields are DESIGN's. ``text_hash`` is empty while its tags are not written."""

    note_id: str
    embedding: Floats
    title: str
    hashtags: list[str]
    category: str
    generated_hashtags: list[str]
    generated_category: str
    published_at: int
    model_version: str
    text_hash: str
    source_epoch: str
    source_partition: int
    source_offset: int
    attributes: dict[str, Scalar] = field(default_factory=dict)


class Encoder(Protocol):
    """The model. One thread at a time calls it. :class:`notellm.encoder.NoteEncoder` is one."""

    @property
    def model_version(self) -> str: ...

    @property
    def embedding_dim(self) -> int: ...

    def build_prompts(self, notes: Sequence[Note]) -> list[Prompt]:
        """The text that the model would read of each. Raises as :meth:`stream` does."""

    def stream(self, prompts: Sequence[Prompt]) -> Iterator[EncodedBatch]:
        """Each row's embedding first, later its tags.

        Raises :class:`notellm.errors.NoteRefused` when one note cannot be encoded, and
        :class:`consumers.errors.EncoderUnavailable` when none can be now.
        """


class Sink(Protocol):
    """Milvus. Every method raises :class:`SinkUnavailable` when it should be called again later."""

    def stored(self, note_ids: Sequence[str]) -> Mapping[str, Row]:
        """Rows that are there, whole; a stale answer does no harm."""

    def upsert(self, rows: Sequence[Row]) -> None:
        """Write rows of distinct note_ids; returns once they are acknowledged. Raises :class:`RowRefused`."""

    def delete(self, note_ids: Sequence[str]) -> None:
        """Delete; an id that is not there is no error."""

    def check(self) -> None:
        """Raises :class:`UpdaterError` when the collection is not the one that we began with any more."""


class DeadLetters(Protocol):
    """Where records go that are no notes. Thread-safe."""

    def send(self, record: Record, *, stage: str, reason: str, error: Exception, delivered: Callable[[], None]) -> None:
        """Hand over; ``delivered`` is called once the dead letter is safe, from whichever thread polls."""

    def poll(self) -> None:
        """Let callbacks run."""


class NoteVectors(Protocol):
    """Where acknowledged rows are published again, for whoever reads Kafka and not Milvus. Thread-safe.

    Per note, the order of the calls is the order in the topic.
    """

    def send(self, row: Row, delivered: Callable[[], None], alive: Callable[[], bool]) -> None:
        """Hand over; ``delivered`` is called once the record is safe, from whichever thread polls.

        Once ``alive`` says no, the record has lost its right to be written, and nothing more is heard of it.
        """

    def delete(self, note_id: str, delivered: Callable[[], None], alive: Callable[[], bool]) -> None:
        """Hand over a tombstone; otherwise as :meth:`send`."""

    def poll(self) -> None:
        """Let callbacks run."""

    def purge(self) -> None:
        """Take back whatever is not delivered and not alive any more."""


class SourceEvents(Protocol):
    """What a source tells its owner, always from inside :meth:`Source.poll` or :meth:`Source.close`."""

    def assigned(self, starts: Mapping[int, int | None]) -> None:
        """These partitions are ours from now on, each read from its committed offset; None: from its beginning."""

    def revoked(self, partitions: Iterable[int]) -> Mapping[int, int]:
        """These are about to go: finish what is in flight; the answer's offsets are committed before they go."""

    def lost(self, partitions: Iterable[int]) -> None:
        """These are gone already; nothing can be committed any more."""


class Source(Protocol):
    """Kafka. Only its owner's thread calls it."""

    def subscribe(self, events: SourceEvents) -> None: ...

    def poll(self, timeout_s: float) -> Record | None:
        """The next record, or None. Rebalances happen in here."""

    def pause(self) -> None:
        """Deliver nothing more, of any partition, until :meth:`resume`; stay in the group."""

    def resume(self) -> None: ...

    def commit(self, positions: Mapping[int, int]) -> None:
        """Store, without waiting, the next offset to read of each partition."""

    def high_watermarks(self) -> Mapping[int, int]:
        """Of each assigned partition, the offset behind its last record, as far as it is known; never waits."""

    def outage(self) -> str:
        """Why no broker can be reached now, or ""."""

    def close(self) -> None:
        """Leave the group; calls ``revoked`` for what is still assigned."""
