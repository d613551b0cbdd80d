"""Clicks to pairs, from one million to ten: ``python -m benchmarks.pairs``.

Users grow with the clicks; clicks per user are long-tailed with a constant mean of 22, notes are clicked Zipf-like.
Every run is a process of its own: seconds are those of the work, without imports; memory is the peak of the process and
of those that it started. At one million, three others do the same, and must come to the same pairs: the formula in
plain Python, a pandas self-join, and Spark on this machine.

Ten million clicks must stay under 6 GiB with DuckDB, and time should grow with clicks to the power of at most 1.15: the
exit status is 1 when the first does not hold.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import math
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Annotated, Any

import duckdb
import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import typer
from rich.console import Console
from rich.table import Table

from streams.cooccurrence import UNIT, PairOptions
from streams.duckdb_engine import DuckDBEngine

RESULTS = Path("build/benchmarks")
MEAN = 22.0
DAY_MS = 86_400_000
GATE_BYTES = 6 * 2**30
GOAL_EXPONENT = 1.15
Row = tuple[str, str, float, int, int]

app = typer.Typer(add_completion=False)


@app.command()
def main(
    sizes: Annotated[str, typer.Option(help="Millions of clicks.")] = "1,3,10",
    spark_up_to: Annotated[float, typer.Option(help="Millions of clicks that Spark is given, at most.")] = 3.0,
    work: Annotated[Path | None, typer.Option(help="A folder for clicks and spills.")] = None,
) -> None:
    """Measure, print one table, write build/benchmarks/pairs.json."""
    console = Console()
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=work) as folder:
        for millions in (float(size) for size in sizes.split(",")):
            file = Path(folder) / f"{millions:g}.parquet"
            about = generate(int(millions * 1e6), file)
            console.print(f"{about['clicks']:,} clicks of {about['users']:,} users on {about['notes']:,} notes")
            programs = ["duckdb", "refresh", *(["spark"] if millions <= spark_up_to else [])]
            if millions == 1:
                programs += ["python", "pandas"]
            for program in programs:
                results.append({**about, "program": program, **_measure(program, file, Path(folder))})
                console.print(_line(results[-1]), highlight=False)
            file.unlink()
    _check_equal(results)
    exponents = _exponents(results)
    console.print(_table(results))
    for name, exponent in exponents.items():
        console.print(f"growth exponent of {name}: {exponent:.2f} (goal for duckdb: at most {GOAL_EXPONENT})")
    RESULTS.mkdir(parents=True, exist_ok=True)
    report = {"runs": results, "growth_exponents": exponents}
    (RESULTS / "pairs.json").write_text(json.dumps(report, indent=2) + "\n")
    ours = [row for row in results if row["program"] in ("duckdb", "refresh")]
    over = [row for row in ours if row["clicks"] <= 10_500_000 and row["peak_bytes"] > GATE_BYTES]
    if over:
        console.print(f"[red]over {GATE_BYTES / 2**30:.0f} GiB:[/] {[_line(row) for row in over]}")
        raise typer.Exit(1)


@app.command()
def child(program: str, file: Path, work: Path) -> None:
    """One measured run; prints JSON. For main."""
    run = {"duckdb": _duckdb, "refresh": _refresh, "spark": _spark, "python": _python, "pandas": _pandas}[program]
    seconds, rows = run(file, work)
    rows.sort()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # of this process, the sort of rows included
    digest = hashlib.sha256(repr(rows).encode()).hexdigest()
    print(json.dumps({"seconds": seconds, "pairs": len(rows), "digest": digest, "own_peak_bytes": peak}))


def generate(clicks: int, file: Path, seed: int = 1) -> dict[str, int]:
    """Users with log-normal numbers of clicks, notes by a shifted Zipf law, times over a week."""
    random = np.random.default_rng(seed)
    users, notes = int(clicks / MEAN), max(1000, clicks // 50)
    each = np.maximum(1, np.round(random.lognormal(math.log(MEAN) - 0.5, 1.0, users))).astype(np.int64)
    total = int(each.sum())
    weights = np.cumsum(1 / np.power(np.arange(notes) + 20.0, 0.9))
    note = np.searchsorted(weights / weights[-1], random.random(total))
    user_ids = pa.array([f"u{number:08}" for number in range(users)])
    note_ids = pa.array([f"n{number:08}" for number in random.permutation(notes)])
    order = random.permutation(total)  # as a log has them: not by user
    table = pa.table(
        {
            "user_id": user_ids.take(pa.array(np.repeat(np.arange(users), each)[order])),
            "note_id": note_ids.take(pa.array(note)),
            "clicked_at": pa.array(1_700_000_000_000 + random.integers(0, 7 * DAY_MS, total)),
        }
    )
    pq.write_table(table, file)
    return {"clicks": total, "users": users, "notes": notes, "steps": int((each * (each - 1) // 2).sum())}


def _duckdb(file: Path, work: Path) -> tuple[float, list[Row]]:
    begin = time.perf_counter()
    DuckDBEngine(work).find_pairs(file, PairOptions(), work / "pairs")
    return time.perf_counter() - begin, _read(work / "pairs" / "*.parquet")


def _refresh(file: Path, work: Path) -> tuple[float, list[Row]]:
    """The whole job: reading and checking the file, notes, pairs, statistics, the snapshot and its report."""
    from streams.refresh import Refresh, refresh  # noqa: PLC0415 - each program loads only what it needs

    notes = work / "notes.jsonl"
    query = "SELECT DISTINCT note_id, note_id AS title FROM read_parquet(?)"
    duckdb.execute(f"COPY ({query.replace('?', repr(str(file)))}) TO '{notes}' (FORMAT json)")
    begin = time.perf_counter()
    job = Refresh(out=work / "out", clicks=(file,), notes=notes, window="all", as_of=2_000_000_000_000)
    snapshot = refresh(job)
    return time.perf_counter() - begin, _read(snapshot.pairs_path)


def _spark(file: Path, work: Path) -> tuple[float, list[Row]]:
    """The session's start is not counted."""
    from streams.spark_engine import SparkEngine  # noqa: PLC0415

    engine = SparkEngine(work, master="local[2]", memory_limit="4GB")
    engine.session()
    begin = time.perf_counter()
    engine.find_pairs(file, PairOptions(), work / "pairs")
    seconds = time.perf_counter() - begin
    engine.close()
    return seconds, _read(work / "pairs" / "*.parquet")


