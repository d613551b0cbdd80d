"""Fakes of what the click worker stands on, for tests: a disk, a changelog and a dead-letter topic."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from notellm.errors import InvalidMessage

__all__ = ["MemoryChangelog", "MemoryClicksLog", "MemoryDeadLetters", "MemoryRows"]


class MemoryClicksLog:
    """See :class:`streams.click_worker.ClicksLog`: the offsets that have a record, of each partition."""

    def __init__(self, offsets: Mapping[int, Sequence[int]], starts: Mapping[int, int]) -> None:
        self.offsets = offsets
        self.starts = starts

    def start(self, partition: int) -> int:
        return self.starts[partition]

    def first_at(self, partition: int, offset: int) -> int | None:
        return next((found for found in self.offsets[partition] if found >= offset), None)


class MemoryRows:
    """See :class:`streams.click_table.Rows`."""

    def __init__(self) -> None:
        self.rows: dict[bytes, bytes] = {}
        self.changelog_offset = -1
        self._stream_ms = -1

    def get(self, key: bytes) -> bytes | None:
        return self.rows.get(key)

    def days(self) -> list[int]:
        return sorted({int.from_bytes(key[:4], "big") for key in self.rows})

    def first_keys(self, before: bytes, limit: int) -> list[bytes]:
        return sorted(key for key in self.rows if key < before)[:limit]

    def stream_ms(self) -> int:
        return self._stream_ms

    def write(self, changes: Mapping[bytes, bytes | None], stream_ms: int, changelog_offset: int | None) -> None:
        for key, row in changes.items():
            if row is None:
                self.rows.pop(key, None)
            else:
                self.rows[key] = row
        self._stream_ms = stream_ms
        if changelog_offset is not None:
            self.changelog_offset = changelog_offset


class MemoryChangelog:
    """See :class:`streams.kafka_writers.Changelog`. ``takes`` False: Kafka is away."""

    def __init__(self) -> None:
        self.records: dict[int, list[tuple[bytes, bytes | None]]] = {}
        self.takes = True

    def send(self, partition: int, key: bytes, row: bytes | None) -> None:
        self.records.setdefault(partition, []).append((key, row))

    def poll(self) -> bool:
        return self.takes

    def last_offset(self, partition: int) -> int | None:
        return len(self.records[partition]) - 1 if partition in self.records else None


class MemoryDeadLetters:
    """See :class:`streams.kafka_writers.DeadLetters`. ``takes`` False: Kafka is away."""

    def __init__(self) -> None:
        self.letters: list[tuple[Any, InvalidMessage]] = []
        self.takes = True

    def send(self, record: Any, error: InvalidMessage) -> None:
        self.letters.append((record, error))

    def poll(self) -> int:
        return self.sent if self.takes else 0

    @property
    def sent(self) -> int:
        return len(self.letters)
