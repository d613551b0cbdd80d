"""The embedded default: a Kafka and a Milvus on loopback, with nothing to install.

Kafka is librdkafka's built-in cluster, inside this process: real TCP, real groups and commits, but everything in
memory, always 4 partitions per topic, about the last 5 MB of each. Milvus is a Milvus Lite server, a process of its own
with its data in a folder. A demo and a developer's desk, never durability.
"""

from __future__ import annotations

import logging
import socket
import sys
from pathlib import Path

from confluent_kafka import Producer
from pymilvus import MilvusClient, MilvusException

from commands.server_process import ServerProcess

__all__ = ["EmbeddedKafka", "MilvusLite", "free_port"]


class EmbeddedKafka:
    """librdkafka's built-in cluster. It lives as long as this object."""

    def __init__(self) -> None:
        # The address is ignored: the property replaces it with the built-in cluster's own.
        self._cluster = Producer(
            {"test.mock.num.brokers": 1, "bootstrap.servers": "embedded:1", "log_level": 3},
            logger=logging.getLogger("consumers.librdkafka"),
        )
        broker = next(iter(self._cluster.list_topics(timeout=10).brokers.values()))
        self.bootstrap_servers = f"{broker.host}:{broker.port}"

    def create_topics(self, *names: str) -> None:
        """A topic is created when its metadata is asked for."""
        for name in names:
            self._cluster.list_topics(name, timeout=10)


class MilvusLite(ServerProcess):
    """A Milvus Lite server in a process of its own, on loopback."""

    def __init__(self, data: Path, *, port: int = 0, log: Path) -> None:
        self.data = data
        self.port = port or free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        super().__init__(f"Milvus Lite (port {self.port})", log, stop_seconds=10.0)

    def start(self) -> None:
        self.data.mkdir(parents=True, exist_ok=True)
        program = Path(sys.executable).parent / "milvus-lite"
        self._run(
            [program, "server", "--data-dir", self.data, "--host", "127.0.0.1", "--port", str(self.port)],
            self._answers,
        )

    def _answers(self) -> bool:
        with socket.socket() as probe:
            probe.settimeout(0.2)
            if probe.connect_ex(("127.0.0.1", self.port)) != 0:
                return False
        try:
            client = MilvusClient(self.uri, timeout=2)
        except MilvusException:
            return False
        client.close()
        return True


def free_port() -> int:
    """A loopback port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
