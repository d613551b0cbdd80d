"""What a worker does with records, and when an offset may be committed; knows neither Faust nor Kafka.

Work goes in rounds. A round takes what has changed in the tables, writes it to the changelog, waits until Kafka has
that and every dead letter, writes it to the tables' disks, and only then names the offsets that may be committed.
Clicks go on meanwhile, into the next round. Whatever is cut off, by a kill or a lost partition, was never committed.

Faust leaves records out: those that it has fetched when the group changes, it may drop without reading them again. So
a partition's records are taken in order only, and one that is missing is fetched again.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Protocol

from prometheus_client import Counter

from notellm.errors import InvalidMessage
from streams.click_table import ClickTable
from streams.errors import WorkerError
from streams.kafka_writers import Changelog, DeadLetters, Source

__all__ = ["ClickWorker", "ClicksLog"]

log = logging.getLogger(__name__)

CLICKS = Counter("notellm_clicks_total", "Records of the clicks topic, by what became of them.", ["outcome"])
EXPIRED_ROWS = Counter("notellm_click_rows_expired_total", "Rows deleted because their day is out of the window.")
REREAD = Counter("notellm_click_rereads_total", "Times that records which Faust had left out were read again.")

_ROWS_IN_MEMORY = 50_000
_LETTERS_WAITING = 5_000
_POLL_S = 0.005
# A record that was asked for again and has not come is asked for once more.
_PATIENCE_S = 5.0


class ClicksLog(Protocol):
    """What Kafka itself says of the clicks topic, by another way than Faust's consumer."""

    def start(self, partition: int) -> int:
        """The group's committed offset, or where the partition begins."""

    def first_at(self, partition: int, offset: int) -> int | None:
        """The first record's offset that is not below ``offset``; None where there is none."""


class ClickWorker:
    """The tables of the partitions that this worker has; ``open_table`` makes one when its first record comes.

    ``longest_pause_s``: a round that begins so long after the last one ended comes from a process that was asleep. Its
    partitions may be another's by now, and what it has in memory is no longer to be written. Raises
    :class:`WorkerError` then.
    """

    def __init__(
        self,
        changelog: Changelog,
        letters: DeadLetters,
        open_table: Callable[[int], ClickTable],
        clicks: ClicksLog,
        *,
        longest_pause_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._changelog = changelog
        self._letters = letters
        self._open_table = open_table
        self._clicks = clicks
        self._longest_pause_s = longest_pause_s
        self._clock = clock
        self._round_ended = clock()
        self._tables: dict[int, ClickTable] = {}
        self._next: dict[int, int] = {}  # the offset of the record that is to be handled next
        self._committed: dict[int, int] = {}
        self._asked: dict[int, float] = {}  # when a record that is missing was asked for

    def expects(self, record: Source) -> bool:
        """Whether the record is the next one of its partition."""
        return self._next.get(record.partition) == record.offset or self._is_first_or_behind_a_gap(record)

    def missing(self, record: Source) -> int | None:
        """For a record that is not expected: the offset from which to read its partition again, if that is the way."""
        partition, now = record.partition, self._clock()
        if record.offset < self._next[partition]:
            return None  # handled already
        if now - self._asked.get(partition, -_PATIENCE_S) < _PATIENCE_S:
            return None
        self._asked[partition] = now
        REREAD.inc()
        log.warning(
            "%s[%d]: Faust left %d to %d out; reading them again",
            record.topic,
            partition,
            self._next[partition],
            record.offset - 1,
        )
        return self._next[partition]

    def handle(self, record: Source, timestamp_ms: int) -> None:
        partition = record.partition
        table = self._tables.get(partition)
        if table is None:
            table = self._tables[partition] = self._open_table(partition)
        try:
            table.handle(record.key, record.value, timestamp_ms)
        except InvalidMessage as error:
            self._letters.send(record, error)
        self._next[partition] = record.offset + 1
        self._asked.pop(partition, None)

    def _is_first_or_behind_a_gap(self, record: Source) -> bool:
        partition, offset = record.partition, record.offset
        if partition not in self._next:
            self._next[partition] = self._committed[partition] = self._clicks.start(partition)
        expected = self._next[partition]
        if offset <= expected or partition in self._asked:
            return offset == expected
        # A transaction's end is an offset without a record, and Kafka deletes what is too old.
        found = self._clicks.first_at(partition, expected)
        if found is not None:
            self._next[partition] = found
        return found == offset

    @property
    def is_full(self) -> bool:
        """Memory holds enough that Kafka does not have yet: no more records until a round has ended."""
        return (
            self._letters.sent - self._letters.poll() > _LETTERS_WAITING
            or sum(table.changed_rows for table in self._tables.values()) > _ROWS_IN_MEMORY
        )

    async def round(self) -> dict[int, int]:
        """Partition -> offset that may be committed now, where there is a new one. One round at a time."""
        self._refuse_to_wake_up()
        try:
            return await self._round()
        finally:
            self._round_ended = self._clock()

    async def _round(self) -> dict[int, int]:
        offsets = {
            partition: offset for partition, offset in self._next.items() if self._committed.get(partition) != offset
        }
        tables = dict(self._tables)
        written = set()
        for partition, table in tables.items():
            table.sweep()
            for key, row in table.take().items():
                self._changelog.send(partition, key, row)
                written.add(partition)
            self._count(table)
        letters = self._letters.sent
        while not self._changelog.poll() or self._letters.poll() < letters:
            await asyncio.sleep(_POLL_S)
        for partition, table in tables.items():
            if self._tables.get(partition) is table:
                table.settle(self._changelog.last_offset(partition) if partition in written else None)
            else:
                offsets.pop(partition, None)
        return offsets

    def committed(self, offsets: dict[int, int]) -> None:
        self._committed.update(offsets)

    def let_go(self, partition: int) -> None:
        """Another worker may have it now: what has not been committed is for that one to read again."""
        self._tables.pop(partition, None)
        self._next.pop(partition, None)
        self._committed.pop(partition, None)
        self._asked.pop(partition, None)

    def _refuse_to_wake_up(self) -> None:
        asleep_s = self._clock() - self._round_ended
        if self._tables and asleep_s > self._longest_pause_s:
            raise WorkerError(
                f"this process did nothing for {asleep_s:.0f} s, longer than streams.session_timeout_s: its partitions "
                "may be another worker's by now"
            )

    def _count(self, table: ClickTable) -> None:
        for outcome, number in table.counts.items():
            CLICKS.labels(outcome).inc(number)
        table.counts.clear()
        EXPIRED_ROWS.inc(table.expired_rows)
        table.expired_rows = 0
