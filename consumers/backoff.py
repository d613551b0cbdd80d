"""Waiting for Milvus: again and again, a little longer each time, until it answers or the updater is told to stop."""

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

from consumers.errors import SinkUnavailable, Stopped

__all__ = ["until_available"]

T = TypeVar("T")
log = logging.getLogger(__name__)


def until_available(call: Callable[[], T], *, stop: Event, longest_wait_s: float) -> T:
    """Call until it raises no :class:`SinkUnavailable`. Raises :class:`Stopped` once ``stop`` is set."""
    retrying = Retrying(
        retry=retry_if_exception_type(SinkUnavailable),
        wait=wait_exponential(multiplier=0.1, max=longest_wait_s) + wait_random(0, min(0.1, longest_wait_s)),
        stop=stop_when_event_set(stop),
        sleep=sleep_using_event(stop),
        before_sleep=_say,
        retry_error_callback=_stopped,
    )
    return retrying(call)


def _say(state: RetryCallState) -> None:
    if state.attempt_number in (1, 5) or state.attempt_number % 20 == 0:
        log.warning("waiting for Milvus (try %d): %s", state.attempt_number, _error(state))


def _stopped(state: RetryCallState) -> NoReturn:
    raise Stopped(f"stopped while waiting for Milvus: {_error(state)}")


def _error(state: RetryCallState) -> BaseException | None:
    return state.outcome.exception() if state.outcome else None
