"""The worker's topics before it starts: are they there, and are they as they must be?"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from confluent_kafka import KafkaError, KafkaException
from confluent_kafka.admin import AdminClient, ConfigResource, NewTopic

from notellm.settings import KafkaSettings, Settings, StreamsSettings
from streams.errors import WorkerError
from streams.rules import DAY_MS

__all__ = ["TABLE", "changelog_topic", "make_client", "prepare_topics"]

log = logging.getLogger(__name__)
_kafka_log = logging.getLogger("streams.librdkafka")

# Faust's name of the table.
TABLE = "clicks"

_SECONDS = 10.0

Client = TypeVar("Client")


def changelog_topic(settings: StreamsSettings) -> str:
    """As Faust names it."""
    return f"{settings.app_id}-{TABLE}-changelog"


def prepare_topics(settings: Settings) -> int:
    """The number of partitions of the clicks. Creates the changelog where it is absent, and nothing else.

    Raises :class:`WorkerError`.
    """
    admin = make_client(AdminClient, settings.kafka, {"allow.auto.create.topics": False})
    streams = settings.streams
    partitions = _partitions(settings, admin, streams.clicks_topic)
    letters = _partitions(settings, admin, streams.dead_letter_topic)
    for topic, found in ((streams.clicks_topic, partitions), (streams.dead_letter_topic, letters)):
        if found == 0:
            raise WorkerError(f"topic {topic!r} on {settings.kafka.bootstrap_servers} is not there; create it first")
    _refuse_compacted(settings, admin, streams.dead_letter_topic)
    changelog = changelog_topic(streams)
    there = _partitions(settings, admin, changelog)
    if there == 0:
        _create(admin, changelog, partitions, streams)
    elif there != partitions:
        raise WorkerError(
            f"topic {changelog!r} has {there} partitions, {streams.clicks_topic!r} has {partitions}: a user's clicks "
            "and rows must have the same number; choose another streams.app_id, which reads all clicks again"
        )
    else:
        _warn(settings, admin, changelog)
    return partitions


def make_client(
    kind: Callable[..., Client],
    settings: KafkaSettings,
    own: Mapping[str, Any],
    *,
    user_wins: Sequence[str] = (),
) -> Client:
    """A client of ``kind``. ``own`` properties win over the user's, but for those in ``user_wins``.

    Raises :class:`WorkerError` that names the property that is refused.
    """
    kept = {name: settings.properties[name] for name in user_wins if name in settings.properties}
    properties = {
        "bootstrap.servers": settings.bootstrap_servers, "client.id": "notellm", **settings.properties, **own, **kept,
    }  # fmt: skip
    try:
        return kind(properties, logger=_kafka_log)
    except KafkaException as error:
        raise WorkerError(f"kafka.properties: {error.args[0].str().strip()}") from None


def _partitions(settings: Settings, admin: AdminClient, topic: str) -> int:
    """0 where the topic is not there."""
    try:
        found = admin.list_topics(topic, timeout=_SECONDS).topics[topic]
    except KafkaException as error:
        raise WorkerError(
            f"kafka.bootstrap_servers: {settings.kafka.bootstrap_servers!r} cannot be reached: {error.args[0].str()}"
        ) from None
    if found.error is None:
        return len(found.partitions)
    if found.error.code() == KafkaError.UNKNOWN_TOPIC_OR_PART:
        return 0
    raise WorkerError(f"topic {topic!r} on {settings.kafka.bootstrap_servers}: {found.error.str()}")


def _changelog_config(streams: StreamsSettings) -> dict[str, str]:
    """Compacted, and never deleted by age: a worker that was down for weeks must find all it had.

    A worker's disk may come back after weeks, with rows of users who were forgotten meanwhile. The tombstones wait for
    it until those rows would have expired anyway. Compaction at least daily: a forgotten user's rows do not linger.
    """
    keep_ms = (streams.window_days + 2) * DAY_MS + streams.allowed_lateness_s * 1000
    return {
        "cleanup.policy": "compact",
        "delete.retention.ms": str(keep_ms),
        "max.compaction.lag.ms": str(DAY_MS),
    }


def _create(admin: AdminClient, topic: str, partitions: int, streams: StreamsSettings) -> None:
    # Replication factor -1: the brokers' default.
    new = NewTopic(topic, partitions, -1, config=_changelog_config(streams))
    try:
        admin.create_topics([new], request_timeout=_SECONDS)[topic].result(timeout=_SECONDS + 1)
        log.info("created topic %s, %d partitions, compacted", topic, partitions)
    except (KafkaException, TimeoutError) as error:
        reason = error.args[0].str() if isinstance(error, KafkaException) else "no answer"
        if isinstance(error, KafkaException) and error.args[0].code() == KafkaError.TOPIC_ALREADY_EXISTS:
            return  # another worker was faster
        config = " ".join(f"--config {name}={value}" for name, value in _changelog_config(streams).items())
        raise WorkerError(
            f"topic {topic!r} cannot be created ({reason}); create it: kafka-topics.sh --create --topic {topic} "
            f"--partitions {partitions} {config}"
        ) from None


def _refuse_compacted(settings: Settings, admin: AdminClient, topic: str) -> None:
    config = _config(admin, topic)
    if "compact" in config.get("cleanup.policy", ""):
        raise WorkerError(
            f"streams.dead_letter_topic: topic {topic!r} has cleanup.policy={config['cleanup.policy']}: Kafka refuses "
            f"letters without a key there; change it: {_alter(settings, topic, 'cleanup.policy=delete')}"
        )


def _warn(settings: Settings, admin: AdminClient, topic: str) -> None:
    config, wanted = _config(admin, topic), _changelog_config(settings.streams)
    policy = config.get("cleanup.policy", "compact")
    if policy != "compact":
        log.warning(
            "topic %s has cleanup.policy=%s: Kafka deletes rows that are still of use; change it: %s",
            topic, policy, _alter(settings, topic, "cleanup.policy=compact"),
        )  # fmt: skip
    needed = wanted["delete.retention.ms"]
    if int(config.get("delete.retention.ms", needed)) < int(needed):
        log.warning(
            "topic %s has delete.retention.ms=%s: a worker that was away for longer may bring forgotten users back; "
            "change it: %s",
            topic, config["delete.retention.ms"], _alter(settings, topic, f"delete.retention.ms={needed}"),
        )  # fmt: skip


def _config(admin: AdminClient, topic: str) -> dict[str, str]:
    """The topic's settings; nothing where the broker does not tell, or forbids the question."""
    resource = ConfigResource(ConfigResource.Type.TOPIC, topic)
    try:
        found = admin.describe_configs([resource], request_timeout=_SECONDS)[resource].result(timeout=_SECONDS + 1)
    except (KafkaException, TimeoutError) as error:
        log.debug("Kafka does not tell: %s", error)
        return {}
    return {name: entry.value for name, entry in found.items() if entry.value is not None}


def _alter(settings: Settings, topic: str, config: str) -> str:
    return (
        f"kafka-configs.sh --bootstrap-server {settings.kafka.bootstrap_servers} --alter --entity-type topics "
        f"--entity-name {topic} --add-config {config}"
    )
