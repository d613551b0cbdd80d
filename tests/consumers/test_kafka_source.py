"""A consumer group on librdkafka's built-in cluster, and what only a real Kafka does: eager and static members."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

import pytest
from confluent_kafka import Consumer, KafkaError, Producer, TopicPartition

from commands.embedded import EmbeddedKafka
from consumers.errors import OffsetOutOfRange, UpdaterError
from consumers.kafka_source import KafkaSource
from consumers.missed_tombstones import Start
from consumers.protocols import Record
from notellm.settings import KafkaSettings
from tests.support.kafka_server import KafkaServer

pytestmark = pytest.mark.integration

GROUP = "notellm.default.notes_0123456789abcdef.f1"


@pytest.fixture(autouse=True)
def close_what_a_failed_test_left_open(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An open consumer that is garbage-collected can wait for its rebalance for ever, and every later test with it."""
    opened: list[KafkaSource] = []
    begin, end = KafkaSource.__init__, KafkaSource.close

    def init(source: KafkaSource, *arguments: Any, **options: Any) -> None:
        begin(source, *arguments, **options)
        opened.append(source)

    def close(source: KafkaSource) -> None:
        opened.remove(source)
        end(source)

    monkeypatch.setattr(KafkaSource, "__init__", init)
    monkeypatch.setattr(KafkaSource, "close", close)
    yield
    while opened:
        opened[-1].close()


def group_of(settings: KafkaSettings) -> str:
    return GROUP.replace("notellm", settings.group_prefix, 1)


@dataclass
class Events:
    """What the owner of a source hears; ``positions`` is what it has to commit when it is asked."""

    positions: dict[int, int] = field(default_factory=dict)
    ours: set[int] = field(default_factory=set)
    starts: dict[int, int | None] = field(default_factory=dict)
    lost_ones: set[int] = field(default_factory=set)
    rebalances: int = 0
    at_assignment: Callable[[], None] | None = None

    def assigned(self, starts: Mapping[int, int | None]) -> None:
        self.rebalances += 1
        self.ours |= starts.keys()
        self.starts.update(starts)
        if self.at_assignment:
            self.at_assignment()

    def revoked(self, partitions: Iterable[int]) -> Mapping[int, int]:
        going = set(partitions)
        self.rebalances += 1
        self.ours -= going
        return {partition: position for partition, position in self.positions.items() if partition in going}

    def lost(self, partitions: Iterable[int]) -> None:
        self.lost_ones |= set(partitions)
        self.ours -= set(partitions)


class Spy:
    """A consumer, and what was committed with it."""

    def __init__(self, consumer: Consumer) -> None:
        self._consumer = consumer
        self.commits: list[list[tuple[int, int]]] = []

    def commit(self, *, offsets: list[TopicPartition], asynchronous: bool) -> object:
        self.commits.append([(offset.partition, offset.offset) for offset in offsets])
        return self._consumer.commit(offsets=offsets, asynchronous=asynchronous)

    def __getattr__(self, name: str) -> object:
        return getattr(self._consumer, name)


@pytest.fixture
def kafka_settings(embedded_kafka: EmbeddedKafka) -> KafkaSettings:
    return KafkaSettings(bootstrap_servers=embedded_kafka.bootstrap_servers)


def publish(settings: KafkaSettings, count: int, partition: int = 0, **message: object) -> None:
    producer = Producer({"bootstrap.servers": settings.bootstrap_servers})
    for number in range(count):
        producer.produce(
            settings.notes_topic, **{"key": f"n{number}", "value": b"{}", "partition": partition, **message}
        )
    assert producer.flush(10) == 0


def commit(settings: KafkaSettings, positions: Mapping[int, int]) -> None:
    consumer = Consumer({"bootstrap.servers": settings.bootstrap_servers, "group.id": group_of(settings)})
    consumer.commit(
        offsets=[TopicPartition(settings.notes_topic, p, o) for p, o in positions.items()], asynchronous=False
    )
    consumer.close()


def committed(settings: KafkaSettings) -> dict[int, int]:
    consumer = Consumer({"bootstrap.servers": settings.bootstrap_servers, "group.id": group_of(settings)})
    found = consumer.committed([TopicPartition(settings.notes_topic, partition) for partition in range(4)], timeout=10)
    consumer.close()
    return {partition.partition: partition.offset for partition in found if partition.offset >= 0}


