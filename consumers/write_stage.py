"""The writer's thread: the one writer of the collection. What Milvus acknowledged is reported safe, nothing else."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from queue import Empty, Queue
from threading import Event
from typing import Protocol

from prometheus_client import Counter, Histogram

from consumers.backoff import Patience
from consumers.changes import Change, Outcome, Report
from consumers.encode_stage import Refusal, Write, without_tags
from consumers.errors import RowRefused
from consumers.protocols import DeadLetters, NoteVectors, Sink

__all__ = ["Observer", "WriteStage"]

log = logging.getLogger(__name__)

WRITTEN = Counter("notellm_rows_written_total", "Rows that Milvus acknowledged, by what was done.", ["operation"])
WRITE_SECONDS = Histogram("notellm_write_seconds", "Seconds of one write to Milvus, waiting for it included.")
FRESHNESS_SECONDS = Histogram(
    "notellm_freshness_seconds",
    "Seconds from a note's Kafka timestamp to Milvus's acknowledgement of its vector.",
    buckets=(0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1, 2, 5, 10, 30, 60, 300, 3600),
)


_CHECK_SECONDS = 10.0


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
        note_vectors: NoteVectors | None,
        *,
        report: Report,
        settle: Callable[[list[Change]], list[Write]],
        observer: Observer | None,
        patience: Patience,
        stop: Event,
    ) -> None:
        self._inbox = inbox
        self._sink = sink
        self._dead_letters = dead_letters
        self._note_vectors = note_vectors
        self._report = report
        self._settle = settle
        self._observer = observer
        self._patience = patience
        self._checked = time.monotonic()
        self._check_first = Event()
        self._stop = stop

    def run(self) -> None:
        """Until ``stop`` is set."""
        while not self._stop.is_set():
            writes: list[Write] = []
            with suppress(Empty):
                writes = self._inbox.get(timeout=0.1)
            self._check_now_and_then()
            if writes:
                self._write(writes)

    def check_first(self) -> None:
        """Look at the collection again before anything that is handed over from now on is written.

        To be called when partitions come. Their last owner may have left because the collection was dropped, and fills
        a new one of that name by now: what we wrote to it could be older than what it wrote.
        """
        self._check_first.set()

    def _check_now_and_then(self) -> None:
        """A collection may be dropped while there is nothing to write to it."""
        if self._check_first.is_set() or time.monotonic() - self._checked >= _CHECK_SECONDS:
            self._check_first.clear()
            self._patience.until_available(self._sink.check)
            self._checked = time.monotonic()

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
            self._patience.until_available(attempt)

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
            self._publish(write) if ours and self._note_vectors else self._finish(write, ours=ours)

    def _publish(self, write: Write) -> None:
        assert self._note_vectors is not None

        def delivered() -> None:
            self._finish(write, ours=True)

        def alive() -> bool:
            return not write.newest.lease.over

        if write.row is None:
            self._note_vectors.delete(write.newest.note_id, delivered, alive)
        else:
            self._note_vectors.send(write.row, delivered, alive)

    def _finish(self, write: Write, *, ours: bool) -> None:
        """The versions are safe now; all but one that was refused and is no dead letter yet."""
        for change in write.versions:
            if ours and write.refused and change is write.newest:
                self._send_dead_letter(change, write.refused)
            else:
                self._report(Outcome(change.lease, change.record.offset, safe=True))
            if ours and self._observer:
                self._observer.settled(change)

    def _refuse(self, write: Write, error: RowRefused) -> list[Write]:
        """The newest version becomes a dead letter; the answer is what to write instead."""
        if not write.final:
            return []  # its final write comes next, and decides
        refused = write.newest
        log.warning("Milvus refuses note %r at offset %d: %s", refused.note_id, refused.record.offset, error)
        if not write.first and write.row is not None and write.row.text_hash:
            # It took the vector: the tags are to blame.
            return [replace(write, row=without_tags(write.row), refused=Refusal(reason="tags_refused", error=error))]
        self._send_dead_letter(refused, Refusal(reason="milvus_refused", error=error))
        return self._settle(write.versions[:-1]) if len(write.versions) > 1 else []

    def _send_dead_letter(self, change: Change, refusal: Refusal) -> None:
        self._dead_letters.send(
            change.record,
            stage="TASK_PUT",
            reason=refusal.reason,
            error=refusal.error,
            delivered=lambda: self._report(Outcome(change.lease, change.record.offset, safe=True)),
        )
