from __future__ import annotations

import hypothesis.strategies as st
from hypothesis import given

from consumers.offsets import OffsetTracker


@st.composite
def histories(draw: st.DrawFn) -> list[tuple[str, int]]:
    """Deliveries in order, with gaps; acknowledgements, repeated ones too, and abandonments anywhere behind."""
    gaps = draw(st.lists(st.integers(1, 4), min_size=1, max_size=20))
    offsets = [sum(gaps[: place + 1]) - 1 for place in range(len(gaps))]
    history: list[tuple[str, int]] = [("deliver", offset) for offset in offsets]
    for offset in offsets:
        delivered = history.index(("deliver", offset))
        extra = draw(st.lists(st.sampled_from(["deliver again", "acknowledge", "abandon"]), max_size=2))
        for event in [*extra, "acknowledge"]:
            history.insert(draw(st.integers(delivered + 1, len(history))), (event, offset))
    return history


@given(histories())
def test_the_position_never_passes_what_is_open_never_goes_back_and_reaches_the_end(
    history: list[tuple[str, int]],
) -> None:
    tracker = OffsetTracker()
    open_offsets: set[int] = set()
    abandoned: set[int] = set()
    last_position = -1
    for event, offset in history:
        if event == "deliver":
            assert tracker.deliver(offset)
            open_offsets.add(offset)
        elif event == "deliver again":
            assert not tracker.deliver(offset)
        elif event == "abandon":
            tracker.abandon(offset)
            abandoned |= {offset} & open_offsets
        else:
            tracker.acknowledge(offset)
            open_offsets.discard(offset)
            abandoned.discard(offset)
        position = tracker.position if tracker.position is not None else -1
        assert position <= min(open_offsets, default=position)
        assert position >= last_position
        assert tracker.unacknowledged == len(open_offsets)
        assert tracker.in_flight == len(open_offsets - abandoned)
        last_position = position
    assert tracker.position == max(offset for _, offset in history) + 1


def test_nothing_is_committable_before_the_first_acknowledgement() -> None:
    tracker = OffsetTracker()
    tracker.deliver(7)
    tracker.deliver(9)
    tracker.acknowledge(9)
    assert tracker.position is None
    tracker.acknowledge(7)
    assert tracker.position == 10


def test_an_offset_that_was_never_delivered_is_neither_acknowledged_nor_waited_for() -> None:
    tracker = OffsetTracker()
    tracker.deliver(0)
    tracker.deliver(5)
    tracker.acknowledge(3)
    tracker.abandon(3)
    assert tracker.unacknowledged == tracker.in_flight == 2
    assert tracker.position is None


def test_an_abandoned_offset_holds_back_the_position_for_good() -> None:
    tracker = OffsetTracker()
    for offset in range(3):
        tracker.deliver(offset)
    tracker.abandon(1)
    tracker.acknowledge(0)
    tracker.acknowledge(2)
    assert tracker.position == 1
    assert tracker.in_flight == 0