def read(source: KafkaSource, count: int, seconds: float = 20.0) -> list[Record]:
    deadline = time.monotonic() + seconds
    records: list[Record] = []
    while len(records) < count:
        assert time.monotonic() < deadline, f"only {len(records)} of {count} records came"
        record = source.poll(0.05)
        if record is not None:
            records.append(record)
    return records


def places(records: Iterable[Record]) -> list[tuple[int, int]]:
    return sorted((record.partition, record.offset) for record in records)


def test_without_a_commit_a_partition_is_read_from_its_beginning_with_one_from_there(
    kafka_settings: KafkaSettings,
) -> None:
    for partition in (0, 1, 3):
        publish(kafka_settings, 3, partition)
    commit(kafka_settings, {1: 2, 3: 3})
    publish(kafka_settings, 1, partition=3)
    source, events = KafkaSource(kafka_settings, GROUP), Events()
    source.subscribe(events)
    assert places(read(source, 5)) == [(0, 0), (0, 1), (0, 2), (1, 2), (3, 3)]
    assert events.ours == {0, 1, 2, 3}
    assert events.starts == {0: None, 1: 2, 2: None, 3: 3}
    source.close()


def test_a_record_comes_as_it_was_written_and_tombstones_are_not_skipped(kafka_settings: KafkaSettings) -> None:
    publish(
        kafka_settings, 1, key=b"n\xff", value=None, headers=[("trace", b"\x00\xff"), ("trace", None)], timestamp=17
    )
    publish(kafka_settings, 1, key=None, value=b"")
    source = KafkaSource(kafka_settings, GROUP)
    source.subscribe(Events())
    tombstone, empty = read(source, 2)
    assert tombstone == Record("notes", 0, 0, 17, b"n\xff", None, (("trace", b"\x00\xff"), ("trace", None)))
    assert (empty.key, empty.value, empty.headers) == (None, b"", ())
    source.close()


def test_only_what_it_is_told_is_committed(kafka_settings: KafkaSettings) -> None:
    publish(kafka_settings, 5)
    publish(kafka_settings, 5, partition=1)
    source, events = KafkaSource(kafka_settings, GROUP), Events()
    source.subscribe(events)
    read(source, 10)
    source.commit({0: 2})
    events.positions = {1: 4}
    source.close()
    assert events.ours == set()
    assert committed(kafka_settings) == {0: 2, 1: 4}


def test_while_paused_nothing_comes_and_after_it_nothing_is_missing(kafka_settings: KafkaSettings) -> None:
    publish(kafka_settings, 20)
    source = KafkaSource(kafka_settings, GROUP)
    source.subscribe(Events())
    before = read(source, 5)
    source.pause()
    publish(kafka_settings, 5, partition=1)
    assert [source.poll(0.05) for _ in range(10)] == [None] * 10
    source.resume()
    assert places([*before, *read(source, 20)]) == [(0, o) for o in range(20)] + [(1, o) for o in range(5)]
    source.close()


def test_a_partition_that_is_paused_as_it_arrives_is_read_from_its_beginning(kafka_settings: KafkaSettings) -> None:
    publish(kafka_settings, 3)
    source = KafkaSource(kafka_settings, GROUP)
    events = Events(at_assignment=source.pause)
    source.subscribe(events)
    deadline = time.monotonic() + 20
    while not events.ours:
        assert time.monotonic() < deadline
        assert source.poll(0.05) is None
    assert [source.poll(0.05) for _ in range(5)] == [None] * 5
    source.resume()
    assert places(read(source, 3)) == [(0, 0), (0, 1), (0, 2)]
    source.close()


def test_a_committed_offset_that_is_not_in_the_topic_is_an_error(kafka_settings: KafkaSettings) -> None:
    publish(kafka_settings, 3)
    commit(kafka_settings, {0: 1000})
    source = KafkaSource(kafka_settings, GROUP)
    source.subscribe(Events())
    with pytest.raises(OffsetOutOfRange, match=r"notes\[0\].*no longer in the topic"):
        read(source, 1)
    source.close()
    assert committed(kafka_settings) == {0: 1000}


