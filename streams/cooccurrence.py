"""Clicks to pairs: the co-occurrence formula, written once, as SQL that DuckDB and Spark both run.

In: a table ``clicks`` (user_id, note_id, clicked_at) of one window. Out: ordered pairs of notes with a score::

    s(A -> B) = sum, over the users who clicked A and later B, of 1 / N_u

N_u is the number of distinct notes that the user clicked in the window. A user counts once per ordered pair, however
often. "Later" is by clicked_at; two clicks of the same millisecond have no order. Pairs within ``min_score`` and
``max_score`` are kept, and of those the ``top`` targets of each source; of two with the same score, the one with the
smaller id goes first, by code points.

Scores are exact: 1 is 10**12 units, a user adds ``10**12 // N_u``, and integers add up to the same sum on every engine
in every order. Should a sum not fit into 64 bits (nine million users behind one pair), both engines raise an error.

Notes and users become dense integers first, in the order of their ids: a self-join of integers takes a fraction of the
memory. As the pairs of one source need nothing of the others, ``scores`` can be asked for in parts.
"""

# ruff: noqa: S608 - all that is put into these queries is numbers and names of our own
from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple, Protocol

import msgspec

from notellm.errors import SettingsError
from streams.rules import DAY_MS
from streams.statistics import Day

__all__ = [
    "UNIT",
    "Found",
    "PairEngine",
    "PairOptions",
    "Query",
    "candidates_sql",
    "counts_sql",
    "days_sql",
    "found",
    "kept_sql",
    "preparation",
    "scores_sql",
    "totals_sql",
]

UNIT: Final = 10**12
_MOST_UNITS: Final = 2**63 - 1


class PairOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What may be asked of the formula. Raises :class:`SettingsError` that says what is allowed.

    ``max_distance``: a user's clicks stand at positions 1, 2, 3, ... by clicked_at, clicks of the same millisecond at
    the same one; B's may be at most so many after A's. ``session_gap_ms``: a pause of more than that between two clicks
    begins a new session, and a pair is made within one. N_u stays that of the window in both cases, and a user still
    counts once per ordered pair. ``symmetric``: the score of A -> B is s(A -> B) + s(B -> A), and so is that of B -> A;
    ``users`` adds up in the same way, so that a user who went both ways counts in both. ``max_notes_per_user``: users
    who clicked more distinct notes in the window are left out.
    """

    min_score: float = 0.01
    max_score: float = 30.0
    top: int = 10
    max_distance: int | None = None
    session_gap_ms: int | None = None
    symmetric: bool = False
    max_notes_per_user: int | None = None

    def __post_init__(self) -> None:
        low, high = in_units("min_score", self.min_score), in_units("max_score", self.max_score)
        if low > high:
            raise SettingsError(f"max_score: {self.max_score} is not allowed: min_score is {self.min_score}, above it")
        for name, least in (("top", 1), ("max_distance", 1), ("session_gap_ms", 0), ("max_notes_per_user", 2)):
            value = getattr(self, name)
            if value is not None and not least <= value < 2**31 * 1000:
                raise SettingsError(f"{name}: {value} is not allowed: a whole number of at least {least} is")

    @property
    def min_units(self) -> int:
        return in_units("min_score", self.min_score)

    @property
    def max_units(self) -> int:
        return in_units("max_score", self.max_score)


def in_units(name: str, score: float) -> int:
    """``score`` as it is written, times 10**12. Raises :class:`SettingsError` where that is no whole number."""
    units = Decimal(str(score)) * UNIT
    if not (units.is_finite() and units == int(units) and 0 <= units <= _MOST_UNITS):
        raise SettingsError(
            f"{name}: {score} is not allowed: a number from 0 to {_MOST_UNITS // UNIT} is, with at most 12 decimals"
        )
    return int(units)


class Found(msgspec.Struct, frozen=True, kw_only=True):
    """What an engine counted on its way. ``clicks``, ``users`` and ``days`` are without power users."""

    clicks: int
    users: int
    clicked_notes: int
    duplicates: int
    power_users: int
    power_clicks: int
    days: list[Day]
    ordered_pairs: int
    below_min: int
    above_max: int


class PairEngine(Protocol):
    """Runs these queries. Raises :class:`streams.errors.EngineError`, and nothing else, when it gives up."""

    @property
    def name(self) -> Literal["duckdb", "spark"]: ...

    @property
    def version(self) -> str: ...

    def find_pairs(
        self, clicks: Path, options: PairOptions, pairs: Path, progress: Callable[[float], None] = ...
    ) -> Found:
        """From a Parquet file of clicks to Parquet files in the folder ``pairs``, which is not there yet.

        They hold source_id, target_id, score, users and rank, in no order. ``progress`` gets the share that is done.
        """
        ...


class Query(NamedTuple):
    """``table`` is what ``sql`` makes, for the queries after it."""

    table: str
    sql: str


def preparation(options: PairOptions) -> list[Query]:
    """What is made once, in this order.

    ``note_ids`` and ``user_ids`` give each id its integer, ``seen`` holds the clicks as integers, each once, ``visits``
    one row for each user and note, ``weights`` each user's N_u and what 1 / N_u is in units, power users left out;
    ``moments`` is what joins with itself: of each user (and session), the first and the last time or position of each
    note. Who clicked one note makes no pair, and is not in it.
    """
    return [
        Query("note_ids", _dense("note_id", "note")),
        Query("user_ids", _dense("user_id", "person")),
        Query(
            "seen",
            """
            SELECT DISTINCT user_ids.person, note_ids.note, clicks.clicked_at
            FROM clicks
            JOIN user_ids ON clicks.user_id = user_ids.user_id
            JOIN note_ids ON clicks.note_id = note_ids.note_id
            """,
        ),
        Query(
            "visits",
            """
            SELECT person, note, MIN(clicked_at) AS first_at, MAX(clicked_at) AS last_at
            FROM seen GROUP BY person, note
            """,
        ),
        Query(
            "weights",
            f"""
            SELECT person, notes, CAST(({UNIT} - {UNIT} % notes) / notes AS BIGINT) AS units
            FROM (SELECT person, COUNT(*) AS notes FROM visits GROUP BY person) AS counted
            {f"WHERE notes <= {options.max_notes_per_user}" if options.max_notes_per_user is not None else ""}
            """,
        ),
        Query("moments", _moments(options)),
    ]


def totals_sql() -> str:
    """Clicks and users before power users are left out; users, and notes that they clicked, after."""
    return """
        SELECT (SELECT COUNT(*) FROM clicks), (SELECT COUNT(*) FROM seen), (SELECT COUNT(*) FROM user_ids),
               (SELECT COUNT(*) FROM weights),
               (SELECT COUNT(DISTINCT visits.note) FROM visits JOIN weights ON visits.person = weights.person)
        """


def days_sql() -> str:
    """Each UTC day's beginning in ms, its clicks and users."""
    return f"""
        SELECT clicked_at - clicked_at % {DAY_MS} AS day, COUNT(*) AS clicks, COUNT(DISTINCT seen.person) AS users
        FROM seen JOIN weights ON seen.person = weights.person GROUP BY clicked_at - clicked_at % {DAY_MS} ORDER BY day
        """


def candidates_sql() -> str:
    """How many rows the self-join looks at, about."""
    return "SELECT COALESCE(SUM(rows * rows), 0) FROM (SELECT COUNT(*) AS rows FROM moments GROUP BY person) AS each"


def scores_sql(options: PairOptions, *, part: int = 0, parts: int = 1) -> str:
    """The table ``scores`` (source, target, units, users) of those sources that fall into this one of ``parts``."""
    later = ["a.first_at < b.last_at"]
    earlier = ["b.first_at < a.last_at"]
    if options.max_distance is not None:
        later.append(f"b.last_at - a.first_at <= {options.max_distance}")
        earlier.append(f"a.last_at - b.first_at <= {options.max_distance}")
    steps = " UNION ALL ".join(
        _steps(options, direction, part, parts) for direction in ([later, earlier] if options.symmetric else [later])
    )
    return f"""
        SELECT source, target, CAST(SUM(units) AS BIGINT) AS units, COUNT(*) AS users
        FROM ({steps}) AS steps GROUP BY source, target
        """


