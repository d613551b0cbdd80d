"""Which offset of a partition may be committed: the end of the contiguous prefix that was acknowledged.

Kafka's commit says "everything before this is done", so one open note holds back all behind it. Offsets come with gaps
(compaction, transaction markers): what counts is the order of delivery, not the numbers between.
"""

from __future__ import annotations

from collections import deque

__all__ = ["OffsetTracker"]


class OffsetTracker:
    """One assignment of one partition. Not thread-safe: the poller owns it."""

    def __init__(self) -> None:
        self._delivered: deque[int] = deque()  # from the first that is open on
        self._open: set[int] = set()
        self._abandoned: set[int] = set()  # some of the open ones
        self._highest = -1
        self._position: int | None = None

    def deliver(self, offset: int) -> bool:
        """A record was handed to us. False if it was before: at-least-once delivery may repeat itself."""
        if offset <= self._highest:
            return False
        self._delivered.append(offset)
        self._open.add(offset)
        self._highest = offset
        return True

    def acknowledge(self, offset: int) -> None:
        """The record is safe: in Milvus, or a flushed dead letter. In any order, more than once does no harm."""
        self._open.discard(offset)
        self._abandoned.discard(offset)
        while self._delivered and self._delivered[0] not in self._open:
            self._position = self._delivered.popleft() + 1

    def abandon(self, offset: int) -> None:
        """Nobody will work on the record any more: it stays unacknowledged, but there is nothing to wait for."""
        if offset in self._open:
            self._abandoned.add(offset)

    @property
    def position(self) -> int | None:
        """The offset to commit: every record delivered before it is safe. None while no record is."""
        return self._position

    @property
    def unacknowledged(self) -> int:
        """Records delivered and not safe yet."""
        return len(self._open)

    @property
    def in_flight(self) -> int:
        """Records that somebody still works on."""
        return len(self._open) - len(self._abandoned)
