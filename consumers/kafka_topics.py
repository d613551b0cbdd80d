"""The topics before they are read or written: are they there, and are they as they must be?"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from confluent_kafka import KafkaError, KafkaException, Producer, TopicCollection
from confluent_kafka.admin import AdminClient, ClusterMetadata, ConfigResource, NewTopic

from consumers.errors import UpdaterError
from consumers.kafka_client import client_properties, make_client
from notellm.settings import KafkaSettings

__all__ = [
    "DELETE_RETENTION_MS",
    "TopicFacts",
    "ensure_vectors_topic",
    "inspect_topic",
    "topic_warnings",
    "vectors_topic",
]

log = logging.getLogger(__name__)

# Kafka's own default, a day: an updater may be down for a night, or fill a collection for a day, and miss no deletion.
DELETE_RETENTION_MS = 24 * 60 * 60 * 1000

_BROKER_SECONDS = 10.0
_ANSWER_SECONDS = 2.0
_BUILT_IN = "mockCluster"  # how librdkafka's built-in cluster begins its id


@dataclass(frozen=True)
class TopicFacts:
    """What the brokers say of a topic. ``epoch`` is its id, "" where they do not tell; so is None for its settings."""

    name: str
    partitions: int
    epoch: str = ""
    cleanup_policy: str | None = None
    delete_retention_ms: int | None = None
    retention_ms: int | None = None
    max_message_bytes: int | None = None

    @property
    def compacted(self) -> bool | None:
        return None if self.cleanup_policy is None else "compact" in self.cleanup_policy.split(",")


def inspect_topic(settings: KafkaSettings, topic: str) -> TopicFacts:
    """Reach the brokers and look at ``topic``; never creates it. Raises :class:`UpdaterError`."""
    facts = _look(settings, _admin(settings), topic)
    if facts is None:
        raise UpdaterError(f"topic {topic!r} on {settings.bootstrap_servers} is not there; create it first")
    return facts


def vectors_topic(settings: KafkaSettings, model_version: str) -> str:
    """The topic that one model's vectors go to."""
    return f"{settings.vectors_topic_prefix}.{model_version}"


def ensure_vectors_topic(settings: KafkaSettings, model_version: str, partitions: int) -> TopicFacts:
    """Create the compacted topic of note vectors if it is absent. Raises :class:`UpdaterError` when that is refused."""
    topic, admin = vectors_topic(settings, model_version), _admin(settings)
    facts = _look(settings, admin, topic)
    if facts is not None:
        return facts
    if _is_built_in(admin.list_topics(timeout=_BROKER_SECONDS)):
        # It has no CreateTopics; it creates a topic, of its own four partitions, when a producer asks for it.
        make_client(Producer, client_properties(settings)).list_topics(topic, timeout=_BROKER_SECONDS)
    else:
        _create(settings, admin, topic, partitions)
    deadline = time.monotonic() + _BROKER_SECONDS
    while (facts := _look(settings, admin, topic)) is None:
        if time.monotonic() > deadline:
            raise UpdaterError(f"topic {topic!r} on {settings.bootstrap_servers} was created and cannot be seen")
        time.sleep(0.1)
    log.info("created topic %s, %d partitions, compacted", topic, facts.partitions)
    return facts


def topic_warnings(
    settings: KafkaSettings, facts: TopicFacts, *, partitions_then: int | None = None, epoch_then: str = ""
) -> list[str]:
    """What is not as it should be, one line each, with what to do. The topic's name says what is expected of it.

    ``partitions_then`` and ``epoch_then`` are the notes topic's as they were when the collection was created.
    """
    if facts.name == settings.dead_letter_topic:
        return _dead_letter_warnings(settings, facts)
    warnings = _compaction_warnings(settings, facts)
    if facts.name == settings.notes_topic:
        warnings += _change_warnings(facts, partitions_then, epoch_then)
    return warnings


def _dead_letter_warnings(settings: KafkaSettings, facts: TopicFacts) -> list[str]:
    if not facts.compacted:
        return []
    return [
        f"topic {facts.name} has cleanup.policy={facts.cleanup_policy}: compaction drops all dead letters of a key but "
        "the last, and Kafka refuses those without a key, each of which would hold up its partition for ever; "
        f"change it: {_alter(settings, facts.name, 'cleanup.policy=delete')}"
    ]


def _compaction_warnings(settings: KafkaSettings, facts: TopicFacts) -> list[str]:
    is_notes = facts.name == settings.notes_topic
    begin = f"topic {facts.name} has cleanup.policy={facts.cleanup_policy}"
    change = f"change it: {_alter(settings, facts.name, 'cleanup.policy=compact')}"
    retention = f"retention.ms ({facts.retention_ms} ms)"
    warnings = []
    if facts.compacted is False:
        loss = "a new model's collection cannot be filled from it" if is_notes else "who reads it later misses them"
        warnings.append(f"{begin}: it is not compacted, Kafka deletes records by their age, and {loss}; {change}")
    elif facts.compacted and "delete" in str(facts.cleanup_policy).split(","):
        loss = (
            "without a tombstone, so such a note stays in this collection and is missing in the next model's"
            if is_notes
            else "and who reads it later misses that"
        )
        warnings.append(f"{begin}: Kafka also deletes what is older than its {retention}, {loss}; {change}")
    if facts.compacted and facts.delete_retention_ms is not None and facts.delete_retention_ms < DELETE_RETENTION_MS:
        reader = "an updater" if is_notes else "a reader"
        longer = _alter(settings, facts.name, f"delete.retention.ms={DELETE_RETENTION_MS}")
        warnings.append(
            f"topic {facts.name} has delete.retention.ms={facts.delete_retention_ms}: {reader} that is away or behind "
            f"for longer may miss deletions; keep them for at least a day: {longer}"
        )
    return warnings


