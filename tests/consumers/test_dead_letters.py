"""Against librdkafka's built-in cluster."""

from __future__ import annotations

import time
from dataclasses import replace
from threading import Event

import pytest
from confluent_kafka import Consumer, Message, TopicPartition

from commands.embedded import EmbeddedKafka
from consumers.dead_letters import KafkaDeadLetters
from consumers.partitioner import murmur2_partition
from consumers.protocols import Record
from notellm.errors import InvalidMessage
from notellm.settings import KafkaSettings

pytestmark = pytest.mark.integration

RECORD = Record("notes", 3, 17, 1, b"n1", b'{"note_id":7}', (("trace", b"\x00\xff"), ("trace", None), ("x", b"")))
ERROR = InvalidMessage("bad_id", "note_id", "Expected `str`, got `int`")
OURS = [
    ("__connect.errors.topic", b"notes"),
    ("__connect.errors.partition", b"3"),
    ("__connect.errors.offset", b"17"),
    ("__connect.errors.connector.name", b"notellm"),
    ("__connect.errors.task.id", b"0"),
    ("__connect.errors.stage", b"VALUE_CONVERTER"),
    ("__connect.errors.class.name", b"notellm.errors.InvalidMessage"),
    ("__connect.errors.exception.class.name", b"notellm.errors.InvalidMessage"),
    ("__connect.errors.exception.message", b"note_id: Expected `str`, got `int`"),
    ("notellm.reason", b"bad_id"),
    ("notellm.model_version", b"0123456789abcdef"),
]


def send(kafka: EmbeddedKafka, *records: Record, **properties: int) -> None:
    """Returns once all are delivered."""
    settings = KafkaSettings(bootstrap_servers=kafka.bootstrap_servers, properties=properties)
    dead_letters = KafkaDeadLetters(settings, "0123456789abcdef")
    delivered = [Event() for _ in records]
    for record, event in zip(records, delivered, strict=True):
        dead_letters.send(record, stage="VALUE_CONVERTER", reason="bad_id", error=ERROR, delivered=event.set)
        assert not event.is_set(), "it is safe before it was polled for"
    deadline = time.monotonic() + 20
    while not all(event.is_set() for event in delivered):
        assert time.monotonic() < deadline, "the dead letters do not arrive"
        dead_letters.poll()
        time.sleep(0.005)


def dead_letters_of(kafka: EmbeddedKafka, count: int) -> list[Message]:
    consumer = Consumer({"bootstrap.servers": kafka.bootstrap_servers, "group.id": "test"})
    consumer.assign([TopicPartition("notes.dead-letter", partition, 0) for partition in range(4)])
    found: list[Message] = []
    deadline = time.monotonic() + 20
    while len(found) < count:
        assert time.monotonic() < deadline, f"only {len(found)} of {count} dead letters came"
        message = consumer.poll(0.05)
        if message is not None:
            assert message.error() is None
            found.append(message)
    assert consumer.poll(0.2) is None, "there are more than were sent"
    consumer.close()
    return found


def test_a_dead_letter_is_the_record_untouched_with_connects_headers_behind_its_own(
    embedded_kafka: EmbeddedKafka,
) -> None:
    send(embedded_kafka, RECORD)
    (letter,) = dead_letters_of(embedded_kafka, 1)
    assert (letter.key(), letter.value()) == (b"n1", b'{"note_id":7}')
    assert letter.headers() == [*RECORD.headers, *OURS]
    assert letter.partition() == murmur2_partition(b"n1", 4)


def test_a_record_without_key_value_and_headers_is_a_dead_letter_too(embedded_kafka: EmbeddedKafka) -> None:
    send(embedded_kafka, replace(RECORD, key=None, value=None, headers=()))
    (letter,) = dead_letters_of(embedded_kafka, 1)
    assert (letter.key(), letter.value(), letter.headers()) == (None, None, OURS)


def test_one_that_is_too_large_goes_without_its_value_and_says_so(embedded_kafka: EmbeddedKafka) -> None:
    send(embedded_kafka, replace(RECORD, value=b"x" * 5000), **{"message.max.bytes": 2000})
    (letter,) = dead_letters_of(embedded_kafka, 1)
    assert (letter.key(), letter.value()) == (b"n1", None)
    assert letter.headers() == [*RECORD.headers, *OURS, ("notellm.value.omitted.bytes", b"5000")]


@pytest.mark.parametrize(
    "large", [{"key": b"k" * 5000, "value": None}, {"headers": (("trace", b"t" * 5000),)}], ids=["key", "headers"]
)
def test_one_that_is_too_large_even_without_its_value_still_says_where_it_came_from(
    embedded_kafka: EmbeddedKafka, large: dict[str, object]
) -> None:
    send(embedded_kafka, replace(RECORD, **large), **{"message.max.bytes": 2000})
    (letter,) = dead_letters_of(embedded_kafka, 1)
    assert (letter.key(), letter.value()) == (None, None)
    assert [header for header in letter.headers() if header[0] != "notellm.value.omitted.bytes"] == OURS


def test_a_full_queue_of_the_client_loses_none(embedded_kafka: EmbeddedKafka) -> None:
    records = [replace(RECORD, offset=offset) for offset in range(50)]
    send(embedded_kafka, *records, **{"queue.buffering.max.messages": 3})
    letters = dead_letters_of(embedded_kafka, 50)
    assert {int(dict(letter.headers())["__connect.errors.offset"]) for letter in letters} == set(range(50))
