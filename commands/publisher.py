"""Records into Kafka, partitioned as Java's producers do, and never dropped without a word."""

from __future__ import annotations

from collections.abc import Callable

from confluent_kafka import KafkaError, KafkaException, Message, Producer

from consumers.kafka_client import client_properties, make_client
from consumers.kafka_topics import inspect_topic
from notellm.errors import NoteLLMError
from notellm.settings import KafkaSettings

__all__ = ["NotePublisher", "RecordPublisher"]

Delivered = Callable[[int, int], None]

_NOW = 0  # librdkafka's word


class RecordPublisher:
    """An idempotent producer for one topic."""

    def __init__(self, settings: KafkaSettings, topic: str) -> None:
        inspect_topic(settings, topic)
        self._topic = topic
        self._failure: KafkaError | None = None
        self._producer: Producer = make_client(
            Producer,
            {
                **client_properties(settings),
                "partitioner": "murmur2_random",
                "enable.idempotence": True,
                "linger.ms": 5,
            },
        )

    def publish(
        self,
        key: bytes | None,
        value: bytes | None,
        delivered: Delivered | None = None,
        *,
        timestamp_ms: int = _NOW,
    ) -> None:
        """Hand over one record; ``delivered(partition, offset)`` is called, in some later call, once Kafka has it.

        Raises :class:`NoteLLMError` if this or an earlier record could not be delivered.
        """

        def on_delivery(error: KafkaError | None, message: Message) -> None:
            if error is not None:
                self._failure = error
            elif delivered is not None:
                delivered(int(message.partition() or 0), int(message.offset() or 0))

        while True:
            try:
                self._producer.produce(
                    self._topic, key=key, value=value, timestamp=timestamp_ms, on_delivery=on_delivery
                )
                break
            except BufferError:
                self._producer.poll(0.1)
            except KafkaException as error:
                raise NoteLLMError(f"Kafka refuses the record with key {key!r}: {error.args[0].str()}") from None
        self._producer.poll(0)
        self._check()

    def flush(self, timeout_s: float = 30.0) -> None:
        """Wait until Kafka has everything. Raises :class:`NoteLLMError`."""
        left = self._producer.flush(timeout_s)
        self._check()
        if left:
            raise NoteLLMError(f"Kafka has not acknowledged {left} records within {timeout_s:.0f} s")

    def _check(self) -> None:
        if self._failure is not None:
            raise NoteLLMError(f"Kafka did not take a record: {self._failure.str()}")


class NotePublisher(RecordPublisher):
    """For the notes topic."""

    def __init__(self, settings: KafkaSettings) -> None:
        super().__init__(settings, settings.notes_topic)