def _change_warnings(facts: TopicFacts, partitions_then: int | None, epoch_then: str) -> list[str]:
    if epoch_then and facts.epoch and epoch_then != facts.epoch:
        # Its number of partitions says nothing then: no key of the old topic stands in this one.
        return [
            f"topic {facts.name} was deleted and created again since the collection was (id {epoch_then}, now "
            f"{facts.epoch}): notes that the new one lacks are still in the collection, and source_offset compares "
            "only within one source_epoch; publish all notes to it, then compare its keys with the collection"
        ]
    if partitions_then is not None and partitions_then != facts.partitions:
        return [
            f"topic {facts.name} has {facts.partitions} partitions, {partitions_then} when the collection was created: "
            "a key may stand on two of them, which have no order, so a collection that is filled later may end with "
            "its older version; publish the last version of every note to a new topic, and name it "
            "in kafka.notes_topic"
        ]
    return []


def _alter(settings: KafkaSettings, topic: str, config: str) -> str:
    return (
        f"kafka-configs.sh --bootstrap-server {settings.bootstrap_servers} --alter --entity-type topics "
        f"--entity-name {topic} --add-config {config}"
    )


def _admin(settings: KafkaSettings) -> AdminClient:
    # An admin client counts as a producer, and its question for a topic would create it where brokers allow that.
    return make_client(AdminClient, {**client_properties(settings), "allow.auto.create.topics": False})


def _look(settings: KafkaSettings, admin: AdminClient, topic: str) -> TopicFacts | None:
    """None where the topic is not there."""
    try:
        metadata = admin.list_topics(topic, timeout=_BROKER_SECONDS)
    except KafkaException as error:
        raise UpdaterError(
            f"kafka.bootstrap_servers: {settings.bootstrap_servers!r} cannot be reached: {error.args[0].str()}"
        ) from None
    found = metadata.topics[topic]
    if found.error is not None:
        if found.error.code() == KafkaError.UNKNOWN_TOPIC_OR_PART:
            return None
        raise UpdaterError(f"topic {topic!r} on {settings.bootstrap_servers}: {found.error.str()}")
    if _is_built_in(metadata):
        return TopicFacts(topic, len(found.partitions))  # it lets such questions time out
    epoch = _answer(lambda: _description(admin, topic))
    configs = _answer(lambda: _configs(admin, topic)) or {}
    return TopicFacts(
        topic,
        len(found.partitions),
        epoch=str(epoch.topic_id) if epoch is not None else "",
        cleanup_policy=configs["cleanup.policy"].value if "cleanup.policy" in configs else None,
        delete_retention_ms=_number(configs.get("delete.retention.ms")),
        retention_ms=_number(configs.get("retention.ms")),
        max_message_bytes=_number(configs.get("max.message.bytes")),
    )


def _is_built_in(metadata: ClusterMetadata) -> bool:
    return str(metadata.cluster_id).startswith(_BUILT_IN)


def _description(admin: AdminClient, topic: str) -> Future[Any]:
    described: dict[str, Future[Any]] = admin.describe_topics(TopicCollection([topic]), request_timeout=_ANSWER_SECONDS)
    return described[topic]


def _configs(admin: AdminClient, topic: str) -> Future[Any]:
    resource = ConfigResource(ConfigResource.Type.TOPIC, topic)
    described: dict[Any, Future[Any]] = admin.describe_configs([resource], request_timeout=_ANSWER_SECONDS)
    (future,) = described.values()
    return future


def _answer(ask: Callable[[], Future[Any]]) -> Any:
    """The answer, or None: a broker that does not tell, or forbids the question, is no reason not to start."""
    try:
        return ask().result(timeout=_ANSWER_SECONDS + 1)
    except (KafkaException, TimeoutError) as error:
        log.debug("Kafka does not tell: %s", error)
        return None


def _number(entry: Any) -> int | None:
    return None if entry is None else int(entry.value)


def _create(settings: KafkaSettings, admin: AdminClient, topic: str, partitions: int) -> None:
    # Replication factor -1: the brokers' default.
    new = NewTopic(topic, partitions, -1, config={"cleanup.policy": "compact"})
    (future,) = admin.create_topics([new], request_timeout=_BROKER_SECONDS).values()
    try:
        future.result(timeout=_BROKER_SECONDS + 1)
    except (KafkaException, TimeoutError) as error:
        reason = error.args[0].str() if isinstance(error, KafkaException) else "no answer"
        if isinstance(error, KafkaException) and error.args[0].code() == KafkaError.TOPIC_ALREADY_EXISTS:
            return  # another updater was faster
        raise UpdaterError(
            f"kafka.vectors_topic_prefix: topic {topic!r} cannot be created ({reason}); create it: kafka-topics.sh "
            f"--bootstrap-server {settings.bootstrap_servers} --create --topic {topic} --partitions {partitions} "
            "--config cleanup.policy=compact"
        ) from None
