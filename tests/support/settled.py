"""The demo's judge, the moment that everything is committed: it reads in one Strong query."""

from __future__ import annotations

import time
from contextlib import closing
from typing import Any

from pymilvus import MilvusClient

from commands.checker import Verdict, judge, read_dead_letters
from tests.support.pipeline import Pipeline

__all__ = ["settled_verdict"]

_MOST_ROWS = 16_384  # that Milvus returns at once
_SECONDS_OF_AN_OLDER_VERSION = 5.0


def settled_verdict(pipeline: Pipeline) -> Verdict:
    """An iterator, which ``Pipeline.judge`` reads with, shows Milvus 2.3 as it was some 100 ms ago, Strong or not."""
    letters = read_dead_letters(pipeline.kafka.bootstrap_servers, pipeline.dead_letter_topic)
    deadline = time.monotonic() + _SECONDS_OF_AN_OLDER_VERSION
    while True:
        verdict = judge(pipeline.entries(), _rows(pipeline), letters, pipeline.program.reference)
        # Milvus 2.3 shows an older version again for a moment while it moves rows between its segments: that counts if
        # it stays. A row that is not there at all counts at once.
        if verdict.lost or not verdict.stale or time.monotonic() > deadline:
            return verdict
        time.sleep(0.2)


def _rows(pipeline: Pipeline) -> list[dict[str, Any]]:
    with closing(MilvusClient(pipeline.milvus.uri, timeout=30)) as client:
        rows: list[dict[str, Any]] = client.query(
            pipeline.alias,
            filter="source_offset >= 0",
            output_fields=["*"],
            limit=_MOST_ROWS,
            consistency_level="Strong",
        )
    assert len(rows) < _MOST_ROWS, "there may be more"
    return rows
