"""Click workers on a real Kafka: killed, restarted, replaced and made to fail, and what is left is what the rules say.

The log is read by hand in :mod:`tests.support.click_log`, which knows nothing of the program.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Literal
from urllib.request import urlopen
from uuid import uuid4

import pytest
from confluent_kafka import Consumer, KafkaException, TopicPartition

from commands.embedded import free_port
from notellm.settings import KafkaSettings, Settings, StreamsSettings
from streams.refresh import Refresh, refresh
from streams.rules import DAY_MS
from tests.conftest import REPOSITORY, missing
from tests.streams.formula import Pair, formula, read_pairs
from tests.support.click_log import (
    BOT,
    Draft,
    Limits,
    Reading,
    click_log,
    latest_rows,
    publish,
    read_by_hand,
    read_topic,
    rows_of,
)
from tests.support.click_worker import PYTHON, ClickWorkerProcess, rows_on_disk
from tests.support.kafka_server import KafkaServer
from tests.support.processes import wait_until

pytestmark = pytest.mark.integration

PARTITIONS = 4
RECORDS = 3000
LIMITS = Limits()
# The log ends now, but for clocks that are a minute ahead.
AS_OF = int(time.time() * 1000) + 3_600_000
UNEXPECTED, STALLED = 70, 75
SLOW = {"TEST_SECONDS_PER_CLICK": "0.003"}
_CONNECT = "__connect.errors."


class Clicks:
    """Topics of one test, and its workers, each with a folder of its own."""

    def __init__(self, folder: Path, kafka: KafkaServer) -> None:
        self.kafka = kafka
        self.topic = f"clicks-{uuid4().hex[:8]}"
        self.changelog = f"{self.topic}-clicks-changelog"
        self._folder = folder
        self._started: list[ClickWorkerProcess] = []

    def start(self, folder: str, **environment: str) -> ClickWorkerProcess:
        worker = ClickWorkerProcess(
            self._folder / f"{folder}-{len(self._started)}.log",
            {
                "NOTELLM_KAFKA_BOOTSTRAP_SERVERS": self.kafka.bootstrap_servers,
                "NOTELLM_STREAMS_CLICKS_TOPIC": self.topic,
                "NOTELLM_STREAMS_DEAD_LETTER_TOPIC": f"{self.topic}.dead-letter",
                "NOTELLM_STREAMS_APP_ID": self.topic,
                "NOTELLM_STREAMS_DATA": str(self.disk(folder)),
                "NOTELLM_STREAMS_WINDOW_DAYS": str(LIMITS.window_days),
                "NOTELLM_STREAMS_ALLOWED_LATENESS_S": str(LIMITS.lateness_ms // 1000),
                "NOTELLM_STREAMS_FUTURE_TOLERANCE_S": str(LIMITS.tolerance_ms // 1000),
                "NOTELLM_STREAMS_CLICKS_PER_DAY": str(LIMITS.clicks_per_day),
                "NOTELLM_STREAMS_SESSION_TIMEOUT_S": "6",
                **environment,
            },
        )
        self._started.append(worker)
        return worker

    def disk(self, folder: str) -> Path:
        return self._folder / folder

    def create_topics(self) -> None:
        # The log is of the last six days.
        self.kafka.create_topic(self.topic, PARTITIONS, {"retention.ms": "-1"})
        self.kafka.create_topic(f"{self.topic}.dead-letter")

    def publish(self, log: list[Draft]) -> Reading:
        """Returns what is to become of it."""
        publish(self.kafka.bootstrap_servers, self.topic, log)
        records = read_topic(self.kafka.bootstrap_servers, self.topic, PARTITIONS)
        assert len(records) == len(log)
        return read_by_hand(records, LIMITS)

    def committed(self) -> dict[int, int]:
        properties = {"bootstrap.servers": self.kafka.bootstrap_servers, "group.id": self.topic}
        with closing(Consumer(properties)) as consumer:
            places = [TopicPartition(self.topic, partition) for partition in range(PARTITIONS)]
            try:
                return {place.partition: max(place.offset, 0) for place in consumer.committed(places, timeout=10)}
            except KafkaException:
                return dict.fromkeys(range(PARTITIONS), 0)  # nobody has made the group yet

    def wait_until_committed(self, number: int, seconds: float = 60.0) -> None:
        wait_until(lambda: sum(self.committed().values()) >= number, f"{number} committed records", seconds)

    def rows(self) -> dict[bytes, bytes]:
        return latest_rows(read_topic(self.kafka.bootstrap_servers, self.changelog, PARTITIONS))

    def judge(self, expected: Reading) -> None:
        """All is committed: the changelog has what is left, and the dead letters are who they should be."""
        assert rows_of(self.rows()) == expected.left
        places = set()
        for letter in read_topic(self.kafka.bootstrap_servers, f"{self.topic}.dead-letter", 1):
            headers = dict(letter.headers)
            place = [(headers[_CONNECT + name] or b"").decode() for name in ("topic", "partition", "offset")]
            places.add((place[0], int(place[1]), int(place[2])))
            assert headers["notellm.reason"]
        assert places == expected.dead_letters

    def pairs(self, source: Literal["changelog", "topic"]) -> list[Pair]:
        """Those of a refresh that reads what the workers, or whoever published, left."""
        limits = {
            "clicks_topic": self.topic,
            "app_id": self.topic,
            "window_days": LIMITS.window_days,
            "allowed_lateness_s": LIMITS.lateness_ms // 1000,
            "future_tolerance_s": LIMITS.tolerance_ms // 1000,
            "clicks_per_day": LIMITS.clicks_per_day,
        }
        settings = Settings(
            kafka=KafkaSettings(bootstrap_servers=self.kafka.bootstrap_servers), streams=StreamsSettings(**limits)
        )
        notes = REPOSITORY / "data" / "notes.jsonl"
        window = f"{LIMITS.window_days}d"
        out = self._folder / source
        snapshot = refresh(
            Refresh(out=out, source=source, notes=notes, window=window, as_of=AS_OF, settings=settings, threads=2)
        )
        return read_pairs(snapshot.pairs_path)

    def end(self) -> None:
        for worker in self._started:
            worker.kill()


@pytest.fixture
def clicks(tmp_path: Path, kafka_server: KafkaServer) -> Iterator[Clicks]:
    if not PYTHON.exists():
        missing(".venv-streams is not there; make it with: make streams")
    running = Clicks(tmp_path, kafka_server)
    running.create_topics()
    yield running
    running.end()


def has_partitions(worker: ClickWorkerProcess) -> bool:
    return any(f"partitions: {partition}" in worker.text() for partition in range(PARTITIONS))


def test_workers_are_killed_and_others_take_over(clicks: Clicks) -> None:
    log = click_log(RECORDS, LIMITS)
    expected = clicks.publish(log)
    for kind in ("dead_letters", "forgets", "late", "future", "duplicates", "forgotten", "evicted", "expired"):
        assert len(getattr(expected, kind)) > RECORDS // 100, f"the log has hardly any {kind}"
    assert len(expected.left) > RECORDS // 10
    assert any(user == BOT for user, _, _ in expected.left)

    first, second = clicks.start("first", **SLOW), clicks.start("second", **SLOW)
    wait_until(lambda: has_partitions(first) and has_partitions(second), "both to have partitions")
    clicks.wait_until_committed(len(log) // 5)
    first.kill()
    on_its_own_disk = clicks.start("first", **SLOW)
    wait_until(lambda: has_partitions(on_its_own_disk), "the restarted one to have partitions")
    second.kill()
    assert sum(clicks.committed().values()) < len(log) * 4 // 5, "killed too late to prove anything"
    on_an_empty_disk = clicks.start("third")
    clicks.wait_until_committed(len(log))
    wait_until(lambda: has_partitions(on_an_empty_disk), "the new one to have partitions")
    clicks.judge(expected)
    assert (on_its_own_disk.stop(), on_an_empty_disk.stop()) == (0, 0)
    for source in ("changelog", "topic"):
        assert clicks.pairs(source) == formula(
            click for click in expected.left if AS_OF - LIMITS.window_days * DAY_MS <= click[2] < AS_OF
        )

    # Whoever comes next finds all of it in the changelog.
    heir = clicks.start("heir")
    heir.wait_for("the changelog is read")
    assert heir.stop() == 0
    assert rows_on_disk(clicks.disk("heir")) == clicks.rows()


def test_an_error_in_the_agent_ends_the_worker_before_it_commits(clicks: Clicks) -> None:
    log = click_log(RECORDS // 2, LIMITS, seed=2)
    place = len(log) // 2
    marked = Draft(
        b"user", log[-1].value.replace(b"last-39", b"user").replace(b'"note-', b'"marked-'), log[-1].timestamp
    )  # type: ignore[union-attr]
    log.insert(place, marked)
    expected = clicks.publish(log)
    (where,) = [kept for kept, click in expected.accepted.items() if click[1].startswith("marked-")]

    failing = clicks.start("worker", TEST_FAIL_ON="marked-")
    assert failing.wait(60) == UNEXPECTED
    assert f"{where[0]}[{where[1]}]@{where[2]}" in failing.text(), "the line says where"
    assert clicks.committed()[where[1]] <= where[2]

    port = free_port()
    mended = clicks.start("worker", NOTELLM_STREAMS_PORT=str(port))
    clicks.wait_until_committed(len(log))
    with urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
        assert b'notellm_clicks_total{outcome="accepted"}' in answer.read()
    assert mended.stop() == 0
    assert sum(clicks.committed().values()) == len(log)
    clicks.judge(expected)
    assert rows_on_disk(clicks.disk("worker")) == clicks.rows()


@pytest.mark.long
def test_a_worker_that_was_asleep_does_not_write_over_its_heir(clicks: Clicks) -> None:
    """Stopped for longer than its session, it still has clicks in memory; another one has its partitions."""
    log = click_log(RECORDS // 2, LIMITS, seed=3)
    expected = clicks.publish(log)
    sleeper = clicks.start("sleeper", **SLOW)
    clicks.wait_until_committed(len(log) // 4)
    sleeper.send_signal(signal.SIGSTOP)
    assert sum(clicks.committed().values()) < len(log), "asleep too late to prove anything"
    heir = clicks.start("heir")
    clicks.wait_until_committed(len(log))
    sleeper.send_signal(signal.SIGCONT)
    assert sleeper.wait(30) == UNEXPECTED
    assert "did nothing for" in sleeper.text() or "cannot be written" in sleeper.text()
    clicks.judge(expected)
    assert heir.stop() == 0


@pytest.mark.long
def test_a_worker_that_hangs_ends_itself(clicks: Clicks) -> None:
    log = click_log(50, LIMITS)
    clicks.publish(log)
    hung = clicks.start("hung", TEST_SECONDS_PER_CLICK="3600", NOTELLM_STREAMS_STALL_S="4")
    assert hung.wait(60) == STALLED
    assert "streams.stall_s" in hung.text()
    assert sum(clicks.committed().values()) == 0


def test_topics_that_are_not_there_are_one_line(clicks: Clicks) -> None:
    for name, topic in (("CLICKS", "absent-clicks"), ("DEAD_LETTER", "absent-letters")):
        worker = ClickWorkerProcess(
            clicks.disk(f"{name}.log"),
            {
                "NOTELLM_KAFKA_BOOTSTRAP_SERVERS": clicks.kafka.bootstrap_servers,
                "NOTELLM_STREAMS_CLICKS_TOPIC": clicks.topic,
                "NOTELLM_STREAMS_DEAD_LETTER_TOPIC": f"{clicks.topic}.dead-letter",
                "NOTELLM_STREAMS_DATA": str(clicks.disk("unused")),
                f"NOTELLM_STREAMS_{name}_TOPIC": topic,
            },
            module="streams.app",
        )
        assert worker.wait(60) == 1
        assert worker.text() == (
            f"error: topic '{topic}' on {clicks.kafka.bootstrap_servers} is not there; create it first\n"
        )
