"""Notes that end the encoder's process, on a real Kafka and a real Milvus: each costs itself and nobody else."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from confluent_kafka import Consumer, TopicPartition
from msgspec.structs import replace
from pymilvus import MilvusClient

from commands.demo_script import Publication
from commands.embedded import free_port
from notellm.dead_letter import REASON
from tests.support.kafka_server import KafkaServer
from tests.support.milvus_server import MilvusServer
from tests.support.operations import ask, members, metric
from tests.support.pipeline import Pipeline, hash_program, note_publication, short_notes
from tests.support.processes import CommandProcess, wait_until
from tests.support.settled import settled_verdict

pytestmark = pytest.mark.integration

NEIGHBOURS = 100
PARTITIONS = 3
# Room for Python and the test encoder, in MiB; "take all memory" wants thousands of times as much.
MEMORY_LIMIT = "1024"

# The title that does it -> what the restarts are counted as.
KILLERS = {"segfault": "SIGSEGV", "kill the tokenizer": "SIGSEGV", "take all memory": "memory"}

Place = tuple[str, int, int]


@dataclass(frozen=True)
class Letter:
    key: bytes | None
    value: bytes | None
    reason: str


@dataclass
class Running:
    """A pipeline with one updater that has its partitions."""

    pipeline: Pipeline
    updater: CommandProcess
    port: int
    group: str
    members: Mapping[str, list[int]]

    def restarts(self) -> Mapping[str, float]:
        return metric(self.port, "notellm_encoder_restarts_total")

    def wait_until_done(self) -> None:
        """Everything is committed; meanwhile the updater never says that it should be restarted."""

        def done() -> bool:
            status, reasons = ask(self.port, "/healthz")
            assert status == 200, reasons
            return self.pipeline.committed_share() >= 1.0

        wait_until(done, "everything to be committed", 180)

    def letters(self) -> dict[Place, Letter]:
        return read_letters(self.pipeline)

    def assert_it_stayed_in_its_group(self) -> None:
        assert members(self.pipeline.kafka.bootstrap_servers, self.group) == self.members
        log = self.updater.text()
        assert log.count(" assigned ") == 1, "it joined its group once"
        assert "revocation" not in log, "and never left it"
        assert "lost to the group" not in log


@pytest.fixture
def running(tmp_path: Path, kafka_server: KafkaServer, milvus_server: MilvusServer) -> Iterator[Running]:
    name = f"killers-{uuid4().hex[:8]}"
    kafka_server.create_topic(name, PARTITIONS, {"cleanup.policy": "compact"})
    kafka_server.create_topic(f"{name}.dead-letter")
    port = free_port()
    environment = {"NOTELLM_ENCODER_MEMORY_LIMIT_MB": MEMORY_LIMIT, "NOTELLM_OPERATIONS_PORT": str(port)}
    with Pipeline(
        tmp_path, kafka_server, milvus_server, hash_program(), name=name, environment=environment
    ) as pipeline:
        updater = pipeline.start_updater()
        updater.wait_for(" assigned ")
        group = pipeline.group(pipeline.program.reference)
        then = members(kafka_server.bootstrap_servers, group)
        assert list(then.values()) == [[0, 1, 2]]
        yield Running(pipeline, updater, port, group, then)
        assert updater.stop() == 0


def among_neighbours(*killers: Publication) -> list[Publication]:
    neighbours = [note_publication(note) for note in short_notes(NEIGHBOURS)]
    return [*neighbours[: NEIGHBOURS // 2], *killers, *neighbours[NEIGHBOURS // 2 :]]


def killer(title: str, *, broken: bool = True) -> Publication:
    note = replace(short_notes(1)[0], note_id="killer", title=title)
    return replace(note_publication(note), broken=broken)


def read_letters(pipeline: Pipeline) -> dict[Place, Letter]:
    consumer = Consumer(
        {
            "bootstrap.servers": pipeline.kafka.bootstrap_servers,
            "group.id": "killers",
            "enable.auto.commit": False,
            "log_level": 3,
        }
    )
    place = TopicPartition(pipeline.dead_letter_topic, 0, 0)
    _, end = consumer.get_watermark_offsets(place, timeout=10)
    consumer.assign([place])
    letters: dict[Place, Letter] = {}
    for message in consumer.consume(end, timeout=30):
        assert message.error() is None
        headers = {name: bytes(value or b"").decode() for name, value in message.headers()}
        topic, partition, offset = (headers[f"__connect.errors.{name}"] for name in ("topic", "partition", "offset"))
        letters[topic, int(partition), int(offset)] = Letter(message.key(), message.value(), headers[REASON])
    consumer.close()
    assert len(letters) == end
    return letters


def place_of(pipeline: Pipeline, publication: Publication) -> Place:
    (entry,) = [one for one in pipeline.entries() if (one.key, one.value) == (publication.key, publication.value)]
    return entry.topic, entry.partition, entry.offset


@pytest.mark.parametrize("title", KILLERS)
def test_a_killer_costs_itself_alone(running: Running, title: str) -> None:
    pipeline = running.pipeline
    assert ask(running.port, "/readyz")[0] == 200
    pipeline.publish(*among_neighbours(killer(title)))
    running.wait_until_done()
    letter = Letter(killer(title).key, killer(title).value, "model_refused")
    assert running.letters() == {place_of(pipeline, killer(title)): letter}
    verdict = settled_verdict(pipeline)
    assert verdict.faults == []
    assert verdict.searchable == NEIGHBOURS
    assert set(running.restarts()) == {KILLERS[title]}
    assert running.restarts()[KILLERS[title]] >= 2, "once among its neighbours, or more, and twice alone"
    wait_until(lambda: ask(running.port, "/readyz")[0] == 200, "the updater to be ready again", 30)
    running.assert_it_stayed_in_its_group()


def test_a_killer_that_is_an_edit_leaves_the_earlier_version(running: Running) -> None:
    pipeline = running.pipeline
    earlier = killer("a harmless title", broken=False)
    pipeline.publish(earlier)
    running.wait_until_done()
    row = the_row(pipeline)
    pipeline.publish(*among_neighbours(killer("segfault"), killer("take all memory")))
    running.wait_until_done()
    assert {place: letter.reason for place, letter in running.letters().items()} == {
        place_of(pipeline, killer("segfault")): "model_refused",
        place_of(pipeline, killer("take all memory")): "model_refused",
    }
    verdict = settled_verdict(pipeline)
    assert verdict.faults == []
    assert verdict.searchable == NEIGHBOURS + 1
    assert the_row(pipeline) == row
    assert set(running.restarts()) == {"SIGSEGV", "memory"}
    running.assert_it_stayed_in_its_group()


def test_a_crash_at_the_tags_leaves_the_note_searchable_without_them(running: Running) -> None:
    pipeline = running.pipeline
    # It is a dead letter and a row, which the judge has no word for: all that it finds must be about this note.
    publication = killer("segfault at the tags", broken=False)
    pipeline.publish(*among_neighbours(publication))
    running.wait_until_done()
    place = place_of(pipeline, publication)
    assert running.letters() == {place: Letter(publication.key, publication.value, "tags_refused")}
    row = the_row(pipeline)
    assert (row["title"], row["generated_hashtags"], row["generated_category"]) == ("segfault at the tags", [], "")
    assert row["source_offset"] == place[2]
    assert row["text_hash"] == "", "the next edit is tried again"
    verdict = settled_verdict(pipeline)
    assert verdict.searchable == NEIGHBOURS + 1
    assert verdict.wrong_vectors == 0
    assert [fault for fault in verdict.faults if not fault.startswith("stale: killer: text_hash is ''")] == [
        f"unexpected_dead_letters: {place} is a dead letter, and was not broken"
    ]
    assert running.restarts()["SIGSEGV"] >= 2
    wait_until(lambda: ask(running.port, "/readyz")[0] == 200, "the updater to be ready again", 30)
    running.assert_it_stayed_in_its_group()


def the_row(pipeline: Pipeline) -> dict[str, Any]:
    """All that Milvus has of the killer, as plain values."""
    with closing(MilvusClient(pipeline.milvus.uri, timeout=10)) as client:
        (row,) = client.query(
            pipeline.alias, filter='note_id == "killer"', output_fields=["*"], consistency_level="Strong"
        )
        arrays = ("embedding", "hashtags", "generated_hashtags")
        return {name: [*row[name]] if name in arrays else row[name] for name in row}
