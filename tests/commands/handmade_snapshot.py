"""A snapshot as ``pairs refresh`` leaves it behind, of pairs and notes that a test chooses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import duckdb
import msgspec

from streams.cooccurrence import PairOptions
from streams.publishing import only_run, publish
from streams.snapshot import Engine, FilesSource, Snapshot, SourceFile, Window
from streams.statistics import Day, Degree, NewNotes, NoteCounts, ScoreBin, Statistics

__all__ = ["DAY_MS", "END", "make_snapshot"]

DAY_MS = 86_400_000
END = 1_795_478_400_000  # 2026-11-24
Pair = tuple[str, str, float, int, int]

STATISTICS_OF_NOTHING = Statistics(
    read=0, forgets=0, dropped={}, clicks=0, users=0, clicked_notes=0, power_users=0, days=[], ordered_pairs=0,
    below_min=0, above_max=0, beyond_top=0, pairs=0, sources=0, targets=0, scores=[], partners=[], partner_of=[],
    notes=NoteCounts(0, 0, 0, 0), new_notes=NewNotes(0, 0), pairs_with_deleted_notes=0,
)  # fmt: skip
STATISTICS_OF_A_WEEK = msgspec.structs.replace(
    STATISTICS_OF_NOTHING,
    read=1200,
    forgets=3,
    dropped={"dead_letter": 4, "late": 12, "future": 1, "forgotten": 20, "duplicate": 60, "evicted": 100},
    clicks=1000,
    users=90,
    clicked_notes=40,
    days=[Day(f"2026-11-{day}", 100 + day, day) for day in range(17, 24)],
    ordered_pairs=500,
    below_min=30,
    beyond_top=100,
    pairs=370,
    scores=[ScoreBin(0.1, 0.125893, 20), ScoreBin(1.0, 1.258925, 3)],
    partners=[Degree(1, 1, 5), Degree(2, 10, 30)],
    partner_of=[Degree(1, 1, 9), Degree(11, 20, 2)],
)


def make_snapshot(
    out: Path,
    pairs: list[Pair],
    titles: dict[str, str],
    *,
    end: int = END,
    statistics: Statistics = STATISTICS_OF_A_WEEK,
    published_at: int = END - DAY_MS,
    **options: Any,
) -> Snapshot:
    """``pairs``: source, target, score, users, rank. ``titles``: the live notes."""
    with only_run(out) as work:
        schema = "source_id VARCHAR, target_id VARCHAR, score DOUBLE, users BIGINT, rank INTEGER"
        _write(work / "pairs", schema, pairs)
        rows = [(note_id, title, "", [], "", published_at, "{}") for note_id, title in titles.items()]
        schema = "note_id VARCHAR, title VARCHAR, content VARCHAR, hashtags VARCHAR[], category VARCHAR, "
        _write(work / "notes", schema + "published_at BIGINT, attributes VARCHAR", rows)
        source = FilesSource([SourceFile("clicks.jsonl", "0" * 64, 1)])
        return publish(
            out,
            work,
            window=Window(end - 7 * DAY_MS, end, "7d"),
            settings=PairOptions(**options),
            engine=Engine("duckdb", "2.0.0"),
            source=source,
            notes_source=source,
            pairs=work / "pairs",
            notes=work / "notes",
            statistics=statistics,
        )


def _write(file: Path, schema: str, rows: list[Any]) -> None:
    with duckdb.connect() as connection:
        connection.execute(f"CREATE TABLE rows ({schema})")
        if rows:
            connection.executemany(f"INSERT INTO rows VALUES ({', '.join('?' * len(rows[0]))})", rows)
        connection.execute(f"COPY rows TO '{file}' (FORMAT parquet)")
