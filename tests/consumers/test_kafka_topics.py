"""Against librdkafka's built-in cluster, and against a real Kafka where the built-in one tells nothing."""

from __future__ import annotations

import logging
import time
from uuid import uuid4

import pytest
from confluent_kafka.admin import AdminClient

from commands.embedded import EmbeddedKafka, free_port
from consumers.errors import UpdaterError
from consumers.kafka_topics import TopicFacts, ensure_vectors_topic, inspect_topic, topic_warnings, vectors_topic
from notellm.settings import KafkaSettings
from tests.support.kafka_server import KafkaServer

MODEL = "0123456789abcdef"
SETTINGS = KafkaSettings(bootstrap_servers="kafka:9092", vectors_topic_prefix="note-vectors")
ALTER = "kafka-configs.sh --bootstrap-server kafka:9092 --alter --entity-type topics --entity-name "
DAY_MS = 86_400_000


def notes(**facts: object) -> TopicFacts:
    return TopicFacts(**{"name": "notes", "partitions": 4, "epoch": "e1", "cleanup_policy": "compact", **facts})


def topics_of(settings: KafkaSettings) -> set[str]:
    return set(AdminClient({"bootstrap.servers": settings.bootstrap_servers}).list_topics(timeout=10).topics)


@pytest.mark.parametrize(
    ("facts", "says", "do"),
    [
        ({"cleanup_policy": "delete"}, "it is not compacted", ALTER + "notes --add-config cleanup.policy=compact"),
        (
            {"cleanup_policy": "compact,delete", "retention_ms": 5},
            "older than its retention.ms (5 ms), without a tombstone",
            ALTER + "notes --add-config cleanup.policy=compact",
        ),
        (
            {"delete_retention_ms": DAY_MS - 1},
            "delete.retention.ms=86399999: an updater that is away or behind for longer may miss deletions",
            ALTER + "notes --add-config delete.retention.ms=86400000",
        ),
        (
            {"name": "note-vectors.x", "cleanup_policy": "delete"},
            "not compacted, Kafka deletes records by their age, and who reads it later misses them",
            ALTER + "note-vectors.x --add-config cleanup.policy=compact",
        ),
        (
            {"name": "notes.dead-letter", "cleanup_policy": "compact"},
            "refuses those without a key",
            ALTER + "notes.dead-letter --add-config cleanup.policy=delete",
        ),
    ],
)
def test_a_setting_that_loses_something_is_said_with_the_command_that_mends_it(
    facts: dict[str, object], says: str, do: str
) -> None:
    (warning,) = topic_warnings(SETTINGS, notes(**facts))
    assert warning.startswith(f"topic {facts.get('name', 'notes')} has ")
    assert says in warning
    assert warning.endswith(do)
    assert "\n" not in warning


def test_two_faults_are_two_lines() -> None:
    facts = notes(cleanup_policy="compact,delete", delete_retention_ms=1)
    assert len(topic_warnings(SETTINGS, facts, partitions_then=3)) == 3


@pytest.mark.parametrize(
    "facts",
    [
        notes(delete_retention_ms=DAY_MS),
        notes(cleanup_policy=None, epoch=""),
        notes(name="notes.dead-letter", cleanup_policy="delete", delete_retention_ms=1),
        notes(name="notes.dead-letter", cleanup_policy=None),
    ],
)
def test_what_is_right_or_unknown_is_not_warned_of(facts: TopicFacts) -> None:
    assert topic_warnings(SETTINGS, facts, partitions_then=4, epoch_then="e1") == []


def test_more_partitions_than_there_were_are_named() -> None:
    (warning,) = topic_warnings(SETTINGS, notes(partitions=6), partitions_then=4, epoch_then="e1")
    assert "has 6 partitions, 4 when the collection was created" in warning
    assert "kafka.notes_topic" in warning


def test_a_topic_that_was_created_again_is_named_and_its_partitions_say_nothing() -> None:
    (warning,) = topic_warnings(SETTINGS, notes(epoch="e2", partitions=6), partitions_then=4, epoch_then="e1")
    assert "deleted and created again" in warning
    assert "id e1, now e2" in warning


def test_brokers_that_cannot_be_reached_are_named_by_their_setting(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL, "consumers.librdkafka")
    monkeypatch.setattr("consumers.kafka_topics._BROKER_SECONDS", 0.5)
    settings = KafkaSettings(bootstrap_servers=f"127.0.0.1:{free_port()}")
    with pytest.raises(
        UpdaterError, match=rf"kafka.bootstrap_servers: '{settings.bootstrap_servers}' cannot be reached"
    ):
        inspect_topic(settings, "notes")


