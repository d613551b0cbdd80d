"""The demo's judge: what is in Milvus and among the dead letters, against the ledger of what was produced.

It imports nothing of the updater (import-linter holds it to that): it reads Milvus with a plain client, Kafka with a
plain consumer, and encodes a sample of the rows again. ``python -m commands.checker --help``.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Protocol

import msgspec
import numpy as np
import typer
from confluent_kafka import Consumer, TopicPartition
from numpy.typing import NDArray
from pymilvus import MilvusClient, MilvusException
from tenacity import retry, retry_if_exception_type, stop_after_attempt, wait_fixed

from commands.ledger import LedgerEntry, read_ledger
from notellm.encoder import NoteEncoder
from notellm.messages import Note, NoteRecord, parse_record
from notellm.settings import load_settings

__all__ = ["BundleReference", "Reference", "Verdict", "dead_letters_wanted", "judge", "main", "wanted_rows"]

SAMPLE = 20
_MOST_ROWS_AT_ONCE = 16_384  # of a query on Milvus
VECTOR_BOUND = 1e-4  # batch == single, as the encoder promises for fp32
_FIELDS = ["note_id", "title", "hashtags", "category", "published_at", "text_hash", "model_version", "attributes"]
_SOURCE = ["source_partition", "source_offset", "generated_category"]

Place = tuple[str, int, int]


class Reference(Protocol):
    """The model, to compute again what a row must hold."""

    @property
    def model_version(self) -> str: ...

    @property
    def categories(self) -> Sequence[str]: ...

    def text_hash(self, note: Note) -> str: ...

    def embed(self, notes: Sequence[Note]) -> NDArray[np.float32]:
        """``[N, D]``."""


class BundleReference:
    """A bundle, run by the encoder in this process."""

    def __init__(self, encoder: NoteEncoder) -> None:
        self._encoder = encoder
        self.model_version = encoder.model_version
        self.categories = encoder.bundle.manifest.categories

    def text_hash(self, note: Note) -> str:
        return self._encoder.prompt(note).text_hash

    def embed(self, notes: Sequence[Note]) -> NDArray[np.float32]:
        return np.stack([encoded.embedding for encoded in self._encoder.encode(notes, embed_only=True)])


class Verdict(msgspec.Struct):
    """Counts, and for each fault a line that names the note."""

    live: int = 0
    searchable: int = 0
    deleted: int = 0
    dead_letters: int = 0
    lost: int = 0
    stale: int = 0
    resurrected: int = 0
    wrong_vectors: int = 0
    missing_dead_letters: int = 0
    unexpected_dead_letters: int = 0
    model_version: str = ""
    faults: list[str] = msgspec.field(default_factory=list)

    @property
    def good(self) -> bool:
        return not self.faults

    def fault(self, counter: str, line: str) -> None:
        setattr(self, counter, getattr(self, counter) + 1)
        self.faults.append(f"{counter}: {line}")


class Wanted(msgspec.Struct, frozen=True):
    """The last valid version of a note, and the record that held it."""

    note: Note
    partition: int
    offset: int


def wanted_rows(entries: Iterable[LedgerEntry]) -> tuple[dict[str, Wanted], set[str]]:
    """What must be there, by note_id, and which note_ids must not be."""
    latest: dict[str, LedgerEntry] = {}
    for entry in entries:
        if entry.broken or entry.key is None:
            continue
        note_id = entry.key.decode()
        if note_id not in latest or entry.offset > latest[note_id].offset:
            latest[note_id] = entry
    live: dict[str, Wanted] = {}
    for note_id, entry in latest.items():
        if entry.value is not None:
            record = parse_record(entry.key, entry.value, 0)
            assert isinstance(record, NoteRecord)
            live[note_id] = Wanted(record.note, entry.partition, entry.offset)
    return live, set(latest) - set(live)


def dead_letters_wanted(entries: Iterable[LedgerEntry]) -> set[Place]:
    return {(entry.topic, entry.partition, entry.offset) for entry in entries if entry.broken}


def judge(
    entries: list[LedgerEntry], rows: list[dict[str, Any]], found_dead_letters: set[Place], reference: Reference
) -> Verdict:
    """``rows`` is everything that the alias shows, embeddings included."""
    live, deleted = wanted_rows(entries)
    by_id = {str(row["note_id"]): row for row in rows}
    verdict = Verdict(live=len(live), deleted=len(deleted), model_version=reference.model_version)
    verdict.dead_letters = len(found_dead_letters)
    for note_id, wanted in live.items():
        if note_id not in by_id:
            verdict.fault("lost", f"{note_id} is not in Milvus")
            continue
        verdict.searchable += 1
        wrong = _difference(wanted, by_id[note_id], reference)
        if wrong:
            verdict.fault("stale", f"{note_id}: {wrong}")
    for note_id in sorted(set(by_id) - set(live)):
        why = "was deleted" if note_id in deleted else "was never published"
        verdict.fault("resurrected", f"{note_id} is in Milvus, but {why}")
    _embed_again(live, by_id, reference, verdict)
    wanted_letters = dead_letters_wanted(entries)
    for place in sorted(wanted_letters - found_dead_letters):
        verdict.fault("missing_dead_letters", f"{place} is broken, and no dead letter")
    for place in sorted(found_dead_letters - wanted_letters):
        verdict.fault("unexpected_dead_letters", f"{place} is a dead letter, and was not broken")
    return verdict


def _difference(wanted: Wanted, row: dict[str, Any], reference: Reference) -> str:
    """The first field that is not as the last valid version would have it, or ""."""
    note = wanted.note
    expected = {
        "source_partition": wanted.partition,
        "source_offset": wanted.offset,
        "title": note.title,
        "hashtags": note.hashtags,
        "category": note.category,
        "attributes": note.attributes,
        "published_at": note.published_at,
        "text_hash": reference.text_hash(note),
        "model_version": reference.model_version,
    }
    for field, value in expected.items():
        found = list(row[field]) if field == "hashtags" else row[field]
        if found != value:
            return f"{field} is {found!r}, not {value!r}"
    if row["generated_category"] not in reference.categories:
        return f"generated_category is {row['generated_category']!r}, which is none of the model's"
    return ""


def _embed_again(
    live: dict[str, Wanted], rows: dict[str, dict[str, Any]], reference: Reference, verdict: Verdict
) -> None:
    there = sorted(set(live) & set(rows))
    sample = random.Random(0).sample(there, min(SAMPLE, len(there)))
    again = reference.embed([live[note_id].note for note_id in sample]) if sample else ()
    for note_id, embedding in zip(sample, again, strict=True):
        stored = np.asarray(rows[note_id]["embedding"], np.float32)
        off = float(np.abs(stored - embedding).max())
        if not off <= VECTOR_BOUND:
            verdict.fault("wrong_vectors", f"{note_id}: its vector is off by {off:.2g}, allowed is {VECTOR_BOUND}")


# Milvus Lite closes a connection that was idle and pinged it too often: the next call on it fails once.
@retry(retry=retry_if_exception_type(MilvusException), stop=stop_after_attempt(5), wait=wait_fixed(1), reraise=True)
def read_rows(uri: str, name: str) -> list[dict[str, Any]]:
    """Every row behind an alias, or of a collection.

    By one query where one can hold them: an iterator shows Milvus 2.3 as it was some 100 ms ago, Strong or not.
    """
    client = MilvusClient(uri, timeout=30)
    what: dict[str, Any] = {"output_fields": [*_FIELDS, *_SOURCE, "embedding"], "consistency_level": "Strong"}
    rows: list[dict[str, Any]] = client.query(name, filter="source_offset >= 0", limit=_MOST_ROWS_AT_ONCE, **what)
    if len(rows) == _MOST_ROWS_AT_ONCE:
        rows = []
        iterator = client.query_iterator(name, batch_size=1000, filter="", **what)
        while page := iterator.next():
            rows += page
        iterator.close()
    client.close()
    return rows


def read_dead_letters(
    bootstrap_servers: str, topic: str, properties: Mapping[str, Any] | None = None, seconds: float = 30.0
) -> set[Place]:
    """Where each dead letter came from, by its own headers; reads the topic from its beginning to its end."""
    consumer = Consumer(
        {
            "bootstrap.servers": bootstrap_servers,
            "group.id": "notellm-checker",
            "enable.auto.commit": False,
            "log_level": 3,
            **(properties or {}),
        }
    )
    places: set[Place] = set()
    left: dict[int, int] = {}
    for partition in consumer.list_topics(topic, timeout=10).topics[topic].partitions:
        low, high = consumer.get_watermark_offsets(TopicPartition(topic, partition), timeout=10)
        if high > low:
            left[partition] = high
    consumer.assign([TopicPartition(topic, partition, 0) for partition in left])
    deadline = time.monotonic() + seconds
    while left and time.monotonic() < deadline:
        message = consumer.poll(0.5)
        if message is None or message.error() is not None:
            continue
        headers = {name: bytes(value or b"").decode() for name, value in message.headers() or []}
        source = tuple(headers[f"__connect.errors.{name}"] for name in ("topic", "partition", "offset"))
        places.add((source[0], int(source[1]), int(source[2])))
        if int(message.offset() or 0) + 1 >= left.get(int(message.partition() or 0), 0):
            left.pop(int(message.partition() or 0), None)
    consumer.close()
    if left:
        raise RuntimeError(f"dead letters could not be read to their end within {seconds:.0f} s")
    return places


def main(
    ledger: Annotated[Path, typer.Option(help="The ledger of what was produced.")],
    milvus: Annotated[str, typer.Option(help="Milvus server.")],
    kafka: Annotated[str, typer.Option(help="Kafka brokers.")],
    bundle: Annotated[Path, typer.Option(help="The bundle, to encode rows again.")],
    out: Annotated[Path, typer.Option(help="Where the verdict goes, as JSON.")],
    alias: Annotated[str, typer.Option(help="The alias that readers use.")] = "notes",
    dead_letter_topic: Annotated[str, typer.Option(help="The dead-letter topic.")] = "notes.dead-letter",
) -> None:
    """Judge; exit status 1 if anything is lost, stale, resurrected or wrong."""
    # It warns of a time stamp that Milvus Lite does not have.
    logging.getLogger("pymilvus").setLevel(logging.ERROR)
    verdict = judge(
        list(read_ledger(ledger)),
        read_rows(milvus, alias),
        read_dead_letters(kafka, dead_letter_topic, load_settings().kafka.properties),
        BundleReference(NoteEncoder.load(bundle)),
    )
    out.write_bytes(msgspec.json.format(msgspec.json.encode(verdict), indent=2) + b"\n")
    for line in verdict.faults[:20]:
        typer.echo(line, err=True)
    raise typer.Exit(0 if verdict.good else 1)


if __name__ == "__main__":
    typer.run(main)
