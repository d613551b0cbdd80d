"""Looks, while updaters run, whether what they have committed is really there."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from threading import Event, Thread
from typing import Any, Self

from pymilvus import MilvusClient

from commands.checker import read_dead_letters
from commands.ledger import LedgerEntry
from tests.support.pipeline import Pipeline

__all__ = ["CommitWatch", "Fault", "unacknowledged"]

Place = tuple[str, int, int]

_SECONDS_OF_AN_OLDER_VERSION = 5.0


@dataclass(frozen=True)
class Fault:
    text: str
    is_older_version: bool = False


def unacknowledged(
    committed: Mapping[int, int],
    entries: Iterable[LedgerEntry],
    rows: Sequence[Mapping[str, Any]],
    dead_letters: set[Place],
) -> list[Fault]:
    """What stands below a committed offset and is neither in Milvus nor a dead letter.

    ``rows`` and ``dead_letters`` were read after ``committed``: they may be ahead of it, never behind.
    """
    history: dict[str, list[LedgerEntry]] = {}
    faults: list[Fault] = []
    for entry in entries:
        below = entry.offset < committed.get(entry.partition, 0)
        if entry.broken:
            if below and (entry.topic, entry.partition, entry.offset) not in dead_letters:
                faults.append(Fault(f"{entry.partition}@{entry.offset} is broken, committed and no dead letter"))
        elif entry.key is not None:
            history.setdefault(entry.key.decode(), []).append(entry)
    offsets = {str(row["note_id"]): int(row["source_offset"]) for row in rows}
    for note_id, versions in history.items():
        versions.sort(key=lambda entry: entry.offset)
        done = [entry for entry in versions if entry.offset < committed.get(entry.partition, 0)]
        if not done:
            continue
        newest, later = done[-1], versions[len(done) :]
        if note_id in offsets:
            fine = offsets[note_id] >= newest.offset and (newest.value is not None or bool(later))
        else:
            fine = newest.value is None or any(entry.value is None for entry in later)
        if not fine:
            found = offsets.get(note_id, "nothing")
            text = f"{note_id}: {newest.partition}@{newest.offset} is committed, Milvus has {found}"
            faults.append(Fault(text, is_older_version=note_id in offsets))
    return faults


class CommitWatch:
    """``with CommitWatch(pipeline) as watch``: looks again and again, in a thread."""

    def __init__(self, pipeline: Pipeline) -> None:
        self.faults: list[str] = []
        self.looks = 0
        self._pipeline = pipeline
        self._done = Event()
        self._error: Exception | None = None
        self._thread = Thread(target=self._run, name="watch", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._done.set()
        self._thread.join(60)
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            while not self._done.wait(0.3):
                self._look()
        except Exception as error:  # noqa: BLE001 - raised again by the test's own thread
            self._error = error

    def _look(self) -> None:
        pipeline = self._pipeline
        committed = pipeline.committed()
        if not committed:
            return
        rows = self._rows()
        letters = read_dead_letters(pipeline.kafka.bootstrap_servers, pipeline.dead_letter_topic)
        found = unacknowledged(committed, pipeline.entries(), rows, letters)
        # Milvus 2.3 shows an older version again for a moment, even to a Strong read, while it moves rows between its
        # segments: that one counts if it stays. A row that is not there at all was never acknowledged.
        deadline = time.monotonic() + _SECONDS_OF_AN_OLDER_VERSION
        while any(fault.is_older_version for fault in found) and time.monotonic() < deadline:
            time.sleep(0.2)
            still = unacknowledged(committed, pipeline.entries(), self._rows(), letters)
            found = [fault for fault in found if not fault.is_older_version or fault in still]
        self.faults += [fault.text for fault in found]
        self.looks += 1

    def _rows(self) -> list[dict[str, Any]]:
        """In one query: an iterator's pages are not of one moment, and rows are on the move."""
        client = MilvusClient(self._pipeline.milvus.uri, timeout=30)
        rows: list[dict[str, Any]] = client.query(
            self._pipeline.alias,
            filter="source_offset >= 0",
            output_fields=["note_id", "source_offset"],
            limit=16_384,
            consistency_level="Strong",
        )
        client.close()
        return rows
