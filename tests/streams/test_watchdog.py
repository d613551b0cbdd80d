"""When a worker counts as hung."""

from __future__ import annotations

from streams.watchdog import Backlog, StallTimer

WAITING = Backlog(committed=5, start=0, end=9)


def test_counts_while_clicks_wait_and_nothing_moves() -> None:
    timer = StallTimer()
    assert timer.observe(100.0, {0: WAITING}, 0) == 0
    assert timer.observe(130.0, {0: WAITING}, 0) == 30
    assert timer.observe(131.0, {0: WAITING._replace(end=99)}, 0) == 31, "more of them is no movement"


def test_a_commit_is_movement() -> None:
    timer = StallTimer()
    timer.observe(100.0, {0: WAITING}, 0)
    assert timer.observe(130.0, {0: WAITING._replace(committed=6)}, 0) == 0
    assert timer.observe(135.0, {0: WAITING._replace(committed=6)}, 0) == 5


def test_one_partition_is_enough() -> None:
    timer = StallTimer()
    timer.observe(100.0, {0: WAITING, 1: WAITING}, 0)
    assert timer.observe(130.0, {0: WAITING._replace(committed=8), 1: WAITING}, 0) == 30


def test_nothing_to_do_is_no_stall() -> None:
    timer = StallTimer()
    done = Backlog(committed=9, start=0, end=9)
    timer.observe(100.0, {0: done}, 0)
    assert timer.observe(900.0, {0: done}, 0) == 0
    assert timer.observe(901.0, {0: done._replace(end=10)}, 0) == 0
    assert timer.observe(902.0, {0: done._replace(end=10)}, 0) == 1


def test_reading_the_changelog_is_movement() -> None:
    timer = StallTimer()
    timer.observe(100.0, {0: WAITING}, 0)
    assert timer.observe(130.0, {0: WAITING}, 4000) == 0
    assert timer.observe(140.0, {0: WAITING}, 4000) == 10


def test_a_group_without_offsets_waits_for_what_is_there() -> None:
    assert Backlog(committed=-1001, start=7, end=9).waiting == 2
    assert Backlog(committed=-1001, start=9, end=9).waiting == 0
    assert Backlog(committed=3, start=9, end=9).waiting == 0, "Kafka has deleted it: nobody can wait for it"
