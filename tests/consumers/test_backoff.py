from __future__ import annotations

from threading import Event, Timer

import pytest

from consumers.backoff import Patience
from consumers.errors import EncoderUnavailable, RowRefused, SinkUnavailable, Stopped
from consumers.outages import Outages


def test_it_calls_until_milvus_answers() -> None:
    answers = [SinkUnavailable("away"), SinkUnavailable("slow"), None]

    def call() -> str:
        error = answers.pop(0)
        if error:
            raise error
        return "there"

    assert Patience(Event(), 0.01).until_available(call) == "there"
    assert answers == []


def test_another_error_is_not_tried_again() -> None:
    calls: list[int] = []

    def call() -> None:
        calls.append(1)
        raise RowRefused("no")

    with pytest.raises(RowRefused):
        Patience(Event(), 0.01).until_available(call)
    assert calls == [1]


def test_being_told_to_stop_ends_even_a_long_wait_at_once() -> None:
    stop = Event()

    def call() -> None:
        raise SinkUnavailable("away")

    timer = Timer(0.15, stop.set)
    timer.start()
    with pytest.raises(Stopped, match="away"):
        Patience(stop, 300).until_available(call)
    timer.join()


def test_what_is_waited_for_can_be_seen_meanwhile() -> None:
    outages = Outages()
    seen: list[list[str]] = []
    answers = [SinkUnavailable("slow"), EncoderUnavailable("was killed by SIGSEGV"), None]

    def call() -> None:
        seen.append(outages.reasons())
        error = answers.pop(0)
        if error:
            raise error

    Patience(Event(), 0.01, outages).until_available(call)
    assert seen == [[], ["waiting for Milvus: slow"], ["waiting for the encoder: was killed by SIGSEGV"]]
    assert outages.reasons() == []
