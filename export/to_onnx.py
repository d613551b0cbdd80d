"""``python export/to_onnx.py``: a checkpoint becomes a bundle."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal, NoReturn

if __package__ in (None, ""):
    # Run as a script, Python puts export/ first on its path, where our graph.py or checkpoint.py could shadow an
    # installed package; the repository's root belongs there.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from notellm.bundle import ParityReport, Precision
from notellm.categories import read_categories
from notellm.errors import NoteLLMError
from notellm.prompt import PromptLimits, load_template

__all__ = ["export"]


def export(
    model: Annotated[
        str,
        typer.Option(
            help="A Hugging Face directory or id (Llama, Qwen2, Qwen3, Mistral, Gemma 3 text, Phi-3), the folder of a "
            "NoteLLM checkpoint, or 'smollm2'.",
            envvar="NOTELLM_EXPORT_MODEL",
        ),
    ],
    out: Annotated[Path, typer.Option(help="The bundle to write.", envvar="NOTELLM_EXPORT_OUT")],
    precision: Annotated[
        Precision,
        typer.Option(
            help="Of the weights: fp32, fp16, or int8 and int4 (weights only).", envvar="NOTELLM_EXPORT_PRECISION"
        ),
    ] = "fp32",
    provider: Annotated[
        Literal["cpu", "cuda"],
        typer.Option(
            help="Where the bundle will run. cuda needs no GPU here, but parity is then unproven.",
            envvar="NOTELLM_EXPORT_PROVIDER",
        ),
    ] = "cpu",
    graph: Annotated[
        Literal["traced", "fused"],
        typer.Option(
            help="traced serves every model and caches the prompt's prefix; fused is ONNX Runtime's own builder.",
            envvar="NOTELLM_EXPORT_GRAPH",
        ),
    ] = "traced",
    categories: Annotated[
        Path | None,
        typer.Option(
            help="A file with one category per line. Default: those that the checkpoint was trained with, or the 16 "
            "that ship.",
            envvar="NOTELLM_EXPORT_CATEGORIES",
            show_default=False,
        ),
    ] = None,
    template: Annotated[
        str | None,
        typer.Option(
            help="Language of the prompt: en or zh. Default: the checkpoint's, or en.",
            envvar="NOTELLM_EXPORT_TEMPLATE",
            show_default=False,
        ),
    ] = None,
    note_tokens: Annotated[
        int | None,
        typer.Option(
            min=16,
            max=4096,
            help=f"Tokens that the prompt reads of a note. Default: the checkpoint's, or {PromptLimits().note}.",
            envvar="NOTELLM_EXPORT_NOTE_TOKENS",
            show_default=False,
        ),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace a bundle that is there.", envvar="NOTELLM_EXPORT_FORCE")
    ] = False,
) -> None:
    """Export a checkpoint to a bundle, and prove that the two are equal.

    \b
    Examples:
      python export/to_onnx.py --model smollm2 --out build/bundles/default
      python export/to_onnx.py --model smollm2 --out build/small --precision int8
      notellm export --model ./my-llama --out bundles/mine --template zh
      notellm export --model checkpoints/mine --out bundles/gpu --precision fp16 --provider cuda
    """  # noqa: D301 - the \\b is meant: it keeps the lines of the examples apart
    console = Console(stderr=True)
    try:
        prompt_template = None if template is None else load_template(template)
        names = None if categories is None else read_categories(categories)
    except NoteLLMError as error:
        _fail(console, str(error))
    try:
        # Imported here: torch takes seconds, and --help and the errors above need none of it.
        from export.build import ExportPlan, build_bundle  # noqa: PLC0415
        from export.errors import ParityError  # noqa: PLC0415
    except ModuleNotFoundError as error:
        _fail(console, f"export needs {error.name}; install: pip install 'notellm[train,cpu]'")
    try:
        plan = ExportPlan(
            source=model,
            out=out,
            template=prompt_template,
            categories=names,
            prompt_limits=None if note_tokens is None else PromptLimits(note=note_tokens),
            precision=precision,
            provider=provider,
            graph=graph,
            replace=force,
        )
        manifest = build_bundle(plan, step=lambda what: _step(console, what), say=lambda line: _say(console, line))
    except ParityError as error:
        console.print(parity_table(error.report))
        _fail(console, str(error))
    except (NoteLLMError, OSError) as error:
        _fail(console, str(error))
    for report in (manifest.parity, *manifest.parity_elsewhere):
        # An unproven one has nothing to show, and has been warned of.
        if report.rows:
            console.print(parity_table(report))
    console.print(
        f"[green]{escape(str(out))}[/]: {manifest.precision} for {manifest.parity.provider}"
        f"{' (UNPROVEN there)' if manifest.parity.state == 'unproven' else ''}, "
        f"model_version {manifest.model_version}, {manifest.embedding_dim} dimensions, "
        f"{len(manifest.categories)} categories, {sum(f.bytes for f in manifest.files.values()) / 1e6:.0f} MB"
    )
    if manifest.recipe:
        console.print(f"recipe: {manifest.recipe}", highlight=False)


def parity_table(report: ParityReport) -> Table:
    """What was only stated has no bound, and no verdict unless it is no number."""
    table = Table(title=f"parity with torch, on {report.provider}")
    for heading in ("check", "value", "bound", ""):
        table.add_column(heading)
    for row in report.rows:
        verdict = ("" if row.bound is None else "[green]ok[/]") if row.passed else "[red]FAILED[/]"
        limit = "" if row.bound is None else f"{'>=' if row.at_least else '<='} {row.bound:.5g}"
        table.add_row(row.check, f"{row.value:.6g}" if row.at_least else f"{row.value:.3g}", limit, verdict)
    return table


@contextmanager
def _step(console: Console, what: str) -> Iterator[None]:
    """A spinner while it runs, on a terminal; everywhere, one line with its seconds when it is done."""
    started = time.monotonic()
    with console.status(what):
        yield
    console.print(f"{what}: {time.monotonic() - started:.1f} s", highlight=False)


def _say(console: Console, line: str) -> None:
    # A Text, not markup: "notellm[train,cpu]" would lose its brackets.
    style = "yellow" if line.startswith("warning:") else ""
    console.print(Text(line, style=style), soft_wrap=True)


def _fail(console: Console, line: str) -> NoReturn:
    console.print(Text.assemble(("error:", "red"), " ", line), soft_wrap=True)
    raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(export)
