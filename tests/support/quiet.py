"""The judge's verdict on a real Milvus, which does not show what it has acknowledged at every moment."""

from __future__ import annotations

import time

from commands.checker import Reference, Verdict
from tests.support.pipeline import Pipeline

__all__ = ["judge_when_quiet"]

_SECONDS = 20.0


def judge_when_quiet(pipeline: Pipeline, reference: Reference | None = None) -> Verdict:
    """Of this model's own collection, once everything is committed. A fault counts if it stays.

    For seconds after a write Milvus 2.3 may show an older version, or none, even to a Strong read: it moves rows
    between its segments, and the pages that a reader gets are not of one moment.
    """
    chosen = reference or pipeline.program.reference
    deadline = time.monotonic() + _SECONDS
    while True:
        verdict = pipeline.judge(chosen, pipeline.collection(chosen))
        if verdict.good or time.monotonic() > deadline:
            return verdict
        time.sleep(0.5)
