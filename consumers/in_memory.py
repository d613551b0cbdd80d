"""Public fakes of the updater's seams: a topic, a model and a Milvus in memory, for tests without a server."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from threading import Lock

import numpy as np

from consumers.errors import CollectionGone, RowRefused, SinkUnavailable
from consumers.partitioner import murmur2_partition
from consumers.protocols import Record, Row, SourceEvents
from notellm.encoder import EncodedBatch, Tags
from notellm.messages import Note
from notellm.prompt import Prompt

__all__ = ["HashEncoder", "MemoryDeadLetters", "MemoryNoteVectors", "MemorySink", "MemorySource", "MemoryTopic"]


@dataclass
class MemoryTopic:
    """A topic and one group's committed offsets. Outlives the sources that read it, as Kafka does."""

    name: str = "notes"
    partitions: int = 4
    logs: dict[int, list[Record]] = field(default_factory=dict)
    committed: dict[int, int] = field(default_factory=dict)

    def publish(
        self,
        key: bytes | None,
        value: bytes | None,
        *,
        timestamp_ms: int = 0,
        partition: int | None = None,
        gap: int = 0,
    ) -> Record:
        """Append a record; ``gap`` leaves that many offsets out before it, as compaction does."""
        where = partition if partition is not None else murmur2_partition(key or b"", self.partitions)
        log = self.logs.setdefault(where, [])
        offset = (log[-1].offset + 1 if log else 0) + gap
        log.append(Record(self.name, where, offset, timestamp_ms, key, value))
        return log[-1]


class MemorySource:
    """Reads a :class:`MemoryTopic` from its committed offsets; all partitions are assigned at the first poll."""

    def __init__(self, topic: MemoryTopic) -> None:
        self._topic = topic
        self._events: SourceEvents | None = None
        self._next: dict[int, int] = {}
        self._paused = False
        self.pauses = 0

    def subscribe(self, events: SourceEvents) -> None:
        self._events = events
        self.assign(range(self._topic.partitions))

    def assign(self, partitions: Sequence[int] | range) -> None:
        """Hand partitions over, each from its committed offset."""
        starts = {partition: self._topic.committed.get(partition) for partition in partitions}
        self._next.update({partition: start or 0 for partition, start in starts.items()})
        assert self._events is not None
        self._events.assigned(starts)

    def revoke(self, partitions: Sequence[int]) -> None:
        """Take partitions away, as a rebalance does."""
        assert self._events is not None
        self._topic.committed.update(self._events.revoked(partitions))
        for partition in partitions:
            self._next.pop(partition, None)

    def poll(self, timeout_s: float) -> Record | None:
        for partition, position in () if self._paused else self._next.items():
            for record in self._topic.logs.get(partition, []):
                if record.offset >= position:
                    self._next[partition] = record.offset + 1
                    return record
        time.sleep(min(timeout_s, 0.001))
        return None

    def pause(self) -> None:
        self._paused = True
        self.pauses += 1

    def resume(self) -> None:
        self._paused = False

    def commit(self, positions: Mapping[int, int]) -> None:
        self._topic.committed.update(positions)

    def high_watermarks(self) -> Mapping[int, int]:
        logs = self._topic.logs
        return {partition: logs[partition][-1].offset + 1 for partition in self._next if logs.get(partition)}

    def outage(self) -> str:
        return ""

    def close(self) -> None:
        self.revoke(list(self._next))


@dataclass
class MemorySink:
    """Rows by note_id. ``away`` makes every call fail, ``gone`` is a collection that was dropped.

    Rows whose title is in ``refused_titles`` are refused, and those that carry tags in ``refused_tags``.
    """

    rows: dict[str, Row] = field(default_factory=dict)
    away: bool = False
    gone: bool = False
    refused_titles: set[str] = field(default_factory=set)
    refused_tags: set[str] = field(default_factory=set)
    before_upsert: Callable[[Sequence[Row]], None] | None = None
    _lock: Lock = field(default_factory=Lock)

    def stored(self, note_ids: Sequence[str]) -> Mapping[str, Row]:
        self.check()
        with self._lock:
            return {note_id: self.rows[note_id] for note_id in note_ids if note_id in self.rows}

    def upsert(self, rows: Sequence[Row]) -> None:
        self.check()
        if self.before_upsert:
            self.before_upsert(rows)
        refused = [
            row.note_id
            for row in rows
            if row.title in self.refused_titles or self.refused_tags & set(row.generated_hashtags)
        ]
        if refused:
            raise RowRefused(f"{refused[0]!r} is refused")
        if len({row.note_id for row in rows}) != len(rows):
            raise AssertionError("a note_id came twice in one upsert")
        with self._lock:
            self.rows.update({row.note_id: replace(row) for row in rows})

    def delete(self, note_ids: Sequence[str]) -> None:
        self.check()
        with self._lock:
            for note_id in note_ids:
                self.rows.pop(note_id, None)

    def check(self) -> None:
        if self.away:
            raise SinkUnavailable("the in-memory sink is away")
        if self.gone:
            raise CollectionGone("the in-memory collection was dropped")


