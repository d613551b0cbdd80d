"""A running pipeline on whatever servers, seen from outside: publish, watch, judge."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, Self

import msgspec
from confluent_kafka import Consumer, KafkaError, KafkaException, TopicPartition
from pymilvus import MilvusClient

from commands.checker import BundleReference, Reference, Verdict, judge, read_dead_letters, read_rows
from commands.demo_script import Publication, demo_script
from commands.ledger import Ledger, LedgerEntry, read_ledger
from commands.publisher import NotePublisher
from notellm.encoder import NoteEncoder
from notellm.messages import Note
from notellm.settings import load_settings
from tests.support.processes import CommandProcess, wait_until
from tests.support.reference import HashReference

__all__ = ["Pipeline", "Program", "bundle_program", "hash_program", "note_publication", "script_of", "short_notes"]

_ENVIRONMENT = {
    # The built-in cluster forgets a member, even one that has left, only when its session is over.
    "NOTELLM_KAFKA_PROPERTIES": '{"session.timeout.ms": 6000, "heartbeat.interval.ms": 1000}',
    # Small batches and frequent commits: there is always something in flight, and something committed.
    "NOTELLM_UPDATER_BATCH_NOTES": "8",
    "NOTELLM_UPDATER_QUEUE_NOTES": "64",
    "NOTELLM_UPDATER_COMMIT_INTERVAL_S": "0.1",
    "NOTELLM_OPERATIONS_PORT": "0",
}
_REPOSITORY = Path(__file__).parent.parent.parent


class Brokers(Protocol):
    bootstrap_servers: str


class MilvusServer(Protocol):
    uri: str


@dataclass(frozen=True)
class Program:
    """An updater to run, and what the judge knows of its model."""

    module: str
    arguments: tuple[str, ...]
    reference: Reference


def bundle_program(bundle: Path) -> Program:
    """``notellm update`` with a real bundle."""
    reference = BundleReference(NoteEncoder.load(bundle, threads=1))
    return Program("commands", ("update", "--bundle", str(bundle)), reference)


def hash_program(**arguments: object) -> Program:
    """The same service with the deterministic test encoder, which is as fast as a test likes."""
    known = {name: value for name, value in arguments.items() if name in ("model_version", "embedding_dim")}
    reference = HashReference(**known)  # type: ignore[arg-type]
    return Program("tests.support.updater", (msgspec.json.encode(arguments).decode(),), reference)


class Pipeline:
    """Kafka, Milvus and a ledger; updaters are processes that the test starts, kills and starts again.

    ``name`` is the topic's, and begins those of the dead letters, the collections and the alias.
    """

    def __init__(
        self,
        folder: Path,
        kafka: Brokers,
        milvus: MilvusServer,
        program: Program,
        *,
        name: str = "notes",
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.folder = folder
        self.kafka = kafka
        self.milvus = milvus
        self.program = program
        self.topic = name
        self.dead_letter_topic = f"{name}.dead-letter"
        self.alias = name.replace("-", "_")
        self._environment = {
            **_ENVIRONMENT,
            "PYTHONPATH": str(_REPOSITORY),
            "NOTELLM_KAFKA_BOOTSTRAP_SERVERS": kafka.bootstrap_servers,
            "NOTELLM_KAFKA_NOTES_TOPIC": self.topic,
            "NOTELLM_KAFKA_DEAD_LETTER_TOPIC": self.dead_letter_topic,
            "NOTELLM_MILVUS_URI": milvus.uri,
            "NOTELLM_MILVUS_COLLECTION_PREFIX": self.alias,
            "NOTELLM_MILVUS_ALIAS": self.alias,
            **(environment or {}),
        }
        self._ledger = Ledger(folder / "ledger.jsonl", self.topic)
        settings = load_settings(
            None, {"kafka.bootstrap_servers": kafka.bootstrap_servers, "kafka.notes_topic": self.topic}
        )
        self._publisher = NotePublisher(settings.kafka)
        self.published: list[Publication] = []
        self.updaters: list[CommandProcess] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._ledger.close()
        for updater in self.updaters:
            if updater.is_running:
                updater.kill()

    def start_updater(self, program: Program | None = None, **environment: str) -> CommandProcess:
        """``environment`` is this one's alone."""
        chosen = program or self.program
        updater = CommandProcess(
            self.folder / f"updater-{len(self.updaters)}.log",
            *chosen.arguments,
            module=chosen.module,
            cwd=self.folder,
            env={**self._environment, **environment},
        )
        self.updaters.append(updater)
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

    def committed(self, reference: Reference | None = None) -> dict[int, int]:
        """Of each partition, what the group of this model's updaters has committed; absent where that is nothing."""
        consumer = Consumer(
            {
                "bootstrap.servers": self.kafka.bootstrap_servers,
                "group.id": self.group(reference or self.program.reference),
                "log_level": 3,
            }
        )
        try:
            count = len(consumer.list_topics(self.topic, timeout=10).topics[self.topic].partitions)
            partitions = [TopicPartition(self.topic, number) for number in range(count)]
            offsets = {found.partition: found.offset for found in consumer.committed(partitions, timeout=10)}
        except KafkaException as error:
            if error.args[0].code() != KafkaError.NOT_COORDINATOR:
                raise
            return {}  # a broker that has just started: nothing is committed yet
        finally:
            consumer.close()
        return {partition: offset for partition, offset in offsets.items() if offset >= 0}

    def committed_share(self, reference: Reference | None = None) -> float:
        """How much of what was published is committed, 0 to 1."""
        return sum(self.committed(reference).values()) / max(len(self.published), 1)

    def wait_until_committed(self, share: float, seconds: float = 120.0, reference: Reference | None = None) -> float:
        def done() -> bool:
            return self.committed_share(reference) >= share

        wait_until(done, f"{share:.0%} to be committed", seconds)
        return self.committed_share(reference)

    def entries(self) -> list[LedgerEntry]:
        return list(read_ledger(self.folder / "ledger.jsonl"))

    def judge(self, reference: Reference | None = None, collection: str = "") -> Verdict:
        """The demo's own checker, over everything that was published; reads the alias, or another ``collection``."""
        return judge(
            self.entries(),
            read_rows(self.milvus.uri, collection or self.alias),
            read_dead_letters(self.kafka.bootstrap_servers, self.dead_letter_topic),
            reference or self.program.reference,
        )

    def collection(self, reference: Reference) -> str:
        return f"{self.alias}_{reference.model_version}"

    def group(self, reference: Reference) -> str:
        """Waits until the collection is there, whose present filling the group is named after."""
        name = self.collection(reference)
        client = MilvusClient(self.milvus.uri, timeout=10)
        try:
            wait_until(lambda: client.has_collection(name), f"collection {name}")
            fill = client.describe_collection(name)["properties"]["notellm.fill"]
        finally:
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
