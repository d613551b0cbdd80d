from __future__ import annotations

from threading import Event, Timer

import pytest

from consumers.backoff import until_available
from consumers.errors import RowRefused, SinkUnavailable, Stopped


def test_it_calls_until_milvus_answers() -> None:
    answers = [SinkUnavailable("away"), SinkUnavailable("slow"), None]

    def call() -> str:
        error = answers.pop(0)
        if error:
            raise error
        return "there"

    assert until_available(call, stop=Event(), longest_wait_s=0.01) == "there"
    assert answers == []


def test_another_error_is_not_tried_again() -> None:
    calls: list[int] = []

    def call() -> None:
        calls.append(1)
        raise RowRefused("no")

    with pytest.raises(RowRefused):
        until_available(call, stop=Event(), longest_wait_s=0.01)
    assert calls == [1]


def test_being_told_to_stop_ends_even_a_long_wait_at_once() -> None:
    stop = Event()

    def call() -> None:
        raise SinkUnavailable("away")

    timer = Timer(0.15, stop.set)
    timer.start()
    with pytest.raises(Stopped, match="away"):
        until_available(call, stop=stop, longest_wait_s=300)
    timer.join()
