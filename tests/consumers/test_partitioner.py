from __future__ import annotations

import pytest
from confluent_kafka import Message, Producer

from commands.embedded import EmbeddedKafka
from consumers.partitioner import murmur2, murmur2_partition


@pytest.mark.parametrize(
    ("key", "java"),
    [
        (b"21", -973932308),
        (b"foobar", -790332482),
        (b"a-little-bit-long-string", -985981536),
        (b"a-little-bit-longer-string", -1486304829),
        (b"lkjh234lh9fiuh90y23oiuhsafujhadof229phr9h19h89h8", -58897971),
        (b"abc", 479470107),
    ],
)
def test_murmur2_is_that_of_javas_client(key: bytes, java: int) -> None:
    """The vectors of org.apache.kafka.common.utils.UtilsTest, which are signed."""
    assert murmur2(key) == java % 2**32


def test_librdkafka_puts_keys_on_the_same_partitions(embedded_kafka: EmbeddedKafka) -> None:
    keys = [f"note-{number}".encode() for number in range(60)]
    keys += [("京都" * number).encode() for number in range(1, 10)] + [b"\xff\x80\x00", b" ", b"n\xc3\xa9"]
    placed: dict[bytes, int] = {}

    def delivered(error: object, message: Message) -> None:
        assert error is None
        placed[message.key()] = message.partition()

    producer = Producer({"bootstrap.servers": embedded_kafka.bootstrap_servers, "partitioner": "murmur2_random"})
    for key in keys:
        producer.produce("notes", key=key, value=b"{}", on_delivery=delivered)
    assert producer.flush(10) == 0
    assert placed == {key: murmur2_partition(key, 4) for key in keys}
    assert set(placed.values()) == {0, 1, 2, 3}
