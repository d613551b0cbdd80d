"""Notes from Kafka: a consumer group member that decides for itself where each partition begins."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from confluent_kafka import (
    OFFSET_BEGINNING,
    OFFSET_INVALID,
    Consumer,
    KafkaError,
    KafkaException,
    Message,
    TopicCollection,
    TopicPartition,
)
from confluent_kafka.admin import AdminClient

from consumers.errors import OffsetOutOfRange, UpdaterError
from consumers.protocols import Record, SourceEvents
from notellm.settings import KafkaSettings

__all__ = ["KafkaSource", "TopicFacts", "inspect_topic"]

log = logging.getLogger(__name__)
_kafka_log = logging.getLogger("consumers.librdkafka")

_COOPERATIVE = "cooperative-sticky"
_BROKER_SECONDS = 10.0


class TopicFacts:
    """What is known of a topic before it is read. ``epoch`` is its id, or "" where the broker does not tell."""

    def __init__(self, partitions: int, epoch: str) -> None:
        self.partitions = partitions
        self.epoch = epoch


def inspect_topic(settings: KafkaSettings, topic: str) -> TopicFacts:
    """Reach the brokers and look at ``topic``. Raises :class:`UpdaterError` that names the setting that is wrong."""
    admin = AdminClient(client_properties(settings), logger=_kafka_log)
    try:
        metadata = admin.list_topics(topic, timeout=_BROKER_SECONDS)
    except KafkaException as error:
        raise UpdaterError(
            f"kafka.bootstrap_servers: {settings.bootstrap_servers!r} cannot be reached: {error.args[0].str()}"
        ) from None
    found = metadata.topics[topic]
    if found.error is not None:
        raise UpdaterError(f"topic {topic!r} on {settings.bootstrap_servers}: {found.error.str()}; create it first")
    return TopicFacts(len(found.partitions), _topic_id(admin, topic))


def _topic_id(admin: AdminClient, topic: str) -> str:
    try:
        described = admin.describe_topics(TopicCollection([topic]), request_timeout=2.0)[topic].result(timeout=3.0)
    except (KafkaException, TimeoutError):
        return ""  # librdkafka's built-in cluster has no topic ids
    return str(described.topic_id)


def client_properties(settings: KafkaSettings) -> dict[str, Any]:
    """What every client of the project is made with; the user's own properties win."""
    return {"bootstrap.servers": settings.bootstrap_servers, "client.id": "notellm", **settings.properties}


