"""A real Spark standalone cluster on loopback: a master and two workers, from the jars of the PySpark package."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pyspark

from commands.embedded import free_port
from commands.server_process import ServerProcess
from notellm.errors import NoteLLMError

__all__ = ["SparkCluster"]

_JARS = Path(pyspark.__file__).parent / "jars"
_MAIN = "org.apache.spark.deploy.{0}.{1}"
# As bin/spark-class of the package gives them on Java 17.
_OPENED = (
    "java.lang",
    "java.lang.invoke",
    "java.nio",
    "java.util",
    "java.util.concurrent",
    "sun.nio.ch",
    "sun.security.action",
)


class _Process(ServerProcess):
    def __init__(self, kind: str, log: Path, *arguments: str, ready: str) -> None:
        super().__init__(f"Spark {kind}", log)
        self._arguments = arguments
        self._kind = kind
        self._ready = ready

    def start(self) -> None:
        opened = [f"--add-opens=java.base/{name}=ALL-UNNAMED" for name in _OPENED]
        command = [
            "java", "-Xmx256m", "-XX:TieredStopAtLevel=1", *opened, "-cp", f"{_JARS}/*",
            _MAIN.format(self._kind.lower(), self._kind), *self._arguments,
        ]  # fmt: skip
        # Workers start their executors as the scripts of the package do.
        env = {
            **os.environ,
            "SPARK_HOME": str(_JARS.parent),
            "SPARK_LOCAL_IP": "127.0.0.1",
            "SPARK_SCALA_VERSION": "2.13",
        }
        self._run(command, lambda: self._ready in self.text(), cwd=self.log.parent, env=env)

    def text(self) -> str:
        return self.log.read_text("utf-8", "replace")


class SparkCluster:
    """``start`` returns once both workers have registered."""

    def __init__(self, folder: Path, workers: int = 2) -> None:
        port = free_port()
        self.master = f"spark://127.0.0.1:{port}"
        ends = ("--host", "127.0.0.1", "--webui-port", "0")
        self._master = _Process("Master", folder / "master.log", *ends, "--port", str(port), ready="New state: ALIVE")
        self._workers = [
            _Process(
                "Worker", folder / f"worker-{number}.log", *ends, "--cores", "1", "--memory", "1g",
                "--work-dir", str(folder / f"worker-{number}"), self.master,
                ready="Successfully registered with master",
            )
            for number in range(workers)
        ]  # fmt: skip

    def start(self) -> None:
        try:
            self._master.start()
            for worker in self._workers:
                worker.start()
        except NoteLLMError:
            self.kill()
            raise

    def executors(self) -> set[str]:
        """The workers that have run an executor, by the master's own log."""
        return set(re.findall(r"Launching executor \S+ on worker (\S+)", self._master.text()))

    def kill(self) -> None:
        for process in (*self._workers, self._master):
            process.kill()
