"""Clicks from a file, as three arrays: ten million of them take 160 MB, and their ids stand once each."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from notellm.clicks import Click
from notellm.decoding import check_id, decode_object
from notellm.errors import InvalidMessage
from training.errors import TrainingDataError

__all__ = ["Clicks", "read_clicks"]

_COLUMNS: Final = ("user_id", "note_id", "clicked_at")
_ROWS: Final = 100_000
_LATEST: Final = 2**53
_PARQUET: Final = b"PAR1"

_decoder = msgspec.json.Decoder(Click)


@dataclass(frozen=True)
class Clicks:
    """C clicks in the order of their file: ``users [C]`` and ``notes [C]`` are places in the two tuples of ids."""

    user_ids: tuple[str, ...]
    note_ids: tuple[str, ...]
    users: NDArray[np.int32]
    notes: NDArray[np.int32]
    clicked_at: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.users)


def read_clicks(file: Path) -> Clicks:
    """JSON Lines as on the ``note-clicks`` topic, or Parquet of the same columns.

    Raises :class:`TrainingDataError` that names the file, and the line, row or column that is wrong.
    """
    users, notes = _Ids("user_id"), _Ids("note_id")
    clicked_at = array("q")
    try:
        with file.open("rb") as stream:
            is_parquet = stream.read(len(_PARQUET)) == _PARQUET
        for user_places, note_places, times in (_parquet if is_parquet else _json_lines)(file, users, notes):
            users.places.extend(user_places)
            notes.places.extend(note_places)
            clicked_at.extend(times)
    except OSError as error:
        first = str(error.strerror or error).splitlines()[0]
        raise TrainingDataError(f"--clicks: {file} cannot be read: {first}") from None
    return Clicks(
        tuple(users.known),
        tuple(notes.known),
        np.frombuffer(users.places, np.int32),
        np.frombuffer(notes.places, np.int32),
        np.frombuffer(clicked_at, np.int64),
    )


class _Ids:
    """Each id's place. An id is checked when it is first seen."""

    def __init__(self, field: str) -> None:
        self.field = field
        self.known: dict[str, int] = {}
        self.places = array("i")

    def place(self, text: str) -> int:
        found = self.known.get(text)
        if found is None:
            found = self.known[check_id(text, self.field)] = len(self.known)
        return found


_Part = tuple[list[int], list[int], list[int]]


def _json_lines(file: Path, users: _Ids, notes: _Ids) -> Iterator[_Part]:
    part: _Part = ([], [], [])
    with file.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            try:
                click = decode_object(line, _decoder, "a click", key_field="")
                part[0].append(users.place(click.user_id))
                part[1].append(notes.place(click.note_id))
            except InvalidMessage as error:
                raise TrainingDataError(f"--clicks: {file}, line {number}: {error}") from None
            part[2].append(click.clicked_at)
            if len(part[2]) == _ROWS:
                yield part
                part = ([], [], [])
    yield part


def _parquet(file: Path, users: _Ids, notes: _Ids) -> Iterator[_Part]:
    try:
        with pq.ParquetFile(file) as parquet:
            _check_columns(file, parquet.schema_arrow)
            before = 0
            for batch in parquet.iter_batches(_ROWS, columns=list(_COLUMNS)):
                texts = [batch.column(name).to_pylist() for name in _COLUMNS[:2]]
                # As Python's integers, since an unsigned one of 64 bits is too large for ours, and is to be refused.
                times = batch.column("clicked_at").to_pylist()
                yield _part(f"--clicks: {file}", before, (users, notes), texts, times)
                before += len(times)
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise TrainingDataError(f"--clicks: {file} cannot be read as Parquet: {str(error).splitlines()[0]}") from None


def _check_columns(file: Path, schema: Any) -> None:
    for name in _COLUMNS:
        is_time = name == "clicked_at"
        words = "an integer, in milliseconds UTC" if is_time else "a string"
        if name not in schema.names:
            raise TrainingDataError(f"--clicks: {file} has no column {name}; it must be there, and be {words}")
        if schema.names.count(name) > 1:
            raise TrainingDataError(f"--clicks: {file} has {schema.names.count(name)} columns {name}; allowed is one")
        kind = schema.field(name).type
        is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
        if not (pa.types.is_integer(kind) if is_time else is_text):
            raise TrainingDataError(f"--clicks: {file}, column {name} is {kind}; allowed is {words}")


def _part(where: str, before: int, ids: tuple[_Ids, _Ids], texts: list[list[str | None]], times: list[Any]) -> _Part:
    found: list[list[int]] = []
    for table, column in zip(ids, texts, strict=True):
        places = []
        for row, text in enumerate(column, before + 1):
            if text is None:
                raise TrainingDataError(f"{where}, row {row}: {table.field}: null; it must be a string")
            try:
                places.append(table.place(text))
            except InvalidMessage as error:
                raise TrainingDataError(f"{where}, row {row}: {error}") from None
        found.append(places)
    for row, time in enumerate(times, before + 1):
        if time is None or not 0 <= time <= _LATEST:
            raise TrainingDataError(
                f"{where}, row {row}: clicked_at: {time}; allowed is an integer from 0 to {_LATEST}"
            )
    return found[0], found[1], times
