"""Killed with -9 with batches in flight, on the embedded default: nothing is lost, stale or resurrected."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from commands.embedded import EmbeddedKafka, MilvusLite
from tests.support.pipeline import Pipeline, bundle_program, script_of
from tests.support.processes import wait_until

pytestmark = pytest.mark.integration

NOTES = 400


@pytest.fixture
def pipeline(
    tmp_path: Path, embedded_kafka: EmbeddedKafka, milvus_lite: MilvusLite, tiny_bundle: Path
) -> Iterator[Pipeline]:
    with Pipeline(tmp_path, embedded_kafka, milvus_lite, bundle_program(tiny_bundle)) as running:
        yield running


def assert_all_is_well(pipeline: Pipeline) -> None:
    verdict = pipeline.judge()
    assert verdict.faults == []
    assert verdict.live > NOTES // 2
    assert verdict.deleted >= NOTES // 10
    assert verdict.dead_letters == sum(one.broken for one in pipeline.published)


def test_updater_killed_with_batches_in_flight(pipeline: Pipeline) -> None:
    # Many seconds of work, so that the kill comes in the middle of it on any machine.
    script = script_of(4 * NOTES)
    updater = pipeline.start_updater()
    pipeline.publish(*script)
    share = pipeline.wait_until_committed(0.3)
    updater.kill()
    assert 0.3 <= share <= 0.7, "killed too late to prove anything"
    assert pipeline.committed_share() <= 0.7
    again = pipeline.start_updater()
    pipeline.wait_until_committed(1.0)
    assert again.stop() == 0
    assert_all_is_well(pipeline)


def test_milvus_killed_while_the_updater_runs(pipeline: Pipeline, milvus_lite: MilvusLite) -> None:
    script = script_of(NOTES)
    updater = pipeline.start_updater()
    pipeline.publish(*script[: NOTES // 2])
    wait_until(lambda: pipeline.committed_share() > 0, "the first commit")
    milvus_lite.kill()
    pipeline.publish(*script[NOTES // 2 :])
    updater.wait_for("waiting for Milvus")
    assert updater.is_running
    milvus_lite.start()
    pipeline.wait_until_committed(1.0)
    assert updater.is_running
    log = updater.text()
    assert updater.stop() == 0
    assert log.count("assigned 0 from") == 1, "it joined its group once"
    assert "revoked" not in log, "and never left it"
    assert "lost to the group" not in log
    assert_all_is_well(pipeline)


def test_sigterm_commits_what_is_in_flight(pipeline: Pipeline) -> None:
    updater = pipeline.start_updater()
    pipeline.publish(*script_of(NOTES))
    pipeline.wait_until_committed(0.1)
    assert updater.stop() == 0
    share = pipeline.committed_share()
    rows_then = pipeline.judge().searchable
    assert rows_then > 0
    again = pipeline.start_updater()
    pipeline.wait_until_committed(1.0)
    assert again.stop() == 0
    assert share > 0.1
    assert_all_is_well(pipeline)
