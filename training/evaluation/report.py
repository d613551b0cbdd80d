"""An evaluation as flat JSON, one number per key::

    hashtags.f1                          of the model; hashtags.f1.low and .high are its 95 % interval
    baselines.tfidf.hashtags.f1          the same of another system
    differences.tfidf.i2i.recall_at_10   the model less that system, query by query; with .low and .high
    counts.hashtags.notes                how many were asked

A metric without an interval (bleu4, macro_f1, valid) has no .low and .high. docs/training.md says what each key means.
"""

from __future__ import annotations

from collections.abc import Mapping

from training.evaluation.bootstrap import Interval
from training.evaluation.evaluation import MODEL, Evaluation

__all__ = ["flat_report"]

_DIGITS = 6


def flat_report(evaluation: Evaluation) -> dict[str, float | int]:
    """The model's metrics first, then all else by name."""
    report: dict[str, float | int] = {}
    for name, metrics in evaluation.systems.items():
        _add(report, "" if name == MODEL else f"baselines.{name}.", metrics)
    for name, metrics in evaluation.differences.items():
        _add(report, f"differences.{name}.", metrics)
    return report | {f"counts.{name}": count for name, count in evaluation.counts.items()}


def _add(report: dict[str, float | int], prefix: str, metrics: Mapping[str, Interval]) -> None:
    for metric, interval in metrics.items():
        report[prefix + metric] = round(interval.value, _DIGITS)
        if interval.low != interval.high or interval.low != interval.value:
            report[f"{prefix}{metric}.low"] = round(interval.low, _DIGITS)
            report[f"{prefix}{metric}.high"] = round(interval.high, _DIGITS)