def test_a_property_that_librdkafka_refuses_is_named() -> None:
    settings = KafkaSettings(properties={"session.timeout.ms": 4_000_000})
    with pytest.raises(UpdaterError, match=r'^kafka.properties: .*"session.timeout.ms" value 4000000') as error:
        inspect_topic(settings, "notes")
    assert "\n" not in str(error.value)


@pytest.mark.integration
class TestBuiltInCluster:
    @pytest.fixture
    def settings(self, embedded_kafka: EmbeddedKafka) -> KafkaSettings:
        return SETTINGS.model_copy(update={"bootstrap_servers": embedded_kafka.bootstrap_servers})

    def test_tells_the_partitions_and_nothing_else_at_once(self, settings: KafkaSettings) -> None:
        began = time.monotonic()
        facts = inspect_topic(settings, "notes")
        assert facts == TopicFacts("notes", 4)
        assert facts.compacted is None
        assert time.monotonic() - began < 1.5, "it waited for what the built-in cluster never answers"

    def test_looking_for_a_topic_does_not_create_it(self, settings: KafkaSettings) -> None:
        # Any broker with auto.create.topics.enable, Kafka's default, would create it, and not compacted.
        with pytest.raises(UpdaterError, match=r"topic 'notse' on .* is not there; create it first"):
            inspect_topic(settings, "notse")
        assert "notse" not in topics_of(settings)

    def test_gets_a_topic_of_vectors(self, settings: KafkaSettings) -> None:
        facts = ensure_vectors_topic(settings, MODEL, 4)
        assert facts == TopicFacts(f"note-vectors.{MODEL}", 4)
        assert ensure_vectors_topic(settings, MODEL, 4) == facts


@pytest.mark.integration
class TestRealKafka:
    @pytest.fixture
    def settings(self, kafka_server: KafkaServer) -> KafkaSettings:
        own = f"test-{uuid4().hex[:8]}"
        return KafkaSettings(
            bootstrap_servers=kafka_server.bootstrap_servers,
            notes_topic=f"{own}.notes",
            vectors_topic_prefix=f"{own}.vectors",
        )

    def test_tells_what_it_does_with_a_topic(self, kafka_server: KafkaServer, settings: KafkaSettings) -> None:
        config = {
            "cleanup.policy": "compact,delete",
            "delete.retention.ms": "1000",
            "retention.ms": "3600000",
            "max.message.bytes": "5000",
        }
        kafka_server.create_topic(settings.notes_topic, 3, config)
        facts = inspect_topic(settings, settings.notes_topic)
        assert (facts.partitions, facts.compacted, facts.cleanup_policy) == (3, True, "compact,delete")
        assert (facts.delete_retention_ms, facts.retention_ms, facts.max_message_bytes) == (1000, 3_600_000, 5000)
        assert len(topic_warnings(settings, facts)) == 2

    def test_gives_a_topic_that_is_created_again_another_epoch(
        self, kafka_server: KafkaServer, settings: KafkaSettings
    ) -> None:
        kafka_server.create_topic(settings.notes_topic)
        before = inspect_topic(settings, settings.notes_topic)
        assert before.epoch
        assert inspect_topic(settings, settings.notes_topic) == before
        kafka_server.delete_topic(settings.notes_topic)
        kafka_server.create_topic(settings.notes_topic)
        after = inspect_topic(settings, settings.notes_topic)
        assert after.epoch not in ("", before.epoch)

    def test_gets_a_compacted_topic_of_vectors_once(self, settings: KafkaSettings) -> None:
        facts = ensure_vectors_topic(settings, MODEL, 3)
        assert (facts.name, facts.partitions, facts.cleanup_policy) == (vectors_topic(settings, MODEL), 3, "compact")
        assert topic_warnings(settings, facts) == []
        assert ensure_vectors_topic(settings, MODEL, 5) == facts, "it is taken as it is"

    def test_a_topic_of_vectors_that_is_not_compacted_is_taken_and_warned_of(
        self, kafka_server: KafkaServer, settings: KafkaSettings
    ) -> None:
        kafka_server.create_topic(vectors_topic(settings, MODEL), 1, {"cleanup.policy": "delete"})
        (warning,) = topic_warnings(settings, ensure_vectors_topic(settings, MODEL, 1))
        assert "not compacted" in warning

    def test_a_topic_that_cannot_be_created_is_said_with_the_command(self, settings: KafkaSettings) -> None:
        with pytest.raises(UpdaterError, match=r"^kafka.vectors_topic_prefix: topic .* cannot be created") as error:
            ensure_vectors_topic(settings, MODEL, 0)
        assert str(error.value).endswith(
            f"kafka-topics.sh --bootstrap-server {settings.bootstrap_servers} --create "
            f"--topic {vectors_topic(settings, MODEL)} --partitions 0 --config cleanup.policy=compact"
        )
