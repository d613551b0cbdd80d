"""Item to item: which note does a person open after this one? Every system answers the same questions.

Recall@k is the share of queries whose target stands among the first k of the pool (its rank, from 0, is below k), MRR
the mean of 1 / (rank + 1); over all queries, and over those with a warm and with a cold target apart. Intervals are of
95 %, by drawing people again.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, Literal, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray

from notellm.messages import Note
from training.errors import TrainingDataError
from training.evaluation.bootstrap import RESAMPLES, Interval, bootstrap_means
from training.evaluation.click_file import Clicks
from training.evaluation.embedding_scores import EmbeddingScorer
from training.evaluation.pair_scores import keep_pairs, pair_scores
from training.evaluation.protocol import (
    Floats,
    ItemQueries,
    NoteClicks,
    Scorer,
    Targets,
    ask_items,
    clicks_on_notes,
    order_of_ids,
    rank_targets,
)
from training.evaluation.retrieval_baselines import (
    BASELINES,
    CooccurrenceScorer,
    PopularityScorer,
    TfidfScorer,
    random_ranks,
)

__all__ = [
    "GROUPS",
    "METRICS",
    "Group",
    "RetrievalRow",
    "evaluate_item_to_item",
    "paired_difference",
    "retrieval_row",
]

Group: TypeAlias = Literal["all", "warm", "cold"]
GROUPS: Final[tuple[Group, ...]] = get_args(Group)
_RECALL_AT: Final = (1, 10, 100, 1000)
METRICS: Final = (*(f"recall_at_{k}" for k in _RECALL_AT), "mrr")

Progress: TypeAlias = Callable[[str, float], None]
Metrics: TypeAlias = Mapping[Group, Mapping[str, Interval]]


@dataclass(frozen=True)
class RetrievalRow:
    """What one system came to. ``metrics[group][metric]``; a group without a query has no metric.

    ``ranks [Q]`` are those of the targets, from 0, or ``[S, Q]`` of S trainings of one system, whose metrics are then
    the mean over trainings of each question; ``asked`` the questions, the same for all rows of one evaluation.
    ``unknown_clicks`` were on notes that are not among the notes, and left out.
    """

    name: str
    metrics: Metrics
    ranks: Floats
    asked: ItemQueries
    unknown_clicks: int

    @property
    def queries(self) -> int:
        return len(self.asked)

    @property
    def warm(self) -> int:
        return len(self.asked) - self.cold

    @property
    def cold(self) -> int:
        return int(self.asked.cold.sum())


def evaluate_item_to_item(
    notes: Sequence[Note],
    clicks: Clicks,
    *,
    train_end: int,
    test_start: int,
    targets: Targets = "test",
    embeddings: Mapping[str, NDArray[Any]],
    baselines: Collection[str] = BASELINES,
    seed: int,
    progress: Progress = lambda name, share: None,
    resamples: int = RESAMPLES,
) -> list[RetrievalRow]:
    """A row for each of ``embeddings`` (name -> ``[N, D]``, a row a note), then for each of ``baselines``.

    ``train_end`` and ``test_start`` in ms UTC; see :mod:`training.evaluation.protocol`. ``progress`` is told the
    system's name and the share of its queries that is done. Raises :class:`TrainingDataError`.
    """
    if unknown := sorted(set(baselines) - set(BASELINES)):
        raise TrainingDataError(f"--baselines: {unknown[0]!r} is not allowed: {', '.join(BASELINES)} are")
    ids = [note.note_id for note in notes]
    on_notes = clicks_on_notes(clicks, ids)
    asked = ask_items(on_notes, train_end=train_end, test_start=test_start, targets=targets)
    # All of them are looked at before one is scored: a wrong one should not be found after minutes.
    models = {name: EmbeddingScorer(matrix, name=name, notes=len(ids)) for name, matrix in embeddings.items()}
    rows = []
    for name, ranks in _ranks(notes, ids, on_notes.before(train_end), asked, models, baselines, seed, progress):
        rows.append(retrieval_row(name, ranks, asked, seed=seed, resamples=resamples, unknown_clicks=on_notes.unknown))
    return rows


def retrieval_row(
    name: str, ranks: Floats, asked: ItemQueries, *, seed: int, resamples: int = RESAMPLES, unknown_clicks: int = 0
) -> RetrievalRow:
    """What ``ranks`` (``[Q]`` or ``[S, Q]``) come to; 0 is the best rank."""
    metrics = _metrics(_query_values(ranks, asked.cold), asked, seed, resamples)
    return RetrievalRow(name, metrics, ranks, asked, unknown_clicks)


def paired_difference(first: RetrievalRow, second: RetrievalRow, *, seed: int, resamples: int = RESAMPLES) -> Metrics:
    """How much more each metric of ``first`` is than that of ``second``, query by query: intervals of the difference.

    An interval without 0 is a difference. The two rows must be of the same questions, else
    :class:`TrainingDataError`.
    """
    one, other = first.asked, second.asked
    if not all(np.array_equal(getattr(one, name), getattr(other, name)) for name in ("users", "queries", "targets")):
        raise TrainingDataError(
            f"{first.name} and {second.name} were asked different questions; compare them on the same"
        )
    values = _query_values(first.ranks, one.cold) - _query_values(second.ranks, one.cold)
    return _metrics(values, one, seed, resamples)


def _ranks(
    notes: Sequence[Note],
    ids: Sequence[str],
    learnt: NoteClicks,
    asked: ItemQueries,
    models: Mapping[str, Scorer],
    baselines: Collection[str],
    seed: int,
    progress: Progress,
) -> Iterator[tuple[str, Floats]]:
    for name, model in models.items():
        yield name, rank_targets(model, asked, partial(progress, name))
    makers: dict[str, Callable[[], Scorer]] = {
        "popularity": lambda: PopularityScorer(learnt),
        "tfidf": lambda: TfidfScorer(notes),
        "cooccurrence": lambda: CooccurrenceScorer(pair_scores(learnt), learnt),
        "cooccurrence_top10": lambda: CooccurrenceScorer(keep_pairs(pair_scores(learnt), order_of_ids(ids)), learnt),
    }
    for baseline in BASELINES:
        if baseline not in baselines:
            continue
        if baseline == "random":
            yield baseline, random_ranks(asked, seed)
            progress(baseline, 1.0)
        else:
            yield baseline, rank_targets(makers[baseline](), asked, partial(progress, baseline))


def _query_values(ranks: Floats, cold: NDArray[np.bool_]) -> Floats:
    """``[Q, groups * metrics]``; NaN where a query is not of the group."""
    each = np.atleast_2d(ranks)
    found = np.stack([*(each < k for k in _RECALL_AT), 1 / (each + 1)], axis=-1, dtype=np.float64)
    values = found.mean(axis=0)
    members = {"all": np.ones_like(cold), "warm": ~cold, "cold": cold}
    return np.concatenate([np.where(members[group][:, None], values, np.nan) for group in GROUPS], axis=1)


def _metrics(values: Floats, asked: ItemQueries, seed: int, resamples: int) -> Metrics:
    intervals = iter(bootstrap_means(values, asked.users, seed=seed, resamples=resamples))
    found = {group: {metric: next(intervals) for metric in METRICS} for group in GROUPS}
    return {group: {name: each for name, each in of.items() if each is not None} for group, of in found.items()}
