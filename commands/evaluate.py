"""``notellm evaluate``: how good a model is, on notes and clicks that it did not learn from."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import typer
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from commands.console import err, fail, out
from commands.encoders import load_encoder
from commands.moments import parse_moment
from commands.options import ConfigOption, ProviderOption, settings_from
from notellm.errors import NoteLLMError
from notellm.messages import Note
from notellm.note_file import read_notes

if TYPE_CHECKING:
    from notellm.encoder import NoteEncoder
    from training.evaluation.evaluation import Evaluation, EvaluationData

__all__ = ["evaluate", "read_data", "show", "show_progress"]

DATA = Path("data/notes.jsonl")
SPLIT = Path("data/split.json")
OUT = Path("build/evaluation")


class Part(StrEnum):
    train = "train"
    validation = "validation"
    held_out = "held_out"


class TargetsOption(StrEnum):
    test = "test"
    validation = "validation"


def evaluate(
    context: typer.Context,
    bundle: Annotated[
        Path | None,
        typer.Option(
            help="An exported model, through ONNX Runtime. Without --checkpoint the default is that of the settings.",
            envvar="NOTELLM_ENCODER_BUNDLE",
            show_default=False,
        ),
    ] = None,
    checkpoint: Annotated[
        str | None,
        typer.Option(
            help="Instead: a run's folder, 'smollm2', or a Hugging Face directory or id, through torch.",
            envvar="NOTELLM_CLI_CHECKPOINT",
            show_default=False,
        ),
    ] = None,
    notes: Annotated[Path, typer.Option(help="The notes, JSON Lines.", envvar="NOTELLM_CLI_NOTES")] = DATA,
    split: Annotated[
        Path | None,
        typer.Option(
            help="A JSON file of note ids, {train, validation, held_out}; data/split.json for data/notes.jsonl. "
            "Without one every note is scored.",
            envvar="NOTELLM_CLI_SPLIT",
            show_default=False,
        ),
    ] = None,
    part: Annotated[
        Part, typer.Option(help="The part of the split that is scored.", envvar="NOTELLM_CLI_PART")
    ] = Part.held_out,
    clicks: Annotated[
        Path | None,
        typer.Option(
            help="Clicks, JSON Lines or Parquet: item to item is measured as well.",
            envvar="NOTELLM_CLI_EVALUATE_CLICKS",
            show_default=False,
        ),
    ] = None,
    train_end: Annotated[
        str | None,
        typer.Option(
            help="Clicks before this moment may be learnt from: ms UTC, or a date as ISO 8601 has it.",
            envvar="NOTELLM_CLI_TRAIN_END",
            show_default=False,
        ),
    ] = None,
    test_start: Annotated[
        str | None,
        typer.Option(help="Clicks from this moment on are asked about.", envvar="NOTELLM_CLI_TEST_START"),
    ] = None,
    targets: Annotated[
        TargetsOption,
        typer.Option(
            help="What is asked about: test (from --test-start on), or validation (from --train-end to there), with "
            "which settings are to be chosen.",
            envvar="NOTELLM_CLI_TARGETS",
        ),
    ] = TargetsOption.test,
    base: Annotated[
        str,
        typer.Option(
            help="The untrained base to stand beside the model, through torch; 'none': without.",
            envvar="NOTELLM_CLI_EVALUATE_BASE",
        ),
    ] = "smollm2",
    baselines: Annotated[
        bool,
        typer.Option(
            help="Measure random, popularity, TF-IDF, co-occurrence, MiniLM and the untrained base as well.",
            envvar="NOTELLM_CLI_BASELINES",
        ),
    ] = True,
    sample: Annotated[
        int,
        typer.Option(
            min=10,
            help="Notes whose hashtags and category are asked for, at most; drawn by --seed.",
            envvar="NOTELLM_CLI_SAMPLE",
        ),
    ] = 2000,
    seed: Annotated[
        int, typer.Option(min=0, help="Of what is drawn, intervals among it.", envvar="NOTELLM_CLI_EVALUATE_SEED")
    ] = 0,
    out_folder: Annotated[
        Path,
        typer.Option("--out", help="Where evaluation.json and evaluation.png go.", envvar="NOTELLM_CLI_EVALUATE_OUT"),
    ] = OUT,
    as_json: Annotated[
        bool,
        typer.Option("--json", help="Print flat JSON instead of a table.", envvar="NOTELLM_CLI_EVALUATE_JSON"),
    ] = False,
    config: ConfigOption = None,
    provider: ProviderOption = None,
) -> None:
    """Measure hashtags, categories, neighbours and, with --clicks, item to item, beside simpler systems.

    Hashtags and categories are asked for with the author's own hashtags withheld. docs/training.md explains each key.

    \b
    Examples:
      notellm evaluate --bundle build/bundles/default
      notellm evaluate --bundle build/bundles/default --json | jq '."hashtags.f1"'
      notellm evaluate --checkpoint runs/first --split data/split.json --part validation
      notellm evaluate --checkpoint runs/first --notes notes.jsonl --clicks clicks.jsonl --train-end 2026-11-01 --test-start 2026-11-08 --out build/evaluation
    """  # noqa: D301, E501 - the \\b is meant: it keeps the lines of the examples apart
    # A bundle that the environment names is everybody's; only one that was typed is in a checkpoint's way.
    source = context.get_parameter_source("bundle")
    if source is not None and source.name == "COMMANDLINE" and checkpoint is not None:
        fail("--bundle and --checkpoint exclude each other; give one")
    moments = _moments(clicks, train_end, test_start)
    try:
        out_folder.mkdir(parents=True, exist_ok=True)  # now, as a minute or an hour later would be a pity
    except OSError as error:
        fail(f"--out: {out_folder} cannot be written: {error.strerror}")
    try:
        # Imported here: torch and scikit-learn take seconds, and --help and the errors above need none of it.
        from export.torch_encoder import open_torch_encoder  # noqa: PLC0415
        from training.evaluation.click_file import read_clicks  # noqa: PLC0415
        from training.evaluation.evaluation import Systems  # noqa: PLC0415
        from training.evaluation.evaluation import evaluate as run_evaluation  # noqa: PLC0415
        from training.evaluation.plot import plot_evaluation  # noqa: PLC0415
        from training.evaluation.report import flat_report  # noqa: PLC0415
    except ModuleNotFoundError as error:
        fail(f"evaluation needs {error.name}; install: pip install 'notellm[cpu,train,evaluate]'")
    began = time.monotonic()
    with ExitStack() as stack, show_progress(quiet=as_json) as progress:
        model: NoteEncoder
        if checkpoint is None:
            settings = settings_from(config, bundle=bundle, provider=provider)
            model = load_encoder(settings.encoder)
        else:
            model = stack.enter_context(open_torch_encoder(checkpoint))
        chosen = split or (SPLIT if notes == DATA and SPLIT.is_file() else None)
        data = read_data(model.bundle.manifest.categories, notes, split=chosen, part=part, sample=sample, seed=seed)
        if clicks is not None:
            data = replace(
                data,
                clicks=read_clicks(clicks),
                train_end=moments[0],
                test_start=moments[1],
                targets=targets.value,
            )
        with_base = baselines and base != "none"
        untrained = stack.enter_context(open_torch_encoder(base) if with_base else nullcontext())
        systems = Systems(model, untrained, minilm=baselines, baselines=baselines)
        found = run_evaluation(systems, data, seed=seed, progress=progress)
    report: dict[str, Any] = {"model_version": model.model_version, **flat_report(found)}
    report["seconds"] = round(time.monotonic() - began, 1)
    (out_folder / "evaluation.json").write_bytes(_json(report))
    plot_evaluation(found, out_folder / "evaluation.png")
    if as_json:
        sys.stdout.write(_json(report).decode())
    else:
        show(found)
        out.print(f"{out_folder}: evaluation.json with every number and its interval, evaluation.png", highlight=False)


def show(found: Evaluation) -> None:
    """One table: a row a system, a column a metric that anybody has."""
    columns = {
        "hashtags.f1": "hashtags F1",
        "hashtags.rouge1": "ROUGE-1",
        "hashtags.valid": "valid",
        "category.accuracy": "category",
        "category.illegal": "illegal",
        "neighbours.precision_at_5": "neighbours@5 (*)",
        "i2i.recall_at_10": "recall@10",
        "i2i.recall_at_100": "recall@100",
        "i2i.cold.recall_at_10": "cold @10",
    }
    used = [name for name in columns if any(name in metrics for metrics in found.systems.values())]
    table = Table("", *(columns[name] for name in used))
    for system, metrics in found.systems.items():
        if metrics:
            table.add_row(system, *(f"{metrics[name].value:.3f}" if name in metrics else "" for name in used))
    out.print(table)
    counts = found.counts
    told = [f"{counts['scored']:,} of {counts['notes']:,} notes scored"]
    told += [f"{counts[name]:,} {what}" for name, what in _COUNTED.items() if name in counts]
    out.print("; ".join(told), highlight=False)
    if "neighbours.precision_at_5" in used:
        out.print("(*) of the same category: easy for a model that was trained on categories", highlight=False)


_COUNTED = {
    "hashtags.notes": "with hashtags",
    "category.notes": "with a category",
    "i2i.queries": "questions item to item",
    "i2i.cold.queries": "of them of a cold target",
}


def _moments(clicks: Path | None, train_end: str | None, test_start: str | None) -> tuple[int, int]:
    given = {"--train-end": train_end, "--test-start": test_start}
    if clicks is None:
        for name, value in given.items():
            if value is not None:
                fail(f"{name}: {value} says which clicks are meant, but --clicks is missing")
        return 0, 0
    for name, value in given.items():
        if value is None:
            fail(f"{name}: is missing; with --clicks it takes both --train-end and --test-start")
    end, start = parse_moment(str(train_end), "--train-end"), parse_moment(str(test_start), "--test-start")
    if end > start:
        fail(f"--train-end: {train_end} is not allowed: it is after --test-start ({test_start})")
    return end, start


def read_data(
    categories: Sequence[str],
    notes: Path,
    *,
    split: Path | None = None,
    part: Part = Part.held_out,
    sample: int | None = None,
    seed: int = 0,
) -> EvaluationData:
    """The notes, and which of them are scored. Raises :class:`NoteLLMError`."""
    import numpy as np  # noqa: PLC0415 - beside what it is used with

    from training.evaluation.evaluation import EvaluationData  # noqa: PLC0415
    from training.split import read_split  # noqa: PLC0415

    every = _last_of_each(read_notes(notes, published_at=0))
    if not every:
        raise NoteLLMError(f"--notes: {notes} holds no note")
    parts = read_split(split) if split else None
    scored = [note for note in every if parts is None or note.note_id in parts[part.value]]
    drawn = np.sort(np.random.default_rng(seed).permutation(len(scored))[:sample])
    return EvaluationData(
        notes=every,
        scored=[scored[place] for place in drawn],
        learnt=[note for note in every if parts is not None and note.note_id in parts["train"]],
        categories=categories,
    )


def _last_of_each(notes: list[Note]) -> list[Note]:
    return list({note.note_id: note for note in notes}.values())


def _json(report: dict[str, Any]) -> bytes:
    return msgspec.json.format(msgspec.json.encode(report), indent=2) + b"\n"


@contextmanager
def show_progress(*, quiet: bool = False) -> Iterator[Any]:
    """A bar for each thing that takes long; none where nobody looks."""
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, console=err, disable=quiet and not err.is_terminal, transient=quiet) as progress:
        tasks: dict[str, TaskID] = {}

        def tell(what: str, share: float) -> None:
            if what not in tasks:
                tasks[what] = progress.add_task(what, total=1.0)
            progress.update(tasks[what], completed=share)

        yield tell
