"""``python -m benchmarks.i2i``: the table of one data set, from saved runs or, with ``--train``, from nothing."""

from __future__ import annotations

import hashlib
import json
import shlex
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, cast

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table as ShownTable

from benchmarks.i2i.saved_runs import RunError, SavedRun, commit, read_run, read_runs, run_folder, save_run
from benchmarks.i2i.table import LABELS, Table, make_table, plot_table
from benchmarks.i2i.train_rows import (
    ROWS,
    DataFolder,
    Stopped,
    embed_with_base,
    embed_with_minilm,
    row_settings,
    train_row,
)
from benchmarks.training_options import changes_but_the_seed, check_rows, one_line_errors
from commands.moments import parse_moment
from commands.training_progress import TrainingProgress
from training.base_model import SMOLLM2
from training.evaluation.protocol import Targets

RESULTS = Path("benchmarks/results/i2i.json")
console = Console(stderr=True)


def main(
    data: Annotated[Path, typer.Option(help="A folder with notes.jsonl and clicks.jsonl.")],
    train_end: Annotated[str, typer.Option(help="Clicks before this are learnt from: ms UTC, or ISO 8601.")],
    test_start: Annotated[str, typer.Option(help="Clicks from this on are asked about.")],
    train: Annotated[bool, typer.Option("--train", help="Train the rows that are not saved yet.")] = False,
    row: Annotated[list[str] | None, typer.Option(help=f"Train only these: {', '.join(ROWS)}.")] = None,
    seed: Annotated[list[int] | None, typer.Option(help="Several times: several trainings a row. Default: 0.")] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", help="A setting of training, name=value.")] = None,
    name: Annotated[str | None, typer.Option(help="Save the one --row under this name, as a row of its own.")] = None,
    base: Annotated[str, typer.Option(help="smollm2, or a Hugging Face directory or id.")] = SMOLLM2,
    runs: Annotated[Path | None, typer.Option(help="Saved runs. Default: build/i2i/runs/<name of the folder>.")] = None,
    targets: Annotated[str, typer.Option(help="test, or validation: what settings are chosen on.")] = "test",
    table: Annotated[bool, typer.Option(help="Make the table (--no-table: only train).")] = True,
    out: Annotated[Path | None, typer.Option(help="The results' JSON, and beside it the plot.")] = None,
) -> None:
    """Measure item to item on any folder of notes and clicks.

    \b
    Examples:
      python -m benchmarks.i2i --data build/i2i/microlens --train-end 1606220800000 --test-start 1606998400000 --train
      python -m benchmarks.i2i --data build/i2i/microlens --train-end 1606220800000 --test-start 1606998400000
      python -m benchmarks.i2i --data build/i2i/microlens --train-end 1606220800000 --test-start 1606998400000 \\
        --train --row contrastive --name dim256 --set embedding_dim=256 --set steps=500 --targets validation
    """  # noqa: D301 - the \\b is meant: it keeps the lines of the examples apart
    with one_line_errors(RunError, Stopped):
        end, start = parse_moment(train_end, "--train-end"), parse_moment(test_start, "--test-start")
        if end > start:
            raise SystemExit(f"--train-end: {train_end} is not allowed: it is after --test-start ({test_start})")
        if targets not in ("test", "validation"):
            raise SystemExit(f"--targets: {targets!r} is not allowed; allowed: test, validation")
        if not train and (row or seed or settings or name):
            raise SystemExit("--row, --seed, --set and --name say what to train; give --train as well")
        if name and len(row or ()) != 1:
            raise SystemExit("--name: names one row; give exactly one --row")
        check_rows(row or (), ROWS)
        changes = changes_but_the_seed(settings or ())
        folder = DataFolder.read(data, end)
        saved = runs or Path("build/i2i/runs") / data.name
        if train:
            for each in row or ROWS:
                for number in seed or [0]:
                    _train(each, name or each, folder, saved, base, changes, number)
        if table:
            _table(folder, data.name, saved, base, start, cast("Targets", targets), out)


