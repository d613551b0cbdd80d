"""Two models beside each other on a real Kafka and a real Milvus: each fills its own collection, undisturbed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from uuid import uuid4

import msgspec
import pytest
from confluent_kafka.admin import AdminClient
from pymilvus import MilvusClient

from commands.demo_script import Publication
from tests.support.kafka_server import KafkaServer
from tests.support.milvus_server import MilvusServer
from tests.support.pipeline import Pipeline, Program, hash_program, note_publication, script_of, short_notes
from tests.support.processes import wait_until
from tests.support.settled import settled_verdict

pytestmark = pytest.mark.integration

NOTES = 300
PARTITIONS = 4
OTHER = hash_program(model_version="fedcba9876543210", embedding_dim=16)
ASSIGNED = " assigned "
AGAIN = "creating and filling it again"


@pytest.fixture
def partitions() -> int:
    return PARTITIONS


@pytest.fixture
def pipeline(
    tmp_path: Path, kafka_server: KafkaServer, milvus_server: MilvusServer, partitions: int
) -> Iterator[Pipeline]:
    name = f"models-{uuid4().hex[:8]}"
    kafka_server.create_topic(name, partitions, {"cleanup.policy": "compact"})
    kafka_server.create_topic(f"{name}.dead-letter")
    with Pipeline(tmp_path, kafka_server, milvus_server, hash_program(), name=name) as running:
        yield running


def assert_complete(pipeline: Pipeline, program: Program) -> None:
    verdict = settled_verdict(pipeline, program.reference)
    assert verdict.faults == []
    assert verdict.live > NOTES // 2
    assert verdict.deleted >= NOTES // 20
    assert verdict.dead_letters == sum(one.broken for one in pipeline.published) > 0


def alias_target(pipeline: Pipeline) -> str:
    with closing(MilvusClient(pipeline.milvus.uri, timeout=10)) as client:
        return str(client.describe_alias(pipeline.alias)["collection_name"])


def drop(pipeline: Pipeline, collection: str) -> None:
    """As an operator would: a server does not drop a collection that an alias points at."""
    with closing(MilvusClient(pipeline.milvus.uri, timeout=30)) as client:
        for alias in client.list_aliases(collection)["aliases"]:
            client.drop_alias(alias)
        client.drop_collection(collection)
        assert not client.has_collection(collection)


def members(pipeline: Pipeline, group: str) -> int:
    admin = AdminClient({"bootstrap.servers": pipeline.kafka.bootstrap_servers, "log_level": 0})
    return len(admin.describe_consumer_groups([group])[group].result(10).members)


def edits(count: int, edition: int) -> list[Publication]:
    notes = short_notes(count)
    return [note_publication(msgspec.structs.replace(note, title=f"{note.title}, edition {edition}")) for note in notes]


def test_second_model_fills_its_own_collection_from_the_beginning(pipeline: Pipeline) -> None:
    first, other = pipeline.program, OTHER
    a = pipeline.start_updater()
    pipeline.publish(*script_of(NOTES))
    a.wait_for(ASSIGNED)
    pipeline.wait_until_committed(1.0)
    b = pipeline.start_updater(other)
    pipeline.wait_until_committed(1.0, reference=other.reference)
    assert b.text().count("from its beginning") == PARTITIONS
    assert_complete(pipeline, first)
    assert_complete(pipeline, other)
    assert alias_target(pipeline) == pipeline.collection(first.reference), "readers have not been moved"
    # Each group has its own offsets: the other goes on while the first is away, and the first then where it was.
    assert pipeline.group(first.reference) != pipeline.group(other.reference)
    assert a.stop() == 0
    then = pipeline.committed(first.reference)
    pipeline.publish(*edits(40, 2))
    pipeline.wait_until_committed(1.0, reference=other.reference)
    assert pipeline.committed(first.reference) == then
    again = pipeline.start_updater()
    pipeline.wait_until_committed(1.0)
    assert "beginning" not in again.text()
    assert_complete(pipeline, first)
    assert_complete(pipeline, other)
    assert alias_target(pipeline) == pipeline.collection(first.reference)
    assert (again.stop(), b.stop()) == (0, 0)


@pytest.mark.parametrize(
    ("partitions", "busy"),
    [
        pytest.param(PARTITIONS, False, id="idle"),
        pytest.param(1, True, id="one writes and one has no partition"),
    ],
)
def test_collection_that_is_dropped_is_filled_again_by_whoever_wrote_to_it(pipeline: Pipeline, busy: bool) -> None:
    first, other = pipeline.program, OTHER
    updaters = [pipeline.start_updater(), pipeline.start_updater()]
    wait_until(lambda: any(ASSIGNED in updater.text() for updater in updaters), "the collection and its alias")
    beside = pipeline.start_updater(other)
    pipeline.publish(*script_of(NOTES))
    beside.wait_for(ASSIGNED)
    for program in (first, other):
        pipeline.wait_until_committed(1.0, reference=program.reference)
    before, others = pipeline.group(first.reference), pipeline.group(other.reference)
    wait_until(lambda: members(pipeline, before) == 2, "both to be in the group")
    if busy:
        pipeline.publish(*edits(NOTES // 2, 2))
    drop(pipeline, pipeline.collection(first.reference))
    if busy:
        pipeline.publish(*edits(NOTES // 4, 3))
    for updater in updaters:
        updater.wait_for(AGAIN)
    after = pipeline.group(first.reference)
    assert after != before, "another filling, and so another group, which has no offsets yet"
    wait_until(lambda: members(pipeline, after) == 2, "both to be in the new group")
    pipeline.wait_until_committed(1.0)
    assert members(pipeline, before) == 0
    assert_complete(pipeline, first)
    assert alias_target(pipeline) == pipeline.collection(first.reference), "readers find it again"
    assert [updater.text().count(AGAIN) for updater in updaters] == [1, 1]
    # The other model has noticed nothing.
    pipeline.wait_until_committed(1.0, reference=other.reference)
    assert pipeline.group(other.reference) == others
    assert beside.text().count(ASSIGNED) == 1
    assert AGAIN not in beside.text()
    assert_complete(pipeline, other)
    assert [updater.stop() for updater in [*updaters, beside]] == [0, 0, 0]
