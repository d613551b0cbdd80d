"""``notellm train``: pairs and notes in, a NoteLLM checkpoint out."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from commands.console import err, fail
from commands.options import ConfigOption
from notellm.categories import default_categories, read_categories
from notellm.errors import SettingsError
from notellm.settings import TrainingSettings, load_settings
from streams.snapshot import open_snapshot

__all__ = ["parse_changes", "train"]


def train(
    out_folder: Annotated[
        Path,
        typer.Option("--out", help="The run's folder; export takes it as --model.", envvar="NOTELLM_CLI_TRAIN_OUT"),
    ],
    pairs: Annotated[
        Path | None,
        typer.Option(
            help="A snapshot of 'notellm pairs refresh' (or the folder of them: its latest), or a file of pairs: "
            "Parquet or JSON Lines with source_id, target_id, score.",
            envvar="NOTELLM_CLI_TRAIN_PAIRS",
            show_default=False,
        ),
    ] = None,
    base: Annotated[
        str, typer.Option(help="smollm2, or a Hugging Face directory or id.", envvar="NOTELLM_CLI_TRAIN_BASE")
    ] = "smollm2",
    begin: Annotated[
        Path | None,
        typer.Option(
            "--from",
            help="Begin with what this run has learnt, and not at the base: newer pairs, or other settings. Of an "
            "adapter the base must be the same, and its rank; a run that was trained whole brings its base along.",
            envvar="NOTELLM_CLI_TRAIN_FROM",
            show_default=False,
        ),
    ] = None,
    notes: Annotated[
        Path | None,
        typer.Option(
            help="The notes, JSON Lines or Parquet. A snapshot has its own.",
            envvar="NOTELLM_CLI_TRAIN_NOTES",
            show_default=False,
        ),
    ] = None,
    split: Annotated[
        Path | None,
        typer.Option(
            help="A JSON file of note ids, {train, validation, held_out}: the first is learnt from, the second is "
            "looked at on the way.",
            envvar="NOTELLM_CLI_TRAIN_SPLIT",
            show_default=False,
        ),
    ] = None,
    train_before: Annotated[
        int | None,
        typer.Option(
            help="Learn only from notes published before this moment, ms UTC.",
            envvar="NOTELLM_CLI_TRAIN_BEFORE",
            show_default=False,
        ),
    ] = None,
    categories: Annotated[
        Path | None,
        typer.Option(
            help="A file with one category per line; others are never taught. Default: the 16 that ship.",
            envvar="NOTELLM_CLI_TRAIN_CATEGORIES",
            show_default=False,
        ),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="As --set steps=N.", envvar="NOTELLM_TRAINING_STEPS", show_default=False)
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="Any setting of [training], name=value; several times. docs/configuration.md lists them.",
            envvar="NOTELLM_CLI_TRAIN_SET",
            show_default=False,
        ),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace a run that is there.", envvar="NOTELLM_CLI_TRAIN_FORCE")
    ] = False,
    smoke: Annotated[
        bool,
        typer.Option(
            "--smoke",
            help="Learn 16 made-up pairs by heart, in minutes: recall@1 within the batch has to pass 0.9.",
            envvar="NOTELLM_CLI_TRAIN_SMOKE",
        ),
    ] = False,
    redraw_partners: Annotated[
        bool,
        typer.Option(
            "--redraw-partners",
            help="A control: each pair gets another partner at every step, so that there is nothing to learn.",
            envvar="NOTELLM_CLI_TRAIN_REDRAW_PARTNERS",
        ),
    ] = False,
    config: ConfigOption = None,
) -> None:
    """Train NoteLLM on co-clicked notes: embeddings, hashtags and categories at once.

    The same command goes on where a run was stopped or killed. Several GPUs: put
    'torchrun --nproc-per-node 8 -m commands' in front of 'train'.

    \b
    Examples:
      notellm train --pairs build/pairs --out runs/first
      notellm train --pairs build/pairs --split data/split.json --out runs/first --steps 500
      notellm train --pairs build/pairs --from runs/first --out runs/second --steps 100
      notellm train --pairs pairs.parquet --notes notes.jsonl --base ./my-llama --out runs/mine
      notellm train --pairs build/pairs --out runs/big --set batch_pairs=256 --set gradient_checkpointing=true
      notellm train --smoke --out runs/smoke
    """  # noqa: D301 - the \\b is meant: it keeps the lines of the examples apart
    if pairs is None and not smoke:
        fail("--pairs: is missing; give a snapshot of 'notellm pairs refresh', or a file of pairs")
    try:
        # Imported here: torch takes seconds, and --help and the errors above need none of it.
        from commands.training_progress import TrainingProgress  # noqa: PLC0415
        from training import smoke as smoke_set  # noqa: PLC0415
        from training.base_model import SMOLLM2  # noqa: PLC0415
        from training.train import TrainingPlan  # noqa: PLC0415
        from training.train import train as run_training  # noqa: PLC0415
        from training.training_data import DataFiles  # noqa: PLC0415
    except ModuleNotFoundError as error:
        fail(f"training needs {error.name}; install: pip install 'notellm[train]'")
    chosen = _settings(config, settings or [], steps, smoke_set.SMOKE_SETTINGS if smoke else {})
    console = _console()
    with tempfile.TemporaryDirectory() as folder, TrainingProgress(console, chosen.steps) as progress:
        if pairs is None:
            files = smoke_set.write_smoke_data(Path(folder))
        else:
            found = open_snapshot(pairs).path if pairs.is_dir() else pairs
            files = DataFiles(found, notes, split, train_before)
        plan = TrainingPlan(
            # The run names its base, and is read from other folders; a path that begins with a dot would be its own.
            base=str(Path(base).resolve()) if base != SMOLLM2 and Path(base).is_dir() else base,
            files=files,
            out=out_folder,
            categories=default_categories() if categories is None else read_categories(categories),
            settings=chosen,
            begin=begin,
            force=force,
            redraw_partners=redraw_partners,
        )
        outcome = run_training(plan, progress)
    last = outcome.metrics
    if not outcome.done:
        console.print(f"stopped after step {last['step']}; the same command goes on from there", highlight=False)
        raise typer.Exit(130)
    console.print(
        f"[green]{escape(str(outcome.run))}[/]: {last['step']} steps, {last['tokens']:,} tokens, "
        f"{last['seconds'] / 60:.1f} minutes; recall@1 within the batch {last['recall_at_1']:.2f}",
        highlight=False,
    )
    if smoke and not redraw_partners and last["recall_at_1"] <= smoke_set.RECALL:
        fail(f"--smoke: recall@1 is {last['recall_at_1']:.2f} and had to pass {smoke_set.RECALL}: it does not learn")
    console.print(f"next: python export/to_onnx.py --model {outcome.run} --out BUNDLE", highlight=False, markup=False)


def _console() -> Console:
    """Under torchrun one of the processes speaks for all."""
    return err if os.environ.get("RANK", "0") == "0" else Console(quiet=True)


def parse_changes(given: Iterable[str]) -> dict[str, str]:
    """``name=value`` of --set. Raises :class:`SettingsError`."""
    changes = {}
    for each in given:
        name, equals, value = each.partition("=")
        if not equals or name.strip() not in TrainingSettings.model_fields:
            raise SettingsError(
                f"--set: {each!r} is not allowed; allowed is name=value with one of "
                f"{', '.join(TrainingSettings.model_fields)}"
            )
        changes[name.strip()] = value.strip()
    return changes


def _settings(config: Path | None, given: list[str], steps: int | None, usual: Mapping[str, Any]) -> TrainingSettings:
    """``usual`` gives way to what is set anywhere."""
    flags: dict[str, Any] = {f"training.{name}": value for name, value in parse_changes(given).items()}
    # --set wins: the value of --steps may be the environment's.
    flags.setdefault("training.steps", steps)
    found = load_settings(config, flags).training
    return TrainingSettings(**{**usual, **found.model_dump(exclude_unset=True)})
