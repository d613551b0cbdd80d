"""Dead letters to Kafka: the record as it came, with headers that say what was wrong with it."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from confluent_kafka import KafkaError, KafkaException, Message, Producer
from prometheus_client import Counter

from consumers.errors import UpdaterError
from consumers.kafka_client import client_properties, make_client
from consumers.protocols import Record
from notellm.dead_letter import DeadLetter, dead_letter_headers
from notellm.settings import KafkaSettings

__all__ = ["KafkaDeadLetters"]

log = logging.getLogger(__name__)

DEAD_LETTERS = Counter("notellm_dead_letters_total", "Records sent to the dead-letter topic.", ["reason"])


@dataclass(frozen=True)
class _Letter(DeadLetter):
    delivered: Callable[[], None]


class KafkaDeadLetters:
    """See :class:`consumers.protocols.DeadLetters`. Waits for the brokers without end: no dead letter is dropped."""

    def __init__(self, settings: KafkaSettings, model_version: str) -> None:
        self._topic = settings.dead_letter_topic
        self._model_version = model_version
        self._again: deque[_Letter] = deque()
        self._producer: Producer = make_client(
            Producer,
            {
                # The broker knows its topic's limit better than we do; whoever knows it too may lower this.
                "message.max.bytes": 100_000_000,
                **client_properties(settings),
                "partitioner": "murmur2_random",
                "acks": "all",
                "message.timeout.ms": 0,
                # A broker holds its limit against a whole batch: one letter too large would take its neighbours along.
                "batch.num.messages": 1,
            },
        )

    def send(self, record: Record, *, stage: str, reason: str, error: Exception, delivered: Callable[[], None]) -> None:
        DEAD_LETTERS.labels(reason).inc()
        log.warning("dead letter: %s[%d]@%d: %s", record.topic, record.partition, record.offset, error)
        ours = dead_letter_headers(
            topic=record.topic,
            partition=record.partition,
            offset=record.offset,
            stage=stage,
            reason=reason,
            error=error,
            model_version=self._model_version,
        )
        self._produce(_Letter(record.key, record.value, record.headers, tuple(ours), delivered))

    def poll(self) -> None:
        for _ in range(len(self._again)):
            self._produce(self._again.popleft())
        self._producer.poll(0)

    def _produce(self, letter: _Letter) -> None:
        def on_delivery(error: KafkaError | None, message: Message) -> None:
            del message
            if error is None:
                letter.delivered()
            else:
                self._recover(letter, error)

        try:
            self._producer.produce(
                self._topic,
                key=letter.key,
                value=letter.value,
                headers=[*letter.theirs, *letter.ours],
                on_delivery=on_delivery,
            )
        except BufferError:
            self._again.append(letter)  # the client's own queue is full
        except KafkaException as error:
            self._recover(letter, error.args[0])

    def _recover(self, letter: _Letter, error: KafkaError) -> None:
        """A letter that is too large never blocks its partition; all else is tried again at the next poll."""
        if error.fatal() or error.code() == KafkaError._FATAL:  # noqa: SLF001 - that is its public name
            raise UpdaterError(f"dead letters cannot be written any more: {error.str()}")
        smaller = letter.smaller() if error.code() == KafkaError.MSG_SIZE_TOO_LARGE else None
        if smaller is None:
            log.warning("dead letter could not be delivered, trying again: %s", error.str())
        self._again.append(smaller or letter)
