"""Waiting for Milvus or the encoder: again and again, a little longer each time, until it is back or we are to stop."""

from __future__ import annotations

import logging
from collections.abc import Callable
from threading import Event
from typing import NoReturn, TypeVar

from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_exception_type,
    sleep_using_event,
    stop_when_event_set,
    wait_exponential,
    wait_random,
)

from consumers.errors import Stopped, Unavailable
from consumers.outages import Outages

__all__ = ["Patience"]

T = TypeVar("T")
log = logging.getLogger(__name__)


class Patience:
    """How long, and until when, one updater waits."""

    def __init__(self, stop: Event, longest_wait_s: float, outages: Outages | None = None) -> None:
        self._stop = stop
        self._longest_wait_s = longest_wait_s
        self._outages = outages or Outages()

    def until_available(self, call: Callable[[], T]) -> T:
        """Call until it raises no :class:`Unavailable`. Raises :class:`Stopped` once it is time to stop."""
        retrying = Retrying(
            retry=retry_if_exception_type(Unavailable),
            wait=wait_exponential(multiplier=0.1, max=self._longest_wait_s)
            + wait_random(0, min(0.1, self._longest_wait_s)),
            stop=stop_when_event_set(self._stop),
            sleep=sleep_using_event(self._stop),
            before_sleep=self._say,
            retry_error_callback=_stopped,
        )
        try:
            return retrying(call)
        finally:
            self._outages.end()

    def _say(self, state: RetryCallState) -> None:
        error = _error(state)
        self._outages.begin(error)
        if state.attempt_number in (1, 5) or state.attempt_number % 20 == 0:
            log.warning("waiting for %s (try %d): %s", error.what, state.attempt_number, error)


def _stopped(state: RetryCallState) -> NoReturn:
    error = _error(state)
    raise Stopped(f"stopped while waiting for {error.what}: {error}")


def _error(state: RetryCallState) -> Unavailable:
    assert state.outcome is not None
    error = state.outcome.exception()
    assert isinstance(error, Unavailable)
    return error
