"""What the demo shows while it runs: counts, speed and freshness, refreshed in place."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Event, Lock, Thread

from rich.console import Console
from rich.live import Live
from rich.table import Table

from consumers.changes import Change

__all__ = ["DemoProgress", "on_screen", "percentiles"]

_LOG_SECONDS = 15.0


class DemoProgress:
    """The updater's observer: counts what it hears. Thread-safe."""

    def __init__(self) -> None:
        self.published = 0
        self.searchable_count = 0
        self.settled_count = 0
        self.freshness_ms: list[float] = []
        self._begin = time.monotonic()
        self._end: float | None = None
        self._lock = Lock()

    def searchable(self, change: Change, freshness_ms: float) -> None:
        """See :class:`consumers.write_stage.Observer`."""
        del change
        with self._lock:
            self.searchable_count += 1
            self.freshness_ms.append(freshness_ms)

    def settled(self, change: Change) -> None:
        """See :class:`consumers.write_stage.Observer`."""
        del change
        with self._lock:
            self.settled_count += 1

    def notes_per_s(self) -> float:
        """Settled notes, edits and deletions, by the time since the first was published."""
        return self.settled_count / max((self._end or time.monotonic()) - self._begin, 1e-9)

    def finish(self) -> None:
        """Stop the clock."""
        self._end = time.monotonic()

    def cells(self) -> dict[str, str]:
        """What there is to show, by heading."""
        with self._lock:
            p50, p99 = percentiles(self.freshness_ms)
        return {
            "published": str(self.published),
            "embedded + searchable": str(self.searchable_count),
            "tagged or deleted": str(self.settled_count),
            "notes/s": f"{self.notes_per_s():.1f}",
            "freshness p50": f"{p50 / 1000:.2f} s",
            "p99": f"{p99 / 1000:.2f} s",
        }

    def __rich__(self) -> Table:
        cells = self.cells()
        table = Table(*cells)
        table.add_row(*cells.values())
        return table


@contextmanager
def on_screen(progress: DemoProgress, console: Console) -> Iterator[None]:
    """Refreshed in place on a terminal; a line now and then in a log."""
    if console.is_terminal:
        with Live(progress, console=console, refresh_per_second=4, get_renderable=lambda: progress):
            yield
        return
    done = Event()

    def log() -> None:
        while not done.wait(_LOG_SECONDS):
            line()

    def line() -> None:
        console.print(", ".join(f"{heading} {cell}" for heading, cell in progress.cells().items()), highlight=False)

    thread = Thread(target=log, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        line()


def percentiles(values: list[float]) -> tuple[float, float]:
    """p50 and p99, (0, 0) of nothing."""
    if len(values) < 2:
        return (values[0], values[0]) if values else (0.0, 0.0)
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    return cuts[49], cuts[98]
