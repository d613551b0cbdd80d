"""The writer's thread: the one writer of the collection. What Milvus acknowledged is reported safe, nothing else."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from queue import Empty, Queue
from threading import Event
from typing import Protocol

from prometheus_client import Counter, Histogram

from consumers.backoff import until_available
from consumers.changes import Change, Outcome, Report
from consumers.encode_stage import Write
from consumers.errors import RowRefused
from consumers.protocols import DeadLetters, Sink
from notellm.settings import UpdaterSettings

__all__ = ["Observer", "WriteStage"]

log = logging.getLogger(__name__)

WRITTEN = Counter("notellm_rows_written_total", "Rows that Milvus acknowledged, by what was done.", ["operation"])
WRITE_SECONDS = Histogram("notellm_write_seconds", "Seconds of one write to Milvus, waiting for it included.")
FRESHNESS_SECONDS = Histogram(
    "notellm_freshness_seconds",
    "Seconds from a note's Kafka timestamp to Milvus's acknowledgement of its vector.",
    buckets=(0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1, 2, 5, 10, 30, 60, 300, 3600),
)


class Observer(Protocol):
    """Is told, from the writer's thread, when a version of a note has become searchable, tagged or deleted."""

    def searchable(self, change: Change, freshness_ms: float) -> None: ...

    def settled(self, change: Change) -> None: ...


class WriteStage:
    """Writes in the order of its inbox: per key, that is the order of the topic."""

    def __init__(
        self,
        inbox: Queue[list[Write]],
        sink: Sink,
        dead_letters: DeadLetters,
        settings: UpdaterSettings,
        *,
        report: Report,
        settle: Callable[[list[Change]], list[Write]],
        observer: Observer | None,
        stop: Event,
    ) -> None:
        self._inbox = inbox
        self._sink = sink
        self._dead_letters = dead_letters
        self._settings = settings
        self._report = report
        self._settle = settle
        self._observer = observer
        self._stop = stop

    def run(self) -> None:
        """Until ``stop`` is set."""
        while not self._stop.is_set():
            try:
                writes = self._inbox.get(timeout=0.1)
            except Empty:
                continue
            self._write(writes)

    def _write(self, writes: list[Write]) -> None:
        # A list of what is left and no recursion: a key with a thousand refused versions is no reason to fall over.
        left = [writes]
        while left:
            group = left.pop()
            self._delete([write for write in group if write.row is None])
            upserts = [write for write in group if write.row is not None]
            try:
                self._upsert(upserts)
            except RowRefused as error:
                if len(upserts) > 1:
                    middle = len(upserts) // 2
                    left += [upserts[middle:], upserts[:middle]]
                else:
                    left.append(self._refuse(upserts[0], error))

    def _upsert(self, writes: list[Write]) -> None:
        self._repeat(writes, lambda alive: self._sink.upsert([write.row for write in alive if write.row is not None]))
        self._done(writes, "upsert")

    def _delete(self, writes: list[Write]) -> None:
        self._repeat(writes, lambda alive: self._sink.delete([write.newest.note_id for write in alive]))
        self._done(writes, "delete")

    def _repeat(self, writes: list[Write], call: Callable[[list[Write]], None]) -> None:
        def attempt() -> None:
            # Looked at again at each try: while Milvus was away, the partition may have got another owner.
            alive = [write for write in writes if not write.newest.lease.over]
            if alive:
                call(alive)

        if not writes:
            return
        with WRITE_SECONDS.time():
            until_available(attempt, stop=self._stop, longest_wait_s=self._settings.retry_max_s)

    def _done(self, writes: list[Write], operation: str) -> None:
        now_ms = time.time() * 1000
        for write in writes:
            ours = not write.newest.lease.over  # else it was left to the next owner
            if ours and write.first and write.row is not None:
                freshness_ms = max(now_ms - write.newest.record.timestamp_ms, 0.0)
                FRESHNESS_SECONDS.observe(freshness_ms / 1000)
                if self._observer:
                    self._observer.searchable(write.newest, freshness_ms)
            if not write.final:
                continue
            if ours:
                WRITTEN.labels(operation).inc()
            for change in write.versions:
                self._report(Outcome(change.lease, change.record.offset, safe=True))
                if ours and self._observer:
                    self._observer.settled(change)

    def _refuse(self, write: Write, error: RowRefused) -> list[Write]:
        """The newest version becomes a dead letter; the answer is what to write of the one before it."""
        if not write.final:
            return []  # its final write comes next, and decides
        refused = write.newest
        log.warning("Milvus refuses note %r at offset %d: %s", refused.note_id, refused.record.offset, error)
        self._dead_letters.send(
            refused.record,
            stage="TASK_PUT",
            reason="milvus_refused",
            error=error,
            delivered=lambda: self._report(Outcome(refused.lease, refused.record.offset, safe=True)),
        )
        return self._settle(write.versions[:-1]) if len(write.versions) > 1 else []
