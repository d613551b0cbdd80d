"""Clicks from the raw topic: the rules of :mod:`streams.rules`, applied by a reader that comes by later.

Each record is judged on its own as it is read; what depends on others (forgotten, duplicate, evicted) is one query over
all of them. What comes out is what the app's table holds, as far as the topic still has the records.
"""

# ruff: noqa: S608 - all that is put into these queries is of our own, or quoted
from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import duckdb
from confluent_kafka import TIMESTAMP_NOT_AVAILABLE, Message

from notellm.clicks import Forget, parse_click
from notellm.errors import InvalidMessage
from notellm.settings import Settings, StreamsSettings
from streams.kafka_log import TopicLog
from streams.rules import DAY_MS, mistimed
from streams.snapshot import TopicSource, Window
from streams.staging import Batch, StagedClicks, write_parquet

__all__ = ["stage_raw_clicks"]

log = logging.getLogger(__name__)

_COLUMNS: Final = "partition INT, place BIGINT, user_id VARCHAR, note_id VARCHAR, clicked_at BIGINT"


def stage_raw_clicks(
    connection: duckdb.DuckDBPyConnection,
    settings: Settings,
    window: Window,
    target: Path,
    progress: Callable[[float], None],
) -> StagedClicks:
    """Write the clicks of the window that the rules leave to ``target``. Raises :class:`SourceError`."""
    streams = settings.streams
    # A click that counts is at most so much younger than its record.
    since_ms = window.start - streams.future_tolerance_s * 1000
    connection.execute(f"CREATE TABLE log ({_COLUMNS})")
    connection.execute(f"CREATE TABLE forgets ({_COLUMNS})")
    clicks, forgets = Batch(connection, "log"), Batch(connection, "forgets")
    counts: Counter[str] = Counter()
    with TopicLog(settings.kafka, streams.clicks_topic, since_ms=since_ms) as topic:
        if topic.truncated and window.start > 0:
            log.warning(
                "topic %s has deleted its oldest records on partitions %s: the window may begin before what is left; "
                "its retention.ms must be longer than the window",
                topic.topic, topic.truncated,
            )  # fmt: skip
        for batch in topic.batches(progress):
            for message in batch:
                counts[_take(message, streams, clicks, forgets)] += 1
    clicks.flush()
    forgets.flush()
    left = _apply(connection, streams.clicks_per_day, window, target)
    dropped = {rule: counts[rule] for rule in ("dead_letter", "late", "future")}
    source = TopicSource(
        topic=streams.clicks_topic,
        partitions=topic.ranges,
        allowed_lateness_s=streams.allowed_lateness_s,
        future_tolerance_s=streams.future_tolerance_s,
        clicks_per_day=streams.clicks_per_day,
    )
    return StagedClicks(source, sum(counts.values()), counts["forget"], {**dropped, **left})


def _take(message: Message, streams: StreamsSettings, clicks: Batch, forgets: Batch) -> str:
    """What the record is on its own: "click" and "forget" go to their tables, the others are dropped by that rule."""
    kind, timestamp_ms = message.timestamp()
    where = (message.partition(), message.offset())
    try:
        # The bytes as they are: a Message is falsy when its value is empty.
        found = parse_click(message.key(), message.value())
    except InvalidMessage:
        return "dead_letter"
    if isinstance(found, Forget):
        forgets.add((*where, found.user_id, None, None))
        return "forget"
    timestamp_ms = -1 if kind == TIMESTAMP_NOT_AVAILABLE else timestamp_ms
    rule = mistimed(found, timestamp_ms, streams.allowed_lateness_s * 1000, streams.future_tolerance_s * 1000)
    if rule is None:
        clicks.add((*where, found.user_id, found.note_id, found.clicked_at))
    return rule or "click"


def _apply(connection: duckdb.DuckDBPyConnection, clicks_per_day: int, window: Window, target: Path) -> dict[str, int]:
    """What the rules that look at several records drop; the others go to ``target``."""
    logged = _number(connection, "log")
    connection.execute(
        """
        CREATE TABLE remembered AS SELECT log.* FROM log
        LEFT JOIN (SELECT partition, user_id, MAX(place) AS place FROM forgets GROUP BY partition, user_id) AS last
        ON log.partition = last.partition AND log.user_id = last.user_id
        WHERE last.place IS NULL OR log.place > last.place
        """
    )
    connection.execute("DROP TABLE log")
    remembered = _number(connection, "remembered")
    connection.execute("CREATE TABLE once AS SELECT DISTINCT partition, user_id, note_id, clicked_at FROM remembered")
    connection.execute("DROP TABLE remembered")
    once = _number(connection, "once")
    # Over all that was read, as clicks after the window's end push out earlier ones of their day too.
    connection.execute(
        f"""
        CREATE TABLE kept AS SELECT user_id, note_id, clicked_at FROM once
        QUALIFY ROW_NUMBER() OVER (
            PARTITION BY partition, user_id, clicked_at // {DAY_MS} ORDER BY clicked_at DESC, note_id DESC
        ) <= {clicks_per_day}
        """
    )
    connection.execute("DROP TABLE once")
    kept = _number(connection, "kept")
    inside = write_parquet(
        connection,
        f"SELECT * FROM kept WHERE clicked_at >= {window.start} AND clicked_at < {window.end}",
        target,
    )
    connection.execute("DROP TABLE kept")
    connection.execute("DROP TABLE forgets")
    return {
        "forgotten": logged - remembered,
        "duplicate": remembered - once,
        "evicted": once - kept,
        "outside_window": kept - inside,
    }


def _number(connection: duckdb.DuckDBPyConnection, table: str) -> int:
    row: Any = connection.execute(f"SELECT COUNT(*) FROM {table}").fetchone()
    return int(row[0])
