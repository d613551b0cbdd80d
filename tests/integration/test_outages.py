"""Kafka and Milvus go away, are killed and hang, while notes are published: nothing is lost, and freshness recovers."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from uuid import uuid4

import grpc
import pytest
from pymilvus import MilvusClient, MilvusException
from rich.console import Console
from rich.table import Table

from commands.embedded import free_port
from notellm.messages import Note
from tests.conftest import REPOSITORY
from tests.support.kafka_server import KafkaServer
from tests.support.load import Load
from tests.support.milvus_server import MilvusServer
from tests.support.operations import ask, members
from tests.support.pipeline import Pipeline, hash_program, note_publication
from tests.support.processes import CommandProcess, wait_until
from tests.support.settled import settled_verdict
from tests.support.tcp_proxy import TcpProxy
from tests.support.watch import CommitWatch

pytestmark = pytest.mark.integration

PARTITIONS = 3
_BEFORE_S, _AFTER_S = 2.0, 5.0
# What timed out in a hang reaches Milvus when it ends: the judge comes a while after that.
_LATE_S = 3.0


@dataclass(frozen=True)
class Size:
    """``records``: published around each outage, at least."""

    name: str
    outages: tuple[str, ...]
    rate: float
    records: int
    hang_s: float
    environment: Mapping[str, str]


# A group forgets a member that it has not heard of for session.timeout.ms, and the broker is away for seconds: as it is
# by default. Where Kafka is there all the time, it forgets soon; and a poller that waits for Milvus is thrown out.
PATIENT_GROUP: dict[str, int] = {}
STRICT_GROUP = {"session.timeout.ms": 6000, "heartbeat.interval.ms": 1000, "max.poll.interval.ms": 10_000}

KAFKA = ("Kafka restarted", "Kafka killed (-9)")
MILVUS = ("Milvus restarted", "Milvus killed (-9)")

SHORT = Size(
    "short",
    outages=(KAFKA[1],),  # after a restart Milvus alone takes a minute and a half
    rate=40,
    records=0,
    hang_s=12,
    environment={"NOTELLM_MILVUS_TIMEOUT_S": "3"},
)
FULL = Size(
    "full",
    outages=KAFKA + MILVUS,
    rate=40,
    records=2000,
    hang_s=60,
    environment={  # as they are by default
        "NOTELLM_UPDATER_BATCH_NOTES": "32",
        "NOTELLM_UPDATER_QUEUE_NOTES": "256",
        "NOTELLM_UPDATER_COMMIT_INTERVAL_S": "1",
    },
)


@dataclass
class Row:
    """One outage in the table. Seconds count from its end, the moment that the server answers again."""

    outage: str
    lasted_s: float = 0.0
    records: int = 0
    behind: int = 0
    answers_s: float = 0.0
    lag_gone_s: float = 0.0
    searchable_s: float = 0.0
    fresh_s: float = 0.0
    joins: int = 0
    live: int = 0
    dead_letters: int = 0
    faults: list[str] = field(default_factory=list)


COLUMNS = {
    "lasted_s": "lasted, s",
    "records": "published around it",
    "behind": "lag at its end",
    "answers_s": "Milvus answers a search after, s",
    "lag_gone_s": "that lag gone after, s",
    "searchable_s": "new note searchable after, s",
    "fresh_s": "note published later, s",
    "joins": "rebalances",
    "live": "notes live",
    "dead_letters": "dead letters",
    "faults": "faults",
}


@dataclass
class Scene:
    pipeline: Pipeline
    kafka: KafkaServer
    milvus: MilvusServer
    line: TcpProxy
    size: Size
    rows: list[Row] = field(default_factory=list)
    port: int = field(default_factory=free_port)

    @contextmanager
    def updater(self, milvus: str, group: Mapping[str, int]) -> Iterator[CommandProcess]:
        environment = {
            "NOTELLM_OPERATIONS_PORT": str(self.port),
            "NOTELLM_MILVUS_URI": milvus,
            "NOTELLM_KAFKA_PROPERTIES": json.dumps(group),
            **self.size.environment,
        }
        updater = self.pipeline.start_updater(None, **environment)
        updater.wait_for(" assigned ")
        yield updater
        assert updater.stop() == 0

    def measure(self, outage: str, updater: CommandProcess, strike: Callable[[], None], felt: str) -> None:
        """``strike`` breaks something and returns once it works again; ``felt`` must then stand in the log."""
        pipeline, row = self.pipeline, Row(outage)
        self.rows.append(row)
        group = pipeline.group(pipeline.program.reference)
        then, said = members(self.kafka.bootstrap_servers, group), len(updater.text())
        before = len(pipeline.published)
        load = Load(pipeline, f"{len(self.rows)}", self.size.rate)
        load.start()
        time.sleep(_BEFORE_S)
        began = time.monotonic()
        strike()
        ended = time.monotonic()
        row.lasted_s = ended - began
        published = len(pipeline.published)
        with ThreadPoolExecutor() as pool:
            answered = pool.submit(self.answers)
            caught_up = pool.submit(self.lag_gone, published, row)
            found = pool.submit(self.searchable, f"{len(self.rows)}-first")
            row.answers_s = answered.result() - ended
            row.lag_gone_s, row.searchable_s = caught_up.result() - ended, found.result() - ended
        time.sleep(max(ended + _AFTER_S - time.monotonic(), 0))
        load.finish(self.size.records)
        pipeline.wait_until_committed(1.0, seconds=180)
        wait_until(lambda: ask(self.port, "/readyz")[0] == 200, "the updater to be ready", 30)
        began = time.monotonic()
        row.fresh_s = self.searchable(f"{len(self.rows)}-second") - began
        pipeline.wait_until_committed(1.0)
        row.records = len(pipeline.published) - before
        time.sleep(_LATE_S)
        verdict = settled_verdict(pipeline)
        row.live, row.dead_letters, row.faults = verdict.live, verdict.dead_letters, verdict.faults
        log = updater.text()[said:]
        row.joins = log.count(" assigned ") + log.count("lost to the group")
        if members(self.kafka.bootstrap_servers, group) != then:
            row.faults.append("the member has left the group")
        if felt not in log:
            row.faults.append(f"no {felt!r} in the log: nothing was proved")
        if "maximum poll interval" in log.lower():
            row.faults.append("the poller did not turn")

    def lag_gone(self, published: int, row: Row) -> float:
        """When all is committed that was published by the end of the outage."""
        wait_until(lambda: len(self.pipeline.entries()) >= published, "Kafka to have what was published")
        ends: dict[int, int] = {}
        for entry in self.pipeline.entries():
            ends[entry.partition] = max(ends.get(entry.partition, 0), entry.offset + 1)

        def behind() -> int:
            committed = self.pipeline.committed()
            return sum(max(end - committed.get(partition, 0), 0) for partition, end in ends.items())

        row.behind = behind()
        wait_until(lambda: behind() == 0, "the lag to be gone", 180)
        return time.monotonic()

    def searchable(self, name: str) -> float:
        """Publishes a note; returns when a search for it finds it."""
        note = Note(note_id=f"probe-{name}", title=f"probe {name}", published_at=1)
        vector = self.pipeline.program.reference.embed([note])[0].tolist()
        self.pipeline.publish(note_publication(note))
        wait_until(lambda: self.nearest(vector) == note.note_id, f"{note.note_id} to be searchable", 180)
        return time.monotonic()

    def answers(self) -> float:
        """When Milvus answers a reader that has nothing to do with us."""
        wait_until(lambda: self.nearest([1.0] + [0.0] * 7) is not None, "Milvus to answer a search", 180)
        return time.monotonic()

    def nearest(self, vector: list[float]) -> str | None:
        """None: Milvus is away, or loads its collections again."""
        try:
            with closing(MilvusClient(self.milvus.uri, timeout=2)) as client:
                ((best, *_),) = client.search(
                    self.pipeline.alias, data=[vector], limit=1, consistency_level="Strong", timeout=2
                )
        except (MilvusException, grpc.RpcError):
            time.sleep(0.2)  # to ask all the time would not make it any faster
            return None
        return str(best.id)

    def hang(self) -> None:
        """Begins in the middle of a burst: there are writes under way, and they time out."""
        notes = [Note(note_id=f"burst-{number}", title=f"burst {number}", published_at=1) for number in range(200)]
        self.pipeline.publish(*map(note_publication, notes))
        time.sleep(0.3)
        self.line.stop_forwarding()
        time.sleep(self.size.hang_s)
        self.line.resume()


@pytest.fixture
def scene(
    request: pytest.FixtureRequest, tmp_path: Path, kafka_server: KafkaServer, milvus_server: MilvusServer
) -> Iterator[Scene]:
    name = f"outages-{uuid4().hex[:8]}"
    kafka_server.create_topic(name, PARTITIONS, {"cleanup.policy": "compact"})
    kafka_server.create_topic(f"{name}.dead-letter")
    host, port = milvus_server.uri.removeprefix("http://").split(":")
    with (
        Pipeline(tmp_path, kafka_server, milvus_server, hash_program(seconds_per_note=0.004), name=name) as pipeline,
        TcpProxy(host, int(port)) as line,
    ):
        yield Scene(pipeline, kafka_server, milvus_server, line, request.getfixturevalue("size"))


@pytest.mark.parametrize(
    "size", [pytest.param(SHORT, id="short"), pytest.param(FULL, id="full", marks=pytest.mark.long)]
)
def test_nothing_is_lost_and_freshness_recovers(
    scene: Scene, size: Size, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL, "pymilvus")  # its tracebacks of each call while Milvus is away
    try:
        with scene.updater(scene.milvus.uri, PATIENT_GROUP) as updater:
            for outage in size.outages:
                server, felt = (scene.kafka, "Kafka: ") if outage in KAFKA else (scene.milvus, "waiting for Milvus")
                scene.measure(
                    outage, updater, server.restart if "restarted" in outage else kill_and_start(server), felt
                )
        with (
            scene.updater(f"http://{scene.line.address}", STRICT_GROUP) as updater,
            CommitWatch(scene.pipeline) as watch,
        ):
            scene.measure(f"Milvus hangs {size.hang_s:.0f} s", updater, scene.hang, "waiting for Milvus")
        scene.rows[-1].faults += watch.faults
    finally:
        with capsys.disabled():
            write_table(scene)
    assert watch.looks >= 3
    assert [row.faults for row in scene.rows] == [[]] * (len(size.outages) + 1)
    assert {row.joins for row in scene.rows} == {0}


def kill_and_start(server: KafkaServer | MilvusServer) -> Callable[[], None]:
    def strike() -> None:
        server.kill()
        server.start()

    return strike


def write_table(scene: Scene) -> None:
    """On the terminal, and as text and as JSON into build/outages/."""
    table = Table(title=f"Outages under a load of {scene.size.rate:.0f} records/s, one updater")
    table.add_column("outage")
    for title in COLUMNS.values():
        table.add_column(title, justify="right")
    for row in scene.rows:
        values = {**asdict(row), "faults": len(row.faults)}
        cells = [f"{value:.1f}" if isinstance(value := values[name], float) else str(value) for name in COLUMNS]
        table.add_row(row.outage, *cells)
    console = Console(width=170, record=True)
    console.print()
    console.print(table)
    folder = REPOSITORY / "build" / "outages"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{scene.size.name}.txt").write_text(console.export_text(), "utf-8")
    report = {
        "size": asdict(scene.size),
        "load_average": os.getloadavg(),
        "outages": [asdict(row) for row in scene.rows],
    }
    (folder / f"{scene.size.name}.json").write_text(json.dumps(report, indent=2) + "\n", "utf-8")
