"""An evaluation as bars with their 95 % intervals: ``evaluation.png``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from training.evaluation.evaluation import MODEL, Evaluation

__all__ = ["plot_evaluation"]

_BLUE, _GREY, _INK = "#2a6fbb", "#c9ced6", "#4a5160"
_PANELS: Final = (
    ("hashtags.f1", "hashtags: F1 of exact tags"),
    ("hashtags.rouge1", "hashtags: ROUGE-1"),
    ("category.accuracy", "category: accuracy"),
    ("neighbours.precision_at_5", "neighbours of the same category, of 5"),
    ("i2i.recall_at_10", "item to item: recall@10"),
    ("i2i.recall_at_100", "item to item: recall@100"),
)


def plot_evaluation(evaluation: Evaluation, file: Path) -> None:
    """A panel for each metric that anybody was asked for; the model is blue."""
    panels = [panel for panel in _PANELS if any(panel[0] in metrics for metrics in evaluation.systems.values())]
    figure = Figure(figsize=(11, 0.6 + 2.3 * -(-len(panels) // 2)), layout="constrained")
    for place, (metric, title) in enumerate(panels):
        axes = figure.add_subplot(-(-len(panels) // 2), 2, place + 1)
        _bars(axes, evaluation, metric)
        axes.set_title(title, fontsize=10, loc="left")
    partial = file.with_name(f".{file.name}")
    figure.savefig(partial, format="png", dpi=110)
    partial.rename(file)


def _bars(axes: Axes, evaluation: Evaluation, metric: str) -> None:
    rows = [(name, metrics[metric]) for name, metrics in evaluation.systems.items() if metric in metrics]
    names: Sequence[str] = [name for name, _ in rows]
    values = [interval.value for _, interval in rows]
    # Of values that are all the same, a rounding may put the mean beside its interval; no bar may be shorter than 0.
    below = [max(interval.value - interval.low, 0.0) for _, interval in rows]
    above = [max(interval.high - interval.value, 0.0) for _, interval in rows]
    axes.barh(
        names,
        values,
        xerr=[below, above],
        color=[_BLUE if name == MODEL else _GREY for name in names],
        error_kw={"ecolor": _INK, "elinewidth": 1, "capsize": 2},
    )
    axes.invert_yaxis()
    axes.set_xlim(left=0)
    axes.tick_params(labelsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", color="#eceff3")
    axes.set_axisbelow(True)
