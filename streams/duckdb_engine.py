"""The co-occurrence queries on one machine: DuckDB, in this process, within a memory limit; the rest spills to disk."""

# ruff: noqa: S608 - all that is put into these queries is of our own, or quoted
from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, Literal

import duckdb

from notellm.errors import SettingsError
from streams.cooccurrence import (
    Found,
    PairOptions,
    candidates_sql,
    counts_sql,
    days_sql,
    found,
    kept_sql,
    preparation,
    scores_sql,
    totals_sql,
)
from streams.errors import EngineError

__all__ = ["MEMORY_LIMIT", "DuckDBEngine", "check_memory_limit", "connect", "engine_errors", "parquet", "quoted"]

MEMORY_LIMIT: Final = "4GB"
# Rows of the self-join in one part: what it groups then stays within the processor's caches, nearly, and is quick.
_CANDIDATES: Final = 16_000_000


class DuckDBEngine:
    """``work`` is a folder for what does not fit into memory. See :class:`streams.cooccurrence.PairEngine`."""

    name: Literal["duckdb"] = "duckdb"

    def __init__(self, work: Path, *, memory_limit: str = MEMORY_LIMIT, threads: int = 0) -> None:
        self._work = work
        self._memory_limit = memory_limit
        self._threads = threads

    @property
    def version(self) -> str:
        return str(duckdb.__version__)

    def find_pairs(
        self, clicks: Path, options: PairOptions, pairs: Path, progress: Callable[[float], None] = lambda _: None
    ) -> Found:
        pairs.mkdir()
        with connect(self._work / "engine.duckdb", self._memory_limit, self._threads) as connection:
            return _find_pairs(connection, clicks, options, pairs, progress)


def _find_pairs(
    connection: duckdb.DuckDBPyConnection,
    clicks: Path,
    options: PairOptions,
    pairs: Path,
    progress: Callable[[float], None],
) -> Found:
    connection.execute(f"CREATE VIEW clicks AS SELECT * FROM {parquet(clicks)}")
    for table, sql in preparation(options):
        # A user's rows side by side: the join then finds them in the processor's caches.
        order = "ORDER BY person" if table == "moments" else ""
        connection.execute(f"CREATE TABLE {table} AS SELECT * FROM ({sql}) AS made {order}")
    totals = _row(connection, totals_sql())
    days = connection.execute(days_sql()).fetchall()
    for table in ("seen", "visits", "user_ids", "weights"):
        connection.execute(f"DROP TABLE {table}")
    parts = max(1, math.ceil(int(_row(connection, candidates_sql())[0]) / _CANDIDATES))
    counts = []
    for part in range(parts):
        connection.execute(f"CREATE OR REPLACE TEMP TABLE scores AS {scores_sql(options, part=part, parts=parts)}")
        counts.append(_row(connection, counts_sql(options)))
        file = pairs / f"part-{part:05}.parquet"
        connection.execute(f"COPY ({kept_sql(options)}) TO {quoted(str(file))} (FORMAT parquet)")
        progress((part + 1) / parts)
    return found(totals, days, counts)


@contextmanager
def connect(database: Path, memory_limit: str, threads: int = 0) -> Iterator[duckdb.DuckDBPyConnection]:
    """A database in a new file, which goes in the end. What DuckDB raises becomes :class:`EngineError`."""
    check_memory_limit(memory_limit)
    config: dict[str, Any] = {
        "memory_limit": memory_limit,
        "temp_directory": str(database.with_suffix(".spill")),
        "preserve_insertion_order": False,
        "autoinstall_known_extensions": False,
    }
    if threads:
        config["threads"] = threads
    with engine_errors():
        connection = duckdb.connect(str(database), config=config)
    try:
        with engine_errors(), connection:
            yield connection
    finally:
        connection.close()
        database.unlink(missing_ok=True)
        database.with_suffix(".duckdb.wal").unlink(missing_ok=True)


def check_memory_limit(text: str) -> None:
    """Raises :class:`SettingsError` that says what is allowed."""
    if re.fullmatch(r"\d+(\.\d+)?\s*([KMGT]i?)?B", text, re.IGNORECASE | re.ASCII) is None:
        raise SettingsError(f"memory_limit: {text!r} is not allowed: a size is, such as 4GB or 512MiB")


@contextmanager
def engine_errors() -> Iterator[None]:
    """One line of what DuckDB says, and what may help."""
    try:
        yield
    except duckdb.OutOfMemoryException as error:
        raise EngineError(f"duckdb ran out of memory: {_first_line(error)}; give --memory-limit more") from None
    except duckdb.Error as error:
        raise EngineError(f"duckdb gave up: {_first_line(error)}") from None


def parquet(path: Path) -> str:
    """SQL that reads this file; a star in the last part of its name stands for several."""
    return f"read_parquet({quoted(str(path))})"


def quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def _row(connection: duckdb.DuckDBPyConnection, sql: str) -> tuple[Any, ...]:
    row = connection.execute(sql).fetchone()
    assert row is not None
    return tuple(row)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
