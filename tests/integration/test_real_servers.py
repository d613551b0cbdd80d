"""The servers that other tests stand on: they are real, they are ours alone, and they keep what they acknowledged."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from contextlib import closing
from uuid import uuid4

import pytest
from confluent_kafka import Consumer, KafkaException, Producer, TopicPartition
from confluent_kafka.admin import AdminClient, ConfigResource, ResourceType
from pymilvus import MilvusClient, MilvusException

from tests.support.kafka_server import KafkaServer
from tests.support.milvus_server import MilvusServer
from tests.support.processes import wait_until
from tests.support.tcp_proxy import TcpProxy

pytestmark = pytest.mark.integration


@pytest.fixture
def topic(kafka_server: KafkaServer) -> Iterator[str]:
    name = f"smoke-{uuid4().hex[:8]}"
    kafka_server.create_topic(name, 3, {"cleanup.policy": "compact", "min.cleanable.dirty.ratio": "0.01"})
    yield name
    kafka_server.delete_topic(name)


def produce(kafka: KafkaServer, topic: str, *records: tuple[str, str | None]) -> None:
    producer = Producer({"bootstrap.servers": kafka.bootstrap_servers, "acks": "all"})
    failures = []
    for key, value in records:
        producer.produce(topic, key=key, value=value, on_delivery=lambda error, _: failures.append(error))
    assert producer.flush(30) == 0
    assert failures == [None] * len(records)


def consume(kafka: KafkaServer, topic: str, count: int) -> dict[str, str | None]:
    consumer = Consumer(
        {"bootstrap.servers": kafka.bootstrap_servers, "group.id": "smoke", "auto.offset.reset": "error"}
    )
    with closing(consumer):
        consumer.assign([TopicPartition(topic, number, 0) for number in range(3)])
        read: dict[str, str | None] = {}
        deadline = time.monotonic() + 30
        while len(read) < count and time.monotonic() < deadline:
            message = consumer.poll(1.0)
            if message is not None:
                assert message.error() is None
                value = message.value()
                read[message.key().decode()] = None if value is None else value.decode()
    return read


def test_what_was_produced_is_consumed_and_the_topic_has_its_own_settings(
    kafka_server: KafkaServer, topic: str
) -> None:
    produce(kafka_server, topic, ("n1", "one"), ("n2", "zwei"), ("n3", None))
    assert consume(kafka_server, topic, 3) == {"n1": "one", "n2": "zwei", "n3": None}
    admin = AdminClient({"bootstrap.servers": kafka_server.bootstrap_servers})
    (answer,) = admin.describe_configs([ConfigResource(ResourceType.TOPIC, topic)]).values()
    settings = {name: entry.value for name, entry in answer.result(10).items()}
    assert settings["cleanup.policy"] == "compact"
    assert settings["min.cleanable.dirty.ratio"] == "0.01"


def test_a_topic_that_was_deleted_is_gone(kafka_server: KafkaServer) -> None:
    name = f"smoke-{uuid4().hex[:8]}"
    kafka_server.create_topic(name)
    kafka_server.delete_topic(name)
    with pytest.raises(KafkaException, match="UNKNOWN_TOPIC"):
        kafka_server.delete_topic(name)


def test_kafka_keeps_its_records_through_a_restart_and_a_kill(kafka_server: KafkaServer, topic: str) -> None:
    produce(kafka_server, topic, ("n1", "before"))
    kafka_server.restart()
    produce(kafka_server, topic, ("n2", "between"))
    kafka_server.kill()
    kafka_server.start()
    produce(kafka_server, topic, ("n3", "after"))
    assert consume(kafka_server, topic, 3) == {"n1": "before", "n2": "between", "n3": "after"}


def test_milvus_keeps_its_rows_through_a_restart(milvus_server: MilvusServer) -> None:
    name = f"smoke_{uuid4().hex[:8]}"

    def stored(client: MilvusClient) -> list[dict[str, object]]:
        found = client.query(name, "id >= 0", output_fields=["id", "title"], consistency_level="Strong", timeout=10)
        return sorted((dict(each) for each in found), key=lambda row: int(row["id"]))

    with closing(MilvusClient(milvus_server.uri, timeout=10)) as client:
        client.create_collection(name, dimension=2)
        client.upsert(name, [{"id": 1, "vector": [0, 1], "title": "before"}])
        client.upsert(name, [{"id": 1, "vector": [1, 0], "title": "Kyoto"}, {"id": 2, "vector": [0, 1], "title": ""}])
        assert stored(client) == [{"id": 1, "title": "Kyoto"}, {"id": 2, "title": ""}]
        milvus_server.restart()

    with closing(MilvusClient(milvus_server.uri, timeout=10)) as client:

        def there() -> bool:
            try:
                return stored(client) == [{"id": 1, "title": "Kyoto"}, {"id": 2, "title": ""}]
            except MilvusException:
                return False  # it loads its collections again

        wait_until(there, "the rows to be there again")
        ((best,),) = client.search(name, data=[[0.9, 0.1]], limit=1, consistency_level="Strong")
        assert best.id == 1
        client.drop_collection(name)


def test_nothing_but_loopback_is_in_our_network(request: pytest.FixtureRequest) -> None:
    if os.environ.get("TEST_KAFKA") or os.environ.get("TEST_MILVUS"):
        pytest.skip("the machine's own network is asked for")
    request.getfixturevalue("milvus_server")  # or it says what is missing
    assert [name for _, name in socket.if_nameindex()] == ["lo"]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as outward, pytest.raises(OSError, match="unreachable"):
        outward.connect(("192.0.2.1", 9))


def test_a_line_can_hang_go_on_and_be_cut() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, TcpProxy("127.0.0.1", server.getsockname()[1]) as line:
        client = socket.create_connection((line.host, line.port), timeout=5)
        accepted, _ = server.accept()
        with client, accepted:
            accepted.settimeout(5)
            client.sendall(b"ping")
            assert accepted.recv(16) == b"ping"
            accepted.sendall(b"pong")
            assert client.recv(16) == b"pong"
            line.stop_forwarding()
            client.sendall(b"held up")
            accepted.settimeout(0.3)
            with pytest.raises(TimeoutError):
                accepted.recv(16)
            line.resume()
            accepted.settimeout(5)
            assert accepted.recv(16) == b"held up"
            line.cut()
            assert client.recv(16) == b""
            assert accepted.recv(16) == b""
        client = socket.create_connection((line.host, line.port), timeout=5)
        accepted, _ = server.accept()
        with client, accepted:
            client.sendall(b"again")
            assert accepted.recv(16) == b"again"
