"""Several updaters on a real Kafka and a real Milvus: one is killed, one joins, and nothing is lost or out of order."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest

from commands.demo_script import Publication
from tests.support.kafka_server import KafkaServer
from tests.support.milvus_server import MilvusServer
from tests.support.pipeline import Pipeline, hash_program, script_of
from tests.support.processes import CommandProcess, wait_until
from tests.support.settled import settled_verdict
from tests.support.watch import CommitWatch, unacknowledged

pytestmark = pytest.mark.integration

NOTES = 2000
PARTITIONS = 6


def stress_script() -> list[Publication]:
    """The demo's mix, then a second round of edits and deletions, and more poison in between."""
    script = script_of(NOTES)
    draw = random.Random(4)
    keys = sorted({one.key for one in script if one.key and not one.broken})
    again = [Publication(key, None) for key in draw.sample(keys, NOTES // 10)]
    again += draw.sample([one for one in script[:NOTES] if one.value], NOTES // 5)
    again += [Publication(draw.choice(keys), b"{", broken=True) for _ in range(50)]
    draw.shuffle(again)
    return script + again


@pytest.fixture
def pipeline(
    tmp_path: Path, kafka_server: KafkaServer, milvus_server: MilvusServer, assignor: str
) -> Iterator[Pipeline]:
    name = f"several-{uuid4().hex[:8]}"
    kafka_server.create_topic(name, PARTITIONS, {"cleanup.policy": "compact"})
    kafka_server.create_topic(f"{name}.dead-letter")
    program = hash_program(seconds_per_note=0.006)
    environment = {"NOTELLM_KAFKA_ASSIGNOR": assignor}
    with Pipeline(tmp_path, kafka_server, milvus_server, program, name=name, environment=environment) as running:
        yield running


def has_partitions(updater: CommandProcess) -> bool:
    return any(f"{partition} from " in updater.text() for partition in range(PARTITIONS))


@pytest.mark.parametrize("assignor", ["range", "cooperative-sticky"])
def test_one_killed_and_one_joining_under_load(pipeline: Pipeline, assignor: str) -> None:
    script = stress_script()
    first, second = pipeline.start_updater(), pipeline.start_updater()
    wait_until(lambda: has_partitions(first) and has_partitions(second), "both to have partitions")
    with CommitWatch(pipeline) as watch:
        pipeline.publish(*script)
        share = pipeline.wait_until_committed(0.3)
        first.kill()
        assert 0.3 <= share <= 0.7, "killed too late to prove anything"
        assert pipeline.committed_share() <= 0.7
        third = pipeline.start_updater()
        pipeline.wait_until_committed(1.0, seconds=180)
    assert has_partitions(third)
    assert watch.faults == []
    assert watch.looks >= 3
    verdict = settled_verdict(pipeline)
    assert verdict.faults == []
    assert verdict.dead_letters == sum(one.broken for one in script) > 50
    assert verdict.live > NOTES // 2
    assert verdict.deleted >= NOTES // 10
    committed = pipeline.committed()
    assert unacknowledged(committed, pipeline.entries(), [], set()) != [], "the watch can find something"
    assert (second.stop(), third.stop()) == (0, 0)
    assert pipeline.committed() == committed