def test_a_second_member_takes_over_and_skips_nothing(kafka_settings: KafkaSettings) -> None:
    # The built-in cluster waits for its members until the session is nearly over, and refuses most commits of a
    # revocation ("rebalance in progress"): the second then reads again what the first had read. A real one takes them.
    settings = kafka_settings.model_copy(
        update={"properties": {"session.timeout.ms": 4000, "heartbeat.interval.ms": 200}}
    )
    for partition in range(4):
        publish(settings, 4, partition)
    first, first_events = joined(settings)
    read(first, 16)
    first_events.positions = dict.fromkeys(range(4), 3)
    second, second_events = joined(settings)
    taken: dict[int, int] = {}

    def shared() -> bool:
        record = second.poll(0.02)
        if record is not None:
            taken.setdefault(record.partition, record.offset)
        return len(first_events.ours) == len(second_events.ours) == len(taken) == 2

    wait_for(shared, first)
    assert first_events.ours | second_events.ours == {0, 1, 2, 3}
    assert taken.keys() == second_events.ours
    assert taken == {partition: second_events.starts[partition] or 0 for partition in taken}
    assert set(taken.values()) <= {0, 3}
    first.close()
    second.close()


def test_a_commit_of_another_program_says_nothing(kafka_settings: KafkaSettings) -> None:
    publish(kafka_settings, 3)
    commit(kafka_settings, {0: 2})
    source = KafkaSource(kafka_settings, GROUP)
    source.subscribe(Events())
    read(source, 1)
    assert source._starts[0] == Start(2, 0, 0)
    source.close()


def test_a_commit_that_the_group_refused_is_sent_again_and_never_goes_back(
    kafka_settings: KafkaSettings, caplog: pytest.LogCaptureFixture
) -> None:
    publish(kafka_settings, 5)
    source = KafkaSource(kafka_settings, GROUP)
    source.subscribe(Events())
    read(source, 5)
    source.commit({0: 3})
    wait_for(lambda: committed(kafka_settings) == {0: 3}, source)
    source.commit({0: 4})
    wait_for(lambda: committed(kafka_settings) == {0: 4}, source)
    spy = Spy(source._consumer)
    source._consumer = spy
    # As if the broker had answered that to the first of the two.
    refused, not_ours = TopicPartition("notes", 0, 3), TopicPartition("notes", 9, 3)
    source._on_commit(KafkaError(KafkaError.ILLEGAL_GENERATION), [refused, not_ours])
    assert "commit of partitions [0, 9] failed" in caplog.text
    wait_for(lambda: spy.commits == [[(0, 4)]], source)
    source.commit({0: 5})
    assert spy.commits == [[(0, 4)], [(0, 5)]], "the refused one is settled"
    wait_for(lambda: committed(kafka_settings) == {0: 5}, source)
    source.close()


def test_a_group_that_commits_nothing_yet_is_no_failure(kafka_settings: KafkaSettings) -> None:
    source = KafkaSource(kafka_settings, GROUP)
    source.subscribe(Events())
    source.commit({})
    source._on_commit(KafkaError(KafkaError._NO_OFFSET), [])
    source.close()


def test_high_watermarks_are_known_of_what_was_fetched_and_while_paused(kafka_settings: KafkaSettings) -> None:
    source = KafkaSource(kafka_settings, GROUP)
    assert source.high_watermarks() == {}
    publish(kafka_settings, 3, partition=1)
    source.subscribe(Events())
    read(source, 3)
    assert source.high_watermarks()[1] == 3
    source.pause()
    publish(kafka_settings, 40, partition=1)
    publish(kafka_settings, 2, partition=2)
    wait_for(lambda: source.high_watermarks() == {0: 0, 1: 43, 2: 2, 3: 0}, source)
    began = time.monotonic()
    for _ in range(100):
        source.high_watermarks()
    assert time.monotonic() - began < 0.5, "it waits for the brokers"
    source.resume()
    read(source, 42)
    assert source.high_watermarks() == {0: 0, 1: 43, 2: 2, 3: 0}
    source.close()


# What the built-in cluster does not do: every assignor, members that come back, commits in a rebalance.


@pytest.fixture
def real_settings(kafka_server: KafkaServer) -> KafkaSettings:
    topic = f"notes-{uuid4().hex[:8]}"
    kafka_server.create_topic(topic, 4, {"cleanup.policy": "compact"})
    return KafkaSettings(
        bootstrap_servers=kafka_server.bootstrap_servers,
        notes_topic=topic,
        group_prefix=topic,
        properties={"session.timeout.ms": 6000, "heartbeat.interval.ms": 300},
    )


