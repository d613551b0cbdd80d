"""The worker's own producers: the changelog and the dead letters. Each can tell when Kafka has all of it so far.

Faust's producer is not used for either: its flush gives up after a tenth of a second, a send that fails is a line in
its log, and in both cases the offsets are committed all the same.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from confluent_kafka import KafkaError, KafkaException, Message, Producer
from prometheus_client import Counter

from notellm.dead_letter import DeadLetter, Headers, dead_letter_headers
from notellm.errors import InvalidMessage
from notellm.settings import Settings
from streams.click_topics import changelog_topic, make_client
from streams.errors import WorkerError

__all__ = ["Changelog", "DeadLetters", "KafkaChangelog", "KafkaDeadLetters", "Source"]

log = logging.getLogger(__name__)

CHANGELOG_RECORDS = Counter("notellm_click_changelog_records_total", "Rows and tombstones written to the changelog.")
CHANGELOG_BYTES = Counter("notellm_click_changelog_bytes_total", "Bytes of their keys and values.")
DEAD_LETTERS = Counter("notellm_click_dead_letters_total", "Records sent to the clicks' dead-letter topic.", ["reason"])


class Source(Protocol):
    """A record as it came: Faust's message is one."""

    @property
    def topic(self) -> str: ...
    @property
    def partition(self) -> int: ...
    @property
    def offset(self) -> int: ...
    @property
    def key(self) -> bytes | None: ...
    @property
    def value(self) -> bytes | None: ...
    @property
    def headers(self) -> Any: ...


class Changelog(Protocol):
    def send(self, partition: int, key: bytes, row: bytes | None) -> None: ...

    def poll(self) -> bool:
        """Whether Kafka has all that was sent. Raises :class:`WorkerError` when it will never have it."""

    def last_offset(self, partition: int) -> int | None:
        """Of what Kafka has; None where nothing was sent."""


class DeadLetters(Protocol):
    def send(self, record: Source, error: InvalidMessage) -> None: ...

    def poll(self) -> int:
        """How many of those sent, counted from the first, Kafka has without a gap. Raises :class:`WorkerError`."""

    @property
    def sent(self) -> int: ...


class KafkaChangelog:
    """To the partitions of the same numbers as the clicks'. Kafka away for half a session is the end of it."""

    def __init__(self, settings: Settings) -> None:
        self._topic = changelog_topic(settings.streams)
        self._waiting = 0
        self._offsets: dict[int, int] = {}
        self._error: KafkaError | None = None
        self._producer: Producer = make_client(
            Producer,
            settings.kafka,
            {
                "acks": "all",
                # In order and once each, also when the client sends again by itself.
                "enable.idempotence": True,
                # A process that was asleep wakes up with rows in its queue, and with its partitions gone to another:
                # what could not be sent while they were surely its own must never be sent.
                "message.timeout.ms": settings.streams.session_timeout_s * 1000 // 2,
                "compression.type": "lz4",
                "queue.buffering.max.messages": 1_000_000,
            },
            user_wins=("compression.type",),
        )

    def send(self, partition: int, key: bytes, row: bytes | None) -> None:
        while True:
            try:
                self._producer.produce(
                    self._topic, partition=partition, key=key, value=row, on_delivery=self._delivered
                )
                break
            except BufferError:
                self._producer.poll(0.1)
        self._waiting += 1
        CHANGELOG_RECORDS.inc()
        CHANGELOG_BYTES.inc(len(key) + len(row or b""))

    def poll(self) -> bool:
        self._producer.poll(0)
        if self._error is not None:
            raise WorkerError(f"the changelog {self._topic} cannot be written: {self._error.str()}")
        return self._waiting == 0

    def last_offset(self, partition: int) -> int | None:
        return self._offsets.get(partition)

    def _delivered(self, error: KafkaError | None, message: Message) -> None:
        if error is not None:
            self._error = error
        else:
            self._waiting -= 1
            self._offsets[message.partition()] = message.offset()


@dataclass(frozen=True)
class _Letter(DeadLetter):
    number: int


class KafkaDeadLetters:
    """The record untouched, with headers behind its own that say where it was and what is wrong with it."""

    def __init__(self, settings: Settings) -> None:
        self.sent = 0
        self._topic = settings.streams.dead_letter_topic
        self._waiting: dict[int, None] = {}  # by number, so the oldest first
        self._again: list[_Letter] = []
        self._error: KafkaError | None = None
        self._producer: Producer = make_client(
            Producer,
            settings.kafka,
            {
                "partitioner": "murmur2_random",
                "acks": "all",
                "message.timeout.ms": 0,
                # The broker knows its topic's limit better than we do.
                "message.max.bytes": 100_000_000,
                # A broker holds its limit against a whole batch: one letter too large would take its neighbours along.
                "batch.num.messages": 1,
            },
            user_wins=("message.max.bytes",),
        )

    def send(self, record: Source, error: InvalidMessage) -> None:
        DEAD_LETTERS.labels(error.reason).inc()
        log.warning("dead letter: %s[%d]@%d: %s", record.topic, record.partition, record.offset, error)
        ours = dead_letter_headers(
            topic=record.topic,
            partition=record.partition,
            offset=record.offset,
            stage="VALUE_CONVERTER",
            reason=error.reason,
            error=error,
        )
        theirs = _pairs(record.headers)
        self._waiting[self.sent] = None
        self._produce(_Letter(record.key, record.value, theirs, tuple(ours), self.sent))
        self.sent += 1

    def poll(self) -> int:
        again, self._again = self._again, []
        for letter in again:
            self._produce(letter)
        self._producer.poll(0)
        if self._error is not None:
            raise WorkerError(f"dead letters cannot be written any more: {self._error.str()}")
        return next(iter(self._waiting), self.sent)

    def _produce(self, letter: _Letter) -> None:
        def on_delivery(error: KafkaError | None, message: Message) -> None:
            del message
            if error is None:
                del self._waiting[letter.number]
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
            self._error = error
            return
        smaller = letter.smaller() if error.code() == KafkaError.MSG_SIZE_TOO_LARGE else None
        if smaller is None:
            log.warning("dead letter could not be delivered, trying again: %s", error.str())
        self._again.append(smaller or letter)


def _pairs(headers: Mapping[str, bytes] | Sequence[tuple[str, bytes | None]] | None) -> Headers:
    return tuple(headers.items() if isinstance(headers, Mapping) else headers or ())
