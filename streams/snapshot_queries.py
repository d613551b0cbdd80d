"""Questions to a snapshot, asked in DuckDB over its Parquet files, so that millions of pairs are fine."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import msgspec

from streams.errors import EngineError, SnapshotError
from streams.snapshot import Snapshot

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

__all__ = [
    "Hub",
    "Partner",
    "TitledPair",
    "best_pairs",
    "hubs",
    "new_notes_by_day",
    "partners",
    "questions",
    "sources_of",
    "title_of",
]


class Partner(msgspec.Struct, frozen=True):
    """The other note of a pair. ``deleted``: it is not in the snapshot's notes file, so it has no title either."""

    note_id: str
    rank: int
    score: float
    users: int
    title: str
    deleted: bool


class TitledPair(msgspec.Struct, frozen=True):
    """A pair, for people."""

    source_id: str
    source_title: str
    target_id: str
    target_title: str
    score: float
    users: int
    rank: int


class Hub(msgspec.Struct, frozen=True):
    """A note that many notes lead to: ``partner_of`` of them, with ``score`` in all."""

    note_id: str
    title: str
    partner_of: int
    score: float


@contextmanager
def questions(snapshots: Mapping[str, Snapshot]) -> Iterator[DuckDBPyConnection]:
    """A connection with the views ``<name>_pairs`` and ``<name>_notes`` of each snapshot, by the name it has here.

    Raises :class:`EngineError` where DuckDB is not installed, and :class:`SnapshotError` for files it cannot read.
    """
    try:
        import duckdb  # noqa: PLC0415 - an extra: whoever asks no such question does not need it
    except ImportError:
        raise EngineError("DuckDB is not installed; install the extra: pip install 'notellm[pairs]'") from None
    with tempfile.TemporaryDirectory(prefix="notellm-") as spill, duckdb.connect() as connection:
        connection.execute("SET temp_directory = ?", [spill])
        try:
            for name, snapshot in snapshots.items():
                connection.read_parquet(str(snapshot.pairs_path)).create_view(f"{name}_pairs")
                connection.read_parquet(str(snapshot.notes_path)).create_view(f"{name}_notes")
            yield connection
        except duckdb.Error as error:
            where = ", ".join(str(snapshot.path) for snapshot in snapshots.values())
            raise SnapshotError(f"{where}: cannot be read: {str(error).splitlines()[0]}") from None


def title_of(connection: DuckDBPyConnection, note_id: str) -> str | None:
    """None where the notes file has no such note."""
    row = connection.execute("SELECT title FROM the_notes WHERE note_id = ?", [note_id]).fetchone()
    return None if row is None else str(row[0])


def partners(connection: DuckDBPyConnection, note_id: str) -> list[Partner]:
    """Whom the note leads to, by rank."""
    return _ask(connection, Partner, _PARTNERS.format(other="target_id", this="source_id", order="rank"), [note_id])


def sources_of(connection: DuckDBPyConnection, note_id: str) -> list[Partner]:
    """Who leads to the note, the highest score first; the rank is the note's own among the partners of each."""
    sql = _PARTNERS.format(other="source_id", this="target_id", order="score DESC, source_id")
    return _ask(connection, Partner, sql, [note_id])


def best_pairs(connection: DuckDBPyConnection, limit: int) -> list[TitledPair]:
    """Those of the highest scores."""
    return _ask(connection, TitledPair, _BEST_PAIRS, [limit])


def hubs(connection: DuckDBPyConnection, limit: int) -> list[Hub]:
    """Notes that most notes lead to."""
    return _ask(connection, Hub, _HUBS, [limit])


def new_notes_by_day(connection: DuckDBPyConnection, start: int, end: int) -> list[tuple[str, int, int]]:
    """(UTC day, live notes published on it within [start, end), those of them that stand in a pair)."""
    return connection.execute(_NEW_NOTES, [start, end]).fetchall()


def _ask(connection: DuckDBPyConnection, kind: Any, sql: str, values: list[Any]) -> list[Any]:
    """The columns are the fields of ``kind``, in order."""
    return [kind(*row) for row in connection.execute(sql, values).fetchall()]


_PARTNERS = """
    SELECT {other}, rank, score, users, coalesce(title, ''), title IS NULL
    FROM the_pairs LEFT JOIN the_notes ON note_id = {other}
    WHERE {this} = ? ORDER BY {order}
"""
# The limit first: only its few pairs need titles.
_BEST_PAIRS = """
    SELECT source_id, coalesce(a.title, ''), target_id, coalesce(b.title, ''), score, users, rank
    FROM (FROM the_pairs ORDER BY score DESC, source_id, target_id LIMIT ?)
    LEFT JOIN the_notes AS a ON a.note_id = source_id
    LEFT JOIN the_notes AS b ON b.note_id = target_id
    ORDER BY score DESC, source_id, target_id
"""
_HUBS = """
    SELECT target_id, coalesce(title, ''), partner_of, score
    FROM (
        SELECT target_id, count(*) AS partner_of, sum(score) AS score
        FROM the_pairs GROUP BY target_id ORDER BY partner_of DESC, score DESC, target_id LIMIT ?
    )
    LEFT JOIN the_notes ON note_id = target_id
    ORDER BY partner_of DESC, score DESC, target_id
"""
_NEW_NOTES = """
    SELECT
        strftime(make_timestamp(published_at * 1000), '%Y-%m-%d') AS day, count(*),
        count(*) FILTER (note_id IN (SELECT source_id FROM the_pairs UNION SELECT target_id FROM the_pairs))
    FROM the_notes WHERE ? <= published_at AND published_at < ?
    GROUP BY day ORDER BY day
"""
