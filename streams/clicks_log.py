"""The clicks topic by a consumer of our own, which is no member of the group: what is committed, and what is where."""

from __future__ import annotations

from confluent_kafka import Consumer, KafkaError, Message, TopicPartition

from notellm.settings import Settings
from streams.click_topics import make_client
from streams.errors import WorkerError

__all__ = ["KafkaClicksLog"]

_ANSWER_SECONDS = 10.0


class KafkaClicksLog:
    """See :class:`streams.click_worker.ClicksLog`. Raises :class:`WorkerError` when Kafka does not answer in time."""

    def __init__(self, settings: Settings) -> None:
        self._topic = settings.streams.clicks_topic
        self._consumer: Consumer = make_client(
            Consumer,
            settings.kafka,
            {
                "group.id": settings.streams.app_id,
                "enable.auto.commit": False,
                "auto.offset.reset": "earliest",
                "enable.partition.eof": True,
            },
        )

    def start(self, partition: int) -> int:
        (place,) = self._consumer.committed([TopicPartition(self._topic, partition)], timeout=_ANSWER_SECONDS)
        low, _ = self._consumer.get_watermark_offsets(place, timeout=_ANSWER_SECONDS)
        return max(int(place.offset), int(low))

    def first_at(self, partition: int, offset: int) -> int | None:
        self._consumer.assign([TopicPartition(self._topic, partition, offset)])
        try:
            message: Message | None = self._consumer.poll(_ANSWER_SECONDS)
        finally:
            self._consumer.unassign()
        if message is None:
            raise WorkerError(f"{self._topic}[{partition}]@{offset} cannot be read: no answer from Kafka")
        error = message.error()
        if error is None:
            found: int = message.offset()
            return found
        if error.code() == KafkaError._PARTITION_EOF:  # noqa: SLF001 - that is its public name
            return None
        raise WorkerError(f"{self._topic}[{partition}]@{offset} cannot be read: {error.str()}")
