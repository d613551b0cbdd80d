"""The notes that training may read, as columns in memory: a million of them are a gigabyte, not a million objects."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq

from notellm.errors import InvalidMessage
from notellm.messages import Note, NoteRecord, parse_record
from training.errors import TrainingDataError

__all__ = ["NoteTable", "read_note_table"]

_COLUMNS = ("note_id", "title", "content", "hashtags", "category", "published_at")
_SCHEMA = pa.schema(
    [(name, pa.string()) for name in ("note_id", "title", "content")]
    + [("hashtags", pa.list_(pa.string())), ("category", pa.string()), ("published_at", pa.int64())]
)
_LINES = 10_000

Wanted = Callable[[Note], bool]


class NoteTable:
    """Notes by row number. ``rows`` maps note_id to row; the last of two notes with one id counts."""

    def __init__(self, table: pa.Table) -> None:
        self._table = table.combine_chunks()
        self.rows: dict[str, int] = {
            note_id: row for row, note_id in enumerate(self._table.column("note_id").to_pylist())
        }

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def note(self, row: int) -> Note:
        found = {name: self._table.column(name)[row].as_py() for name in _COLUMNS}
        return Note(**found)

    def live_rows(self) -> list[int]:
        """The row of each note_id, in order."""
        return sorted(self.rows.values())


def read_note_table(file: Path, wanted: Wanted = lambda note: True) -> NoteTable:
    """JSON Lines as on the ``notes`` topic, or a snapshot's Parquet; read in parts, and only what is ``wanted`` kept.

    Of a note's versions the last that is wanted counts: where notes are taken by time, what was known then. Raises
    :class:`TrainingDataError` that names file and line or row, or column.
    """
    parts = _parquet(file) if file.suffix == ".parquet" else _json_lines(file)
    batches = [_batch([note for note in part if wanted(note)]) for part in parts]
    return NoteTable(pa.Table.from_batches(batches, _SCHEMA))


def _batch(notes: Iterable[Note]) -> pa.RecordBatch:
    kept = list(notes)
    return pa.RecordBatch.from_pydict(
        {name: [getattr(note, name) for note in kept] for name in _COLUMNS}, schema=_SCHEMA
    )


def _parquet(file: Path) -> Iterator[list[Note]]:
    try:
        with pq.ParquetFile(file) as parquet:
            if missing := set(_COLUMNS) - set(parquet.schema_arrow.names):
                raise TrainingDataError(
                    f"notes: {file} has no column {min(missing)!r}; needed are {', '.join(_COLUMNS)}"
                )
            before = 0
            for part in parquet.iter_batches(_LINES, columns=list(_COLUMNS)):
                # Through the same door as a line: a file's strangers are no better than a topic's.
                lines = [
                    msgspec.json.encode({k: v for k, v in row.items() if v is not None}) for row in part.to_pylist()
                ]
                yield [_note(line, f"notes: {file}, row {before + place}") for place, line in enumerate(lines, 1)]
                before += len(lines)
    except (OSError, pa.ArrowException, TypeError, UnicodeDecodeError) as error:
        raise TrainingDataError(f"notes: {file} cannot be read as Parquet: {str(error).splitlines()[0]}") from None


def _json_lines(file: Path) -> Iterator[list[Note]]:
    notes: list[Note] = []
    try:
        with file.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                notes.append(_note(line, f"notes: {file}, line {number}"))
                if len(notes) == _LINES:
                    yield notes
                    notes = []
    except OSError as error:
        raise TrainingDataError(f"notes: {file} cannot be read: {error.strerror}") from None
    yield notes


def _note(line: bytes, where: str) -> Note:
    """Through the door of the topic, with the line's own note_id as the key."""
    try:
        key = msgspec.json.decode(line, type=_Key).note_id.encode("utf-8")
        record = parse_record(key, line, 0)
    except (InvalidMessage, msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise TrainingDataError(f"{where} is no note: {error}") from None
    assert isinstance(record, NoteRecord)
    return record.note


class _Key(msgspec.Struct):
    note_id: str
