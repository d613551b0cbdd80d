"""Spark's pairs: those of the formula, and those of DuckDB. A real cluster: tests/integration/test_spark_cluster.py."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from streams.cooccurrence import PairOptions, scores_sql
from streams.duckdb_engine import DuckDBEngine
from streams.errors import EngineError
from tests.conftest import missing
from tests.streams.formula import formula, read_pairs, write_clicks
from tests.streams.logs import OVERFLOWING, random_logs

# For tables this small, compiling a query takes longer than running it.
SMALL = {
    "spark.sql.shuffle.partitions": "2",
    "spark.sql.adaptive.enabled": "false",
    "spark.sql.codegen.wholeStage": "false",
    "spark.sql.codegen.factoryMode": "NO_CODEGEN",
    "spark.driver.extraJavaOptions": "-XX:TieredStopAtLevel=1",
}


@pytest.fixture(scope="module")
def spark(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    if shutil.which("java") is None or importlib.util.find_spec("pyspark") is None:
        missing("no java or no pyspark; install Java 17 or newer, and the extra spark")
    from streams.spark_engine import SparkEngine

    engine = SparkEngine(tmp_path_factory.mktemp("spark"), master="local[2]", memory_limit="1GB", properties=SMALL)
    yield engine
    engine.close()


class TestSpark:
    @pytest.mark.parametrize(
        "options",
        [
            PairOptions(),
            PairOptions(max_distance=2, session_gap_ms=3, symmetric=True, max_notes_per_user=14, top=2),
            PairOptions(session_gap_ms=1, min_score=0.1, max_score=0.5),
        ],
        ids=["plain", "all options", "sessions and bounds"],
    )
    def test_equals_the_formula_and_duckdb(self, spark: Any, tmp_path: Path, options: PairOptions) -> None:
        log = random_logs(1)
        clicks = write_clicks(log, tmp_path / "clicks.parquet")
        expected = formula(log, options)
        assert len(expected) > 100
        found = spark.find_pairs(clicks, options, tmp_path / "spark")
        assert read_pairs(tmp_path / "spark") == expected
        assert found == DuckDBEngine(tmp_path).find_pairs(clicks, options, tmp_path / "duckdb")
        assert read_pairs(tmp_path / "duckdb") == expected

    def test_no_clicks_are_no_pairs(self, spark: Any, tmp_path: Path) -> None:
        clicks = write_clicks([], tmp_path / "clicks.parquet")
        found = spark.find_pairs(clicks, PairOptions(), tmp_path / "spark")
        assert found == DuckDBEngine(tmp_path).find_pairs(clicks, PairOptions(), tmp_path / "duckdb")
        assert read_pairs(tmp_path / "spark") == []

    def test_a_sum_beyond_64_bits_is_an_error(self, spark: Any) -> None:
        from streams.spark_engine import spark_errors

        session = spark.session()
        session.sql(OVERFLOWING).createOrReplaceTempView("moments")
        with pytest.raises(EngineError, match=r"spark gave up: .*OVERFLOW"), spark_errors():
            session.sql(scores_sql(PairOptions())).collect()

    def test_a_file_that_is_not_there_is_one_line(self, spark: Any, tmp_path: Path) -> None:
        with pytest.raises(EngineError, match=r"^spark gave up: .*PATH_NOT_FOUND.*$") as error:
            spark.find_pairs(tmp_path / "no.parquet", PairOptions(), tmp_path / "pairs")
        assert "\n" not in str(error.value)
