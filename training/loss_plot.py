"""A run's metrics as curves: ``loss.png``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

__all__ = ["plot_losses"]

_CURVES = (
    ("contrastive", "contrastive loss"),
    ("generative", "generative loss, per answer token"),
    ("recall_at_1", "recall@1 within the batch"),
    ("learning_rate", "learning rate"),
)
_BLUE, _ORANGE, _PALE = "#2a6fbb", "#d9822b", "#b9cfe8"
_WINDOW = 20


def plot_losses(metrics: Sequence[dict[str, Any]], file: Path) -> None:
    """Each step pale, their running mean on top, and the validation part's points."""
    figure = Figure(figsize=(10, 6.5), layout="constrained")
    panels = figure.subplots(2, 2).ravel()
    for axes, (name, title) in zip(panels, _CURVES, strict=True):
        steps = [line for line in metrics if line["part"] == "train" and name in line]
        looks = [line for line in metrics if line["part"] == "validation" and name in line]
        axes.plot([line["step"] for line in steps], [line[name] for line in steps], color=_PALE, linewidth=1)
        means = _running_mean([line[name] for line in steps])
        axes.plot([line["step"] for line in steps], means, color=_BLUE, label="train")
        if looks:
            xs, ys = [line["step"] for line in looks], [line[name] for line in looks]
            axes.plot(xs, ys, color=_ORANGE, marker="o", markersize=4, label="validation")
            axes.legend(frameon=False)
        axes.set_title(title, fontsize=10, loc="left")
        axes.set_xlabel("step")
        axes.grid(color="#eceff3")
        axes.spines[["top", "right"]].set_visible(False)
    partial = file.with_name(f".{file.name}")
    figure.savefig(partial, format="png", dpi=110)
    partial.rename(file)


def _running_mean(values: Sequence[float]) -> list[float]:
    return [sum(values[max(0, end - _WINDOW) : end]) / min(end, _WINDOW) for end in range(1, len(values) + 1)]
