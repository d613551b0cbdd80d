"""Where commands print: results to standard output, everything else to standard error."""

from __future__ import annotations

import logging
import sys
from typing import NoReturn

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape

__all__ = ["err", "fail", "log_to_console", "out"]

out = Console(soft_wrap=True)
err = Console(stderr=True, soft_wrap=True)


def fail(line: str) -> NoReturn:
    """One clear line (or one per fault), and exit status 1."""
    for part in line.splitlines():
        err.print(f"[red]error:[/] {escape(part)}", highlight=False)
    raise typer.Exit(1)


def log_to_console(level: int = logging.INFO) -> None:
    """The updater's log: for people at a terminal, as plain lines elsewhere."""
    if sys.stderr.isatty():
        handler: logging.Handler = RichHandler(console=err, show_path=False, omit_repeated_times=False)
        handler.setFormatter(logging.Formatter("%(message)s"))
    else:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=level, handlers=[handler], force=True)
    # librdkafka's own lines repeat what we already say, once per retry.
    logging.getLogger("consumers.librdkafka").setLevel(logging.ERROR)
