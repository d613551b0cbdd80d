"""Clicks from the app's table: its compacted changelog, in which the last record of a key is the row as it is now."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Final

import duckdb

from notellm.settings import Settings
from streams.click_topics import changelog_topic
from streams.day_row import read_row, user_and_day
from streams.errors import SourceError
from streams.kafka_log import TopicLog
from streams.rules import DAY_MS, day_of
from streams.snapshot import ChangelogSource, Window
from streams.staging import CLICKS, Batch, StagedClicks, write_parquet

__all__ = ["stage_changelog"]

log = logging.getLogger(__name__)

_ROWS_AT_ONCE: Final = 20_000


def stage_changelog(
    connection: duckdb.DuckDBPyConnection,
    settings: Settings,
    window: Window,
    target: Path,
    progress: Callable[[float], None],
) -> StagedClicks:
    """Write the clicks of the window to ``target``. Raises :class:`SourceError`.

    ``read`` counts the clicks of those days that the window touches.
    """
    if window.start < window.end - settings.streams.window_days * DAY_MS:
        log.warning(
            "the window is longer than the %d days that the app keeps (streams.window_days): older clicks are not "
            "in its changelog; --source topic reads what the raw topic still has",
            settings.streams.window_days,
        )
    first, last = day_of(window.start), day_of(max(window.end - 1, 0))
    connection.execute("CREATE TABLE rows (partition INT, place BIGINT, key BLOB, value BLOB)")
    rows = Batch(connection, "rows")
    with TopicLog(settings.kafka, changelog_topic(settings.streams)) as topic:
        for batch in topic.batches(progress):
            for message in batch:
                key = message.key()
                if key is None:
                    raise SourceError(f"topic {topic.topic!r} has a record without a key; it is no changelog of ours")
                if first <= user_and_day(key)[1] <= last:
                    rows.add((message.partition(), message.offset(), key, message.value()))
    rows.flush()
    connection.execute(f"CREATE TABLE staged ({CLICKS})")
    read = _decode(connection, window)
    kept = write_parquet(connection, "SELECT * FROM staged", target)
    connection.execute("DROP TABLE rows")
    connection.execute("DROP TABLE staged")
    source = ChangelogSource(topic.topic, topic.ranges)
    return StagedClicks(source, read, 0, {"outside_window": read - kept})


def _decode(connection: duckdb.DuckDBPyConnection, window: Window) -> int:
    """From the rows that live to ``staged``; returns how many clicks they hold."""
    clicks = Batch(connection.cursor(), "staged")
    live = connection.execute(
        """
        SELECT rows.key, rows.value FROM rows
        JOIN (SELECT partition, MAX(place) AS place FROM rows GROUP BY partition, key) AS last
        ON rows.partition = last.partition AND rows.place = last.place
        WHERE rows.value IS NOT NULL
        """
    )
    read = 0
    while lot := live.fetchmany(_ROWS_AT_ONCE):
        for key, value in lot:
            for click in read_row(key, value):
                read += 1
                if window.start <= click.clicked_at < window.end:
                    clicks.add((click.user_id, click.note_id, click.clicked_at))
    clicks.flush()
    return read
