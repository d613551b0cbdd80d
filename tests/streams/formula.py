"""An obvious reading of the formula, in plain Python: what both engines are held against."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from itertools import pairwise, permutations
from pathlib import Path

import duckdb

from streams.cooccurrence import PairOptions
from streams.duckdb_engine import parquet, quoted

__all__ = ["Click", "Pair", "formula", "read_pairs", "write_clicks"]

Click = tuple[str, str, int]  # user_id, note_id, clicked_at
Pair = tuple[str, str, float, int, int]  # source_id, target_id, score, users, rank
UNIT = 10**12


def formula(clicks: Iterable[Click], options: PairOptions | None = None) -> list[Pair]:
    """s(A -> B) = sum over users who clicked A and later B of 1 / N_u; bounds; top; by (source, rank)."""
    o = options or PairOptions()
    history: dict[str, list[tuple[int, str]]] = defaultdict(list)
    for user, note, at in set(clicks):
        history[user].append((at, note))
    units: dict[tuple[str, str], int] = defaultdict(int)
    users: dict[tuple[str, str], int] = defaultdict(int)
    for rows in history.values():
        n = len({note for _, note in rows})
        if o.max_notes_per_user is not None and n > o.max_notes_per_user:
            continue
        times = sorted({at for at, _ in rows})
        went = set()
        for (a_at, a), (b_at, b) in permutations(rows, 2):
            near = o.max_distance is None or times.index(b_at) - times.index(a_at) <= o.max_distance
            between = [at for at in times if a_at <= at <= b_at]
            pauses = [late - early for early, late in pairwise(between)]
            together = o.session_gap_ms is None or all(pause <= o.session_gap_ms for pause in pauses)
            if a != b and a_at < b_at and near and together:
                went.add((a, b))
        for a, b in [*went, *((b, a) for a, b in went if o.symmetric)]:
            units[a, b] += UNIT // n
            users[a, b] += 1
    low, high = round(o.min_score * UNIT), round(o.max_score * UNIT)
    found = []
    for source in sorted({a for a, _ in units}):
        ranked = sorted((-u, b) for (a, b), u in units.items() if a == source and low <= u <= high)
        for rank, (minus, target) in enumerate(ranked[: o.top], 1):
            found.append((source, target, -minus / UNIT, users[source, target], rank))
    return found


def write_clicks(clicks: Iterable[Click], file: Path) -> Path:
    with duckdb.connect() as connection:
        connection.execute("CREATE TABLE clicks (user_id VARCHAR, note_id VARCHAR, clicked_at BIGINT)")
        rows = list(clicks)
        if rows:
            columns = zip(*rows, strict=True)
            connection.execute("INSERT INTO clicks SELECT unnest(?), unnest(?), unnest(?)", [list(c) for c in columns])
        connection.execute(f"COPY clicks TO {quoted(str(file))} (FORMAT parquet)")
    return file


def read_pairs(folder_or_file: Path) -> list[Pair]:
    """By code points of the source, then rank."""
    path = folder_or_file / "*.parquet" if folder_or_file.is_dir() else folder_or_file
    rows = duckdb.sql(f"SELECT source_id, target_id, score, users, rank FROM {parquet(path)}").fetchall()
    return sorted(rows, key=lambda row: (row[0], row[4]))
