"""A whole evaluation by a reader of words: its numbers by hand, or by an obvious reading; and its flat report."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest

from notellm.encoder import Tags
from notellm.messages import Note
from tests.training.evaluation.slow_protocol import click_arrays, questions, rank
from tests.training.evaluation.word_reader import WordReader
from training.errors import TrainingDataError
from training.evaluation.evaluation import Evaluation, EvaluationData, Systems, evaluate
from training.evaluation.report import flat_report

CATEGORIES = ["travel", "food", "art"]
PLACES = ["kyoto", "nara", "osaka", "kobe"]
NOTES = [
    Note(note_id=f"{category}-{place}", title=f"{category} {place}", hashtags=[category, place], category=category)
    for category in CATEGORIES
    for place in PLACES
]
IDS = [note.note_id for note in NOTES]
# One of the author's two hashtags for each, and the right category; but for three notes.
TAGS = {note.title: Tags(note.hashtags[:1], note.category) for note in NOTES} | {
    "travel kyoto": Tags(["travel"], "food"),  # wrong
    "travel nara": Tags(["travel"], "poetry"),  # illegal
    "travel osaka": Tags([], "travel"),
}
# Everybody goes through all notes from a place of their own; the last of each is of the test.
LOG = [(f"u{user}", IDS[(user * 5 + step) % 12], 1000 + 10 * step + user) for user in range(4) for step in range(7)] + [
    ("u0", "gone", 5)
]
TIMES: dict[str, Any] = {"train_end": 1020, "test_start": 1040}


def evaluated(reader: WordReader, base: WordReader | None = None, **changes: Any) -> Evaluation:
    options: dict[str, Any] = {"notes": NOTES, "scored": NOTES, "learnt": [], "categories": CATEGORIES, **changes}
    return evaluate(Systems(reader, base), EvaluationData(**options), seed=1)


@pytest.fixture(scope="module")
def reader() -> WordReader:
    return WordReader(TAGS)


@pytest.fixture(scope="module")
def whole(reader: WordReader) -> dict[str, float | int]:
    base = WordReader(TAGS | {"art kyoto": Tags(["art", "kyoto"], "poetry")}, salt="base")
    return flat_report(evaluated(reader, base, learnt=NOTES[:6], clicks=click_arrays(LOG), **TIMES))


def test_categories(whole: dict[str, float | int]) -> None:
    assert whole["category.accuracy"] == pytest.approx(10 / 12, abs=1e-6)
    assert whole["category.illegal"] == pytest.approx(1 / 12, abs=1e-6)
    assert whole["baselines.base.category.illegal"] == pytest.approx(2 / 12, abs=1e-6)
    assert whole["category.accuracy.low"] < whole["category.accuracy"] < whole["category.accuracy.high"]


def test_hashtags(whole: dict[str, float | int]) -> None:
    # Eleven times one of two, which is 2/3; once nothing.
    for name in ("hashtags.f1", "hashtags.rouge1"):
        assert whole[name] == pytest.approx(11 * (2 / 3) / 12, abs=1e-6)
        assert whole[f"baselines.base.{name}"] == pytest.approx((10 * (2 / 3) + 1) / 12, abs=1e-6)
    assert whole["hashtags.precision"] == pytest.approx(11 / 12, abs=1e-6)
    assert whole["hashtags.valid"] == 1
    assert "hashtags.valid.low" not in whole
    # The tagger finds itself among the six that it learnt, and among the other six a note of the same place.
    assert whole["baselines.tfidf.hashtags.f1"] == pytest.approx((6 * 1 + 6 * 1 / 2) / 12, abs=1e-6)


def cosines(reader: WordReader, query: str) -> dict[str, float]:
    embeddings = {note.note_id: reader.embed(f"{note.title}\n{' '.join(note.hashtags)}\n") for note in NOTES}
    return {note: round(float(embeddings[query] @ each), 5) for note, each in embeddings.items()}


def test_neighbours(whole: dict[str, float | int], reader: WordReader) -> None:
    right = 0
    for note in NOTES:
        others = {other: cosine for other, cosine in cosines(reader, note.note_id).items() if other != note.note_id}
        nearest = sorted(others, key=lambda other: -others[other])[:5]
        right += sum(other.startswith(note.category) for other in nearest)
    assert whole["neighbours.precision_at_5"] == pytest.approx(right / 60, abs=1e-6)
    assert whole["baselines.base_centred.neighbours.precision_at_5"] != whole["neighbours.precision_at_5"]


def test_item_to_item(whole: dict[str, float | int], reader: WordReader) -> None:
    asked = questions(LOG, IDS, train_end=1020, low=1040, high=10**9)
    ranks = {question: rank(cosines(reader, question.query), question.query, question.target) for question in asked}
    assert whole["counts.i2i.queries"] == len(asked) == 12
    assert whole["counts.i2i.cold.queries"] == sum(question.cold for question in asked) > 0
    assert whole["i2i.recall_at_10"] == pytest.approx(np.mean([each < 10 for each in ranks.values()]), abs=1e-6)
    assert whole["i2i.mrr"] == pytest.approx(np.mean([1 / (each + 1) for each in ranks.values()]), abs=1e-6)
    cold = [1 / (each + 1) for question, each in ranks.items() if question.cold]
    assert whole["i2i.cold.mrr"] == pytest.approx(np.mean(cold), abs=1e-6)


def test_differences_are_the_model_less_the_other(whole: dict[str, float | int]) -> None:
    others = {key.split(".")[1] for key in whole if key.startswith("differences.")}
    systems = {"random", "popularity", "tfidf", "cooccurrence", "cooccurrence_top10", "base_centred", "base_whitened"}
    assert others == systems
    for other in others:
        wanted = whole["i2i.mrr"] - whole[f"baselines.{other}.i2i.mrr"]
        assert whole[f"differences.{other}.i2i.mrr"] == pytest.approx(wanted, abs=2e-6)


def test_the_report_has_the_keys_that_are_promised(whole: dict[str, float | int]) -> None:
    promised = {"category.accuracy", "category.illegal", "hashtags.f1", "hashtags.rouge1", "neighbours.precision_at_5"}
    assert promised | {"i2i.recall_at_10"} <= set(whole)
    assert whole["counts.notes"] == whole["counts.scored"] == whole["counts.hashtags.notes"] == 12
    assert all(isinstance(value, float | int) for value in whole.values())


def test_the_model_saw_hashtags_only_for_embeddings(whole: dict[str, float | int], reader: WordReader) -> None:
    assert {embed_only for _, embed_only in reader.asked} == {False, True}
    for prompt, embed_only in reader.asked:
        assert bool(prompt.author_hashtags) is embed_only
        assert ("\n\n" not in prompt.text) is embed_only


def test_only_notes_that_can_be_answered_are_asked_for_tags() -> None:
    notes = [
        *NOTES[:2],
        msgspec.structs.replace(NOTES[2], hashtags=[]),
        msgspec.structs.replace(NOTES[3], category="a word of the author's own"),
        Note(note_id="blank", title=" ", hashtags=["only", "hashtags"], category="art"),
        msgspec.structs.replace(NOTES[4], hashtags=[], category=""),
    ]
    reader = WordReader(TAGS)
    report = flat_report(evaluated(reader, notes=notes, scored=notes))
    assert report["counts.hashtags.notes"] == report["counts.category.notes"] == 3
    tagged = {prompt.text.split("\n")[0] for prompt, embed_only in reader.asked if not embed_only}
    assert tagged == {note.title for note in notes[:4]}
    # Wrong, illegal, right.
    assert report["category.accuracy"] == pytest.approx(1 / 3, abs=1e-6)
    # Five have a category: fewer than a note and five neighbours.
    assert not [key for key in report if "neighbours" in key or "i2i" in key]


def test_without_clicks_only_the_scored_notes_are_read_and_without_learnt_ones_there_is_no_tagger() -> None:
    reader = WordReader(TAGS)
    found = evaluated(reader, scored=NOTES[4:])
    assert {prompt.text.split("\n")[0] for prompt, _ in reader.asked} == {note.title for note in NOTES[4:]}
    assert found.systems["tfidf"] == {}
    assert found.counts["scored"] == 8
    assert not found.differences
    assert not found.retrieval


def test_with_clicks_neighbours_are_still_among_the_scored() -> None:
    scored = NOTES[4:]
    alone = evaluated(WordReader(TAGS), scored=scored)
    found = evaluated(WordReader(TAGS), scored=scored[::-1], clicks=click_arrays(LOG), **TIMES)
    name = "neighbours.precision_at_5"
    assert found.systems["notellm"][name].value == pytest.approx(alone.systems["notellm"][name].value)


def test_nothing_to_score_is_refused() -> None:
    with pytest.raises(TrainingDataError, match="--notes: no note is left to be scored"):
        evaluated(WordReader(TAGS), scored=[])
