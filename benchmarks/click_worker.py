"""The click worker against a naive Faust table, on a real Kafka: ``python -m benchmarks.click_worker``.

Clicks are published first, so that workers run as fast as they can; the time counts from the first committed offset to
the last. The naive table runs on the same Kafka and the same clicks.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from confluent_kafka import OFFSET_BEGINNING, Consumer, KafkaException, Producer, TopicPartition
from rich.console import Console
from rich.table import Table

from notellm.clicks import Click, encode_click
from streams.day_row import add_click, row_key
from tests.support.kafka_server import KafkaServer

RESULTS = Path("build/benchmarks")
JARS = Path("build/servers/kafka/jars").absolute()
PYTHON = Path(".venv-streams/bin/python")
PARTITIONS = 4
ENTRIES = 500_000  # of the changelog that is recovered, besides those of the run
DAY_MS = 24 * 60 * 60 * 1000


def main(
    clicks: Annotated[int, typer.Option(min=20_000, help="Clicks of each run.")] = 200_000,
    rounds: Annotated[int, typer.Option(min=1, help="How often each is timed.")] = 3,
) -> None:
    """Clicks a second of one and two workers, of the naive table, bytes of the changelogs, and recovery."""
    console = Console()
    results: dict[str, Any] = {"clicks": clicks, "partitions": PARTITIONS, "cores": os.cpu_count(), "runs": []}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        kafka = KafkaServer(JARS, Path(folder) / "kafka")
        stack.callback(kafka.kill)
        kafka.start()
        kafka.create_topic("clicks", PARTITIONS)
        kafka.create_topic("clicks.dead-letter")
        publish(kafka.bootstrap_servers, clicks)
        results["load_before"] = os.getloadavg()
        for number in range(rounds):
            for kind, workers in (("ours", 1), ("naive", 1), ("ours", 2)):
                run = Run(kafka.bootstrap_servers, Path(folder), kind, f"{kind}{workers}-{number}", clicks)
                results["runs"].append({"kind": kind, "workers": workers, **run.measure(workers)})
                console.print(results["runs"][-1], highlight=False)
        results["load_after"] = os.getloadavg()
    table = Table(
        "what", "workers", "clicks/s", "CPU us/click", "changelog bytes/click", "recovery s/million entries", "MiB"
    )
    medians = {}
    for kind, workers in (("ours", 1), ("ours", 2), ("naive", 1)):
        runs = [run for run in results["runs"] if (run["kind"], run["workers"]) == (kind, workers)]
        median = {name: statistics.median(run[name] for run in runs) for name in runs[0] if name not in ("kind",)}
        medians[f"{kind}-{workers}"] = median
        recovery = f"{median['recovery_s_per_million']:.1f}" if "recovery_s_per_million" in median else ""
        table.add_row(
            kind, str(workers), f"{median['clicks_per_s']:,.0f}", f"{median['cpu_us_per_click']:.0f}",
            f"{median['changelog_bytes_per_click']:,.0f}",
            recovery, f"{median['rss_mib']:.0f}",
        )  # fmt: skip
    results["medians"] = medians
    console.print(table)
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "click_worker.json").write_text(json.dumps(results, indent=2) + "\n")


def publish(servers: str, number: int) -> None:
    """Users of long-tailed activity, 25 clicks each on average, in sessions, over three days."""
    draw = random.Random(5)
    users = max(number // 25, 1)
    weights = [1 / (rank + 10) ** 0.7 for rank in range(users)]
    chosen = draw.choices(range(users), weights, k=number)
    end = int(time.time() * 1000)
    producer = Producer({"bootstrap.servers": servers, "partitioner": "murmur2_random", "linger.ms": 20})
    for place, user in enumerate(chosen):
        at = end - 3 * DAY_MS + 3 * DAY_MS * place // number
        click = Click(user_id=f"user-{user}", note_id=f"note-{draw.randrange(10_000)}", clicked_at=at)
        while True:
            try:
                producer.produce("clicks", key=click.user_id, value=encode_click(click), timestamp=at)
                break
            except BufferError:
                producer.poll(0.1)
    assert producer.flush(60) == 0


class Run:
    """One kind of worker, from an empty disk and a group without offsets."""

    def __init__(self, servers: str, folder: Path, kind: str, app_id: str, clicks: int) -> None:
        self._servers = servers
        self._folder = folder
        self._kind = kind
        self._app_id = app_id
        self._clicks = clicks

    def measure(self, workers: int) -> dict[str, float]:
        with ExitStack() as stack:
            processes = [stack.enter_context(self._worker(f"{self._app_id}-{number}")) for number in range(workers)]
            seconds, cpu_s, done = self._wait([process.pid for process in processes])
            rss = max(_peak_mib(process.pid) for process in processes)
        records, size = self._changelog()
        measured = {
            "clicks_per_s": done / seconds,
            "cpu_us_per_click": cpu_s / done * 1e6,
            "changelog_bytes_per_click": size / self._clicks,
            "changelog_records_per_click": records / self._clicks,
            "rss_mib": rss,
        }
        if self._kind == "ours" and workers == 1:
            measured["recovery_s_per_million"] = self._recovery() / (records + ENTRIES) * 1e6
        return measured

    @contextmanager
    def _worker(self, name: str) -> Iterator[subprocess.Popen[bytes]]:
        folder = self._folder / name
        environment = {
            **os.environ,
            "NOTELLM_KAFKA_BOOTSTRAP_SERVERS": self._servers,
            "NOTELLM_STREAMS_CLICKS_TOPIC": "clicks",
            "NOTELLM_STREAMS_DEAD_LETTER_TOPIC": "clicks.dead-letter",
            "NOTELLM_STREAMS_APP_ID": self._app_id,
            "NOTELLM_STREAMS_DATA": str(folder),
            "NOTELLM_STREAMS_PORT": "0",
        }
        naive = ["benchmarks.peers.naive_clicks", self._servers, "clicks", self._app_id, str(folder), str(PARTITIONS)]
        module = naive if self._kind == "naive" else ["streams.app"]
        with (self._folder / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                [str(PYTHON.absolute()), "-m", *module], env=environment, stdout=log, stderr=subprocess.STDOUT
            )
        try:
            yield process
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _wait(self, pids: Sequence[int]) -> tuple[float, float, int]:
        """From the first committed offset to the last: seconds, the processes' seconds of CPU, and clicks."""
        settings = {"bootstrap.servers": self._servers, "group.id": self._app_id, "enable.auto.commit": False}
        with closing(Consumer(settings)) as consumer:
            began, cpu_s, first, deadline = 0.0, 0.0, 0, time.monotonic() + 600
            while time.monotonic() < deadline:
                places = [TopicPartition("clicks", partition) for partition in range(PARTITIONS)]
                with suppress(KafkaException):  # the group's coordinator is just being made
                    committed = sum(max(place.offset, 0) for place in consumer.committed(places, timeout=10))
                    if committed and not began:
                        began, cpu_s, first = time.monotonic(), _cpu_s(pids), committed
                    if committed == self._clicks:
                        return time.monotonic() - began, _cpu_s(pids) - cpu_s, self._clicks - first
                time.sleep(0.02)
        raise SystemExit(f"{self._app_id}: not done after 600 s; see its log")

    def _changelog(self) -> tuple[int, int]:
        """Records, and bytes of their keys and values."""
        settings = {"bootstrap.servers": self._servers, "group.id": "size", "enable.partition.eof": True}
        topic, records, size, ends = f"{self._app_id}-clicks-changelog", 0, 0, 0
        with closing(Consumer(settings)) as consumer:
            consumer.assign([TopicPartition(topic, partition, OFFSET_BEGINNING) for partition in range(PARTITIONS)])
            while ends < PARTITIONS:
                for message in consumer.consume(10_000, timeout=0.2):
                    if message.error() is not None:
                        ends += 1
                    else:
                        records += 1
                        size += len(message.key()) + len(message.value() or b"")
        return records, size

    def _recovery(self) -> float:
        """Seconds that a worker without a disk reads so many changelog entries, by its own log."""
        topic, day = f"{self._app_id}-clicks-changelog", int(time.time() * 1000) // DAY_MS
        producer = Producer({"bootstrap.servers": self._servers, "linger.ms": 20, "compression.type": "lz4"})
        for number in range(ENTRIES):
            user, row = f"user-{number // 3}", None
            for click in range(3):
                at = day * DAY_MS + 1000 * click
                row = add_click(row, Click(user_id=user, note_id=f"note-{number % 997}", clicked_at=at), 200).row
            while True:
                try:
                    producer.produce(topic, row, row_key(user, day - number % 3), partition=number // 3 % PARTITIONS)
                    break
                except BufferError:
                    producer.poll(0.1)
        assert producer.flush(60) == 0
        name = f"{self._app_id}-recovery"
        with self._worker(name):
            log = self._folder / f"{name}.log"
            deadline = time.monotonic() + 300
            while "the changelog is read" not in log.read_text() and time.monotonic() < deadline:
                time.sleep(0.1)
        return _seconds_between(log.read_text(), "partitions: 0, 1, 2, 3", "the changelog is read")


def _seconds_between(log: str, first: str, second: str) -> float:
    def at(words: str) -> datetime:
        found = re.search(rf"^(\S+ \S+) .*{re.escape(words)}", log, re.MULTILINE)
        assert found is not None, f"{words!r} is not in the log:\n{log}"
        return datetime.strptime(found[1], "%Y-%m-%d %H:%M:%S,%f")

    return (at(second) - at(first)).total_seconds()


def _cpu_s(pids: Sequence[int]) -> float:
    ticks = 0
    for pid in pids:
        user, system = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
        ticks += int(user) + int(system)
    return ticks / os.sysconf("SC_CLK_TCK")


def _peak_mib(pid: int) -> float:
    found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    return int(found[1]) / 1024 if found else 0.0


if __name__ == "__main__":
    typer.run(main)
