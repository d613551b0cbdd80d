"""What ``notellm train`` shows while it runs, and how it is stopped: a bar on a terminal, lines elsewhere."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from training.watch import Watch

__all__ = ["TrainingProgress"]

_LINE_EVERY = 10


class TrainingProgress(Watch):
    """Inside ``with``, Ctrl-C and SIGTERM end the training after the step that is going on, with a state to go on from.

    A second Ctrl-C ends it at once.
    """

    def __init__(self, console: Console, steps: int) -> None:
        self._console = console
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[figures]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._bar = self._progress.add_task("training", total=steps, figures="")
        self._steps = steps
        self._stop = threading.Event()
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> TrainingProgress:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._asked_to_stop)
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def say(self, line: str) -> None:
        style = "yellow" if line.startswith("warning:") else None
        self._progress.console.print(escape(line), style=style, highlight=False)

    def metrics(self, line: dict[str, Any]) -> None:
        losses = (
            f"contrastive {line['contrastive']:.3f}  generative {line['generative']:.3f}  "
            f"recall@1 {line['recall_at_1']:.2f}"
        )
        if line["part"] == "validation":
            self.say(f"step {line['step']}, validation: {losses}")
            return
        rate = line["tokens"] / max(line["seconds"], 1e-9)
        self._progress.update(self._bar, completed=line["step"], figures=f"{losses}  {rate:,.0f} tokens/s")
        if not self._console.is_terminal and (line["step"] % _LINE_EVERY == 0 or line["step"] == self._steps):
            self.say(f"step {line['step']}/{self._steps}: {losses}  {rate:,.0f} tokens/s")

    def wants_to_stop(self) -> bool:
        return self._stop.is_set()

    def _asked_to_stop(self, number: int, frame: FrameType | None) -> None:
        if self._stop.is_set():
            raise KeyboardInterrupt
        self._stop.set()
        self.say("stopping after this step, with a state to go on from (once more: at once)")
