"""Rows on their way from a source to a Parquet file: through a database on disk, so that there may be any number."""

# ruff: noqa: S608 - all that is put into these queries is of our own, or quoted
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import duckdb
import pyarrow as pa

from streams.duckdb_engine import quoted
from streams.snapshot import Source

__all__ = ["CLICKS", "Batch", "StagedClicks", "write_parquet", "write_sorted"]

# Columns of a table of clicks, in SQL.
CLICKS: Final = "user_id VARCHAR, note_id VARCHAR, clicked_at BIGINT"


class StagedClicks(NamedTuple):
    """What a source made of all that it read; see :class:`streams.statistics.Statistics` for the numbers."""

    source: Source
    read: int
    forgets: int
    dropped: dict[str, int]


class Batch:
    """Appends rows to a table in lots: one by one, DuckDB would take a thousand times as long."""

    def __init__(self, connection: duckdb.DuckDBPyConnection, table: str, size: int = 50_000) -> None:
        self._connection = connection
        self._table = table
        empty: Any = connection.sql(f"SELECT * FROM {table} LIMIT 0").to_arrow_table()
        self._schema = empty.schema
        self._size = size
        self._rows: list[Sequence[Any]] = []

    def add(self, row: Sequence[Any]) -> None:
        self._rows.append(row)
        if len(self._rows) >= self._size:
            self.flush()

    def flush(self) -> None:
        if not self._rows:
            return
        columns = zip(*self._rows, strict=True)
        arrays = [pa.array(column, field.type) for column, field in zip(columns, self._schema, strict=True)]
        self._rows = []
        self._connection.register("batch", pa.Table.from_arrays(arrays, schema=self._schema))
        self._connection.execute(f"INSERT INTO {self._table} SELECT * FROM batch")
        self._connection.unregister("batch")


def write_parquet(connection: duckdb.DuckDBPyConnection, sql: str, file: Path) -> int:
    """The rows of ``sql``, in any order. Returns their number."""
    row = connection.execute(f"COPY ({sql}) TO {quoted(str(file))} (FORMAT parquet, COMPRESSION zstd)").fetchone()
    assert row is not None
    return int(row[0])


def write_sorted(connection: duckdb.DuckDBPyConnection, sql: str, file: Path) -> int:
    """The rows of ``sql``, which says their order: the same rows give the same bytes, wherever they come from."""
    # Row groups would otherwise be written as threads finish them.
    connection.execute("SET preserve_insertion_order = true")
    # A column is written as one without nulls where DuckDB knows that there are none: of a table of its own it does.
    connection.execute(f"CREATE TABLE sorted AS {sql}")
    written = write_parquet(connection, "FROM sorted", file)
    connection.execute("DROP TABLE sorted")
    connection.execute("SET preserve_insertion_order = false")
    return written