def joined(settings: KafkaSettings, **changes: object) -> tuple[KafkaSource, Events]:
    events = Events()
    own = settings.model_copy(update=changes)
    source = KafkaSource(own, group_of(settings))
    source.subscribe(events)
    return source, events


def test_a_commit_says_when_it_was_made_and_since_when_the_group_reads(real_settings: KafkaSettings) -> None:
    publish(real_settings, 3)
    began = int(time.time() * 1000)
    first = KafkaSource(real_settings, group_of(real_settings))
    first.subscribe(Events())
    read(first, 3)
    since = first._starts[0].reading_since_ms
    assert first._starts[0] == Start(None, since, since)
    time.sleep(0.05)
    first.commit({0: 2})
    first.close()
    second = KafkaSource(real_settings, group_of(real_settings))
    second.subscribe(Events())
    read(second, 1)
    start = second._starts[0]
    assert (start.offset, start.reading_since_ms) == (2, since)
    assert began <= since < since + 50 <= start.committed_at_ms <= time.time() * 1000
    assert second._starts[1].offset is None
    second.close()
    assert second._starts == {}


def test_it_says_so_once_when_deletions_may_have_been_missed(
    real_settings: KafkaSettings, caplog: pytest.LogCaptureFixture
) -> None:
    publish(real_settings, 3, timestamp=int(time.time() * 1000) - 60_000)
    publish(real_settings, 1, partition=1)
    commit(real_settings, {0: 1, 1: 0})
    for retention_ms, warnings in ((60_000 - 1000, 1), (300_000, 0), (None, 0)):
        source = KafkaSource(real_settings, group_of(real_settings), delete_retention_ms=retention_ms)
        source.subscribe(Events())
        caplog.clear()
        assert places(read(source, 3)) == [(0, 1), (0, 2), (1, 0)]
        said = [line for line in caplog.messages if "compare the topic's keys" in line]
        assert [line.split(":")[0] for line in said] == [f"{real_settings.notes_topic}[0]"] * warnings
        source.close()


@pytest.mark.parametrize("assignor", ["range", "roundrobin", "cooperative-sticky"])
def test_with_every_assignor_a_second_member_begins_where_the_first_committed(
    real_settings: KafkaSettings, assignor: str, caplog: pytest.LogCaptureFixture
) -> None:
    for partition in range(4):
        publish(real_settings, 4, partition)
    first, first_events = joined(real_settings, assignor=assignor)
    read(first, 16)
    first_events.positions = dict.fromkeys(range(4), 3)
    second, second_events = joined(real_settings, assignor=assignor)
    taken: list[Record] = []

    def shared() -> bool:
        taken.extend(record for record in [second.poll(0.02)] if record is not None)
        return len(first_events.ours) == len(second_events.ours) == 2 and len(taken) == 2

    wait_for(shared, first)
    assert first_events.ours | second_events.ours == {0, 1, 2, 3}
    assert places(taken) == [(partition, 3) for partition in sorted(second_events.ours)]
    assert {second_events.starts[partition] for partition in second_events.ours} == {3}
    assert committed(real_settings).items() >= dict.fromkeys(second_events.ours, 3).items()
    assert "failed" not in caplog.text, "a real broker takes commits in a revocation"
    first.close()
    wait_for(lambda: second_events.ours == {0, 1, 2, 3}, second)
    assert {second_events.starts[partition] for partition in range(4)} == {3}
    second.close()


def test_another_assignor_than_the_groups_is_one_line(real_settings: KafkaSettings) -> None:
    first, first_events = joined(real_settings)
    wait_for(lambda: len(first_events.ours) == 4, first)
    second, _ = joined(real_settings, assignor="range")
    with pytest.raises(UpdaterError, match=r"^kafka.assignor: 'range' is not how the running updaters") as error:
        wait_for(lambda: False, second)
    assert group_of(real_settings) in str(error.value)
    second.close()
    assert len(first_events.ours) == 4
    first.close()


