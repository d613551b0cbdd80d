"""Dead letters to Kafka: the record as it came, with headers that say what was wrong with it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from confluent_kafka import KafkaError, KafkaException, Message, Producer
from prometheus_client import Counter

from consumers.kafka_source import client_properties
from consumers.protocols import Record
from notellm.dead_letter import VALUE_OMITTED, dead_letter_headers
from notellm.settings import KafkaSettings

__all__ = ["KafkaDeadLetters"]

log = logging.getLogger(__name__)

DEAD_LETTERS = Counter("notellm_dead_letters_total", "Records sent to the dead-letter topic.", ["reason"])


class KafkaDeadLetters:
    """See :class:`consumers.protocols.DeadLetters`. Waits for the brokers without end: a dead letter is never dropped."""

    def __init__(self, settings: KafkaSettings, model_version: str) -> None:
        self._topic = settings.dead_letter_topic
        self._model_version = model_version
        self._producer = Producer(
            {
                **client_properties(settings),
                "partitioner": "murmur2_random",
                "acks": "all",
                "message.timeout.ms": 0,
                # The broker knows its topic's limit better than we do.
                "message.max.bytes": 100_000_000,
            },
            logger=logging.getLogger("consumers.librdkafka"),
        )

    def send(self, record: Record, *, stage: str, reason: str, error: Exception, delivered: Callable[[], None]) -> None:
        DEAD_LETTERS.labels(reason).inc()
        log.warning("dead letter: %s[%d]@%d: %s", record.topic, record.partition, record.offset, error)
        added = dead_letter_headers(
            topic=record.topic,
            partition=record.partition,
            offset=record.offset,
            stage=stage,
            reason=reason,
            error=error,
            model_version=self._model_version,
        )
        self._produce(record, record.value, [*record.headers, *added], delivered)

    def poll(self) -> None:
        self._producer.poll(0)

    def _produce(
        self, record: Record, value: bytes | None, headers: list[tuple[str, Any]], delivered: Callable[[], None]
    ) -> None:
        def on_delivery(error: KafkaError | None, message: Message) -> None:
            del message
            if error is None:
                delivered()
            elif error.code() == KafkaError.MSG_SIZE_TOO_LARGE and value is not None:
                self._produce_without_value(record, headers, delivered)
            else:
                log.warning("dead letter could not be delivered, trying again: %s", error.str())
                self._produce(record, value, headers, delivered)

        try:
            self._producer.produce(self._topic, key=record.key, value=value, headers=headers, on_delivery=on_delivery)
        except KafkaException as error:
            if error.args[0].code() != KafkaError.MSG_SIZE_TOO_LARGE or value is None:
                raise
            self._produce_without_value(record, headers, delivered)

    def _produce_without_value(
        self, record: Record, headers: list[tuple[str, Any]], delivered: Callable[[], None]
    ) -> None:
        """A record that is too large for the dead-letter topic never blocks its partition: its value stays behind."""
        size = str(len(record.value or b"")).encode()
        self._produce(record, None, [*headers, (VALUE_OMITTED, size)], delivered)
