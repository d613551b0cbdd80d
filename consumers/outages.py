"""What the updater waits for now: readiness and metrics tell it, from threads of their own."""

from __future__ import annotations

from threading import Lock, get_ident

from prometheus_client import Gauge

from consumers.errors import Unavailable

__all__ = ["WAITING", "Outages"]

WAITING = Gauge("notellm_waiting", "1 while the updater waits for it to come back.", ["what"])


class Outages:
    """Who waits for what. Thread-safe; each thread waits for one thing at a time."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._waiting: dict[int, Unavailable] = {}

    def begin(self, error: Unavailable) -> None:
        """The calling thread begins, or goes on, to wait."""
        with self._lock:
            self._waiting[get_ident()] = error
        WAITING.labels(error.what).set(1)

    def end(self) -> None:
        """The calling thread waits no more."""
        with self._lock:
            ended = self._waiting.pop(get_ident(), None)
            over = ended is not None and not any(error.what == ended.what for error in self._waiting.values())
        if ended is not None and over:
            WAITING.labels(ended.what).set(0)

    def reasons(self) -> list[str]:
        """One line for each thing that somebody waits for."""
        with self._lock:
            waiting = list(self._waiting.values())
        return sorted({f"waiting for {error.what}: {error}" for error in waiting})
