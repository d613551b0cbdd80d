"""Was a partition left unread for so long that compaction may have taken a deletion away before it was read?

Kafka keeps a tombstone for ``delete.retention.ms`` after the cleaning that took the note before it. Whoever read the
note earlier than that, and comes by later, never hears of the deletion. Kafka does not tell when a group last
committed, so the updater writes it into each commit's metadata, and since when the group has read the partition.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

__all__ = ["Start", "TombstoneWatch", "read_start", "write_start"]

_WRITTEN = re.compile(r"notellm committed_at=(\d{1,15}) reading_since=(\d{1,15})", re.ASCII)


@dataclass(frozen=True)
class Start:
    """Where a partition was taken up. ``offset`` is None where the group had committed none, and begins to read it.

    ``committed_at_ms`` is the time of the group's last commit, ``reading_since_ms`` that of its first assignment;
    0 where the commit does not say, such as one that ``kafka-consumer-groups.sh`` made: long ago, then.
    """

    offset: int | None
    committed_at_ms: int
    reading_since_ms: int


def write_start(committed_at_ms: int, reading_since_ms: int) -> str:
    """A commit's metadata."""
    return f"notellm committed_at={committed_at_ms} reading_since={reading_since_ms}"


def read_start(offset: int, metadata: str | None) -> Start:
    """What a commit says of itself. Whatever the metadata, nothing is raised."""
    found = _WRITTEN.fullmatch(metadata or "")
    return Start(offset, int(found[1]), int(found[2])) if found else Start(offset, 0, 0)


class TombstoneWatch:
    """One assignment of one partition. Is to see each record, as it is read; costs a few comparisons."""

    def __init__(self, start: Start, delete_retention_ms: int) -> None:
        self._retention_ms = delete_retention_ms
        self._since_ms = start.reading_since_ms
        self._expected = start.offset
        self._read_at_ms = start.committed_at_ms

    def may_have_missed(self, offset: int, timestamp_ms: int, now_ms: int) -> bool:
        """Whether a tombstone beside this record may have gone before it could be read.

        Either the record itself has waited for longer than they are kept; or there is a gap before it, where one may
        have stood, and what is before the gap was read longer ago than that. A partition that the group began to read
        a shorter time ago can have missed none, however old its records are: what was gone by then was never read.
        """
        horizon = now_ms - self._retention_ms
        gap = self._expected is not None and offset > self._expected
        read_at_ms, self._read_at_ms = self._read_at_ms, now_ms
        self._expected = offset + 1
        if self._since_ms >= horizon:
            return False
        return 0 <= timestamp_ms < horizon or (gap and read_at_ms < horizon)

    def warning(self, topic: str, partition: int) -> str:
        """One line, to be said once."""
        return (
            f"{topic}[{partition}]: records have waited for longer than the topic's delete.retention.ms "
            f"({self._retention_ms} ms): deletions may have been compacted away before they were read, and their notes "
            "may still be in the collection; compare the topic's keys with the collection"
        )