def _train(
    row: str, name: str, data: DataFolder, saved: Path, base: str, changes: Mapping[str, str], seed: int
) -> None:
    folder = run_folder(saved, name, seed)
    settings = row_settings(row, changes, seed)
    if (there := read_run(folder)) is not None:
        if (there.base, there.train_end, there.settings) != (base, data.train_end, settings.model_dump()):
            raise RunError(f"{folder} was trained with other settings; give another --name, or remove it")
        console.print(f"{folder}: is there already", highlight=False)
        return
    with TrainingProgress(console, settings.steps) as progress:
        trained = train_row(row, data, settings, base=base, folder=folder, watch=progress)
    run = SavedRun(
        name=name,
        row=row,
        seed=seed,
        base=base,
        data_sha256=data.sha256,
        train_end=data.train_end,
        settings=settings.model_dump(),
        steps=trained.steps,
        tokens=trained.tokens,
        seconds=trained.seconds,
        device=torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        commit=commit(),
        command=shlex.join(["python", "-m", "benchmarks.i2i", *sys.argv[1:]]),
    )
    save_run(folder, run, trained.embeddings, trained.curve)
    console.print(f"{folder}: {run.steps} steps, {run.tokens:,} tokens, {run.seconds:.0f} s", highlight=False)


def _table(
    data: DataFolder, name: str, saved: Path, base: str, test_start: int, targets: Targets, out: Path | None
) -> None:
    zero_shot = {
        "base": _kept(saved, base, data, lambda: embed_with_base(base, data.notes)),
        "minilm": _kept(saved, "minilm", data, lambda: embed_with_minilm(data.notes)),
    }
    found_runs = read_runs(saved, data.sha256, data.train_end)
    with console.status("asking all systems"):
        found = make_table(data, zero_shot, found_runs, test_start=test_start, targets=targets, tell=console.log)
    _show(found, name, targets)
    if out is None and targets == "test":
        out = RESULTS
    if out is not None:
        results = json.loads(out.read_text()) if out.exists() else {}
        results[name] = {
            "train_end": data.train_end,
            "test_start": test_start,
            "targets": targets,
            "notes": len(data.notes),
            "clicks": len(data.clicks),
            **found.flat(found_runs),
        }
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(results, indent=1) + "\n")
        plot_table(found, found_runs, out.with_name(f"{out.stem}-{name}.png"))


def _kept(saved: Path, model: str, data: DataFolder, make: Callable[[], NDArray[np.float32]]) -> NDArray[np.float32]:
    """Embeddings that cost minutes, kept by model and data."""
    key = hashlib.sha256(f"{model} {data.sha256}".encode()).hexdigest()[:16]
    file = saved / f"zero-shot-{key}.npy"
    if not file.exists():
        with console.status(f"{model}: embedding {len(data.notes):,} notes"):
            found = make()
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(".partial.npy")
        np.save(partial, found)
        partial.rename(file)
    return np.asarray(np.load(file))


def _show(found: Table, name: str, targets: str) -> None:
    title = f"{name}, {targets} targets: {next(iter(found.rows.values())).queries:,} questions"
    shown = ShownTable("", "R@10", "R@100", "warm R@10", "cold R@10", "cold R@100", title=title)
    for each, row in found.rows.items():
        cold = row.metrics["cold"]
        shown.add_row(
            LABELS.get(each, each),
            *(_interval(row.metrics["all"][metric]) for metric in ("recall_at_10", "recall_at_100")),
            _interval(row.metrics["warm"]["recall_at_10"]) if row.metrics["warm"] else "",
            *(_interval(cold[metric]) if metric in cold else "" for metric in ("recall_at_10", "recall_at_100")),
        )
    Console(width=150).print(shown)


def _interval(interval: Any) -> str:
    return f"{interval.value:.4f} [{interval.low:.4f}, {interval.high:.4f}]"


if __name__ == "__main__":
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(main)
    app()