class KafkaSource:
    """See :class:`consumers.protocols.Source`.

    A partition without a committed offset is read from its beginning, by an explicit assignment; and
    ``auto.offset.reset=error`` makes an offset that is no longer there an error, never a silent jump.
    """

    def __init__(self, settings: KafkaSettings, group_id: str) -> None:
        self._topic = settings.notes_topic
        strategy = str(settings.properties.get("partition.assignment.strategy", _COOPERATIVE))
        self._cooperative = strategy == _COOPERATIVE
        self._consumer = Consumer(
            {
                # One poll may be a drain: the group must not throw us out meanwhile.
                "max.poll.interval.ms": 300_000,
                # A slow model reads little; megabytes fetched ahead would only be fetched again by the next owner.
                "queued.max.messages.kbytes": 16_384,
                "error_cb": lambda error: log.warning("Kafka: %s", error.str()),
                **client_properties(settings),
                "partition.assignment.strategy": strategy,
                "group.id": group_id,
                "enable.auto.commit": False,
                "enable.auto.offset.store": False,
                "auto.offset.reset": "error",
                "on_commit": _say_failed_commit,
            },
            logger=_kafka_log,
        )
        self._events: SourceEvents | None = None

    def subscribe(self, events: SourceEvents) -> None:
        self._events = events
        self._consumer.subscribe(
            [self._topic], on_assign=self._on_assign, on_revoke=self._on_revoke, on_lost=self._on_lost
        )

    def poll(self, timeout_s: float) -> Record | None:
        message = self._consumer.poll(timeout_s)
        # Never "if not message": a Message is falsy when its value is empty or null, and every tombstone is.
        if message is None:
            return None
        error = message.error()
        if error is not None:
            self._raise(error, message)
            return None
        return _record(message)

    def pause(self) -> None:
        self._consumer.pause(self._consumer.assignment())

    def resume(self) -> None:
        self._consumer.resume(self._consumer.assignment())

    def commit(self, positions: Mapping[int, int]) -> None:
        self._consumer.commit(offsets=self._partitions(positions), asynchronous=True)

    def close(self) -> None:
        self._consumer.close()

    def _on_assign(self, consumer: Consumer, partitions: Sequence[TopicPartition]) -> None:
        assert self._events is not None
        starts = self._committed(list(partitions))
        if self._cooperative:
            consumer.incremental_assign(starts)
        else:
            consumer.assign(starts)
        self._events.assigned([start.partition for start in starts])
        if starts:
            log.info("assigned %s", ", ".join(f"{s.partition} from {_place(s.offset)}" for s in starts))

    def _committed(self, partitions: list[TopicPartition]) -> list[TopicPartition]:
        if not partitions:
            return []
        try:
            starts = self._consumer.committed(partitions, timeout=_BROKER_SECONDS)
        except KafkaException as error:
            raise UpdaterError(f"the group's offsets cannot be read: {error.args[0].str()}") from None
        for start in starts:
            if start.error is not None:
                raise UpdaterError(
                    f"{start.topic}[{start.partition}]: the group's offset cannot be read: {start.error.str()}"
                )
            if start.offset == OFFSET_INVALID:
                start.offset = OFFSET_BEGINNING
        return list(starts)

    def _on_revoke(self, consumer: Consumer, partitions: Sequence[TopicPartition]) -> None:
        assert self._events is not None
        positions = self._events.revoked([partition.partition for partition in partitions])
        if positions:
            try:
                consumer.commit(offsets=self._partitions(positions), asynchronous=False)
            except KafkaException as error:
                # The next owner reads them again: at-least-once, and unchanged text costs it nothing.
                log.warning("commit at revocation failed: %s", error)
        if self._cooperative:
            consumer.incremental_unassign(list(partitions))
        else:
            consumer.unassign()

    def _on_lost(self, consumer: Consumer, partitions: Sequence[TopicPartition]) -> None:
        assert self._events is not None
        log.warning("partitions %s were lost to the group", [partition.partition for partition in partitions])
        self._events.lost([partition.partition for partition in partitions])
        if self._cooperative:
            consumer.incremental_unassign(list(partitions))

    def _partitions(self, positions: Mapping[int, int]) -> list[TopicPartition]:
        return [TopicPartition(self._topic, partition, position) for partition, position in positions.items()]

    def _raise(self, error: KafkaError, message: Message) -> None:
        if error.code() == KafkaError._AUTO_OFFSET_RESET:  # noqa: SLF001 - that is its public name
            raise OffsetOutOfRange(
                f"{self._topic}[{message.partition()}]: the group's committed offset is no longer in the topic "
                f"({error.str()}); notes may have been lost before they were read. To read the partition from its "
                "beginning, delete the group's offset for it and start again"
            )
        if error.fatal():
            raise UpdaterError(f"Kafka consumer: {error.str()}")
        log.warning("Kafka: %s", error.str())


def _record(message: Message) -> Record:
    key, value = message.key(), message.value()
    headers = message.headers() or []
    return Record(
        topic=str(message.topic()),
        partition=int(message.partition() or 0),
        offset=int(message.offset() or 0),
        timestamp_ms=message.timestamp()[1],
        key=key.encode() if isinstance(key, str) else key,
        value=value.encode() if isinstance(value, str) else value,
        headers=tuple((name, content.encode() if isinstance(content, str) else content) for name, content in headers),
    )


def _say_failed_commit(error: KafkaError | None, partitions: Sequence[TopicPartition]) -> None:
    if error is not None and error.code() != KafkaError._NO_OFFSET:  # noqa: SLF001
        log.warning("commit failed, the next one of these partitions stands for it: %s", error.str())
    for partition in partitions:
        if partition.error is not None:
            log.warning("commit of partition %d failed: %s", partition.partition, partition.error.str())


def _place(offset: int) -> str:
    return "its beginning" if offset == OFFSET_BEGINNING else str(offset)
