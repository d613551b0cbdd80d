"""Clicks from files: JSON Lines or Parquet, through the door of the topic. One bad row, and nothing is taken."""

# ruff: noqa: S608 - all that is put into these queries is of our own, or quoted
from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

import duckdb
import msgspec

from notellm.bundle import hash_file
from notellm.clicks import Click
from notellm.decoding import ID_BYTES, check_id, decode_object
from notellm.errors import InvalidMessage
from streams.duckdb_engine import parquet
from streams.errors import SourceError
from streams.snapshot import FilesSource, SourceFile, Window
from streams.staging import CLICKS, Batch, StagedClicks, write_parquet

__all__ = ["describe_file", "stage_click_files"]

_INTEGERS: Final = ("TINYINT", "SMALLINT", "INTEGER", "BIGINT", "UTINYINT", "USMALLINT", "UINTEGER", "UBIGINT")
_LATEST: Final = 2**53
_NAMED: Final = 5  # bad rows; more would be read by nobody
_ID: Final = f"1 to {ID_BYTES} bytes of UTF-8, no control characters"

_decoder = msgspec.json.Decoder(Click)


def stage_click_files(
    connection: duckdb.DuckDBPyConnection,
    files: Sequence[Path],
    window: Window,
    target: Path,
    progress: Callable[[float], None],
) -> StagedClicks:
    """Write the clicks of the window to ``target``. Raises :class:`SourceError` that names the rows that are none."""
    described = [describe_file(file, "--clicks") for file in files]
    connection.execute(f"CREATE TABLE staged ({CLICKS})")
    read, done, total = 0, 0, max(sum(each.bytes for each in described), 1)
    for file, about in zip(files, described, strict=True):
        if _is_parquet(file):
            read += _stage_parquet(connection, file, window)
        else:
            read += _stage_lines(connection, file, window, partial(_add, progress, done, total))
        done += about.bytes
        progress(done / total)
    kept = write_parquet(connection, "SELECT * FROM staged", target)
    connection.execute("DROP TABLE staged")
    return StagedClicks(FilesSource(described), read, 0, {"outside_window": read - kept})


def _add(progress: Callable[[float], None], done: int, total: int, size: int) -> None:
    progress((done + size) / total)


def describe_file(file: Path, option: str) -> SourceFile:
    """Raises :class:`SourceError` that names ``option`` when it cannot be read."""
    try:
        return SourceFile(str(file), hash_file(file), file.stat().st_size)
    except OSError as error:
        raise SourceError(f"{option}: {file} cannot be read: {error.strerror}") from None


def _is_parquet(file: Path) -> bool:
    with file.open("rb") as stream:
        return stream.read(4) == b"PAR1"


def _stage_lines(
    connection: duckdb.DuckDBPyConnection, file: Path, window: Window, progress: Callable[[int], None]
) -> int:
    batch = Batch(connection, "staged")
    read = 0
    for click in _clicks(file, progress):
        read += 1
        if window.start <= click.clicked_at < window.end:
            batch.add((click.user_id, click.note_id, click.clicked_at))
    batch.flush()
    return read


def _clicks(file: Path, progress: Callable[[int], None]) -> Iterator[Click]:
    bad: list[str] = []
    size = 0
    with file.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            size += len(line)
            if number % 50_000 == 0:
                progress(size)
            if not line.strip():
                continue
            try:
                click = decode_object(line, _decoder, "a click", key_field="")
                check_id(click.user_id, "user_id")
                check_id(click.note_id, "note_id")
            except InvalidMessage as error:
                bad.append(f"--clicks: {file}, line {number}: {error}")
                if len(bad) == _NAMED:
                    break
                continue
            if not bad:
                yield click
    if bad:
        raise SourceError("\n".join(bad))


def _stage_parquet(connection: duckdb.DuckDBPyConnection, file: Path, window: Window) -> int:
    try:
        described = connection.execute(f"DESCRIBE SELECT * FROM {parquet(file)}").fetchall()
        types = {name: kind for name, kind, *_ in described}
        _check_columns(file, types)
        _refuse_bad_rows(connection, file)
        row = connection.execute(f"SELECT COUNT(*) FROM {parquet(file)}").fetchone()
        connection.execute(
            f"INSERT INTO staged SELECT user_id, note_id, clicked_at FROM {parquet(file)} "
            f"WHERE clicked_at >= {window.start} AND clicked_at < {window.end}"
        )
    except (duckdb.IOException, duckdb.InvalidInputException) as error:
        raise SourceError(f"--clicks: {file} cannot be read as Parquet: {str(error).splitlines()[0]}") from None
    assert row is not None
    return int(row[0])


def _check_columns(file: Path, types: dict[str, str]) -> None:
    for name, allowed in (("user_id", ("VARCHAR",)), ("note_id", ("VARCHAR",)), ("clicked_at", _INTEGERS)):
        words = "a string" if allowed == ("VARCHAR",) else "an integer, in milliseconds UTC"
        if name not in types:
            raise SourceError(f"--clicks: {file} has no column {name}; it must be there, and be {words}")
        if types[name] not in allowed:
            raise SourceError(f"--clicks: {file}, column {name} is {types[name]}; allowed is {words}")


def _refuse_bad_rows(connection: duckdb.DuckDBPyConnection, file: Path) -> None:
    # coalesce: a null is bad, not unknown.
    good_id = "coalesce(strlen({0}) BETWEEN 1 AND {1} AND NOT regexp_matches({0}, '\\p{{Cc}}'), false)"
    good = {name: good_id.format(name, ID_BYTES) for name in ("user_id", "note_id")}
    good["clicked_at"] = f"coalesce(clicked_at BETWEEN 0 AND {_LATEST}, false)"
    found = connection.execute(
        f"SELECT file_row_number + 1, {', '.join(good.values())}, {', '.join(good)} "
        f"FROM read_parquet(?, file_row_number = true) WHERE NOT ({' AND '.join(good.values())}) "
        f"ORDER BY 1 LIMIT {_NAMED}",
        [str(file)],
    ).fetchall()
    if found:
        raise SourceError("\n".join(f"--clicks: {file}, row {_complaint(row)}" for row in found))


def _complaint(row: Sequence[Any]) -> str:
    number, is_good, values = row[0], row[1:4], row[4:7]
    allowed = {"user_id": _ID, "note_id": _ID, "clicked_at": f"an integer from 0 to {_LATEST}"}
    name, value = next((name, value) for name, good, value in zip(allowed, is_good, values, strict=True) if not good)
    return f"{number}: {name}: {'null' if value is None else repr(value)[:80]}; allowed is {allowed[name]}"
