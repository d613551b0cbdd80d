"""How two snapshots differ: what they were made of, what they hold, and how much of it is the same."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from streams.snapshot import Snapshot
from streams.snapshot_queries import questions

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

__all__ = ["ChangedPair", "Counts", "Overlap", "SnapshotDiff", "diff_snapshots"]

_COUNTED = ("read", "clicks", "users", "clicked_notes", "ordered_pairs", "pairs", "sources", "targets")
_BINS = 5


class Counts(msgspec.Struct, frozen=True):
    """Pairs or sources. ``rescored`` and ``reranked`` are of those in both, and may be the same ones."""

    both: int
    gained: int
    lost: int
    rescored: int = 0
    reranked: int = 0


class Overlap(msgspec.Struct, frozen=True):
    """Jaccard: the partners that a source has in both, by those it has in either; over the sources in both.

    ``bins`` are sources by that share: 0 to 0.2, 0.2 to 0.4, ..., each without its end but for the last; ``equal`` are
    those at 1. ``mean`` is None where no source is in both.
    """

    mean: float | None
    bins: list[int]
    equal: int


class ChangedPair(msgspec.Struct, frozen=True):
    """A pair that is not the same in both; None where it is not there."""

    source_id: str
    source_title: str
    target_id: str
    target_title: str
    score_a: float | None
    score_b: float | None
    rank_a: int | None
    rank_b: int | None


class SnapshotDiff(msgspec.Struct, frozen=True, kw_only=True):
    """From ``a`` to ``b``. ``made_of`` has what differs in their manifests, ``counts`` what their statistics say."""

    a: str
    b: str
    made_of: dict[str, tuple[Any, Any]]
    counts: dict[str, tuple[int, int]]
    pairs: Counts
    sources: Counts
    overlap: Overlap
    gained: list[ChangedPair]
    lost: list[ChangedPair]
    changed: list[ChangedPair]


def diff_snapshots(a: Snapshot, b: Snapshot, limit: int = 10) -> SnapshotDiff:
    """``limit`` is how many of the gained, lost and rescored pairs are named, the largest first.

    Raises :class:`streams.errors.SnapshotError` and :class:`streams.errors.EngineError`.
    """
    with questions({"a": a, "b": b}) as connection:
        connection.execute(_JOINED)
        connection.execute(_BY_SOURCE)
        return SnapshotDiff(
            a=a.name,
            b=b.name,
            made_of=_made_of(a, b),
            counts={name: (getattr(a.statistics, name), getattr(b.statistics, name)) for name in _COUNTED},
            pairs=_counts(connection, _PAIRS),
            sources=_counts(connection, _SOURCES),
            overlap=_overlap(connection),
            gained=_largest(connection, "rank_a IS NULL", "score_b", limit),
            lost=_largest(connection, "rank_b IS NULL", "score_a", limit),
            changed=_largest(connection, "score_a <> score_b", "abs(score_b - score_a)", limit),
        )


def _made_of(a: Snapshot, b: Snapshot) -> dict[str, tuple[Any, Any]]:
    first, second = _flat(a), _flat(b)
    names = list(dict.fromkeys([*first, *second]))
    return {name: (first.get(name), second.get(name)) for name in names if first.get(name) != second.get(name)}


def _flat(snapshot: Snapshot) -> dict[str, Any]:
    """``window.end`` -> its value. Hashes of what the questions look into would only say that something differs."""
    manifest = msgspec.to_builtins(snapshot.manifest)
    shown = {name: manifest[name] for name in ("format_version", "window", "settings", "engine", "source")}
    shown["notes"] = {"sha256": manifest["notes"]["sha256"], "rows": manifest["notes"]["rows"]}
    return dict(_leaves(shown))


def _leaves(value: dict[str, Any], above: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for name, below in value.items():
        found += _leaves(below, f"{above}{name}.") if isinstance(below, dict) else [(f"{above}{name}", below)]
    return found


def _counts(connection: DuckDBPyConnection, sql: str) -> Counts:
    row = connection.execute(sql).fetchone()
    assert row is not None
    return Counts(*row)


def _overlap(connection: DuckDBPyConnection) -> Overlap:
    bins = [0] * _BINS
    total = equal = 0
    shares = 0.0
    # One row for each share that occurs, of which there are few: a source has some partners, not thousands.
    for both, either, sources in connection.execute(_SHARES).fetchall():
        bins[min(both * _BINS // either, _BINS - 1)] += sources
        total += sources
        shares += both / either * sources
        equal += sources if both == either else 0
    return Overlap(shares / total if total else None, bins, equal)


def _largest(connection: DuckDBPyConnection, which: str, size: str, limit: int) -> list[ChangedPair]:
    sql = _LARGEST.format(which=which, size=size)
    return [ChangedPair(*row) for row in connection.execute(sql, [limit]).fetchall()]


_JOINED = """
    CREATE TEMP TABLE joined AS
    SELECT
        coalesce(a.source_id, b.source_id) AS source_id, coalesce(a.target_id, b.target_id) AS target_id,
        a.score AS score_a, b.score AS score_b, a.rank AS rank_a, b.rank AS rank_b
    FROM a_pairs AS a FULL JOIN b_pairs AS b ON a.source_id = b.source_id AND a.target_id = b.target_id
"""
_PAIRS = """
    SELECT
        count(*) FILTER (rank_a IS NOT NULL AND rank_b IS NOT NULL), count(*) FILTER (rank_a IS NULL),
        count(*) FILTER (rank_b IS NULL), count(*) FILTER (score_a <> score_b), count(*) FILTER (rank_a <> rank_b)
    FROM joined
"""
_BY_SOURCE = """
    CREATE TEMP TABLE by_source AS
    SELECT
        source_id, count(rank_a) AS in_a, count(rank_b) AS in_b, count(*) AS in_either,
        count(*) FILTER (rank_a IS NOT NULL AND rank_b IS NOT NULL) AS in_both
    FROM joined GROUP BY source_id
"""
_SOURCES = """
    SELECT
        count(*) FILTER (in_a > 0 AND in_b > 0), count(*) FILTER (in_a = 0), count(*) FILTER (in_b = 0)
    FROM by_source
"""
_SHARES = "SELECT in_both, in_either, count(*) FROM by_source WHERE in_a > 0 AND in_b > 0 GROUP BY ALL"
# The later snapshot's title, where it has one.
_LARGEST = """
    SELECT
        source_id, coalesce(sb.title, sa.title, ''), target_id, coalesce(tb.title, ta.title, ''),
        score_a, score_b, rank_a, rank_b
    FROM (FROM joined WHERE {which} ORDER BY {size} DESC, source_id, target_id LIMIT ?)
    LEFT JOIN a_notes AS sa ON sa.note_id = source_id LEFT JOIN b_notes AS sb ON sb.note_id = source_id
    LEFT JOIN a_notes AS ta ON ta.note_id = target_id LEFT JOIN b_notes AS tb ON tb.note_id = target_id
    ORDER BY {size} DESC, source_id, target_id
"""
