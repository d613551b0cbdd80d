"""The co-occurrence queries on Spark, for clicks that one machine cannot hold: Spark SQL runs them as they are.

Clicks come from a Parquet file and pairs go to Parquet files, so the folder of both must be one that Spark's workers
reach by the same path: any folder where the master is ``local``, shared storage on a cluster.
"""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, Literal

from streams.cooccurrence import (
    Found,
    PairOptions,
    counts_sql,
    days_sql,
    found,
    kept_sql,
    preparation,
    scores_sql,
    totals_sql,
)
from streams.errors import EngineError

try:
    with warnings.catch_warnings():
        # Of a pandas that is newer than it knows; nothing here goes through pandas.
        warnings.simplefilter("ignore", FutureWarning)
        import pyspark
        from pyspark import StorageLevel
        from pyspark.errors import PySparkException
        from pyspark.sql import SparkSession
except ModuleNotFoundError:
    raise EngineError("--engine spark: pyspark is not installed; pip install 'notellm[pairs,spark]'") from None

__all__ = ["LOCAL", "SparkEngine", "spark_errors"]

LOCAL: Final = "local[*]"
# Tables that more than one query reads.
_READ_AGAIN: Final = ("note_ids", "seen", "visits", "weights", "moments")
_PARTITIONS: Final = "spark.sql.shuffle.partitions"
_CLICKS_IN_PARTITION: Final = 100_000
_LOOPBACK: Final = ("local", "spark://127.0.0.1", "spark://localhost")


class SparkEngine:
    """``properties`` are Spark's own, ``memory_limit`` is that of each of its processes that works on the clicks.

    See :class:`streams.cooccurrence.PairEngine`.

    A session begins with the first use and lasts until :meth:`close`; a Java virtual machine is one of a process.
    """

    name: Literal["spark"] = "spark"

    def __init__(
        self,
        work: Path,
        *,
        master: str = LOCAL,
        memory_limit: str = "",
        properties: Mapping[str, str] | None = None,
    ) -> None:
        if shutil.which("java") is None and "JAVA_HOME" not in os.environ:
            raise EngineError("--engine spark: there is no java; Spark needs version 17 or newer")
        self._work = work
        self._master = master
        self._properties = {**_memory(master, memory_limit), **(properties or {})}
        self._session: Any = None

    @property
    def version(self) -> str:
        return str(pyspark.__version__)

    def find_pairs(
        self, clicks: Path, options: PairOptions, pairs: Path, progress: Callable[[float], None] = lambda _: None
    ) -> Found:
        with spark_errors():
            spark = self.session()
            try:
                return _find_pairs(spark, clicks, options, pairs, progress)
            finally:
                spark.catalog.clearCache()

    def close(self) -> None:
        if self._session is not None:
            self._session.stop()
            self._session = None

    def session(self) -> Any:
        if self._session is None:
            settings = {
                "spark.ui.enabled": "false",
                "spark.ui.showConsoleProgress": "false",
                "spark.local.dir": str(self._work.absolute()),
                "spark.sql.warehouse.dir": str(self._work.absolute() / "warehouse"),
                **({} if not self._master.startswith(_LOOPBACK) else _on_loopback()),
                **self._properties,
                # What overflows is an error, never another number; and a double is divided as DuckDB divides it.
                "spark.sql.ansi.enabled": "true",
            }
            builder = SparkSession.builder.master(self._master).appName("notellm pairs")
            for name, value in settings.items():
                builder = builder.config(name, value)
            self._session = builder.getOrCreate()
            self._session.sparkContext.setLogLevel("ERROR")
        return self._session


def _find_pairs(
    spark: Any, clicks: Path, options: PairOptions, pairs: Path, progress: Callable[[float], None]
) -> Found:
    table = spark.read.parquet(_address(clicks))
    table.createOrReplaceTempView("clicks")
    if not spark.sparkContext.getConf().contains(_PARTITIONS):
        # Spark's 200 are minutes of nothing for few clicks, and memory for many.
        wanted = max(spark.sparkContext.defaultParallelism, table.count() // _CLICKS_IN_PARTITION)
        spark.conf.set(_PARTITIONS, str(wanted))
    for table, sql in preparation(options):
        _view(spark, table, sql, keep=table in _READ_AGAIN)
    totals = spark.sql(totals_sql()).first()
    progress(0.1)
    days = spark.sql(days_sql()).collect()
    progress(0.2)
    _view(spark, "scores", scores_sql(options), keep=True)
    counts = spark.sql(counts_sql(options)).first()
    progress(0.8)
    spark.sql(kept_sql(options)).write.parquet(_address(pairs))
    progress(1.0)
    return found(totals, days, [counts])


def _view(spark: Any, table: str, sql: str, *, keep: bool) -> None:
    frame = spark.sql(sql)
    if keep:
        frame = frame.persist(StorageLevel.MEMORY_AND_DISK)
    frame.createOrReplaceTempView(table)


def _address(path: Path) -> str:
    """Spark would read the braces and stars of a bare path as a pattern, and look for it in HDFS if it has one."""
    return path.absolute().as_uri()


def _memory(master: str, limit: str) -> dict[str, str]:
    if not limit:
        return {}
    # 4GB, 512MiB -> 4g, 512m
    size = limit.strip().lower().rstrip("b").rstrip("i").replace(" ", "")
    return {"spark.driver.memory" if master.startswith("local") else "spark.executor.memory": size}


def _on_loopback() -> dict[str, str]:
    return {"spark.driver.bindAddress": "127.0.0.1", "spark.driver.host": "127.0.0.1"}


@contextmanager
def spark_errors() -> Iterator[None]:
    """One line of what Spark says."""
    try:
        yield
    except PySparkException as error:
        raise EngineError(f"spark gave up: {_first_line(error)}") from None
    except Exception as error:
        # Py4J's own errors have no base that is part of its interface.
        if type(error).__module__.split(".")[0] not in ("py4j", "pyspark"):
            raise
        raise EngineError(f"spark gave up: {_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    # Of an error in Java, the first line only says which call it came from.
    return lines[1].lstrip(": ") if lines[0].startswith("An error occurred while calling") and lines[1:] else lines[0]
