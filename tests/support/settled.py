"""The judge's verdict on a real Milvus, which does not show what it has acknowledged at every moment."""

from __future__ import annotations

import time

from commands.checker import Reference, Verdict
from tests.support.pipeline import Pipeline

__all__ = ["settled_verdict"]

_SECONDS = 20.0


def settled_verdict(pipeline: Pipeline, reference: Reference | None = None) -> Verdict:
    """Of this model's own collection, once everything is committed. A fault counts if it stays.

    For seconds after a write Milvus 2.3 may show an older version, even to a Strong read, while it moves rows between
    its segments.
    """
    chosen = reference or pipeline.program.reference
    deadline = time.monotonic() + _SECONDS
    while True:
        verdict = pipeline.judge(chosen, pipeline.collection(chosen))
        if verdict.good or time.monotonic() > deadline:
            return verdict
        time.sleep(0.5)
