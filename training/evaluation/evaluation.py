"""A NoteLLM judged on notes and clicks that it did not learn from, beside simpler systems, in one run.

What is asked, of which system::

    hashtags, category   the model, the untrained base; hashtags also of the TF-IDF tagger      scored notes
    neighbours           the model, the untrained base (centred; whitened), MiniLM              scored notes
    i2i                  those, and random, popularity, TF-IDF, co-occurrence                   all notes, clicks

*Scored* are the notes of one part of a split (all, without one). Hashtags and category are asked for with the author's
hashtags withheld from the prompt; embeddings are those of the notes as they were published, as the updater makes them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from notellm.messages import Note
from training.errors import TrainingDataError
from training.evaluation.bootstrap import Interval
from training.evaluation.category_scores import category_metrics
from training.evaluation.click_file import Clicks
from training.evaluation.embedding_scores import centre, whiten
from training.evaluation.hashtag_scores import hashtag_metrics
from training.evaluation.item_to_item import RetrievalRow, evaluate_item_to_item, paired_difference
from training.evaluation.minilm import MINILM, MiniLM
from training.evaluation.neighbours import NEIGHBOURS, neighbour_precision
from training.evaluation.note_text import note_text
from training.evaluation.protocol import Targets
from training.evaluation.readers import NoteReader, read_embeddings, read_tags
from training.evaluation.retrieval_baselines import BASELINES
from training.evaluation.tfidf_tagger import TfidfTagger

__all__ = ["BASE", "MODEL", "Evaluation", "EvaluationData", "Systems", "evaluate"]

MODEL: Final = "notellm"
BASE: Final = "base"
_BASE_CENTRED: Final = "base_centred"
_BASE_WHITENED: Final = "base_whitened"
_MINILM: Final = "minilm"
_TFIDF: Final = "tfidf"

# "hashtags.f1", "i2i.warm.recall_at_10", ... -> what it came to.
Metrics: TypeAlias = dict[str, Interval]
Progress: TypeAlias = Callable[[str, float], None]
Matrix: TypeAlias = NDArray[np.float32]


@dataclass(frozen=True)
class EvaluationData:
    """``scored`` are some of ``notes``; ``learnt`` those that a tagger may copy from. ``clicks`` None: no i2i."""

    notes: Sequence[Note]
    scored: Sequence[Note]
    learnt: Sequence[Note]
    categories: Sequence[str]
    clicks: Clicks | None = None
    train_end: int = 0
    test_start: int = 0
    targets: Targets = "test"


@dataclass(frozen=True)
class Systems:
    """The model, and what stands beside it. ``base`` is its own base, untrained; None: without."""

    model: NoteReader
    base: NoteReader | None = None
    minilm: bool = False
    baselines: bool = True


@dataclass(frozen=True)
class Evaluation:
    """``systems[name][metric]``; ``differences[name][metric]`` is the model less that system, query by query (i2i)."""

    systems: Mapping[str, Metrics]
    differences: Mapping[str, Metrics]
    counts: Mapping[str, int]
    retrieval: Sequence[RetrievalRow] = field(default=(), repr=False)


def evaluate(
    systems: Systems, data: EvaluationData, *, seed: int, progress: Progress = lambda what, share: None
) -> Evaluation:
    """Raises :class:`TrainingDataError` where nothing can be scored, or notes and clicks do not fit."""
    if not data.scored:
        raise TrainingDataError("--notes: no note is left to be scored; is the split of these notes?")
    found: dict[str, Metrics] = {MODEL: {}}
    counts: dict[str, int] = {"notes": len(data.notes), "scored": len(data.scored)}
    readers = {MODEL: systems.model} | ({BASE: systems.base} if systems.base is not None else {})
    for name, reader in readers.items():
        found.setdefault(name, {}).update(
            _tag_metrics(reader, data, counts, seed, partial(progress, f"{name}: hashtags and categories"))
        )
    if systems.baselines:
        found.setdefault(_TFIDF, {}).update(_tagger_metrics(data, seed))
    embeddings = _embeddings(systems, data, progress)
    for name, matrix in embeddings.items():
        found.setdefault(name, {}).update(_neighbour_metrics(matrix, data, seed))
    if data.clicks is None:
        return Evaluation(found, {}, counts)
    rows = evaluate_item_to_item(
        data.notes,
        data.clicks,
        train_end=data.train_end,
        test_start=data.test_start,
        targets=data.targets,
        embeddings=embeddings,
        seed=seed,
        progress=lambda name, share: progress(f"{name}: item to item", share),
        baselines=BASELINES if systems.baselines else (),
    )
    counts |= {"i2i.queries": rows[0].queries, "i2i.cold.queries": rows[0].cold}
    for row in rows:
        found.setdefault(row.name, {}).update(_flat(row.metrics))
    differences = {row.name: _flat(paired_difference(rows[0], row, seed=seed)) for row in rows[1:]}
    return Evaluation(found, differences, counts, rows)


def _tag_metrics(
    reader: NoteReader, data: EvaluationData, counts: dict[str, int], seed: int, progress: Callable[[float], None]
) -> Metrics:
    tagged = [note.note_id for note in data.scored if note.hashtags and _has_text(note)]
    # A category outside the list is the author's word, which a model cannot know.
    filed = [note.note_id for note in data.scored if note.category in set(data.categories) and _has_text(note)]
    asked = [note for note in data.scored if note.note_id in {*tagged, *filed}]
    said = {note.note_id: tags for note, tags in zip(asked, read_tags(reader, asked, progress), strict=True)}
    author = {note.note_id: note for note in asked}
    counts |= {"hashtags.notes": len(tagged), "category.notes": len(filed)}
    found: Metrics = {}
    if tagged:
        metrics = hashtag_metrics(
            [said[note].hashtags for note in tagged], [author[note].hashtags for note in tagged], seed=seed
        )
        found |= {f"hashtags.{name}": value for name, value in metrics.items()}
    if filed:
        metrics = category_metrics(
            [said[note].category for note in filed],
            [author[note].category for note in filed],
            categories=set(data.categories),
            seed=seed,
        )
        found |= {f"category.{name}": value for name, value in metrics.items()}
    return found


def _has_text(note: Note) -> bool:
    """With its hashtags withheld, something is left to read."""
    return bool((note.title + note.content).strip())


def _tagger_metrics(data: EvaluationData, seed: int) -> Metrics:
    tagged = [note for note in data.scored if note.hashtags and _has_text(note)]
    if not (tagged and any(note.hashtags for note in data.learnt)):
        return {}
    found = hashtag_metrics(TfidfTagger(data.learnt).tag(tagged), [note.hashtags for note in tagged], seed=seed)
    return {f"hashtags.{name}": value for name, value in found.items()}


def _embeddings(systems: Systems, data: EvaluationData, progress: Progress) -> dict[str, Matrix]:
    """Of all notes where there are clicks, else of those that are scored; the model's come first."""
    notes = data.scored if data.clicks is None else data.notes
    found = {MODEL: read_embeddings(systems.model, notes, partial(progress, f"{MODEL}: embeddings"))}
    if systems.base is not None:
        raw = read_embeddings(systems.base, notes, partial(progress, f"{BASE}: embeddings"))
        found[_BASE_CENTRED] = centre(raw)
        found[_BASE_WHITENED] = whiten(raw, min(found[MODEL].shape[1], raw.shape[1]))
    if systems.minilm:
        told = partial(progress, f"{MINILM}: embeddings")
        found[_MINILM] = MiniLM.load().embed([note_text(note) for note in notes], told)
    return found


def _neighbour_metrics(matrix: Matrix, data: EvaluationData, seed: int) -> Metrics:
    if data.clicks is not None:
        places = {note.note_id: row for row, note in enumerate(data.notes)}
        matrix = matrix[[places[note.note_id] for note in data.scored]]
    filed = [row for row, note in enumerate(data.scored) if note.category]
    if len(filed) <= NEIGHBOURS:
        return {}
    categories = [data.scored[row].category for row in filed]
    return {f"neighbours.precision_at_{NEIGHBOURS}": neighbour_precision(matrix[filed], categories, seed=seed)}


def _flat(metrics: Mapping[Any, Mapping[str, Interval]]) -> Metrics:
    return {
        f"i2i.{name}" if group == "all" else f"i2i.{group}.{name}": value
        for group, of in metrics.items()
        for name, value in of.items()
    }