def _python(file: Path, _work: Path) -> tuple[float, list[Row]]:
    """Dictionaries and loops, with notes as numbers, and units and users of a pair in one integer."""
    table = pq.read_table(file).to_pydict()
    begin = time.perf_counter()
    names = sorted(set(table["note_id"]))
    number = {name: place for place, name in enumerate(names)}
    visits: dict[str, dict[int, list[int]]] = defaultdict(dict)
    for user, name, at in zip(table["user_id"], table["note_id"], table["clicked_at"], strict=True):
        times = visits[user].setdefault(number[name], [at, at])
        times[0], times[1] = min(times[0], at), max(times[1], at)
    several = len(names)
    sums: dict[int, int] = defaultdict(int)
    for notes in visits.values():
        one = (UNIT // len(notes) << 32) + 1
        for a, (first, _) in notes.items():
            key = a * several
            for b, (_, last) in notes.items():
                if first < last and a != b:
                    sums[key + b] += one
    ranked: dict[int, list[tuple[int, int, int]]] = defaultdict(list)
    for key, packed in sums.items():
        units = packed >> 32
        if UNIT // 100 <= units <= 30 * UNIT:
            ranked[key // several].append((-units, key % several, packed & 0xFFFFFFFF))
    rows = [
        (names[source], names[target], -minus / UNIT, users, rank)
        for source, found in ranked.items()
        for rank, (minus, target, users) in enumerate(heapq.nsmallest(10, found), 1)
    ]
    return time.perf_counter() - begin, rows


def _pandas(file: Path, _work: Path) -> tuple[float, list[Row]]:
    """A self-join by user, as one would write it; ids as categories."""
    import pandas as pd  # noqa: PLC0415

    clicks = pd.read_parquet(file)
    begin = time.perf_counter()
    codes, names = pd.factorize(clicks["note_id"], sort=True)
    clicks = pd.DataFrame(
        {"user": pd.factorize(clicks["user_id"])[0].astype("int32"), "note": codes.astype("int32"),
         "at": clicks["clicked_at"]}
    )  # fmt: skip
    visits = clicks.groupby(["user", "note"])["at"].agg(["min", "max"]).reset_index()
    visits["units"] = UNIT // visits.groupby("user")["note"].transform("size")
    left, right = visits[["user", "note", "min", "units"]], visits[["user", "note", "max"]]
    steps = left.merge(right, on="user", suffixes=("_a", "_b"))
    steps = steps[(steps["min"] < steps["max"]) & (steps["note_a"] != steps["note_b"])]
    pairs = steps.groupby(["note_a", "note_b"])["units"].agg(["sum", "size"]).reset_index()
    pairs = pairs[(pairs["sum"] >= UNIT // 100) & (pairs["sum"] <= 30 * UNIT)]
    pairs = pairs.sort_values(["note_a", "sum", "note_b"], ascending=[True, False, True])
    pairs["rank"] = pairs.groupby("note_a").cumcount() + 1
    pairs = pairs[pairs["rank"] <= 10]
    seconds = time.perf_counter() - begin
    rows = zip(
        names[pairs["note_a"]], names[pairs["note_b"]], pairs["sum"] / UNIT, pairs["size"], pairs["rank"], strict=True
    )
    return seconds, [(str(a), str(b), float(score), int(users), int(rank)) for a, b, score, users, rank in rows]


def _read(files: Path) -> list[Row]:
    return duckdb.sql(f"SELECT source_id, target_id, score, users, rank FROM read_parquet('{files}')").fetchall()


def _measure(program: str, file: Path, folder: Path) -> dict[str, Any]:
    """Run it in a process of its own, and look at the memory of its tree."""
    work = folder / program
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    command = [sys.executable, "-m", "benchmarks.pairs", "child", program, str(file), str(work)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        peak = 0
        while process.poll() is None:
            peak = max(peak, _tree_bytes(process.pid))
            time.sleep(0.05)
        assert process.stdout is not None
        output = process.stdout.read()
    if process.returncode != 0:
        raise SystemExit(f"{program} ended with {process.returncode}")
    shutil.rmtree(work, ignore_errors=True)
    found: dict[str, Any] = json.loads(output.splitlines()[-1])
    return {**found, "peak_bytes": max(peak, found["own_peak_bytes"])}


def _tree_bytes(pid: int) -> int:
    total = 0
    try:
        top = psutil.Process(pid)
        for process in (top, *top.children(recursive=True)):
            total += process.memory_info().rss
    except psutil.Error:
        pass  # it has just ended
    return total


def _check_equal(results: list[dict[str, Any]]) -> None:
    """Whatever the program, the same clicks are the same pairs."""
    for clicks in {row["clicks"] for row in results}:
        digests = {row["digest"] for row in results if row["clicks"] == clicks}
        if len(digests) != 1:
            raise SystemExit(f"{clicks} clicks: the programs do not agree")


def _exponents(results: list[dict[str, Any]]) -> dict[str, float]:
    """The slope of time over clicks, both as logarithms, of each program that was given several sizes."""
    found = {}
    for program in ("duckdb", "refresh", "spark"):
        rows = [row for row in results if row["program"] == program]
        if len(rows) > 1:
            clicks, seconds = (np.log([row[name] for row in rows]) for name in ("clicks", "seconds"))
            found[program] = float(np.polyfit(clicks, seconds, 1)[0])
    return found


def _line(row: dict[str, Any]) -> str:
    speed = row["clicks"] / row["seconds"]
    return f"{row['program']}: {row['seconds']:.1f} s, {speed:,.0f} clicks/s, {row['peak_bytes'] / 2**30:.2f} GiB"


def _table(results: list[dict[str, Any]]) -> Table:
    table = Table("clicks", "program", "seconds", "clicks/s", "peak GiB", "pairs", "x pure Python")
    python = {row["clicks"]: row["seconds"] for row in results if row["program"] == "python"}
    for row in results:
        times = f"{python[row['clicks']] / row['seconds']:.1f}" if row["clicks"] in python else ""
        table.add_row(
            f"{row['clicks']:,}", row["program"], f"{row['seconds']:.1f}", f"{row['clicks'] / row['seconds']:,.0f}",
            f"{row['peak_bytes'] / 2**30:.2f}", f"{row['pairs']:,}", times,
        )  # fmt: skip
    return table


if __name__ == "__main__":
    # Without a word, measure.
    sys.argv[1:1] = [] if sys.argv[1:2] == ["child"] else ["main"]
    app()
