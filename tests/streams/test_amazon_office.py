"""Real interactions, where ``TEST_DATA`` names their folder: the counts that another program has found."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

import pytest

from streams.refresh import Refresh, refresh
from streams.snapshot import Snapshot
from tests.streams.formula import read_pairs

ENGINES: tuple[Literal["duckdb"], Literal["spark"]] = ("duckdb", "spark")


@pytest.fixture(scope="module")
def office() -> Path:
    folder = Path(os.environ.get("TEST_DATA", "")) / "amazon-office"
    if not os.environ.get("TEST_DATA") or not folder.is_dir():
        # Not part of the project, so no failure anywhere.
        pytest.skip("TEST_DATA does not name a folder with amazon-office")
    return folder


@pytest.mark.long  # half a minute of Spark; the default tests hold it against DuckDB on logs of every kind
def test_spark_finds_the_same(office: Path, tmp_path: Path) -> None:
    for as_of in (1_500_000_000_000, 2_000_000_000_000):
        by_duckdb, by_spark = (
            refresh(
                Refresh(
                    out=tmp_path / engine,
                    clicks=(office / "clicks.jsonl",),
                    notes=office / "notes.jsonl",
                    window="all",
                    as_of=as_of,
                    engine=engine,
                    spark_master="local[2]",
                )
            )
            for engine in ENGINES
        )
        assert by_spark.manifest.files == by_duckdb.manifest.files


def snapshot(office: Path, out: Path, as_of: int) -> Snapshot:
    return refresh(
        Refresh(out=out, clicks=(office / "clicks.jsonl",), notes=office / "notes.jsonl", window="all", as_of=as_of)
    )


def test_counts_before_the_end_of_training(office: Path, tmp_path: Path) -> None:
    written = snapshot(office, tmp_path, 1_500_000_000_000)
    found = written.statistics
    assert (found.clicks, found.users, found.ordered_pairs) == (12_715, 3_231, 23_824)
    assert (found.below_min, found.above_max) == (0, 0)
    assert (found.pairs, found.sources) == (15_635, 2_616)
    assert found.read == 22_447 == found.clicks + found.dropped["outside_window"]
    assert found.notes.live == 3_459
    assert found.pairs_with_deleted_notes == 0
    assert len(read_pairs(written.pairs_path)) == 15_635


def test_counts_of_all_clicks(office: Path, tmp_path: Path) -> None:
    found = snapshot(office, tmp_path, 2_000_000_000_000).statistics
    assert (found.clicks, found.ordered_pairs, found.pairs, found.sources) == (22_447, 63_436, 25_714, 3_215)
