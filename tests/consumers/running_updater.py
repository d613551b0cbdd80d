"""An updater on the in-memory fakes, in a thread, with everything a test needs to watch it and to get in its way."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from threading import Event, Thread
from types import TracebackType
from typing import Any

import msgspec

from consumers.changes import Change
from consumers.in_memory import HashEncoder, MemoryDeadLetters, MemoryNoteVectors, MemorySink, MemorySource, MemoryTopic
from consumers.protocols import Record, Row
from consumers.updater import Updater
from notellm.settings import UpdaterSettings
from tests.support.processes import wait_until

__all__ = [
    "DirectedSource",
    "RunningUpdater",
    "WatchedSink",
    "committed_to_the_end",
    "ends",
    "note",
    "titles",
    "wait_until",
]


def note(note_id: str, title: str = "Kyoto in autumn", **fields: Any) -> bytes:
    return msgspec.json.encode({"note_id": note_id, "title": title, **fields})


class DirectedSource(MemorySource):
    """Does what a test orders from inside :meth:`poll`, which is where rebalances happen."""

    def __init__(self, topic: MemoryTopic) -> None:
        super().__init__(topic)
        self.polls = 0
        self.closed = False
        self._orders: SimpleQueue[tuple[Callable[[], None], Event]] = SimpleQueue()

    def order(self, action: Callable[[], None]) -> Event:
        """The event is set once ``action`` is done."""
        done = Event()
        self._orders.put((action, done))
        return done

    def poll(self, timeout_s: float) -> Record | None:
        self.polls += 1
        try:
            action, done = self._orders.get_nowait()
        except Empty:
            return super().poll(timeout_s)
        action()
        done.set()
        return None

    def lose(self, partitions: Sequence[int]) -> None:
        """The group has given the partitions away already, without asking."""
        assert self._events is not None
        for partition in partitions:
            self._next.pop(partition, None)
        self._events.lost(partitions)

    def close(self) -> None:
        self.closed = True
        super().close()


@dataclass
class WatchedSink(MemorySink):
    """Remembers every acknowledged row and deletion; while ``gate`` is not set, writes wait for it."""

    upserted: list[Row] = field(default_factory=list)
    deleted: list[str] = field(default_factory=list)
    gate: Event = field(default_factory=Event)
    waiting: Event = field(default_factory=Event)

    def __post_init__(self) -> None:
        self.gate.set()

    def upsert(self, rows: Sequence[Row]) -> None:
        self.waiting.set()
        assert self.gate.wait(20)
        super().upsert(rows)
        self.upserted += rows

    def delete(self, note_ids: Sequence[str]) -> None:
        super().delete(note_ids)
        self.deleted += note_ids


@dataclass
class Watcher:
    """Everything that the observer was told."""

    searchable_versions: list[tuple[str, int]] = field(default_factory=list)
    settled_versions: list[tuple[str, int]] = field(default_factory=list)

    def searchable(self, change: Change, freshness_ms: float) -> None:
        assert freshness_ms >= 0
        self.searchable_versions.append((change.note_id, change.record.offset))

    def settled(self, change: Change) -> None:
        self.settled_versions.append((change.note_id, change.record.offset))


class RunningUpdater:
    """``with RunningUpdater(topic) as running``: it runs inside; leaving stops it and raises what it raised."""

    def __init__(
        self,
        topic: MemoryTopic,
        *,
        source: MemorySource | None = None,
        sink: Any = None,
        encoder: HashEncoder | None = None,
        dead_letters: MemoryDeadLetters | None = None,
        note_vectors: MemoryNoteVectors | None = None,
        topic_partitions: int | None = None,
        **settings: Any,
    ) -> None:
        self.topic = topic
        self.source = source or DirectedSource(topic)
        self.sink = sink or WatchedSink()
        self.encoder = encoder or HashEncoder()
        self.dead_letters = dead_letters or MemoryDeadLetters()
        self.observer = Watcher()
        self.error: Exception | None = None
        self.updater = Updater(
            self.source,
            self.encoder,
            self.sink,
            self.dead_letters,
            UpdaterSettings(
                **{"commit_interval_s": 0.005, "retry_max_s": 0.02, "drain_timeout_s": 5.0, **settings},
            ),
            note_vectors=note_vectors,
            source_epoch="epoch",
            topic_partitions=topic_partitions,
            observer=self.observer,
        )
        self._thread = Thread(target=self._run, daemon=True)

    def start(self) -> RunningUpdater:
        self._thread.start()
        return self

    def stop(self) -> None:
        """Returns once it has stopped; raises nothing."""
        self.updater.stop()
        self.join()

    def join(self, seconds: float = 20.0) -> None:
        self._thread.join(seconds)
        assert not self._thread.is_alive(), "the updater does not end"

    def wait_until_done(self) -> None:
        """Every record of the topic is committed."""
        wait_until(lambda: self.error is not None or committed_to_the_end(self.topic), "everything to be committed")
        if self.error is not None:
            raise self.error

    @property
    def ended(self) -> bool:
        return not self._thread.is_alive()

    @property
    def dead(self) -> list[tuple[int, int, str]]:
        """The dead letters: partition, offset, reason."""
        return [(record.partition, record.offset, reason) for record, reason in self.dead_letters.sent]

    def _run(self) -> None:
        try:
            self.updater.run()
        except Exception as error:  # noqa: BLE001 - the test looks at it
            self.error = error

    def __enter__(self) -> RunningUpdater:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        if error is None and self.error is not None:
            raise self.error


def ends(topic: MemoryTopic) -> dict[int, int]:
    """Behind the last record of every partition that has one."""
    return {partition: records[-1].offset + 1 for partition, records in topic.logs.items() if records}


def committed_to_the_end(topic: MemoryTopic) -> bool:
    return {partition: position for partition, position in topic.committed.items() if position} == ends(topic)


def titles(rows: Mapping[str, Row] | Iterable[Row]) -> dict[str, str]:
    listed = rows.values() if isinstance(rows, Mapping) else rows
    return {row.note_id: row.title for row in listed}
