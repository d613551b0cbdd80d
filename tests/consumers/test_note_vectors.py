"""Against librdkafka's built-in cluster, against a client that fails at random, and against a real Kafka."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from threading import Thread
from typing import Any
from uuid import uuid4

import numpy as np
import pytest
from confluent_kafka import Consumer, KafkaError, KafkaException, Message, TopicPartition
from hypothesis import given
from hypothesis import strategies as st

from commands.embedded import EmbeddedKafka
from consumers.errors import UpdaterError
from consumers.in_memory import MemoryNoteVectors
from consumers.kafka_topics import ensure_vectors_topic
from consumers.note_vectors import KafkaNoteVectors, note_vector
from consumers.partitioner import murmur2_partition
from consumers.protocols import Row
from notellm.messages import NoteVector, Tombstone, parse_note_vector
from notellm.settings import KafkaSettings
from tests.support.kafka_server import KafkaServer

MODEL = "0123456789abcdef"


def row(note_id: str, version: int, *, dim: int = 8, seed: int = 0) -> Row:
    """``version`` stands in the text_hash."""
    vector = np.random.default_rng(seed).standard_normal(dim).astype(np.float32)
    return Row(
        note_id=note_id,
        embedding=vector / np.linalg.norm(vector),
        title="Tea",
        hashtags=["green"],
        category="food",
        generated_hashtags=["tea", "Kyoto 京都"],
        generated_category="travel",
        published_at=1,
        model_version=MODEL,
        text_hash=f"{version:064x}",
        source_epoch="e",
        source_partition=0,
        source_offset=version,
    )


def version_of(vector: NoteVector | Tombstone) -> int | None:
    return int(vector.text_hash, 16) if isinstance(vector, NoteVector) else None


def deliver(vectors: KafkaNoteVectors, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while vectors.undelivered:
        assert time.monotonic() < deadline, f"{vectors.undelivered} are not delivered"
        vectors.poll()
        time.sleep(0.002)


def read_all(settings: KafkaSettings, topic: str, partitions: int) -> list[tuple[str, int, int | None]]:
    """(note_id, partition, version), as they stand in each partition; None is a tombstone."""
    consumer = Consumer(
        {"bootstrap.servers": settings.bootstrap_servers, "group.id": "test", "enable.partition.eof": True}
    )
    consumer.assign([TopicPartition(topic, partition, 0) for partition in range(partitions)])
    found: list[tuple[str, int, int | None]] = []
    ends, deadline = 0, time.monotonic() + 30
    while ends < partitions:
        assert time.monotonic() < deadline
        message: Message | None = consumer.poll(0.1)
        if message is None:
            continue
        if message.error() is not None:
            assert message.error().code() == KafkaError._PARTITION_EOF
            ends += 1
            continue
        vector = parse_note_vector(message.key(), message.value())
        found.append((message.key().decode(), message.partition(), version_of(vector)))
    consumer.close()
    return found


def versions(found: list[tuple[str, int, int | None]]) -> dict[str, list[int | None]]:
    kept: dict[str, list[int | None]] = {}
    for note_id, _, version in found:
        kept.setdefault(note_id, []).append(version)
    return kept


def test_a_message_holds_the_rows_own_numbers_in_the_shortest_digits() -> None:
    sent = row("n1", 5, dim=512, seed=3)
    vector = note_vector(sent)
    assert np.array_equal(np.array(vector.embedding, np.float32), sent.embedding)
    assert max(len(repr(number)) for number in vector.embedding) <= 16
    assert (vector.note_id, vector.model_version, vector.text_hash) == ("n1", MODEL, f"{5:064x}")
    assert (vector.generated_hashtags, vector.generated_category) == (["tea", "Kyoto 京都"], "travel")


@pytest.mark.integration
class TestBuiltInCluster:
    @pytest.fixture
    def settings(self, embedded_kafka: EmbeddedKafka) -> KafkaSettings:
        return KafkaSettings(bootstrap_servers=embedded_kafka.bootstrap_servers, vectors_topic_prefix="note-vectors")

    @pytest.fixture
    def topic(self, settings: KafkaSettings) -> str:
        return ensure_vectors_topic(settings, MODEL, 4).name

    def test_vectors_and_tombstones_stand_where_javas_partitioner_puts_them(
        self, settings: KafkaSettings, topic: str
    ) -> None:
        vectors, delivered = KafkaNoteVectors(settings, MODEL), []
        for number in range(20):
            vectors.send(row(f"n{number}", number), lambda number=number: delivered.append(number))
        vectors.delete("笔记", lambda: delivered.append(-1))
        assert delivered == [], "it is safe before it was polled for"
        deliver(vectors)
        assert sorted(delivered) == list(range(-1, 20))
        found = read_all(settings, topic, 4)
        assert versions(found) == {**{f"n{number}": [number] for number in range(20)}, "笔记": [None]}
        assert all(partition == murmur2_partition(note_id.encode(), 4) for note_id, partition, _ in found)
        vectors.close(5)

    def test_a_full_queue_of_the_client_keeps_the_order_of_each_note(self, settings: KafkaSettings, topic: str) -> None:
        small = settings.model_copy(update={"properties": {"queue.buffering.max.messages": 3}})
        vectors = KafkaNoteVectors(small, MODEL)
        sent: dict[str, list[int | None]] = {}
        numbers = count()

        def write() -> None:
            for number in range(300):
                note_id = f"n{number * 7 % 11}"
                version = None if number % 5 == 4 else next(numbers)
                sent.setdefault(note_id, []).append(version)
                if version is None:
                    vectors.delete(note_id, lambda: None)
                else:
                    vectors.send(row(note_id, version), lambda: None)

        writer = Thread(target=write)
        writer.start()
        while writer.is_alive():
            vectors.poll()
        deliver(vectors)
        assert versions(read_all(settings, topic, 4)) == sent
        vectors.close(5)

    def test_one_that_is_too_large_names_the_limit(self, settings: KafkaSettings, topic: str) -> None:
        vectors = KafkaNoteVectors(
            settings.model_copy(update={"properties": {"message.max.bytes": 2000}}), MODEL, max_message_bytes=2000
        )
        vectors.send(row("n1", 1, dim=400), lambda: None)
        with pytest.raises(UpdaterError, match=rf"topic '{topic}' refuses the vector of note 'n1'.*max.message.bytes"):
            vectors.poll()
        with pytest.raises(UpdaterError, match=r"max.message.bytes"):
            vectors.send(row("n2", 1), lambda: None)
        vectors.close(0)

    def test_close_delivers_what_is_left(self, settings: KafkaSettings, topic: str) -> None:
        vectors, delivered = KafkaNoteVectors(settings, MODEL), []
        for version in range(10):
            vectors.send(row("n1", version), lambda: delivered.append(1))
        vectors.close(10)
        assert len(delivered) == 10
        assert versions(read_all(settings, topic, 4)) == {"n1": list(range(10))}


# A client that does what librdkafka may do, in any order.


@dataclass
class Handed:
    key: str
    value: bytes | None
    on_delivery: Callable[[KafkaError | None, Any], None]


@dataclass
class WildClient:
    """Holds few records, delivers them in any order across notes, fails some; a failed one may be in the topic."""

    draw: Callable[[st.SearchStrategy[Any]], Any]
    held: list[Handed] = field(default_factory=list)
    topic: list[tuple[str, int | None]] = field(default_factory=list)
    calm: bool = False

    def produce(self, topic: str, *, key: bytes, value: bytes | None, on_delivery: Any) -> None:
        del topic
        if len(self.held) >= 2:
            raise BufferError
        if not self.calm and self.draw(st.integers(0, 5)) == 0:
            raise KafkaException(KafkaError(KafkaError.TOPIC_AUTHORIZATION_FAILED))
        self.held.append(Handed(key.decode(), value, on_delivery))

    def poll(self, timeout: float) -> None:
        del timeout
        while self.held and (self.calm or self.draw(st.booleans())):
            handed = self.held.pop(0 if self.calm else self.draw(st.integers(0, len(self.held) - 1)))
            outcome = "good" if self.calm else self.draw(st.sampled_from(["good", "good", "failed", "failed, there"]))
            if outcome != "failed":
                self.topic.append((handed.key, version_of(parse_note_vector(handed.key.encode(), handed.value))))
            handed.on_delivery(None if outcome == "good" else KafkaError(KafkaError.UNKNOWN_TOPIC_OR_PART), None)

    def purge(self, **flags: bool) -> None:
        del flags
        for handed in [self.held.pop(0) for _ in range(len(self.held))]:
            handed.on_delivery(KafkaError(KafkaError._PURGE_QUEUE), None)


_sends = st.tuples(st.just("send"), st.integers(0, 2), st.booleans(), st.integers(0, 1))
_steps = st.lists(st.one_of(_sends, _sends, st.just(("poll",)), st.just(("over",))), max_size=40)


@given(st.data(), _steps)
def test_whatever_the_client_does_no_record_is_lost_or_overtaken(data: st.DataObject, steps: list[Any]) -> None:
    """Leases 0 and 1; ``over`` ends lease 0."""
    with pytest.MonkeyPatch.context() as patch:
        client = WildClient(data.draw)
        patch.setattr("consumers.note_vectors.make_client", lambda *_: client)
        vectors = KafkaNoteVectors(KafkaSettings(vectors_topic_prefix="v"), MODEL)
    numbers, over = count(), [False, False]
    sent: list[tuple[str, int | None, int, list[int]]] = []
    ended_at = 0
    for step in steps:
        if step[0] == "send":
            _, key, tombstone, lease = step
            # A note belongs to one partition, so to one lease.
            note_id, version = f"n{lease}.{key}", None if tombstone else next(numbers)
            confirmed: list[int] = []
            sent.append((note_id, version, lease, confirmed))
            arguments = (lambda confirmed=confirmed: confirmed.append(1), lambda lease=lease: not over[lease])
            if version is None:
                vectors.delete(note_id, *arguments)
            else:
                vectors.send(row(note_id, version), *arguments)
        elif step[0] == "over" and not over[0]:
            over[0] = True
            vectors.purge()
            ended_at = len(client.topic)
        else:
            vectors.poll()
    client.calm = True
    while vectors.undelivered:
        vectors.poll()
    for note_id in {note_id for note_id, *_ in sent}:
        wanted = once([version for other, version, _, _ in sent if other == note_id])
        there = once([version for other, version in client.topic if other == note_id])
        if over[0] and note_id.startswith("n0"):
            assert there == wanted[: len(there)]
        else:
            assert there == wanted
    for note_id, _, _, confirmed in sent:
        assert len(confirmed) == 1 or (over[0] and note_id.startswith("n0") and not confirmed)
    if over[0]:
        late = [note_id for note_id, _ in client.topic[ended_at:] if note_id.startswith("n0")]
        assert late == [], "written after its partition had gone"


def once(found: list[int | None]) -> list[int | None]:
    """A record that is there twice in a row is there once: delivery is at least once."""
    return [version for place, version in enumerate(found) if place == 0 or found[place - 1] != version]


@pytest.mark.integration
class TestRealKafka:
    @pytest.fixture
    def settings(self, kafka_server: KafkaServer) -> KafkaSettings:
        return KafkaSettings(
            bootstrap_servers=kafka_server.bootstrap_servers, vectors_topic_prefix=f"vectors-{uuid4().hex[:8]}"
        )

    def test_takes_every_version_in_order(self, settings: KafkaSettings) -> None:
        facts = ensure_vectors_topic(settings, MODEL, 3)
        vectors = KafkaNoteVectors(settings, MODEL, max_message_bytes=facts.max_message_bytes)
        for version in range(500):
            vectors.send(row(f"n{version % 50}", version), lambda: None)
        deliver(vectors)
        found = versions(read_all(settings, facts.name, 3))
        assert found == {f"n{first}": list(range(first, 500, 50)) for first in range(50)}
        vectors.close(5)

    def test_small_records_never_make_a_batch_that_the_topic_refuses(
        self, kafka_server: KafkaServer, settings: KafkaSettings
    ) -> None:
        kafka_server.create_topic(f"{settings.vectors_topic_prefix}.{MODEL}", 1, {"max.message.bytes": "2000"})
        facts = ensure_vectors_topic(settings, MODEL, 1)
        slow = settings.model_copy(update={"properties": {"linger.ms": 100}})
        vectors = KafkaNoteVectors(slow, MODEL, max_message_bytes=facts.max_message_bytes)
        for version in range(100):
            vectors.send(row(f"n{version}", version), lambda: None)
        deliver(vectors)
        assert len(read_all(settings, facts.name, 1)) == 100
        vectors.close(5)

    def test_one_that_is_too_large_for_the_topic_is_one_line(
        self, kafka_server: KafkaServer, settings: KafkaSettings
    ) -> None:
        kafka_server.create_topic(f"{settings.vectors_topic_prefix}.{MODEL}", 1, {"max.message.bytes": "2000"})
        vectors = KafkaNoteVectors(settings, MODEL)
        vectors.send(row("n1", 1, dim=400), lambda: None)
        with pytest.raises(
            UpdaterError, match=r"refuses the vector of note 'n1', \d+ bytes; raise the topic's max.mess"
        ):
            deliver(vectors)
        vectors.close(0)

    def test_what_waits_while_the_broker_is_away_arrives_unless_its_partition_went(
        self, kafka_server: KafkaServer, settings: KafkaSettings
    ) -> None:
        facts = ensure_vectors_topic(settings, MODEL, 2)
        vectors = KafkaNoteVectors(settings, MODEL)
        vectors.send(row("first", 0), lambda: None)
        deliver(vectors)
        kafka_server.stop()
        alive, delivered = True, []
        for version in range(1, 4):
            vectors.send(row("stays", version), lambda: delivered.append("stays"))
            vectors.send(row("goes", version), lambda: delivered.append("goes"), lambda: alive)
        alive = False
        vectors.purge()
        kafka_server.start()
        vectors.send(row("goes", 9), lambda: delivered.append("next owner"))
        deliver(vectors)
        assert sorted(delivered) == ["next owner", "stays", "stays", "stays"]
        found = versions(read_all(settings, facts.name, 2))
        assert {note_id: once(found[note_id]) for note_id in found} == {"first": [0], "stays": [1, 2, 3], "goes": [9]}
        vectors.close(5)

    def test_close_gives_up_in_time_and_sends_nothing_any_more(
        self, kafka_server: KafkaServer, settings: KafkaSettings, caplog: pytest.LogCaptureFixture
    ) -> None:
        facts = ensure_vectors_topic(settings, MODEL, 1)
        vectors = KafkaNoteVectors(settings, MODEL)
        vectors.send(row("n1", 1), lambda: None)
        deliver(vectors)
        kafka_server.stop()
        vectors.send(row("n1", 2), lambda: None)
        began = time.monotonic()
        vectors.close(0.5)
        assert time.monotonic() - began < 3
        assert f"1 records for {facts.name} were not delivered" in caplog.text
        kafka_server.start()
        time.sleep(1)
        assert versions(read_all(settings, facts.name, 1)) == {"n1": [1]}


def test_the_fake_confirms_when_polled_and_keeps_what_compaction_would() -> None:
    fake, delivered, alive = MemoryNoteVectors(), [], [True]
    fake.send(row("n1", 1), lambda: delivered.append(1), lambda: alive[0])
    fake.send(row("n2", 2), lambda: delivered.append(2), lambda: alive[0])
    fake.delete("n1", lambda: delivered.append(3), lambda: alive[0])
    fake.held = True
    fake.poll()
    assert delivered == []
    fake.held = False
    fake.poll()
    assert delivered == [1, 2, 3]
    alive[0] = False
    fake.send(row("n3", 1), lambda: delivered.append(4), lambda: alive[0])
    fake.poll()
    assert fake.latest.keys() == {"n2"}
    assert delivered == [1, 2, 3]
