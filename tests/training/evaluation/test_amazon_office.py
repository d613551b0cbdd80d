"""Real interactions, where ``TEST_DATA`` names their folder: the baselines come to what another program has found."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
import pytest

from notellm.messages import Note
from training.evaluation.click_file import read_clicks
from training.evaluation.item_to_item import RetrievalRow, evaluate_item_to_item


@pytest.fixture(scope="module")
def rows() -> dict[str, RetrievalRow]:
    office = Path(os.environ.get("TEST_DATA", "")) / "amazon-office"
    if not os.environ.get("TEST_DATA") or not office.is_dir():
        # Not part of the project, so no failure anywhere.
        pytest.skip("TEST_DATA does not name a folder with amazon-office")
    notes = [msgspec.json.decode(line, type=Note) for line in (office / "notes.jsonl").read_bytes().splitlines()]
    found = evaluate_item_to_item(
        notes,
        read_clicks(office / "clicks.jsonl"),
        train_end=1_500_000_000_000,
        test_start=1_600_000_000_000,
        embeddings={},
        seed=1,
        resamples=20,
    )
    return {row.name: row for row in found}


def test_the_questions(rows: dict[str, RetrievalRow]) -> None:
    assert {(row.queries, row.warm, row.cold, row.unknown_clicks) for row in rows.values()} == {(4_855, 4_412, 443, 0)}


@pytest.mark.parametrize(
    ("name", "at_10", "at_100"),
    [("tfidf", 0.1215, 0.2208), ("popularity", 0.0371, 0.2093), ("cooccurrence", 0.1102, 0.2445)],
)
def test_the_baselines(rows: dict[str, RetrievalRow], name: str, at_10: float, at_100: float) -> None:
    found = rows[name].metrics["all"]
    assert found["recall_at_10"].value == pytest.approx(at_10, abs=0.002)
    assert found["recall_at_100"].value == pytest.approx(at_100, abs=0.002)


def test_what_knows_clicks_only_finds_no_cold_target(rows: dict[str, RetrievalRow]) -> None:
    for name in ("popularity", "cooccurrence", "cooccurrence_top10"):
        assert rows[name].metrics["cold"]["recall_at_1000"].value == 0
    assert rows["tfidf"].metrics["cold"]["recall_at_1000"].value > 0.4
    assert rows["random"].metrics["all"]["recall_at_100"].value == pytest.approx(100 / 3_458, abs=1 / 4_855)
