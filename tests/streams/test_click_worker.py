"""Nothing is committed before Kafka has all that was done up to it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import msgspec
import pytest

from streams.click_table import ClickTable, Rules
from streams.click_worker import ClickWorker
from streams.errors import WorkerError
from streams.in_memory import MemoryChangelog, MemoryClicksLog, MemoryDeadLetters, MemoryRows

RULES = Rules(lateness_ms=1000, tolerance_ms=1000, clicks_per_day=5, keep_ms=10**9)
AT = 1_700_000_000_000


@dataclass(frozen=True)
class Record:
    offset: int
    partition: int = 0
    key: bytes | None = b"u"
    value: bytes | None = None
    topic: str = "clicks"
    headers: tuple[tuple[str, bytes], ...] = ()


def click(offset: int, partition: int = 0) -> Record:
    value = msgspec.json.encode({"user_id": "u", "note_id": f"n{offset}", "clicked_at": AT})
    return Record(offset, partition, value=value)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Desk:
    """A worker and all that it stands on."""

    def __init__(self) -> None:
        self.changelog, self.letters, self.clock = MemoryChangelog(), MemoryDeadLetters(), Clock()
        self.clicks = MemoryClicksLog({0: [5, 6, 7, 9, 10]}, {0: 5})
        self.rows: dict[int, MemoryRows] = {}
        self.worker = ClickWorker(
            self.changelog, self.letters, self._open, self.clicks, longest_pause_s=6.0, clock=self.clock
        )

    def _open(self, partition: int) -> ClickTable:
        return ClickTable(self.rows.setdefault(partition, MemoryRows()), RULES)

    def handle(self, *records: Record) -> None:
        for record in records:
            self.worker.handle(record, AT)


@pytest.fixture
def desk() -> Desk:
    return Desk()


def test_a_round_names_what_may_be_committed(desk: Desk) -> None:
    desk.handle(click(5), click(6), click(3, partition=1))
    offsets = asyncio.run(desk.worker.round())
    assert offsets == {0: 7, 1: 4}
    desk.worker.committed(offsets)
    assert asyncio.run(desk.worker.round()) == {}
    assert len(desk.changelog.records[0]) == 1, "two clicks of one row in one round: one record"
    assert desk.rows[0].changelog_offset == 0


def test_a_commit_that_failed_is_tried_again(desk: Desk) -> None:
    desk.handle(click(5))
    assert asyncio.run(desk.worker.round()) == {0: 6}
    assert asyncio.run(desk.worker.round()) == {0: 6}


@pytest.mark.parametrize("away", ["changelog", "letters"])
def test_waits_for_the_changelog_and_for_dead_letters(desk: Desk, away: str) -> None:
    async def scenario() -> None:
        desk.handle(click(5), Record(6, value=b"{"))
        getattr(desk, away).takes = False
        waiting = asyncio.create_task(desk.worker.round())
        await asyncio.sleep(0.05)
        assert not waiting.done()
        assert desk.rows[0].rows == {}, "the disk is never ahead of the changelog"
        desk.handle(click(7))
        getattr(desk, away).takes = True
        assert await waiting == {0: 7}, "what came meanwhile is for the next round"
        assert await desk.worker.round() == {0: 8}

    asyncio.run(scenario())
    assert [error.reason for _, error in desk.letters.letters] == ["not_json"]


def test_a_partition_that_was_lost_meanwhile_is_not_committed(desk: Desk) -> None:
    async def scenario() -> None:
        desk.handle(click(5), click(6, partition=1))
        desk.changelog.takes = False
        waiting = asyncio.create_task(desk.worker.round())
        await asyncio.sleep(0.02)
        desk.worker.let_go(0)
        desk.changelog.takes = True
        assert await waiting == {1: 7}

    asyncio.run(scenario())
    assert desk.rows[0].rows == {}


def test_a_worker_that_slept_writes_nothing_any_more(desk: Desk) -> None:
    desk.handle(click(5))
    desk.clock.now = 7.0
    with pytest.raises(WorkerError, match="did nothing for 7 s"):
        asyncio.run(desk.worker.round())
    assert desk.changelog.records == {}


def test_takes_no_more_when_memory_is_full(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streams.click_worker._LETTERS_WAITING", 2)
    desk.letters.takes = False
    desk.handle(*(Record(offset, value=b"{") for offset in range(2)))
    assert not desk.worker.is_full
    desk.handle(Record(2, value=b"{"))
    assert desk.worker.is_full
    desk.letters.takes = True
    assert not desk.worker.is_full


def test_records_come_in_order_or_are_asked_for_again(desk: Desk) -> None:
    worker = desk.worker
    assert not worker.expects(click(7)), "5 is committed, so 5 is next"
    assert worker.missing(click(7)) == 5
    assert not worker.expects(click(9))
    assert worker.missing(click(9)) is None, "asked for already"
    assert worker.expects(click(5))
    desk.handle(click(5))
    assert not worker.expects(click(5))
    assert worker.missing(click(5)) is None, "handled already"
    assert asyncio.run(worker.round()) == {0: 6}
    assert worker.expects(click(6))
    desk.handle(click(6), click(7))
    assert not worker.expects(click(10))
    assert worker.missing(click(10)) == 9, "there is no 8: a transaction ended there"
    desk.clock.now = 5.5
    assert not worker.expects(click(10))
    assert worker.missing(click(10)) == 9, "it has not come: asked for once more"
    worker.let_go(0)
    desk.clicks.starts = {0: 8}
    assert worker.expects(click(9))


def test_a_partition_begins_where_the_group_has_committed(desk: Desk) -> None:
    assert not desk.worker.expects(click(4))
    assert desk.worker.missing(click(4)) is None
    assert asyncio.run(desk.worker.round()) == {}
