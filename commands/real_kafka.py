"""One real Apache Kafka broker (KRaft) on loopback. ``make servers`` fetches its jars; it needs Java 17 or newer."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from confluent_kafka import KafkaException
from confluent_kafka.admin import AdminClient

from commands.embedded import free_port
from commands.server_process import ServerProcess
from notellm.errors import NoteLLMError

__all__ = ["RealKafka", "fetched_jars"]

_SETTINGS = """\
process.roles=broker,controller
node.id=1
controller.listener.names=CONTROLLER
controller.quorum.voters=1@127.0.0.1:{controller_port}
listeners=PLAINTEXT://127.0.0.1:{port},CONTROLLER://127.0.0.1:{controller_port}
advertised.listeners=PLAINTEXT://127.0.0.1:{port}
log.dirs={data}
# One broker: nothing can have two copies.
offsets.topic.replication.factor=1
offsets.topic.num.partitions=4
transaction.state.log.replication.factor=1
transaction.state.log.min.isr=1
transaction.state.log.num.partitions=4
share.coordinator.state.topic.replication.factor=1
share.coordinator.state.topic.min.isr=1
# After a kill -9 the next start waits until the killed one's session is over.
broker.session.timeout.ms=3000
broker.heartbeat.interval.ms=500
# Nobody waits for a second member.
group.initial.rebalance.delay.ms=0
auto.create.topics.enable=false
"""


class RealKafka(ServerProcess):
    """Its data, its settings and its log are in ``folder``."""

    def __init__(self, jars: Path, folder: Path) -> None:
        super().__init__("Kafka", folder / "kafka.log")
        self.folder = folder.resolve()
        self._jars = jars.resolve()  # the server runs in its folder
        self._port, self._controller_port = free_port(), free_port()
        self.bootstrap_servers = f"127.0.0.1:{self._port}"

    def start(self) -> None:
        settings = self.folder / "server.properties"
        if not settings.exists():
            self._format(settings)
        admin = self._admin()
        command = self._java("-Xmx512m", "kafka.Kafka", str(settings))
        self._run(command, lambda: self._answers(admin), cwd=self.folder)

    def _format(self, settings: Path) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        text = _SETTINGS.format(port=self._port, controller_port=self._controller_port, data=self.folder / "data")
        unformatted = settings.with_suffix(".new")
        unformatted.write_text(text)
        # Any 16 bytes in URL-safe base64 are a cluster's id.
        arguments = ("kafka.tools.StorageTool", "format", "-t", "bm90ZWxsbS10ZXN0cy0wMQ", "-c", str(unformatted))
        done = subprocess.run(self._java(*arguments), capture_output=True, text=True, timeout=60, check=False)
        if done.returncode != 0:
            raise NoteLLMError(f"Kafka's storage could not be formatted:\n{done.stdout}{done.stderr}")
        unformatted.rename(settings)

    def _java(self, *arguments: str) -> list[str]:
        return [
            "java", "-Dorg.slf4j.simpleLogger.defaultLogLevel=warn", "-Dorg.slf4j.simpleLogger.showDateTime=true",
            "-XX:TieredStopAtLevel=1",  # a few minutes of work do not pay for the second compiler
            "-cp", f"{self._jars}/*", *arguments,
        ]  # fmt: skip

    def _admin(self) -> AdminClient:
        # log_level: a broker that is just starting, or was just killed, is no news.
        return AdminClient(
            {"bootstrap.servers": self.bootstrap_servers, "log_level": 0, "reconnect.backoff.max.ms": 500}
        )

    def _answers(self, admin: AdminClient) -> bool:
        try:
            return bool(admin.list_topics(timeout=0.5).brokers)
        except KafkaException:
            return False


def fetched_jars(folder: Path) -> Path:
    """Where ``make servers`` puts Kafka's jars. Raises :class:`NoteLLMError` that says what is missing."""
    if shutil.which("java") is None:
        raise NoteLLMError("no java for a real Kafka; install version 17 or newer, or name a Kafka of yours: --kafka")
    if not (folder / "ready").exists():
        raise NoteLLMError(f"{folder} is not there; fetch Kafka's jars with: make servers, or name a Kafka: --kafka")
    return folder / "jars"