@pytest.mark.parametrize("assignor", ["range", "cooperative-sticky"])
def test_a_static_member_comes_back_to_its_partitions_and_nobody_else_notices(
    real_settings: KafkaSettings, assignor: str
) -> None:
    for partition in range(4):
        publish(real_settings, 4, partition)
    # A session that a busy machine cannot outlast between the member's end and its return.
    real_settings.properties["session.timeout.ms"] = 40_000
    first, first_events = joined(real_settings, assignor=assignor, group_instance_id="u1")
    second, second_events = joined(real_settings, assignor=assignor, group_instance_id="u2")
    wait_for(lambda: len(first_events.ours) == len(second_events.ours) == 2, first, second)
    theirs, rebalances = set(first_events.ours), second_events.rebalances
    first_events.positions = dict.fromkeys(theirs, 2)
    first.close()
    assert committed(real_settings) == dict.fromkeys(theirs, 2)
    again, again_events = joined(real_settings, assignor=assignor, group_instance_id="u1")
    wait_for(lambda: len(again_events.ours) == 2, again, second)
    assert again_events.ours == theirs
    assert again_events.starts == dict.fromkeys(theirs, 2)
    assert second_events.rebalances == rebalances
    again.close()
    second.close()


def test_two_members_of_one_name_are_one_line_and_the_first_lets_go(real_settings: KafkaSettings) -> None:
    first, first_events = joined(real_settings, group_instance_id="u1")
    wait_for(lambda: len(first_events.ours) == 4, first)
    second, second_events = joined(real_settings, group_instance_id="u1")
    with pytest.raises(UpdaterError, match=r"^kafka.group_instance_id: 'u1' is taken by another updater of group"):
        wait_for(lambda: False, first, second)
    assert first_events.lost_ones == {0, 1, 2, 3}, "it would go on writing"
    assert first_events.ours == set()
    first.close()
    wait_for(lambda: len(second_events.ours) == 4, second)
    second.close()


@pytest.mark.parametrize("assignor", ["range", "cooperative-sticky"])
def test_who_was_thrown_out_reads_again_what_it_could_not_commit(
    real_settings: KafkaSettings, assignor: str, caplog: pytest.LogCaptureFixture
) -> None:
    publish(real_settings, 4)
    properties = {**real_settings.properties, "max.poll.interval.ms": 6000}
    source, events = joined(real_settings, assignor=assignor, properties=properties)
    read(source, 4)
    source.commit({0: 1})
    wait_for(lambda: committed(real_settings) == {0: 1}, source)
    time.sleep(7)  # librdkafka's shortest poll interval is its shortest session
    source.commit({0: 4})
    assert places(read(source, 3)) == [(0, 1), (0, 2), (0, 3)]
    assert events.lost_ones == {0, 1, 2, 3}
    assert events.ours == {0, 1, 2, 3}
    assert "commit of partitions [0] failed" in caplog.text
    assert committed(real_settings) == {0: 1}
    source.commit({0: 4})
    wait_for(lambda: committed(real_settings) == {0: 4}, source)
    source.close()


def wait_for(condition: Callable[[], bool], *sources: KafkaSource, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it does not come"
        for source in sources:
            source.poll(0.02)


def test_brokers_that_cannot_be_reached_are_an_outage_said_now_and_then(caplog: pytest.LogCaptureFixture) -> None:
    source = KafkaSource(KafkaSettings(bootstrap_servers="127.0.0.1:1"), "group")
    source.subscribe(Events())
    assert source.outage() == ""
    deadline = time.monotonic() + 10
    while not source.outage() and time.monotonic() < deadline:
        source.poll(0.1)
    assert "brokers are down" in source.outage()
    for _ in range(20):
        source.poll(0.05)
    assert len([record for record in caplog.records if record.message.startswith("Kafka: ")]) == 1
    source.close()


def test_brokers_that_are_back_end_the_outage(embedded_kafka: EmbeddedKafka) -> None:
    source = KafkaSource(KafkaSettings(bootstrap_servers=embedded_kafka.bootstrap_servers), "group")
    source.subscribe(Events())
    source._on_error(KafkaError(KafkaError._ALL_BROKERS_DOWN))
    assert source.outage() != ""
    deadline = time.monotonic() + 15
    while source.outage() and time.monotonic() < deadline:
        source.poll(0.1)
    assert source.outage() == ""
    source.close()
