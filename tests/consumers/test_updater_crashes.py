"""The promise, searched for a counterexample: whatever crashes when, each key ends as its last valid version."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import hypothesis.strategies as st
from hypothesis import given, settings

from consumers.in_memory import HashEncoder, MemoryDeadLetters, MemorySink, MemorySource, MemoryTopic
from consumers.protocols import Record, Row
from notellm.encoder import EncodedBatch
from notellm.errors import NoteRefused
from notellm.prompt import Prompt
from tests.consumers.running_updater import RunningUpdater, committed_to_the_end, note, wait_until

KEYS = [f"key{number}" for number in range(4)]
REFUSED_BY_MODEL = "the model will not"
REFUSED_BY_MILVUS = "Milvus will not"
TITLES = ["one", "two", "three", REFUSED_BY_MODEL, REFUSED_BY_MILVUS]


class Crash(Exception):
    pass


@dataclass(frozen=True)
class Publication:
    key: str
    title: str | None  # None: a tombstone
    broken: bool = False
    gap: int = 0

    @property
    def value(self) -> bytes | None:
        if self.broken:
            return b'{"note_id":"other"}'
        return None if self.title is None else note(self.key, self.title)

    @property
    def valid(self) -> bool:
        return not self.broken and self.title not in (REFUSED_BY_MODEL, REFUSED_BY_MILVUS)


@dataclass(frozen=True)
class Life:
    """What is published before an updater starts, and where it crashes: at the ``after``-th call of ``at``."""

    publications: list[Publication]
    at: str
    after: int


publications = st.builds(
    Publication,
    key=st.sampled_from(KEYS),
    title=st.one_of(st.none(), st.sampled_from(TITLES)),
    broken=st.integers(0, 5).map(lambda drawn: drawn == 0),
    gap=st.integers(0, 2),
)
lives = st.builds(
    Life,
    publications=st.lists(publications, min_size=1, max_size=25),
    at=st.sampled_from(["poll", "before upsert", "after upsert", "before delete", "after delete", "stored", "stop"]),
    after=st.integers(1, 12),
)


@dataclass
class World:
    """What outlives an updater, with a judge who sees every acknowledgement and every commit."""

    topic: MemoryTopic = field(default_factory=lambda: MemoryTopic(partitions=2))
    sink: MemorySink = field(default_factory=lambda: MemorySink(refused_titles={REFUSED_BY_MILVUS}))
    acknowledged: dict[str, int] = field(default_factory=dict)  # of each key, the highest offset that Milvus has
    read: dict[str, int] = field(default_factory=dict)  # of each key, the highest tombstone's offset that was read
    dead: set[tuple[int, int]] = field(default_factory=set)
    faults: list[str] = field(default_factory=list)

    def acknowledge(self, key: str, offset: int) -> None:
        self.acknowledged[key] = max(offset, self.acknowledged.get(key, -1))

    def judge_commit(self, positions: Mapping[int, int]) -> None:
        for partition, position in positions.items():
            if position < self.topic.committed.get(partition, 0):
                self.faults.append(f"partition {partition} went back to {position}")
            for record in self.topic.logs.get(partition, []):
                if record.offset < position and not self._is_safe(record):
                    self.faults.append(f"{position} was committed of partition {partition}, {record} is not safe")

    def _is_safe(self, record: Record) -> bool:
        key = (record.key or b"").decode()
        return (record.partition, record.offset) in self.dead or self.acknowledged.get(key, -1) >= record.offset


class Fuse:
    """Burns down with each call of one kind; then every call of that kind crashes."""

    def __init__(self, life: Life | None) -> None:
        self._at = life.at if life else ""
        self._left = life.after if life else 0

    def burn(self, at: str) -> None:
        if at == self._at:
            self._left -= 1
            if self._left <= 0:
                raise Crash(at)


class CrashingSource(MemorySource):
    """After a crash the process is gone: nobody closes it, nothing more is committed."""

    def __init__(self, world: World, fuse: Fuse, crashed: Callable[[], bool]) -> None:
        super().__init__(world.topic)
        self._world, self._fuse, self._crashed = world, fuse, crashed

    def poll(self, timeout_s: float) -> Record | None:
        record = super().poll(timeout_s)
        if record is not None:
            self._fuse.burn("poll")
            if record.value is None and record.key is not None:
                self._world.read[record.key.decode()] = record.offset
        return record

    def commit(self, positions: Mapping[int, int]) -> None:
        self._world.judge_commit(positions)
        super().commit(positions)

    def revoke(self, partitions: Sequence[int]) -> None:
        assert self._events is not None
        positions = self._events.revoked(partitions)
        self._world.judge_commit(positions)
        self._topic.committed.update(positions)
        for partition in partitions:
            self._next.pop(partition, None)

    def close(self) -> None:
        if not self._crashed():
            super().close()


@dataclass
class CrashingSink(MemorySink):
    """A connection to the world's sink. An answer that crashes on its way back has been written all the same."""

    world: World = field(default_factory=World)
    fuse: Fuse = field(default_factory=lambda: Fuse(None))

    def stored(self, note_ids: Sequence[str]):  # type: ignore[no-untyped-def]
        self.fuse.burn("stored")
        return self.world.sink.stored(note_ids)

    def upsert(self, rows: Sequence[Row]) -> None:
        time.sleep(0.003)  # long enough for the poller to commit what should not be safe yet
        self.fuse.burn("before upsert")
        self.world.sink.upsert(rows)
        for row in rows:
            if row.text_hash:
                self.world.acknowledge(row.note_id, row.source_offset)
        self.fuse.burn("after upsert")

    def delete(self, note_ids: Sequence[str]) -> None:
        self.fuse.burn("before delete")
        self.world.sink.delete(note_ids)
        for note_id in note_ids:
            self.world.acknowledge(note_id, self.world.read[note_id])
        self.fuse.burn("after delete")


