"""Somebody who goes on publishing while things break."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from threading import Event, Thread

from msgspec.structs import replace

from commands.demo_script import Publication
from notellm.errors import NoteLLMError
from notellm.messages import Note
from tests.support.pipeline import Pipeline, note_publication

__all__ = ["Load"]

_BUSY_NOTES = 20
_TURN_SECONDS = 0.1


class Load:
    """Publishes ``rate`` records a second from :meth:`start` to :meth:`finish`, in a thread.

    Every second one is a new note; the others edit the same few notes again and again, delete them, or are broken.
    While Kafka is away they pile up, as they do in any producer, and go out once it is back.
    """

    def __init__(self, pipeline: Pipeline, name: str, rate: float) -> None:
        self.sent = 0
        self._pipeline = pipeline
        self._name = name
        self._rate = rate
        self._draw = random.Random(name)
        self._at_least = 0
        self._finish = Event()
        self._error: Exception | None = None
        self._thread = Thread(target=self._guard, name="load", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def finish(self, at_least: int = 0) -> None:
        """Returns once ``at_least`` so many are published and Kafka has acknowledged them all."""
        self._at_least = at_least
        self._finish.set()
        self._thread.join(at_least / self._rate + 120)
        if self._error is not None:
            raise self._error
        assert not self._thread.is_alive(), "Kafka does not take what is published"

    def _guard(self) -> None:
        try:
            self._run()
        except Exception as error:  # noqa: BLE001 - raised again by the test's own thread
            self._error = error

    def _run(self) -> None:
        begun = time.monotonic()
        while not self._finish.is_set() or self.sent < self._at_least:
            due = int((time.monotonic() - begun) * self._rate) - self.sent
            self._publish([self._next(self.sent + number) for number in range(due)])
            self.sent += due
            time.sleep(_TURN_SECONDS)

    def _publish(self, publications: Sequence[Publication]) -> None:
        try:
            self._pipeline.publish(*publications)
        except NoteLLMError:
            self._pipeline.publish()  # a broker may be away for longer than one flush waits; they are handed over

    def _next(self, number: int) -> Publication:
        if number % 2 == 0:
            return note_publication(self._note(f"new{number}", number))
        busy = self._note(f"busy{self._draw.randrange(_BUSY_NOTES)}", number)
        kind = self._draw.random()
        if kind < 0.1:
            return Publication(busy.note_id.encode(), None)
        if kind < 0.2:
            return Publication(busy.note_id.encode(), b"{", broken=True)
        if kind < 0.6:  # its text stays as it is: the model does not run
            return note_publication(replace(busy, title="always the same", attributes={"likes": number}))
        return note_publication(busy)

    def _note(self, name: str, number: int) -> Note:
        content = "a little more each day " * (number % 5)
        return Note(note_id=f"{self._name}-{name}", title=f"number {number}", content=content, published_at=number)
