"""All systems on the same questions, their differences, and how they learnt."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from benchmarks.i2i.mix import MixScorer, choose_weight
from benchmarks.i2i.saved_runs import SavedRun, read_curve
from benchmarks.i2i.train_rows import DataFolder
from training.evaluation.embedding_scores import EmbeddingScorer, centre, whiten
from training.evaluation.item_to_item import (
    RetrievalRow,
    evaluate_item_to_item,
    paired_difference,
    retrieval_row,
)
from training.evaluation.pair_scores import pair_scores
from training.evaluation.protocol import ItemQueries, NoteClicks, Targets, ask_items, clicks_on_notes, rank_targets

__all__ = ["LABELS", "Table", "make_table", "plot_table"]

Runs = Mapping[str, Sequence[tuple[SavedRun, Path]]]

FULL: Final = "notellm"
MIXED: Final = "notellm_mixed"
# In the order of the table; what else was trained comes after them by its own name.
LABELS: Final = {
    "random": "random",
    "popularity": "popularity",
    "tfidf": "TF-IDF",
    "cooccurrence": "co-occurrence",
    "minilm": "MiniLM, zero-shot",
    "minilm_tuned": "MiniLM, same pairs and loss",
    "base_centred": "base, zero-shot, centred",
    "base_whitened": "base, zero-shot, whitened",
    "contrastive": "contrastive only",
    FULL: "NoteLLM: contrastive + generation",
    MIXED: "NoteLLM + co-occurrence",
}
_BASELINES: Final = ("random", "popularity", "tfidf", "cooccurrence")
_SEED: Final = 0
_POINTS: Final = 60
Metrics = Mapping[Any, Mapping[str, Any]]


@dataclass(frozen=True)
class Table:
    """``rows`` by name; ``weights`` of the mix, one a seed."""

    rows: Mapping[str, RetrievalRow]
    weights: Sequence[float]
    unknown_clicks: int

    def flat(self, runs: Runs) -> dict[str, Any]:
        """As it goes into the results' JSON."""
        first = next(iter(self.rows.values()))
        return {
            "queries": first.queries,
            "cold_queries": first.cold,
            "unknown_clicks": self.unknown_clicks,
            "mixing_weights": list(self.weights),
            "rows": [{"name": name, **_flat(row.metrics), **_origin(name, runs)} for name, row in self.rows.items()],
            "differences": {
                system: {
                    other: _flat(paired_difference(self.rows[system], row, seed=_SEED))
                    for other, row in self.rows.items()
                    if other != system
                }
                for system in (FULL, MIXED)
                if system in self.rows
            },
            "curves": {
                f"{name}-{run.seed}": _thin(read_curve(folder)) for name, each in runs.items() for run, folder in each
            },
        }


def make_table(
    data: DataFolder,
    zero_shot: Mapping[str, NDArray[np.float32]],
    runs: Runs,
    *,
    test_start: int,
    targets: Targets,
    tell: Callable[[str], None],
) -> Table:
    """``zero_shot``: embeddings of ``base`` and ``minilm``, as they come."""
    ids = [note.note_id for note in data.notes]
    clicks = clicks_on_notes(data.clicks, ids)
    asked = ask_items(clicks, train_end=data.train_end, test_start=test_start, targets=targets)
    untrained = {}
    if "minilm" in zero_shot:
        untrained["minilm"] = zero_shot["minilm"]
    if "base" in zero_shot:
        untrained["base_centred"] = centre(zero_shot["base"])
        untrained["base_whitened"] = whiten(zero_shot["base"], 64)
    rows = evaluate_item_to_item(
        data.notes,
        data.clicks,
        train_end=data.train_end,
        test_start=test_start,
        targets=targets,
        embeddings=untrained,
        baselines=_BASELINES,
        seed=_SEED,
    )
    found = {row.name: row for row in rows}
    for name, each in runs.items():
        tell(f"{name}: {len(each)} run{'s' if len(each) > 1 else ''}")
        ranks = [rank_targets(EmbeddingScorer(np.load(folder / "embeddings.npy")), asked) for _, folder in each]
        found[name] = retrieval_row(name, np.stack(ranks), asked, seed=_SEED)
    weights: list[float] = []
    if FULL in runs:
        found[MIXED], weights = _mixed(data, clicks, runs[FULL], asked, test_start, tell)
    known = {name: place for place, name in enumerate(LABELS)}
    order = sorted(found, key=lambda name: (known.get(name, len(known)), name))
    return Table({name: found[name] for name in order}, weights, clicks.unknown)


