"""The embedded default: a Kafka and a Milvus on loopback, with nothing to install.

Kafka is librdkafka's built-in cluster, inside this process: real TCP, real groups and commits, but everything in
memory, always 4 partitions per topic, about the last 5 MB of each. Milvus is a Milvus Lite server, a process of its own
with its data in a folder. A demo and a developer's desk, never durability.
"""

from __future__ import annotations

import logging
import socket
import subprocess
import sys
import time
from pathlib import Path

from confluent_kafka import Producer
from pymilvus import MilvusClient, MilvusException

from notellm.errors import NoteLLMError

__all__ = ["EmbeddedKafka", "MilvusLite", "free_port"]

_START_SECONDS = 60.0


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


class MilvusLite:
    """A Milvus Lite server in a process of its own, on loopback."""

    def __init__(self, data: Path, *, port: int = 0, log: Path) -> None:
        self.data = data
        self.log = log
        self.port = port or free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Returns once it answers. Raises :class:`NoteLLMError` with the end of its log when it does not."""
        self.data.mkdir(parents=True, exist_ok=True)
        self.log.parent.mkdir(parents=True, exist_ok=True)
        command = [Path(sys.executable).parent / "milvus-lite", "server", "--data-dir", self.data]
        with self.log.open("ab") as output:
            self._process = subprocess.Popen(
                [*map(str, command), "--host", "127.0.0.1", "--port", str(self.port)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                # Ctrl-C in the terminal is for us; we end the server when nobody writes to it any more.
                start_new_session=True,
            )
        deadline = time.monotonic() + _START_SECONDS
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                tail = "\n".join(self.log.read_text("utf-8", "replace").splitlines()[-5:])
                raise NoteLLMError(f"Milvus Lite did not start on port {self.port}; the end of {self.log}:\n{tail}")
            time.sleep(0.1)

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def kill(self) -> None:
        """As ``kill -9``: for tests of what survives."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def stop(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                self.kill()

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
