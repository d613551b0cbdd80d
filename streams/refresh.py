"""One refresh: clicks and notes are read, pairs are found, and a snapshot of them is published. All or nothing."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal

import duckdb

from notellm.errors import NoteLLMError, SettingsError
from notellm.settings import Settings
from streams.changelog import stage_changelog
from streams.click_files import stage_click_files
from streams.cooccurrence import Found, PairEngine, PairOptions
from streams.duckdb_engine import MEMORY_LIMIT, DuckDBEngine, check_memory_limit, connect, parquet
from streams.live_notes import StagedNotes, stage_notes_file, stage_notes_topic
from streams.measures import measure
from streams.publishing import only_run, prune, publish
from streams.raw_clicks import stage_raw_clicks
from streams.report import refresh_reports
from streams.snapshot import Engine, Snapshot, Window
from streams.staging import StagedClicks, write_sorted

__all__ = ["Progress", "Refresh", "check", "refresh", "window_of"]

log = logging.getLogger(__name__)

# What is being done, and the share of it that is done.
Progress = Callable[[str, float], None]

_UNITS: Final = {"m": 60_000, "h": 3_600_000, "d": 86_400_000}


@dataclass(frozen=True, kw_only=True)
class Refresh:
    """What a run is to do. ``clicks`` empty: from Kafka, by ``source``. ``notes`` None: from their topic.

    ``as_of`` is the window's end in ms UTC; None: when the run begins. ``threads`` 0: one per core.
    """

    out: Path
    clicks: tuple[Path, ...] = ()
    source: Literal["changelog", "topic"] = "changelog"
    notes: Path | None = None
    window: str = "7d"
    as_of: int | None = None
    options: PairOptions = field(default_factory=PairOptions)
    settings: Settings = field(default_factory=Settings)
    engine: Literal["duckdb", "spark"] = "duckdb"
    spark_master: str = "local[*]"
    memory_limit: str = MEMORY_LIMIT
    threads: int = 0
    keep: int = 7
    wait: bool = False


def window_of(length: str, end: int) -> Window:
    """``length`` is ``all``, or a number with d, h or m. Raises :class:`SettingsError`."""
    if length == "all":
        return Window(0, end, length)
    found = re.fullmatch(r"([1-9]\d{0,8})([dhm])", length, re.ASCII)
    if found is None:
        raise SettingsError(f"--window: {length!r} is not allowed: all is, or a time such as 7d, 24h or 90m")
    return Window(max(end - int(found[1]) * _UNITS[found[2]], 0), end, length)


def check(job: Refresh) -> None:
    """What is wrong with the job itself, before anything is read. Raises :class:`SettingsError` or EngineError."""
    window_of(job.window, 0)
    check_memory_limit(job.memory_limit)
    with _engine(job, job.out):
        pass


def refresh(job: Refresh, progress: Progress = lambda _step, _share: None) -> Snapshot:
    """Publish a snapshot, prune old ones. Where it raises, readers of ``out`` see what they saw before.

    What it raises on purpose is a :class:`notellm.errors.NoteLLMError`.
    """
    window = window_of(job.window, time.time_ns() // 1_000_000 if job.as_of is None else job.as_of)
    with only_run(job.out, wait=job.wait) as work:
        snapshot = _run(job, window, work, progress)
        # It is there for all to see: what may still go wrong is no reason to call the run a failure.
        try:
            for name in prune(job.out, job.keep, snapshot):
                log.info("pruned %s", name)
            refresh_reports(snapshot)
        except (NoteLLMError, OSError) as error:
            log.warning("%s is written, and what comes after it went wrong: %s", snapshot.path, error)
    return snapshot


def _run(job: Refresh, window: Window, work: Path, progress: Progress) -> Snapshot:
    clicks, notes, found_pairs = work / "clicks.parquet", work / "notes.parquet", work / "found"
    with connect(work / "stage.duckdb", job.memory_limit, job.threads) as connection:
        staged_clicks = _stage_clicks(job, connection, window, clicks, lambda share: progress("reading clicks", share))
        staged_notes = _stage_notes(job, connection, notes, lambda share: progress("reading notes", share))
    with _engine(job, work) as engine:
        found = engine.find_pairs(clicks, job.options, found_pairs, lambda share: progress("finding pairs", share))
    clicks.unlink()
    progress("writing", 0.0)
    with connect(work / "write.duckdb", job.memory_limit, job.threads) as connection:
        snapshot = _publish(job, window, work, connection, engine, found, staged_clicks, staged_notes)
    progress("writing", 1.0)
    return snapshot


def _stage_clicks(
    job: Refresh,
    connection: duckdb.DuckDBPyConnection,
    window: Window,
    target: Path,
    progress: Callable[[float], None],
) -> StagedClicks:
    if job.clicks:
        return stage_click_files(connection, job.clicks, window, target, progress)
    stage = stage_changelog if job.source == "changelog" else stage_raw_clicks
    return stage(connection, job.settings, window, target, progress)


def _stage_notes(
    job: Refresh, connection: duckdb.DuckDBPyConnection, target: Path, progress: Callable[[float], None]
) -> StagedNotes:
    if job.notes is not None:
        return stage_notes_file(connection, job.notes, target, progress)
    return stage_notes_topic(connection, job.settings.kafka, target, progress)


@contextmanager
def _engine(job: Refresh, work: Path) -> Iterator[PairEngine]:
    if job.engine == "duckdb":
        yield DuckDBEngine(work, memory_limit=job.memory_limit, threads=job.threads)
        return
    from streams.spark_engine import SparkEngine  # noqa: PLC0415 - an extra; without it only this fails

    engine = SparkEngine(work, master=job.spark_master, memory_limit=job.memory_limit)
    try:
        yield engine
    finally:
        engine.close()


def _publish(
    job: Refresh,
    window: Window,
    work: Path,
    connection: duckdb.DuckDBPyConnection,
    engine: PairEngine,
    found: Found,
    clicks: StagedClicks,
    notes: StagedNotes,
) -> Snapshot:
    pairs, notes_file = work / "pairs.parquet", work / "notes.parquet"
    # Whatever the engine, the same pairs become the same bytes.
    columns = "source_id, target_id, score, users, rank"
    parts = parquet(work / "found" / "*.parquet")
    write_sorted(connection, f"SELECT {columns} FROM {parts} ORDER BY source_id, rank", pairs)  # noqa: S608
    statistics = measure(connection, pairs, notes_file, window, clicks=clicks, found=found, note_counts=notes.counts)
    return publish(
        job.out,
        work,
        window=window,
        settings=job.options,
        engine=Engine(engine.name, engine.version),
        source=clicks.source,
        notes_source=notes.source,
        pairs=pairs,
        notes=notes_file,
        statistics=statistics,
    )