@dataclass
class MemoryDeadLetters:
    """Keeps what it is sent. Delivery is confirmed at the next :meth:`poll`, as a producer's callbacks are."""

    sent: list[tuple[Record, str]] = field(default_factory=list)
    _waiting: list[Callable[[], None]] = field(default_factory=list)

    def send(self, record: Record, *, stage: str, reason: str, error: Exception, delivered: Callable[[], None]) -> None:
        del stage, error
        self.sent.append((record, reason))
        self._waiting.append(delivered)

    def poll(self) -> None:
        while self._waiting:
            self._waiting.pop(0)()


@dataclass
class MemoryNoteVectors:
    """What a reader of the topic would hold: the last row of each note. Delivery is confirmed at :meth:`poll`."""

    latest: dict[str, Row] = field(default_factory=dict)
    records: int = 0
    held: bool = False
    _waiting: list[Callable[[], None]] = field(default_factory=list)
    _lock: Lock = field(default_factory=Lock)

    def send(self, row: Row, delivered: Callable[[], None], alive: Callable[[], bool]) -> None:
        self._keep(lambda: self.latest.update({row.note_id: row}), delivered, alive)

    def delete(self, note_id: str, delivered: Callable[[], None], alive: Callable[[], bool]) -> None:
        self._keep(lambda: self.latest.pop(note_id, None), delivered, alive)

    def purge(self) -> None:
        """Nothing is ever on its way."""

    def _keep(self, keep: Callable[[], object], delivered: Callable[[], None], alive: Callable[[], bool]) -> None:
        with self._lock:
            if alive():
                keep()
                self.records += 1
                self._waiting.append(delivered)

    def poll(self) -> None:
        """Confirm, unless the brokers are ``held`` up."""
        with self._lock:
            waiting = [] if self.held else self._waiting
            self._waiting = self._waiting if self.held else []
        for delivered in waiting:
            delivered()


class HashEncoder:
    """A model whose embedding is drawn from a hash of the prompt's text: deterministic, other for other text."""

    def __init__(
        self, *, embedding_dim: int = 8, model_version: str = "0123456789abcdef", seconds_per_note: float = 0.0
    ) -> None:
        self.embedding_dim = embedding_dim
        self.model_version = model_version
        self.encoded = 0
        self._seconds_per_note = seconds_per_note

    def prompt(self, note: Note) -> Prompt:
        text = f"{note.title}\n{', '.join(note.hashtags)}\n{note.content[:1000]}"
        return Prompt(text, hashlib.sha256(text.encode()).hexdigest(), [], list(note.hashtags))

    def build_prompts(self, notes: Sequence[Note]) -> list[Prompt]:
        return [self.prompt(note) for note in notes]

    def stream(self, prompts: Sequence[Prompt]) -> Iterator[EncodedBatch]:
        for start in range(0, len(prompts), 8):
            batch = prompts[start : start + 8]
            indices = list(range(start, start + len(batch)))
            embeddings = np.stack([self.embed(prompt.text) for prompt in batch])
            time.sleep(self._seconds_per_note * len(batch))
            yield EncodedBatch(indices, embeddings, None)
            self.encoded += len(batch)
            yield EncodedBatch(indices, embeddings, [Tags(["hash"], "test") for _ in batch])

    def embed(self, text: str) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
        """A unit vector ``[D]`` that only ``text`` decides."""
        seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
        vector = np.random.default_rng(seed).standard_normal(self.embedding_dim).astype(np.float32)
        return (vector / np.linalg.norm(vector)).astype(np.float32)