def _mixed(
    data: DataFolder,
    clicks: NoteClicks,
    runs: Sequence[tuple[SavedRun, Path]],
    asked: ItemQueries,
    test_start: int,
    tell: Callable[[str], None],
) -> tuple[RetrievalRow, list[float]]:
    pairs = pair_scores(clicks.before(data.train_end))
    chosen_on = ask_items(clicks, train_end=data.train_end, test_start=test_start, targets="validation")
    ranks, weights = [], []
    for _, folder in runs:
        embeddings = np.load(folder / "embeddings.npy")
        weights.append(choose_weight(embeddings, pairs, chosen_on, tell))
        ranks.append(rank_targets(MixScorer(embeddings, pairs, weights[-1]), asked))
    return retrieval_row(MIXED, np.stack(ranks), asked, seed=_SEED), weights


def _flat(metrics: Metrics) -> dict[str, list[float]]:
    return {
        name if group == "all" else f"{group}.{name}": [round(number, 5) for number in interval]
        for group, of in metrics.items()
        for name, interval in of.items()
    }


def _origin(name: str, runs: Runs) -> dict[str, Any]:
    """Of a trained row: how it came about. The mix is of the full model's runs."""
    each = [run for run, _ in runs.get(FULL if name == MIXED else name, ())]
    if not each:
        return {}
    return {
        "seeds": [run.seed for run in each],
        "steps": each[0].steps,
        "tokens": [run.tokens for run in each],
        "seconds": [round(run.seconds, 1) for run in each],
        "device": sorted({run.device for run in each}),
        "commit": sorted({run.commit for run in each}),
        "commands": [run.command for run in each],
    }


def _thin(curve: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """Means of some sixty stretches: single steps are noise."""
    stretch = max(1, len(curve) // _POINTS)
    parts = [curve[begin : begin + stretch] for begin in range(0, len(curve), stretch)]
    return [(part[-1][0], round(sum(loss for _, loss in part) / len(part), 4)) for part in parts]


_BLUE, _GREY, _INK = "#2a6fbb", "#c9ced6", "#4a5160"
_COLOURS: Final = {FULL: _BLUE, "contrastive": "#d9822b", "minilm_tuned": "#5a9e6f"}


def plot_table(table: Table, runs: Runs, file: Path) -> None:
    """Recall@10 and @100 with their intervals, and the contrastive loss by tokens read."""
    names = [name for name in table.rows if name in LABELS]
    figure = Figure(figsize=(13, 0.8 + 0.36 * len(names)), layout="constrained")
    bars, more, losses = figure.subplots(1, 3, width_ratios=(1, 1, 1.1))
    for axes, metric in ((bars, "recall_at_10"), (more, "recall_at_100")):
        found = [table.rows[name].metrics["all"][metric] for name in names]
        axes.barh(
            [LABELS[name] for name in names],
            [each.value for each in found],
            xerr=[
                [max(each.value - each.low, 0) for each in found],
                [max(each.high - each.value, 0) for each in found],
            ],
            color=[_BLUE if name in (FULL, MIXED) else _GREY for name in names],
            error_kw={"ecolor": _INK, "elinewidth": 1, "capsize": 2},
        )
        axes.invert_yaxis()
        axes.set_title(metric.replace("_at_", "@"), fontsize=10, loc="left")
        axes.grid(axis="x", color="#eceff3")
    more.set_yticklabels([])
    for name, colour in _COLOURS.items():
        for place, (_, folder) in enumerate(runs.get(name, ())):
            curve = _thin(read_curve(folder))
            losses.plot(*zip(*curve, strict=True), color=colour, linewidth=1, label=None if place else LABELS[name])
    losses.set_title("contrastive loss by tokens read, each seed", fontsize=10, loc="left")
    losses.grid(color="#eceff3")
    if losses.lines:
        losses.legend(frameon=False, fontsize=8)
    for axes in (bars, more, losses):
        axes.set_axisbelow(True)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, format="png", dpi=110)
