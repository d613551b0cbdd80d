"""``notellm``: every command of the project."""

from __future__ import annotations

from typing import Any

import typer
from typer.core import TyperGroup

from commands.check import check
from commands.console import fail
from commands.demo import demo
from commands.dev import dev
from commands.embed import embed
from commands.evaluate import evaluate
from commands.pairs import pairs_app
from commands.publish import publish
from commands.similar import similar
from commands.simulate import simulate_app
from commands.train import train
from commands.update import update
from export.to_onnx import export
from notellm.errors import NoteLLMError

__all__ = ["app", "main"]


class _OneLineErrors(TyperGroup):
    """What the project raises on purpose is a line for the person, never a traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except NoteLLMError as error:
            fail(str(error))


app = typer.Typer(
    cls=_OneLineErrors,
    name="notellm",
    help="Notes published to Kafka become embedded, tagged and searchable in Milvus, by one model in one pass.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_show_locals=False,
    add_completion=False,
)
for command in (demo, dev, update, publish, similar, embed, train, evaluate, export, check):
    app.command()(command)
app.add_typer(pairs_app)
app.add_typer(simulate_app)


def main() -> None:
    app()


if __name__ == "__main__":
    main()
