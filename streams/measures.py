"""What is counted of a snapshot's own files, once they are written: the second half of ``statistics.json``."""

# ruff: noqa: S608 - all that is put into these queries is of our own, or quoted
from __future__ import annotations

from pathlib import Path
from typing import Any

import duckdb

from streams.cooccurrence import Found
from streams.duckdb_engine import parquet
from streams.snapshot import Window
from streams.staging import StagedClicks
from streams.statistics import RULES, Degree, NewNotes, NoteCounts, ScoreBin, Statistics

__all__ = ["measure"]


def measure(
    connection: duckdb.DuckDBPyConnection,
    pairs: Path,
    notes: Path,
    window: Window,
    *,
    clicks: StagedClicks,
    found: Found,
    note_counts: NoteCounts,
) -> Statistics:
    """All of it. ``pairs`` and ``notes`` are the Parquet files of the snapshot."""
    connection.execute(f"CREATE VIEW pairs AS SELECT * FROM {parquet(pairs)}")
    connection.execute(f"CREATE VIEW notes AS SELECT note_id, published_at FROM {parquet(notes)}")
    kept, sources, targets = _rows(
        connection, "SELECT COUNT(*), COUNT(DISTINCT source_id), COUNT(DISTINCT target_id) FROM pairs"
    )[0]
    dropped = dict(clicks.dropped)
    dropped["duplicate"] = dropped.get("duplicate", 0) + found.duplicates
    dropped["power_user"] = found.power_clicks
    return Statistics(
        read=clicks.read,
        forgets=clicks.forgets,
        dropped={rule: dropped[rule] for rule in RULES if rule in dropped},
        clicks=found.clicks,
        users=found.users,
        clicked_notes=found.clicked_notes,
        power_users=found.power_users,
        days=found.days,
        ordered_pairs=found.ordered_pairs,
        below_min=found.below_min,
        above_max=found.above_max,
        beyond_top=found.ordered_pairs - found.below_min - found.above_max - kept,
        pairs=kept,
        sources=sources,
        targets=targets,
        scores=_scores(connection),
        partners=_degrees(connection, "source_id", "of"),
        partner_of=_degrees(connection, "target_id", "power_of_two"),
        notes=note_counts,
        new_notes=_new_notes(connection, window),
        pairs_with_deleted_notes=_rows(
            connection,
            "SELECT COUNT(*) FROM pairs WHERE source_id NOT IN (SELECT note_id FROM notes) "
            "OR target_id NOT IN (SELECT note_id FROM notes)",
        )[0][0],
    )


def _scores(connection: duckdb.DuckDBPyConnection) -> list[ScoreBin]:
    bins = _rows(
        connection,
        "SELECT CAST(floor(10 * log10(score)) AS INT) AS bin, COUNT(*) FROM pairs WHERE score > 0 "
        "GROUP BY bin ORDER BY bin",
    )
    return [
        ScoreBin(round(10 ** (number / 10), 9), round(10 ** ((number + 1) / 10), 9), count) for number, count in bins
    ]


def _degrees(connection: duckdb.DuckDBPyConnection, column: str, bins: str) -> list[Degree]:
    """``of``: a bin for each number; ``power_of_two``: 1, 2 to 3, 4 to 7, ..."""
    low = "degree" if bins == "of" else "CAST(2 ** floor(log2(degree)) AS BIGINT)"
    found = _rows(
        connection,
        f"SELECT {low} AS low, COUNT(*) FROM (SELECT COUNT(*) AS degree FROM pairs GROUP BY {column}) "
        "GROUP BY low ORDER BY low",
    )
    return [Degree(low, low if bins == "of" else 2 * low - 1, notes) for low, notes in found]


def _new_notes(connection: duckdb.DuckDBPyConnection, window: Window) -> NewNotes:
    [(published, with_pair)] = _rows(
        connection,
        "SELECT COUNT(*), COUNT(*) FILTER (note_id IN (SELECT source_id FROM pairs UNION SELECT target_id FROM pairs)) "
        f"FROM notes WHERE published_at >= {window.start} AND published_at < {window.end}",
    )
    return NewNotes(published, with_pair)


def _rows(connection: duckdb.DuckDBPyConnection, sql: str) -> list[Any]:
    return connection.execute(sql).fetchall()
