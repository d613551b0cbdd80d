"""The notes of a snapshot: the last valid version of every note that is not deleted, as one Parquet file.

Last is by offset within a partition. A record that is no note does not remove the valid version before it; a tombstone
does. Of a key on two partitions, which has no order, the one with the later timestamp counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, NamedTuple

import duckdb
import msgspec

from notellm.errors import InvalidMessage
from notellm.messages import NoteRecord, Tombstone, parse_record
from notellm.settings import KafkaSettings
from streams.click_files import describe_file
from streams.errors import SourceError
from streams.kafka_log import TopicLog
from streams.snapshot import FilesSource, NotesTopic
from streams.staging import Batch, write_sorted
from streams.statistics import NoteCounts

__all__ = ["StagedNotes", "stage_notes_file", "stage_notes_topic"]

_TABLE: Final = """
    CREATE TABLE note_log (
        partition INT, place BIGINT, timestamp BIGINT, deleted BOOLEAN, note_id VARCHAR, title VARCHAR, content VARCHAR,
        hashtags VARCHAR[], category VARCHAR, published_at BIGINT, attributes VARCHAR
    )
    """
# One row for each note: which record it is as of now. Only narrow columns, as contents may be long.
_LAST: Final = """
    CREATE TABLE last_record AS SELECT partition, place FROM (
        SELECT note_id, partition, MAX(place) AS place, arg_max(timestamp, place) AS timestamp
        FROM note_log GROUP BY note_id, partition
    ) QUALIFY ROW_NUMBER() OVER (PARTITION BY note_id ORDER BY timestamp DESC, partition DESC) = 1
    """
_LIVE: Final = """
    SELECT note_id, title, content, hashtags, category, published_at, attributes
    FROM note_log SEMI JOIN last_record USING (partition, place) WHERE NOT deleted ORDER BY note_id
    """
_BATCH: Final = 1_000  # a note may be a megabyte
_NAMED: Final = 5


class StagedNotes(NamedTuple):
    source: FilesSource | NotesTopic
    counts: NoteCounts


class _Identity(msgspec.Struct):
    note_id: str


_identity = msgspec.json.Decoder(_Identity)


def stage_notes_file(
    connection: duckdb.DuckDBPyConnection, file: Path, target: Path, progress: Callable[[float], None]
) -> StagedNotes:
    """JSON Lines, one note a line; of several lines of one note the last counts. A note without a time gets 0.

    Raises :class:`SourceError` that names the lines that are no notes.
    """
    about = describe_file(file, "--notes")
    connection.execute(_TABLE)
    batch = Batch(connection, "note_log", _BATCH)
    read = size = 0
    bad: list[str] = []
    for number, line in _lines(file):
        size += len(line)
        if number % 10_000 == 0:
            progress(size / max(about.bytes, 1))
        read += 1
        try:
            record = parse_record(_key_of(line), line, 0)
        except InvalidMessage as error:
            bad.append(f"--notes: {file}, line {number}: {error}")
            if len(bad) == _NAMED:
                break
            continue
        batch.add(_row(0, number, 0, record))
    if bad:
        raise SourceError("\n".join(bad))
    batch.flush()
    progress(1.0)
    return StagedNotes(FilesSource([about]), _write(connection, target, read, 0))


def stage_notes_topic(
    connection: duckdb.DuckDBPyConnection, settings: KafkaSettings, target: Path, progress: Callable[[float], None]
) -> StagedNotes:
    """The compacted topic of notes, to its end. Records that are no notes are counted. Raises :class:`SourceError`."""
    connection.execute(_TABLE)
    batch = Batch(connection, "note_log", _BATCH)
    read = invalid = 0
    with TopicLog(settings, settings.notes_topic) as topic:
        for messages in topic.batches(progress):
            for message in messages:
                read += 1
                timestamp = message.timestamp()[1]
                try:
                    record = parse_record(message.key(), message.value(), timestamp)
                except InvalidMessage:
                    invalid += 1
                    continue
                batch.add(_row(message.partition(), message.offset(), timestamp, record))
    batch.flush()
    return StagedNotes(NotesTopic(topic.topic, topic.ranges), _write(connection, target, read, invalid))


def _write(connection: duckdb.DuckDBPyConnection, target: Path, read: int, invalid: int) -> NoteCounts:
    connection.execute(_LAST)
    live = write_sorted(connection, _LIVE, target)
    row = connection.execute("SELECT COUNT(*) FROM last_record").fetchone()
    assert row is not None
    connection.execute("DROP TABLE note_log")
    connection.execute("DROP TABLE last_record")
    return NoteCounts(read=read, invalid=invalid, deleted=int(row[0]) - live, live=live)


def _lines(file: Path) -> Iterator[tuple[int, bytes]]:
    with file.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            if line.strip():
                yield number, line


def _key_of(line: bytes) -> bytes:
    try:
        return _identity.decode(line).note_id.encode()
    except msgspec.MsgspecError:
        return b"?"  # the door finds the better words


def _row(partition: int, place: int, timestamp: int, record: NoteRecord | Tombstone) -> tuple[object, ...]:
    if isinstance(record, Tombstone):
        return (partition, place, timestamp, True, record.note_id, None, None, None, None, None, None)
    note = record.note
    attributes = msgspec.json.encode(note.attributes, order="deterministic").decode()
    return (
        partition, place, timestamp, False, note.note_id, note.title, note.content, note.hashtags, note.category,
        note.published_at, attributes,
    )  # fmt: skip
