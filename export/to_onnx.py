"""``python export/to_onnx.py``: a checkpoint becomes a bundle."""

from __future__ import annotations

import sys
import time
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, NoReturn

if __package__ in (None, ""):
    # Run as a script, Python puts export/ first on its path, where our graph.py or checkpoint.py could shadow an
    # installed package; the repository's root belongs there.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from notellm.bundle import ParityReport
from notellm.errors import NoteLLMError
from notellm.prompt import PromptLimits, load_template

__all__ = ["export"]

_DEFAULT_CATEGORIES = Path(__file__).resolve().parent.parent / "notellm" / "templates" / "categories.txt"


def export(
    model: Annotated[
        str,
        typer.Option(
            help="A Hugging Face directory or id of a Llama-type causal LM, or 'smollm2'.",
            envvar="NOTELLM_EXPORT_MODEL",
        ),
    ],
    out: Annotated[Path, typer.Option(help="The bundle to write.", envvar="NOTELLM_EXPORT_OUT")],
    categories: Annotated[
        Path, typer.Option(help="A file with one category per line.", envvar="NOTELLM_EXPORT_CATEGORIES")
    ] = _DEFAULT_CATEGORIES,
    template: Annotated[
        str, typer.Option(help="Language of the prompt: en or zh.", envvar="NOTELLM_EXPORT_TEMPLATE")
    ] = "en",
    note_tokens: Annotated[
        int,
        typer.Option(
            min=16, max=4096, help="Tokens that the prompt reads of a note.", envvar="NOTELLM_EXPORT_NOTE_TOKENS"
        ),
    ] = PromptLimits().note,
    force: Annotated[
        bool, typer.Option("--force", help="Replace a bundle that is there.", envvar="NOTELLM_EXPORT_FORCE")
    ] = False,
) -> None:
    """Export a checkpoint to a bundle, and prove that the two are equal.

    \b
    Examples:
      python export/to_onnx.py --model smollm2 --out build/bundle
      notellm export --model ./my-llama --out bundles/mine --template zh
    """  # noqa: D301 - the \\b is meant: it keeps the lines of the examples apart
    console = Console(stderr=True)
    try:
        prompt_template = load_template(template)
        names = read_categories(categories)
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
            prompt_limits=PromptLimits(note=note_tokens),
            replace=force,
        )
        manifest = build_bundle(plan, step=lambda what: _step(console, what), say=console.print)
    except ParityError as error:
        console.print(parity_table(error.report))
        _fail(console, str(error))
    except (NoteLLMError, OSError) as error:
        _fail(console, str(error))
    console.print(parity_table(manifest.parity))
    console.print(
        f"[green]{escape(str(out))}[/]: model_version {manifest.model_version}, {manifest.embedding_dim} dimensions, "
        f"{len(manifest.categories)} categories, {sum(f.bytes for f in manifest.files.values()) / 1e6:.0f} MB"
    )


def read_categories(file: Path) -> list[str]:
    """One category per line; blank lines are skipped. Raises :class:`NoteLLMError`.

    Two that differ only in case or Unicode form are refused: a tokenizer may make the same ids of both.
    """
    try:
        lines = [line.strip() for line in file.read_text("utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise NoteLLMError(f"--categories {file}: cannot be read as UTF-8 text: {error}") from None
    found = [line for line in lines if line]
    folded = [unicodedata.normalize("NFKC", line).casefold() for line in found]
    twice = [line for line, key in zip(found, folded, strict=True) if folded.count(key) > 1]
    if not found or twice or max(map(len, found)) > 128:
        wrong = f"{twice[0]!r} stands there twice" if twice else "no line, or one of more than 128 characters"
        raise NoteLLMError(f"--categories {file}: {wrong}; allowed are distinct lines of 1 to 128 characters")
    return found


def parity_table(report: ParityReport) -> Table:
    table = Table(title=f"parity with torch, on {report.provider}")
    for heading in ("check", "value", "bound", ""):
        table.add_column(heading)
    for row in report.rows:
        verdict = "[green]ok[/]" if row.passed else "[red]FAILED[/]"
        table.add_row(row.check, f"{row.value:.3g}", f"{row.bound:.3g}", verdict)
    return table


@contextmanager
def _step(console: Console, what: str) -> Iterator[None]:
    """A spinner while it runs, on a terminal; everywhere, one line with its seconds when it is done."""
    started = time.monotonic()
    with console.status(what):
        yield
    console.print(f"{what}: {time.monotonic() - started:.1f} s", highlight=False)


def _fail(console: Console, line: str) -> NoReturn:
    # A Text, not markup: "notellm[train,cpu]" would lose its brackets.
    console.print(Text.assemble(("error:", "red"), " ", line), soft_wrap=True)
    raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(export)
