"""What was produced, line by line: the checker's only source of truth about what must be in Milvus."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from threading import Lock

import msgspec

__all__ = ["Ledger", "LedgerEntry", "read_ledger"]


class LedgerEntry(msgspec.Struct, frozen=True):
    """One record that Kafka acknowledged. ``broken``: its publisher made it so that it must become a dead letter."""

    topic: str
    partition: int
    offset: int
    key: bytes | None
    value: bytes | None
    broken: bool


class Ledger:
    """An append-only file of JSON Lines (bytes as base64). Thread-safe."""

    def __init__(self, file: Path, topic: str) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        self._stream = file.open("wb")
        self._topic = topic
        self._lock = Lock()
        self.entries = 0

    def add(self, key: bytes | None, value: bytes | None, partition: int, offset: int, *, broken: bool) -> None:
        entry = LedgerEntry(self._topic, partition, offset, key, value, broken)
        with self._lock:
            self._stream.write(msgspec.json.encode(entry) + b"\n")
            self._stream.flush()
            self.entries += 1

    def close(self) -> None:
        self._stream.close()


def read_ledger(file: Path) -> Iterator[LedgerEntry]:
    """In the order of delivery reports; order between records of a key is their offsets'."""
    decoder = msgspec.json.Decoder(LedgerEntry)
    with file.open("rb") as stream:
        for line in stream:
            yield decoder.decode(line)
