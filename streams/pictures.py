"""Pictures of a snapshot's statistics: SVG that stands inside a page, with no text in it but our own."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from datetime import date
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from streams.statistics import Day, Degree, ScoreBin

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["bars_picture", "coverage_picture", "days_picture", "degrees_picture", "scores_picture"]

_BLUE, _ORANGE, _GREY = "#2a6fbb", "#d9822b", "#c9ced6"
_STYLE = {
    "svg.fonttype": "none",  # text stays text: small, and it can be searched
    "svg.hashsalt": "notellm",
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "#eceff3",
}
_DAYS_WITH_NAMES = 14
_PLAIN = FuncFormatter(lambda value, _: f"{value:,.12g}")


def scores_picture(bins: Sequence[ScoreBin]) -> str:
    """Pairs by score, which spans orders of magnitude."""
    with mpl.rc_context(_STYLE):
        figure, axes = _axes()
        axes.bar(
            [each.low for each in bins],
            [each.pairs for each in bins],
            width=[each.high - each.low for each in bins],
            align="edge",
            color=_BLUE,
            edgecolor="white",
        )
        axes.set_xscale("log")
        _labels(axes, "score s(A→B), logarithmic", "pairs")
        return _svg(figure)


def degrees_picture(partners: Sequence[Degree], partner_of: Sequence[Degree]) -> str:
    """Notes by number of partners, both axes logarithmic; a range of numbers is a point at its middle."""
    with mpl.rc_context(_STYLE):
        figure, axes = _axes()
        series = ((partners, "o", _BLUE, "partners of a source"), (partner_of, "s", _ORANGE, "sources of a target"))
        for degrees, marker, color, label in series:
            where = [(each.low * each.high) ** 0.5 for each in degrees]
            notes = [each.notes / (each.high - each.low + 1) for each in degrees]
            axes.plot(where, notes, marker, color=color, label=label, alpha=0.8)
        axes.set_xscale("log")
        axes.set_yscale("log")
        _legend(axes)
        _labels(axes, "number of partners, logarithmic", "notes with that number, logarithmic")
        return _svg(figure)


def days_picture(days: Sequence[Day]) -> str:
    """Clicks and users, day by day."""
    with mpl.rc_context(_STYLE):
        figure, axes = _axes()
        where = [date.fromisoformat(each.day).toordinal() for each in days]
        bars = axes.bar(where, [each.clicks for each in days], color=_BLUE, label="clicks", width=0.8)
        _days(axes, where)
        _labels(axes, "day (UTC)", "clicks")
        # Users are few beside clicks: they have a scale of their own.
        right = axes.twinx()
        (line,) = right.plot(where, [each.users for each in days], "o-", color=_ORANGE, label="users")
        right.set_ylim(bottom=0)
        right.grid(visible=False)
        right.spines["right"].set_visible(True)
        _labels(right, "", "users")
        _legend(axes, [bars, line])
        return _svg(figure)


def coverage_picture(days: Sequence[tuple[str, int, int]]) -> str:
    """(day, notes published, those of them in a pair)."""
    with mpl.rc_context(_STYLE):
        figure, axes = _axes()
        where = [date.fromisoformat(day).toordinal() for day, _, _ in days]
        axes.bar(where, [notes for _, notes, _ in days], color=_GREY, label="published", width=0.8)
        axes.bar(where, [paired for _, _, paired in days], color=_BLUE, label="of these, in a pair", width=0.8)
        _days(axes, where)
        _legend(axes)
        _labels(axes, "day of publication (UTC)", "notes")
        return _svg(figure)


def bars_picture(bars: Sequence[tuple[str, int]], unit: str) -> str:
    """Horizontal, the first on top, with their numbers; logarithmic, as they differ by orders of magnitude."""
    with mpl.rc_context(_STYLE):
        figure, axes = _axes(height=0.6 + 0.33 * len(bars))
        drawn = axes.barh([name for name, _ in bars], [count for _, count in bars], color=_BLUE)
        axes.bar_label(drawn, [f" {count:,}" for _, count in bars])
        axes.invert_yaxis()
        axes.set_xscale("symlog", linthresh=1)
        axes.set_xlim(0, max(count for _, count in bars) * 4 + 1)
        axes.grid(visible=False, axis="y")
        axes.xaxis.set_major_formatter(_PLAIN)
        axes.set_xlabel(f"{unit}, logarithmic")
        return _svg(figure)


def _axes(height: float = 3.2) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(9, height), layout="constrained")
    return figure, figure.add_subplot()


def _labels(axes: Axes, x: str, y: str) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    for axis in (axes.xaxis, axes.yaxis):
        if axis.get_scale() == "log":
            axis.set_major_formatter(_PLAIN)
            axis.set_minor_formatter(NullFormatter())
    if axes.get_yscale() == "linear":
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        axes.yaxis.set_major_formatter(_PLAIN)


def _legend(axes: Axes, handles: Sequence[Any] | None = None) -> None:
    """Above the picture, where it covers nothing."""
    place = {"loc": "lower right", "bbox_to_anchor": (1, 1), "ncols": 2, "frameon": False}
    axes.legend(**place) if handles is None else axes.legend(handles=handles, **place)


def _days(axes: Axes, where: Sequence[int]) -> None:
    """A tick for each day, or for some where there are many."""
    first, last = min(where), max(where)
    step = (last - first) // _DAYS_WITH_NAMES + 1
    axes.set_xticks(range(first, last + 1, step))
    axes.xaxis.set_major_formatter(FuncFormatter(_day))
    axes.tick_params("x", rotation=30 if last - first > 7 else 0)


def _day(ordinal: float, _: Any) -> str:
    return date.fromordinal(int(ordinal)).isoformat() if ordinal >= 1 else ""


def _svg(figure: Figure) -> str:
    """Without the prologue and the metadata, which name pages elsewhere."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    svg = buffer.getvalue()
    return re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
