"""``notellm pairs refresh --engine spark`` on a real master with two workers: the same files as with DuckDB."""

from __future__ import annotations

import importlib.util
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from streams.snapshot import Snapshot, latest_snapshot
from tests.conftest import missing
from tests.streams.formula import write_clicks
from tests.support.processes import run_command

if TYPE_CHECKING:
    from tests.support.spark_cluster import SparkCluster

pytestmark = [pytest.mark.integration, pytest.mark.long]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SparkCluster]:
    if shutil.which("java") is None or importlib.util.find_spec("pyspark") is None:
        missing("no java or no pyspark; install Java 17 or newer, and the extra spark")
    from tests.support.spark_cluster import SparkCluster

    cluster = SparkCluster(tmp_path_factory.mktemp("spark"))
    cluster.start()
    yield cluster
    cluster.kill()


def refresh(folder: Path, out: str, *arguments: str) -> Snapshot:
    done = run_command(
        "pairs", "refresh", "--clicks", str(folder / "clicks.parquet"), "--notes", str(folder / "notes.jsonl"),
        "--out", str(folder / out), "--window", "all", "--as-of", "1000000", *arguments, seconds=240,
        env={"SPARK_CONF_DIR": str(folder)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return latest_snapshot(folder / out)


def test_two_workers_write_what_duckdb_writes(cluster: SparkCluster, tmp_path: Path) -> None:
    chance = random.Random(1)
    clicks = [(f"u{chance.randrange(2000)}", f"n{int(chance.expovariate(0.01))}", at) for at in range(40_000)]
    write_clicks(clicks, tmp_path / "clicks.parquet")
    (tmp_path / "notes.jsonl").write_text('{"note_id": "n1", "title": "Tea"}\n')
    (tmp_path / "spark-defaults.conf").write_text("spark.sql.shuffle.partitions 4\n")
    ours = refresh(tmp_path, "duckdb")
    theirs = refresh(
        tmp_path, "spark", "--engine", "spark", "--spark-master", cluster.master, "--memory-limit", "512MB"
    )
    assert len(cluster.executors()) == 2
    assert theirs.manifest.engine.name == "spark"
    assert theirs.manifest.rows > 5000
    assert theirs.manifest.files == ours.manifest.files
