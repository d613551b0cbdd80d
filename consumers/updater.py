"""The updater's heart: one poller that owns the source, and two stages behind queues.

::

    source -> poller -> [inbox] -> encode stage -> [outbox] -> write stage -> sink
                 ^------------------ outcomes: what is safe -------------------'

The poller never waits for the model or for Milvus: it pauses its partitions when enough is in flight, and keeps
polling, so that the updater stays in its group however long Milvus is away. The one exception is a revocation.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from threading import Event, Thread

from prometheus_client import Counter, Gauge

from consumers.backoff import Patience
from consumers.changes import Change, Lease, Outcome
from consumers.encode_stage import EncodeStage
from consumers.errors import Stopped
from consumers.offsets import OffsetTracker
from consumers.outages import Outages
from consumers.partitioner import murmur2_partition
from consumers.protocols import DeadLetters, Encoder, NoteVectors, Record, Sink, Source
from consumers.write_stage import Observer, WriteStage
from notellm.errors import InvalidMessage
from notellm.messages import Tombstone, parse_record
from notellm.settings import UpdaterSettings

__all__ = ["Updater"]

log = logging.getLogger(__name__)

RECORDS = Counter("notellm_records_total", "Records read from the notes topic, by what they are.", ["kind"])
TRIMMED = Counter("notellm_notes_trimmed_total", "Fields that were cut to their limit.", ["field"])
MISPLACED = Counter("notellm_misplaced_keys_total", "Records on another partition than murmur2 of their key.")
LAG = Gauge("notellm_consumer_lag", "Records of a partition of ours that are not safe yet.", ["partition"])
IN_FLIGHT = Gauge("notellm_notes_in_flight", "Records read and not yet safe.")

_SILENCE_SECONDS = 60.0


@dataclass
class _Assignment:
    lease: Lease
    start: int | None
    offsets: OffsetTracker = field(default_factory=OffsetTracker)
    committed: int | None = None

    @property
    def safe(self) -> int:
        """Every record before it is safe."""
        return self.offsets.position or self.start or 0


class Updater:
    """Reads, encodes and writes notes; commits what is safe. :meth:`run` blocks until :meth:`stop` or an error."""

    def __init__(
        self,
        source: Source,
        encoder: Encoder,
        sink: Sink,
        dead_letters: DeadLetters,
        settings: UpdaterSettings,
        *,
        note_vectors: NoteVectors | None = None,
        source_epoch: str = "",
        topic_partitions: int | None = None,
        observer: Observer | None = None,
    ) -> None:
        self._source = source
        self._dead_letters = dead_letters
        self._note_vectors = note_vectors
        self._settings = settings
        self._topic_partitions = topic_partitions
        self._assignments: dict[int, _Assignment] = {}
        self._outcomes: SimpleQueue[Outcome] = SimpleQueue()
        self._failure: Exception | None = None
        self._asked_to_stop = Event()
        self._stages_stop = Event()
        self._paused = False
        self._said_misplaced = False
        self._last_commit = self._last_turn = time.monotonic()
        self._joined = False
        self._outages = Outages()
        patience = Patience(self._stages_stop, settings.retry_max_s, self._outages)
        self._encode_stage = EncodeStage(
            encoder, sink, dead_letters, settings,
            source_epoch=source_epoch, report=self._outcomes.put, patience=patience, stop=self._stages_stop,
        )  # fmt: skip
        self._write_stage = WriteStage(
            self._encode_stage.outbox, sink, dead_letters, note_vectors,
            report=self._outcomes.put, settle=self._encode_stage.settle, observer=observer,
            patience=patience, stop=self._stages_stop,
        )  # fmt: skip

    def stop(self) -> None:
        """Ask :meth:`run` to finish what is in flight, commit it and return. Safe from a signal handler."""
        self._asked_to_stop.set()

    def run(self) -> None:
        """Raises what ended a stage or the source; what was safe by then is committed, the rest is read again."""
        stages = [
            Thread(target=self._guard, args=(stage.run,), name=name, daemon=True)
            for name, stage in (("encode", self._encode_stage), ("write", self._write_stage))
        ]
        for stage in stages:
            stage.start()
        try:
            self._source.subscribe(self)
            while not self._asked_to_stop.is_set() and self._failure is None:
                self._turn()
        finally:
            try:
                self._source.close()
            finally:
                self._stages_stop.set()
                for stage in stages:
                    stage.join(timeout=self._settings.drain_timeout_s)
        if self._failure is not None:
            raise self._failure

    def health(self) -> list[str]:
        """What only a restart would mend; empty while all is well. Any thread may ask."""
        silent = time.monotonic() - self._last_turn
        # A drain may hold the poller for as long as it is allowed to.
        if silent > self._settings.drain_timeout_s + _SILENCE_SECONDS:
            return [f"the poller has not turned for {silent:.0f} s"]
        return [str(self._failure)] if self._failure is not None else []

    def readiness(self) -> list[str]:
        """What keeps notes from being taken in now; empty while they are. Any thread may ask."""
        joining = [] if self._joined else ["waiting for the consumer group to assign partitions"]
        brokers = [f"waiting for Kafka: {outage}" for outage in [self._source.outage()] if outage]
        return [*self.health(), *joining, *brokers, *self._outages.reasons()]

    def _turn(self) -> None:
        self._last_turn = time.monotonic()
        self._absorb()
        self._poll_producers()
        self._pause_or_resume()
        record = self._source.poll(0.05)
        if record is not None:
            self._accept(record)
        if time.monotonic() - self._last_commit >= self._settings.commit_interval_s:
            self._commit()

    def _accept(self, record: Record) -> None:
        assignment = self._assignments.get(record.partition)
        if assignment is None or not assignment.offsets.deliver(record.offset):
            return
        self._look_for_misplaced_key(record)
        try:
            parsed = parse_record(record.key, record.value, record.timestamp_ms)
        except InvalidMessage as error:
            RECORDS.labels("dead_letter").inc()
            lease, offset = assignment.lease, record.offset
            self._dead_letters.send(
                record,
                stage="VALUE_CONVERTER",
                reason=error.reason,
                error=error,
                delivered=lambda: self._outcomes.put(Outcome(lease, offset, safe=True)),
            )
            return
        if isinstance(parsed, Tombstone):
            RECORDS.labels("tombstone").inc()
            self._encode_stage.inbox.put(Change(record, assignment.lease, parsed.note_id, None))
        else:
            RECORDS.labels("note").inc()
            for name in parsed.trimmed:
                TRIMMED.labels(name).inc()
            self._encode_stage.inbox.put(Change(record, assignment.lease, parsed.note.note_id, parsed.note))

    def _look_for_misplaced_key(self, record: Record) -> None:
        if not self._topic_partitions or not record.key:
            return
        expected = murmur2_partition(record.key, self._topic_partitions)
        if expected != record.partition:
            if not self._said_misplaced:  # say it once, count it always
                self._said_misplaced = True
                log.warning(
                    "key %r is on partition %d, murmur2 puts it on %d: a key on two partitions has no order; "
                    "every writer of %s must partition with murmur2 (kcat: -X partitioner=murmur2_random)",
                    record.key[:64], record.partition, expected, record.topic,
                )  # fmt: skip
            MISPLACED.inc()

    def _poll_producers(self) -> None:
        self._dead_letters.poll()
        if self._note_vectors is not None:
            self._note_vectors.poll()

    def _pause_or_resume(self) -> None:
        in_flight = sum(assignment.offsets.in_flight for assignment in self._assignments.values())
        IN_FLIGHT.set(in_flight)
        if not self._paused and in_flight >= self._settings.queue_notes:
            self._source.pause()
            self._paused = True
        elif self._paused and in_flight <= self._settings.queue_notes // 2:
            self._source.resume()
            self._paused = False

    def _absorb(self, wait_s: float = 0.0) -> None:
        """Take in all outcomes that are there; wait for the first one for at most ``wait_s``."""
        try:
            outcome = self._outcomes.get(timeout=wait_s) if wait_s else self._outcomes.get_nowait()
            while True:
                assignment = self._assignments.get(outcome.lease.partition)
                # An outcome of an earlier assignment says nothing about this one's offsets.
                if assignment is not None and assignment.lease is outcome.lease:
                    if outcome.safe:
                        assignment.offsets.acknowledge(outcome.offset)
                    else:
                        assignment.offsets.abandon(outcome.offset)
                outcome = self._outcomes.get_nowait()
        except Empty:
            return

    def _commit(self) -> None:
        self._last_commit = time.monotonic()
        self._measure_lag()
        positions = {
            partition: position
            for partition, position in self._positions(self._assignments).items()
            if position != self._assignments[partition].committed
        }
        if positions:
            self._source.commit(positions)
            for partition, position in positions.items():
                self._assignments[partition].committed = position

    def _measure_lag(self) -> None:
        for partition, end in self._source.high_watermarks().items():
            assignment = self._assignments.get(partition)
            if assignment is not None:
                LAG.labels(str(partition)).set(max(end - assignment.safe, 0))

    def _positions(self, partitions: Iterable[int]) -> dict[int, int]:
        """Of each partition, the offset to commit, where there is one."""
        positions = {partition: self._assignments[partition].offsets.position for partition in partitions}
        return {partition: position for partition, position in positions.items() if position is not None}

    def assigned(self, starts: Mapping[int, int | None]) -> None:
        """See :class:`SourceEvents`."""
        self._joined = True
        if starts:
            self._write_stage.check_first()
        for partition, start in starts.items():
            self._assignments[partition] = _Assignment(Lease(partition), start)
        if self._paused:
            self._source.pause()

    def revoked(self, partitions: Iterable[int]) -> Mapping[int, int]:
        """See :class:`SourceEvents`. Waits, within a deadline, for what the stages have already begun."""
        going = [partition for partition in partitions if partition in self._assignments]
        for partition in going:
            self._assignments[partition].lease.draining = True
        deadline = time.monotonic() + self._settings.drain_timeout_s
        while self._failure is None and time.monotonic() < deadline:
            if not any(self._assignments[partition].offsets.in_flight for partition in going):
                break
            self._absorb(wait_s=0.05)
            self._poll_producers()
        self._absorb()
        # All of them, moved or not: one of the commits that nobody waited for may have failed.
        positions = self._positions(going)
        self.lost(going)
        return positions

    def lost(self, partitions: Iterable[int]) -> None:
        """See :class:`SourceEvents`."""
        left = 0
        for partition in partitions:
            assignment = self._assignments.pop(partition, None)
            if assignment is not None:
                with suppress(KeyError):  # where its lag was never known
                    LAG.remove(str(partition))
                assignment.lease.draining = assignment.lease.over = True
                left += assignment.offsets.in_flight
        if left and self._note_vectors is not None:
            self._note_vectors.purge()  # or a late record could land behind the next owner's newer one

    def _guard(self, run: Callable[[], None]) -> None:
        try:
            run()
        except Stopped:
            pass
        except Exception as error:  # noqa: BLE001 - whatever ends a stage ends the updater, in run()
            self._failure = error