@dataclass
class WorldsDeadLetters(MemoryDeadLetters):
    world: World = field(default_factory=World)

    def poll(self) -> None:
        arrived = {(record.partition, record.offset) for record, _ in self.sent}
        self.world.dead |= arrived
        super().poll()


class RefusingEncoder(HashEncoder):
    def stream(self, prompts: Sequence[Prompt]) -> Iterator[EncodedBatch]:
        for index, prompt in enumerate(prompts):
            if REFUSED_BY_MODEL in prompt.text:
                yield from super().stream(prompts[:index])
                raise NoteRefused(index, "the model would not")
        yield from super().stream(prompts)


def live(world: World, life: Life | None, **updater_settings: object) -> None:
    """One updater, from its start to its crash, or until all is quiet."""
    fuse = Fuse(life)
    running: RunningUpdater
    running = RunningUpdater(
        world.topic,
        # Whoever dies closes nothing; only who is asked to stop does.
        source=CrashingSource(world, fuse, lambda: life is not None and life.at != "stop"),
        sink=CrashingSink(world=world, fuse=fuse),
        encoder=RefusingEncoder(),
        dead_letters=WorldsDeadLetters(world=world),
        **updater_settings,
    )
    running.start()
    if life is not None and life.at == "stop":
        wait_until(lambda: bool(world.acknowledged or world.dead), "the first record to be safe")
    else:
        wait_until(lambda: running.ended or committed_to_the_end(world.topic), "quiet, or a crash")
    running.stop()
    if running.error is not None and not isinstance(running.error, Crash):
        raise running.error


@settings(deadline=None, max_examples=30)
@given(st.lists(lives, min_size=1, max_size=3), st.integers(1, 8), st.integers(1, 20), st.booleans())
def test_after_any_crashes_the_sink_holds_the_last_valid_versions_and_the_dead_letters_are_the_poison(
    lived: list[Life], batch_notes: int, queue_notes: int, vectors_first: bool
) -> None:
    world = World()
    published: list[tuple[Publication, Record]] = []
    updater_settings = {
        "commit_interval_s": 1e-4,
        "batch_notes": batch_notes,
        "queue_notes": queue_notes,
        "vectors_first": vectors_first,
    }
    for life in lived:
        for publication in life.publications:
            record = world.topic.publish(publication.key.encode(), publication.value, gap=publication.gap)
            published.append((publication, record))
        live(world, life, **updater_settings)
    live(world, None, **updater_settings)

    last_valid = {
        publication.key: (publication.title, record) for publication, record in published if publication.valid
    }
    valid_until = {key: record.offset for key, (_, record) in last_valid.items()}
    expected = {key: (title, record.offset) for key, (title, record) in last_valid.items() if title is not None}
    assert {key: (row.title, row.source_offset) for key, row in world.sink.rows.items()} == expected
    assert all(row.text_hash for row in world.sink.rows.values())
    # A version that only the model or Milvus would have refused may have given way, in its batch, to a valid one.
    poison = {(r.partition, r.offset) for p, r in published if not p.valid}
    given_way = {
        (r.partition, r.offset) for p, r in published if not p.broken and r.offset < valid_until.get(p.key, -1)
    }
    assert poison - given_way <= world.dead <= poison
    assert world.faults == []
