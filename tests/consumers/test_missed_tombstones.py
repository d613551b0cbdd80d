"""The rule against a simulated compacted log: whoever missed a deletion was warned."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import event, given
from hypothesis import strategies as st

from consumers.missed_tombstones import Start, TombstoneWatch, read_start, write_start

DAY = 1000
NOW = 1_000_000


def watch(*, committed: int | None = 10, committed_ago: int = 1, since_ago: int = 100 * DAY) -> TombstoneWatch:
    return TombstoneWatch(Start(committed, NOW - committed_ago, NOW - since_ago), DAY)


def test_a_record_that_waited_for_longer_may_have_had_a_tombstone_beside_it() -> None:
    assert watch().may_have_missed(10, NOW - DAY - 1, NOW)
    assert not watch().may_have_missed(10, NOW - DAY, NOW)


def test_a_gap_counts_only_after_a_long_absence() -> None:
    assert watch(committed_ago=DAY + 1).may_have_missed(12, NOW, NOW)
    assert not watch(committed_ago=DAY + 1).may_have_missed(10, NOW, NOW), "a quiet partition: nothing was written"
    assert not watch(committed_ago=DAY).may_have_missed(12, NOW, NOW)


def test_a_gap_in_the_middle_counts_after_a_long_pause() -> None:
    paused = watch()
    assert not paused.may_have_missed(10, NOW, NOW)
    assert paused.may_have_missed(12, NOW + 2 * DAY, NOW + 2 * DAY)


def test_old_records_are_no_loss_for_a_group_that_has_just_begun() -> None:
    fresh = watch(committed=None, since_ago=0)
    assert not fresh.may_have_missed(5000, 0, NOW)
    assert not fresh.may_have_missed(9000, 0, NOW + DAY)
    assert fresh.may_have_missed(9001, 0, NOW + DAY + 1)


def test_a_commit_that_says_nothing_was_long_ago() -> None:
    assert TombstoneWatch(read_start(10, None), DAY).may_have_missed(12, NOW, NOW)


def test_a_record_without_a_time_is_no_sign() -> None:
    assert not watch().may_have_missed(10, -1, NOW)


@pytest.mark.parametrize("metadata", [None, "", "x", "notellm committed_at=x reading_since=1", "\x00" * 5000])
def test_metadata_of_others_is_unknown(metadata: str | None) -> None:
    assert read_start(7, metadata) == Start(7, 0, 0)


def test_metadata_is_read_as_it_was_written() -> None:
    assert read_start(7, write_start(1_700_000_000_000, 5)) == Start(7, 1_700_000_000_000, 5)


def test_the_warning_names_the_partition_and_what_to_do() -> None:
    text = watch().warning("notes", 3)
    assert text.startswith("notes[3]: ")
    assert f"delete.retention.ms ({DAY} ms)" in text
    assert "compare the topic's keys" in text
    assert "\n" not in text


@dataclass
class Entry:
    offset: int
    written_at: int
    key: int
    tombstone: bool
    horizon: int | None = None  # when a tombstone may go, set by the first cleaning that sees it


@dataclass
class CompactedLog:
    """One partition as Kafka cleans it (KIP-534); its last entry is in the active segment, which is never cleaned."""

    entries: list[Entry] = field(default_factory=list)
    end: int = 0

    def write(self, now: int, key: int, tombstone: bool) -> None:
        self.entries.append(Entry(self.end, now, key, tombstone))
        self.end += 1

    def clean(self, now: int) -> None:
        closed, active = self.entries[:-1], self.entries[-1:]
        newest = {entry.key: entry.offset for entry in closed}
        kept = [entry for entry in closed if newest[entry.key] == entry.offset]
        for entry in kept:
            if entry.tombstone and entry.horizon is None:
                entry.horizon = now + DAY
        self.entries = [entry for entry in kept if entry.horizon is None or now <= entry.horizon] + active


@dataclass
class Reader:
    """An updater of this one partition; what it has committed outlives it."""

    topic: CompactedLog
    committed: str | None = None
    position: int = 0
    since: int = 0
    live: set[int] = field(default_factory=set)
    warned: bool = False
    watch: TombstoneWatch | None = None

    def start(self, now: int) -> None:
        start = Start(None, now, now) if self.committed is None else read_start(self.position, self.committed)
        self.since = start.reading_since_ms
        self.watch = TombstoneWatch(start, DAY)

    def read(self, now: int, count: int) -> None:
        if self.watch is None:
            self.start(now)
        assert self.watch is not None
        for entry in [entry for entry in self.topic.entries if entry.offset >= self.position][:count]:
            self.warned |= self.watch.may_have_missed(entry.offset, entry.written_at, now)
            self.live = self.live - {entry.key} if entry.tombstone else self.live | {entry.key}
            self.position = entry.offset + 1
            self.committed = write_start(now, self.since)

    def stop(self) -> None:
        self.watch = None


_steps = st.lists(
    st.one_of(
        st.tuples(st.just("write"), st.integers(0, 3), st.booleans()),
        st.tuples(st.just("read"), st.integers(1, 4)),
        st.tuples(st.just("wait"), st.sampled_from([1, DAY // 3, DAY + 1, 3 * DAY])),
        st.sampled_from([("clean",), ("stop",)]),
    ),
    max_size=40,
)
# Nothing old is left to be read, just a gap where the tombstone stood.
_HARD = [
    ("write", 0, False), ("read", 1), ("write", 0, True), ("write", 1, False), ("clean",),
    ("wait", 3 * DAY), ("write", 1, False), ("clean",),
]  # fmt: skip


@given(st.tuples(st.sampled_from([[], _HARD]), _steps).map(lambda both: both[0] + both[1]))
def test_whoever_missed_a_deletion_was_warned(steps: list[tuple[object, ...]]) -> None:
    now, topic = NOW, CompactedLog()
    reader = Reader(topic)
    for step in steps:
        match step:
            case ("write", int(key), bool(tombstone)):
                topic.write(now, key, tombstone)
            case ("read", int(count)):
                reader.read(now, count)
            case ("wait", int(time)):
                now += time
            case ("clean",):
                topic.clean(now)
            case ("stop",):
                reader.stop()
    reader.read(now, 1000)
    final = {entry.key: not entry.tombstone for entry in topic.entries}
    missed = {key for key in reader.live if not final.get(key)}
    event(f"missed {bool(missed)}, warned {reader.warned}")
    assert not missed or reader.warned
