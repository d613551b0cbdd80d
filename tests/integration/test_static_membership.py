"""An updater with a name of its own in its group is restarted, and the others do not notice."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest
from confluent_kafka import ConsumerGroupState
from confluent_kafka.admin import AdminClient

from tests.support.kafka_server import KafkaServer
from tests.support.milvus_server import MilvusServer
from tests.support.pipeline import Pipeline, hash_program, script_of
from tests.support.processes import CommandProcess
from tests.support.settled import settled_verdict

pytestmark = pytest.mark.integration

NOTES = 200
PARTITIONS = 4
ASSIGNED = " assigned "
# Longer than a restart takes, on a busy machine too.
PROPERTIES = '{"session.timeout.ms": 60000, "heartbeat.interval.ms": 1000}'

Members = dict[str, tuple[str, frozenset[int]]]


@pytest.fixture
def pipeline(tmp_path: Path, kafka_server: KafkaServer, milvus_server: MilvusServer) -> Iterator[Pipeline]:
    name = f"static-{uuid4().hex[:8]}"
    kafka_server.create_topic(name, PARTITIONS, {"cleanup.policy": "compact"})
    kafka_server.create_topic(f"{name}.dead-letter")
    environment = {"NOTELLM_KAFKA_PROPERTIES": PROPERTIES}
    with Pipeline(tmp_path, kafka_server, milvus_server, hash_program(), name=name, environment=environment) as running:
        yield running


def start(pipeline: Pipeline, name: str) -> CommandProcess:
    updater = pipeline.start_updater(NOTELLM_KAFKA_GROUP_INSTANCE_ID=name)
    updater.wait_for(ASSIGNED)
    return updater


def members(pipeline: Pipeline) -> Members:
    """Of each member by its own name, what the group calls it and the partitions that it has."""
    admin = AdminClient({"bootstrap.servers": pipeline.kafka.bootstrap_servers, "log_level": 0})
    group = pipeline.group(pipeline.program.reference)
    found = admin.describe_consumer_groups([group])[group].result(10)
    assert found.state == ConsumerGroupState.STABLE
    return {
        member.group_instance_id: (
            member.member_id,
            frozenset(place.partition for place in member.assignment.topic_partitions),
        )
        for member in found.members
    }


def test_restart_within_the_session_is_no_rebalance(pipeline: Pipeline) -> None:
    script = script_of(NOTES)
    restarted, other = start(pipeline, "one"), start(pipeline, "two")
    pipeline.publish(*script[: NOTES // 2])
    pipeline.wait_until_committed(1.0)
    before = members(pipeline)
    assert [len(partitions) for _, partitions in before.values()] == [2, 2]

    assert restarted.stop() == 0
    assert members(pipeline) == before, "it has not left its group"
    pipeline.publish(*script[NOTES // 2 : NOTES])
    restarted = start(pipeline, "one")
    after = members(pipeline)
    assert after["two"] == before["two"], "the same member with the same partitions"
    assert after["one"][1] == before["one"][1]
    assert after["one"][0] != before["one"][0], "another process"
    pipeline.publish(*script[NOTES:])
    pipeline.wait_until_committed(1.0)

    lines = [line for line in other.text().splitlines() if "kafka_source" in line]
    assert len(lines) == 1, "it was told once of its partitions, and of nothing else since"
    assert ASSIGNED in lines[0]
    assert settled_verdict(pipeline).faults == []
    assert (restarted.stop(), other.stop()) == (0, 0)
