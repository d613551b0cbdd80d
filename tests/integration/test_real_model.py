"""Notes through the real model, on a real Kafka and a real Milvus, and every row against the bundle."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import msgspec
import pytest

from commands.demo_script import Publication, demo_script
from notellm.messages import Note, NoteRecord, parse_record
from tests.conftest import REPOSITORY
from tests.support.kafka_server import KafkaServer
from tests.support.milvus_server import MilvusServer
from tests.support.pipeline import Pipeline, bundle_program, note_publication, short_notes
from tests.support.settled import settled_verdict

pytestmark = [pytest.mark.integration, pytest.mark.real_model]

PARTITIONS = 4
NOTES = 100


@pytest.fixture
def pipeline(
    tmp_path: Path, kafka_server: KafkaServer, milvus_server: MilvusServer, real_bundle: Path
) -> Iterator[Pipeline]:
    name = f"real-{uuid4().hex[:8]}"
    kafka_server.create_topic(name, PARTITIONS, {"cleanup.policy": "compact"})
    kafka_server.create_topic(f"{name}.dead-letter")
    with Pipeline(tmp_path, kafka_server, milvus_server, bundle_program(real_bundle), name=name) as running:
        yield running


def test_a_hundred_notes(pipeline: Pipeline) -> None:
    notes = short_notes(NOTES)
    updater = pipeline.start_updater()
    pipeline.publish(*map(note_publication, notes))
    updater.wait_for(" assigned ", seconds=120)
    pipeline.wait_until_committed(1.0, seconds=600)
    pipeline.publish(
        note_publication(msgspec.structs.replace(notes[0], title="A rainy week in Kyoto")),
        note_publication(msgspec.structs.replace(notes[1], attributes={"public": False})),
        Publication(notes[2].note_id.encode(), None),
        Publication(notes[3].note_id.encode(), b"{", broken=True),
    )
    pipeline.wait_until_committed(1.0, seconds=120)
    verdict = settled_verdict(pipeline)
    assert verdict.faults == []
    assert (verdict.live, verdict.deleted, verdict.dead_letters) == (NOTES - 1, 1, 1)
    assert updater.stop() == 0


@pytest.mark.long
def test_all_notes_of_the_demo(pipeline: Pipeline) -> None:
    script = demo_script(notes_of(REPOSITORY / "data" / "notes.jsonl"))
    updater = pipeline.start_updater()
    pipeline.publish(*script)
    updater.wait_for(" assigned ", seconds=120)
    pipeline.wait_until_committed(1.0, seconds=3600)
    verdict = settled_verdict(pipeline)
    assert verdict.faults == []
    assert verdict.live >= 400
    assert verdict.deleted >= 40
    assert verdict.dead_letters == sum(one.broken for one in script) > 0
    assert updater.stop() == 0


def notes_of(file: Path) -> list[Note]:
    notes = []
    for line in file.read_bytes().splitlines():
        record = parse_record(msgspec.json.decode(line)["note_id"].encode(), line, 0)
        assert isinstance(record, NoteRecord)
        notes.append(record.note)
    return notes
