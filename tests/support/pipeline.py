"""A running pipeline on the embedded default, seen from outside: publish, watch, judge."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Self

import msgspec
from confluent_kafka import Consumer, TopicPartition
from pymilvus import MilvusClient

from commands.checker import Verdict, judge, read_dead_letters, read_rows
from commands.demo_script import Publication, demo_script
from commands.embedded import EmbeddedKafka, MilvusLite
from commands.ledger import Ledger, read_ledger
from commands.publisher import NotePublisher
from notellm.encoder import NoteEncoder
from notellm.messages import Note
from notellm.settings import load_settings
from tests.support.processes import CommandProcess, wait_until

__all__ = ["Pipeline", "note_publication", "script_of", "short_notes"]

_ENVIRONMENT = {
    # The built-in cluster forgets a member, even one that has left, only when its session is over.
    "NOTELLM_KAFKA_PROPERTIES": '{"session.timeout.ms": 6000, "heartbeat.interval.ms": 1000}',
    # Small batches and frequent commits: there is always something in flight, and something committed.
    "NOTELLM_UPDATER_BATCH_NOTES": "8",
    "NOTELLM_UPDATER_QUEUE_NOTES": "64",
    "NOTELLM_UPDATER_COMMIT_INTERVAL_S": "0.1",
}


class Pipeline:
    """Kafka, Milvus and a ledger; the updater is a process that the test starts, kills and starts again."""

    def __init__(self, folder: Path, kafka: EmbeddedKafka, milvus: MilvusLite, bundle: Path) -> None:
        self.folder = folder
        self.kafka = kafka
        self.milvus = milvus
        self.encoder = NoteEncoder.load(bundle, threads=1)
        self.bundle = bundle
        self._ledger = Ledger(folder / "ledger.jsonl", "notes")
        settings = load_settings(None, {"kafka.bootstrap_servers": kafka.bootstrap_servers})
        self._publisher = NotePublisher(settings.kafka)
        self.published: list[Publication] = []
        self._processes: list[CommandProcess] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._ledger.close()
        for process in self._processes:
            if process.is_running:
                process.kill()

    def start_updater(self) -> CommandProcess:
        updater = CommandProcess(
            self.folder / "updater.log",
            "update",
            *("--kafka", self.kafka.bootstrap_servers, "--milvus", self.milvus.uri, "--bundle", str(self.bundle)),
            cwd=self.folder,
            env=_ENVIRONMENT,
        )
        self._processes.append(updater)
        return updater

    def publish(self, *publications: Publication) -> None:
        """Returns once Kafka has acknowledged them and the ledger holds them."""
        for publication in publications:
            self._publish(publication)
        self._publisher.flush()

    def _publish(self, publication: Publication) -> None:
        def delivered(partition: int, offset: int) -> None:
            self._ledger.add(publication.key, publication.value, partition, offset, broken=publication.broken)

        self._publisher.publish(publication.key, publication.value, delivered)
        self.published.append(publication)

    def committed_share(self) -> float:
        """How much of what was published the updater's group has committed, 0 to 1."""
        committed = self._offsets()
        return sum(max(offset, 0) for offset in committed.values()) / max(len(self.published), 1)

    def wait_until_committed(self, share: float, seconds: float = 120.0) -> float:
        wait_until(lambda: self.committed_share() >= share, f"{share:.0%} to be committed", seconds)
        return self.committed_share()

    def judge(self) -> Verdict:
        """The demo's own checker, over everything that was published."""
        return judge(
            list(read_ledger(self.folder / "ledger.jsonl")),
            read_rows(self.milvus.uri, "notes"),
            read_dead_letters(self.kafka.bootstrap_servers, "notes.dead-letter"),
            self.encoder,
        )

    def _offsets(self) -> dict[int, int]:
        consumer = Consumer(
            {"bootstrap.servers": self.kafka.bootstrap_servers, "group.id": self._group, "log_level": 3}
        )
        partitions = [TopicPartition("notes", number) for number in range(4)]
        offsets = {found.partition: found.offset for found in consumer.committed(partitions, timeout=10)}
        consumer.close()
        return offsets

    @functools.cached_property
    def _group(self) -> str:
        client = MilvusClient(self.milvus.uri, timeout=10)
        name = f"notes_{self.encoder.model_version}"
        wait_until(lambda: client.has_collection(name), f"collection {name}")
        fill = client.describe_collection(name)["properties"]["notellm.fill"]
        client.close()
        return f"notellm.default.{name}.{fill}"


def short_notes(count: int) -> list[Note]:
    """Notes of a few words, all different."""
    return [
        Note(
            note_id=f"note-{number:04d}",
            title=f"Day {number} of the {('garden', 'sourdough', 'marathon', '旅行')[number % 4]} diary",
            content=f"entry {number}: " + "a little more each day " * (number % 5),
            hashtags=[f"day{number}"],
            category=("food", "travel", "", "somewhere else")[number % 4],
            published_at=1_700_000_000_000 + number,
            attributes={"author_id": f"a{number % 7}", "public": number % 2 == 0},
        )
        for number in range(count)
    ]


def note_publication(note: Note) -> Publication:
    return Publication(note.note_id.encode(), msgspec.json.encode(note))


def script_of(count: int) -> list[Publication]:
    """The demo's own mix of notes, edits, deletions and broken records."""
    return demo_script(short_notes(count))
