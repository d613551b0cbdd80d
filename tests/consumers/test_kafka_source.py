"""Against librdkafka's built-in cluster: real sockets, a real group."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import pytest
from confluent_kafka import Consumer, Producer, TopicPartition

from commands.embedded import EmbeddedKafka, free_port
from consumers.errors import OffsetOutOfRange, UpdaterError
from consumers.kafka_source import KafkaSource, inspect_topic
from consumers.protocols import Record
from notellm.settings import KafkaSettings

pytestmark = pytest.mark.integration

GROUP = "notellm.default.notes_0123456789abcdef.f1"


@dataclass
class Events:
    """What the owner of a source hears; ``positions`` is what it has to commit when it is asked."""

    positions: dict[int, int] = field(default_factory=dict)
    ours: set[int] = field(default_factory=set)
    at_assignment: Callable[[], None] | None = None

    def assigned(self, partitions: Iterable[int]) -> None:
        self.ours |= set(partitions)
        if self.at_assignment:
            self.at_assignment()

    def revoked(self, partitions: Iterable[int]) -> Mapping[int, int]:
        going = set(partitions)
        self.ours -= going
        return {partition: position for partition, position in self.positions.items() if partition in going}

    def lost(self, partitions: Iterable[int]) -> None:
        self.ours -= set(partitions)


@pytest.fixture
def kafka_settings(embedded_kafka: EmbeddedKafka) -> KafkaSettings:
    return KafkaSettings(bootstrap_servers=embedded_kafka.bootstrap_servers)


def publish(settings: KafkaSettings, count: int, partition: int = 0, **message: object) -> None:
    producer = Producer({"bootstrap.servers": settings.bootstrap_servers})
    for number in range(count):
        producer.produce("notes", **{"key": f"n{number}", "value": b"{}", "partition": partition, **message})
    assert producer.flush(10) == 0


def commit(settings: KafkaSettings, positions: Mapping[int, int]) -> None:
    consumer = Consumer({"bootstrap.servers": settings.bootstrap_servers, "group.id": GROUP})
    consumer.commit(offsets=[TopicPartition("notes", p, o) for p, o in positions.items()], asynchronous=False)
    consumer.close()


def committed(settings: KafkaSettings) -> dict[int, int]:
    consumer = Consumer({"bootstrap.servers": settings.bootstrap_servers, "group.id": GROUP})
    found = consumer.committed([TopicPartition("notes", partition) for partition in range(4)], timeout=10)
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


def test_a_second_member_takes_over_from_what_the_first_commits_at_revocation(kafka_settings: KafkaSettings) -> None:
    # The built-in cluster waits for its members until the session is nearly over.
    settings = kafka_settings.model_copy(
        update={"properties": {"session.timeout.ms": 4000, "heartbeat.interval.ms": 200}}
    )
    for partition in range(4):
        publish(settings, 4, partition)
    first, first_events = KafkaSource(settings, GROUP), Events()
    first.subscribe(first_events)
    read(first, 16)
    first_events.positions = dict.fromkeys(range(4), 3)
    second, second_events = KafkaSource(settings, GROUP), Events()
    second.subscribe(second_events)
    taken: list[Record] = []
    deadline = time.monotonic() + 20
    while len(taken) < 2:
        assert time.monotonic() < deadline, f"{first_events.ours} / {second_events.ours}: {taken}"
        first.poll(0.02)
        record = second.poll(0.02)
        taken += [record] if record is not None else []
    assert len(first_events.ours) == len(second_events.ours) == 2
    assert first_events.ours | second_events.ours == {0, 1, 2, 3}
    assert places(taken) == [(partition, 3) for partition in sorted(second_events.ours)]
    first.close()
    second.close()


def test_inspecting_a_topic_tells_its_partitions_and_no_epoch_where_there_is_none(
    kafka_settings: KafkaSettings,
) -> None:
    facts = inspect_topic(kafka_settings, "notes")
    assert (facts.partitions, facts.epoch) == (4, "")


def test_brokers_that_cannot_be_reached_are_named_by_their_setting(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL, "consumers.librdkafka")
    monkeypatch.setattr("consumers.kafka_source._BROKER_SECONDS", 0.5)
    settings = KafkaSettings(bootstrap_servers=f"127.0.0.1:{free_port()}")
    with pytest.raises(
        UpdaterError, match=rf"kafka.bootstrap_servers: '{settings.bootstrap_servers}' cannot be reached"
    ):
        inspect_topic(settings, "notes")