def counts_sql(options: PairOptions) -> str:
    """Of the table ``scores``: all, those below and above the bounds."""
    return f"""
        SELECT COUNT(*),
               COALESCE(SUM(CASE WHEN units < {options.min_units} THEN 1 ELSE 0 END), 0),
               COALESCE(SUM(CASE WHEN units > {options.max_units} THEN 1 ELSE 0 END), 0)
        FROM scores
        """


def kept_sql(options: PairOptions) -> str:
    """Of the table ``scores``: the pairs of a snapshot, in no order."""
    return f"""
        SELECT sources.note_id AS source_id, targets.note_id AS target_id,
               CAST(units AS DOUBLE) / CAST({UNIT} AS DOUBLE) AS score, users, CAST(place AS INT) AS rank
        FROM (
            SELECT source, target, units, users,
                   ROW_NUMBER() OVER (PARTITION BY source ORDER BY units DESC, target) AS place
            FROM scores WHERE units BETWEEN {options.min_units} AND {options.max_units}
        ) AS ranked
        JOIN note_ids AS sources ON sources.note = ranked.source
        JOIN note_ids AS targets ON targets.note = ranked.target
        WHERE place <= {options.top}
        """


def found(totals: Sequence[Any], days: Iterable[Sequence[Any]], counts: Iterable[Sequence[Any]]) -> Found:
    """From the rows of :func:`totals_sql`, :func:`days_sql`, and :func:`counts_sql` of every part."""
    rows, seen, everyone, users, notes = map(int, totals)
    by_day = [Day(datetime.fromtimestamp(day / 1000, UTC).date().isoformat(), clicks, who) for day, clicks, who in days]
    clicks = sum(day.clicks for day in by_day)
    pairs, below, above = (sum(map(int, column)) for column in zip(*counts, strict=True))
    return Found(
        clicks=clicks,
        users=users,
        clicked_notes=notes,
        duplicates=rows - seen,
        power_users=everyone - users,
        power_clicks=seen - clicks,
        days=by_day,
        ordered_pairs=pairs,
        below_min=below,
        above_max=above,
    )


def _dense(name: str, number: str) -> str:
    return f"""
        SELECT {name}, CAST(ROW_NUMBER() OVER (ORDER BY {name}) AS INT) AS {number}
        FROM (SELECT DISTINCT {name} FROM clicks) AS each
        """


def _moments(options: PairOptions) -> str:
    if options.max_distance is None and options.session_gap_ms is None:
        return """
            SELECT visits.person, visits.note, visits.first_at, visits.last_at, weights.units
            FROM visits JOIN weights ON visits.person = weights.person WHERE notes > 1
            """
    gap = options.session_gap_ms
    begins = "0" if gap is None else f"CASE WHEN clicked_at - before > {gap} THEN 1 ELSE 0 END"
    placed = f"""
        SELECT person, note, clicked_at, units,
               DENSE_RANK() OVER (PARTITION BY person ORDER BY clicked_at) AS place,
               SUM({begins}) OVER (PARTITION BY person ORDER BY clicked_at) AS session
        FROM (
            SELECT seen.person, seen.note, seen.clicked_at, weights.units,
                   LAG(seen.clicked_at) OVER (PARTITION BY seen.person ORDER BY seen.clicked_at) AS before
            FROM seen JOIN weights ON seen.person = weights.person WHERE notes > 1
        ) AS ordered
        """
    if options.max_distance is not None:
        return f"SELECT person, session, note, place AS first_at, place AS last_at, units FROM ({placed}) AS placed"
    return f"""
        SELECT person, session, note, MIN(clicked_at) AS first_at, MAX(clicked_at) AS last_at, MIN(units) AS units
        FROM ({placed}) AS placed GROUP BY person, session, note
        """


def _steps(options: PairOptions, direction: list[str], part: int, parts: int) -> str:
    """Who went from which note to which: once for each user and ordered pair."""
    several = options.max_distance is not None or options.session_gap_ms is not None
    conditions = [
        "a.person = b.person",
        *(["a.session = b.session"] if several else []),
        "a.note <> b.note",
        *direction,
    ]
    return f"""
        SELECT {"DISTINCT" if several else ""} a.person, a.note AS source, b.note AS target, a.units
        FROM moments AS a JOIN moments AS b ON {" AND ".join(conditions)}
        {f"WHERE a.note % {parts} = {part}" if parts > 1 else ""}
        """
