"""What a plain consumer of the note-vectors topic ends up with is what Milvus holds, kills and all."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any
from uuid import uuid4

import msgspec
import numpy as np
import pytest
from confluent_kafka import Consumer, TopicPartition
from confluent_kafka.admin import AdminClient, AlterConfigOpType, ConfigEntry, ConfigResource
from pymilvus import MilvusClient

from commands.demo_script import Publication
from commands.ledger import LedgerEntry
from notellm.messages import NoteRecord, parse_record
from tests.support.kafka_server import KafkaServer
from tests.support.milvus_server import MilvusServer
from tests.support.pipeline import Pipeline, hash_program, note_publication, short_notes
from tests.support.processes import wait_until
from tests.support.reference import HashReference
from tests.support.settled import settled_verdict
from tests.support.watch import CommitWatch

pytestmark = pytest.mark.integration

OPERATIONS = 500
KEYS = 60
PARTITIONS = 4
OLDEST = "message.timestamp.before.max.ms"

View = Mapping[str, dict[str, Any] | None]


def operations(count: int) -> list[Publication]:
    """Drawn from a fixed seed. Every edit makes a new text, so that its hash tells which version a record is of."""
    draw = random.Random(8)
    notes = {note.note_id: note for note in short_notes(KEYS)}
    script: list[Publication] = []
    for number in range(count):
        note_id = draw.choice(list(notes))
        (what,) = draw.choices(["edit", "attributes", "again", "delete", "poison"], [45, 15, 10, 20, 10])
        if what == "edit":
            notes[note_id] = msgspec.structs.replace(notes[note_id], title=f"{note_id}, version {number}")
        elif what == "attributes":
            notes[note_id] = msgspec.structs.replace(notes[note_id], attributes={"likes": number})
        if what == "delete":
            script.append(Publication(note_id.encode(), None))
        elif what == "poison":
            script.append(Publication(note_id.encode(), draw.choice([b"", b"{", b'{"note_id": 1}']), broken=True))
        else:
            script.append(note_publication(notes[note_id]))
    return script


def read_to_its_end(bootstrap_servers: str, topic: str) -> list[tuple[str, dict[str, Any] | None]]:
    """Key and value of every record, as any consumer would see them; of a key in the order of the topic."""
    consumer = Consumer({"bootstrap.servers": bootstrap_servers, "group.id": "reader", "auto.offset.reset": "error"})
    records: list[tuple[str, dict[str, Any] | None]] = []
    home: dict[str, int] = {}
    with closing(consumer):
        ends = {}
        for partition in consumer.list_topics(topic, timeout=10).topics[topic].partitions:
            low, high = consumer.get_watermark_offsets(TopicPartition(topic, partition), timeout=10)
            if high > low:
                ends[partition] = high
        consumer.assign([TopicPartition(topic, partition, 0) for partition in ends])
        deadline = time.monotonic() + 60
        while ends:
            assert time.monotonic() < deadline, f"{topic} was not read to its end"
            message = consumer.poll(0.5)
            if message is None:
                continue
            assert message.error() is None
            key, partition = message.key().decode(), message.partition()
            assert home.setdefault(key, partition) == partition, "a key on two partitions has no order"
            value = message.value()
            records.append((key, None if value is None else json.loads(value)))
            if message.offset() + 1 >= ends.get(partition, 0):
                ends.pop(partition, None)
    return records


def view(records: Iterable[tuple[str, dict[str, Any] | None]]) -> dict[str, dict[str, Any]]:
    """The last record of each key; a tombstone takes it away."""
    last = dict(records)
    return {key: value for key, value in last.items() if value is not None}


def rows(pipeline: Pipeline) -> dict[str, dict[str, Any]]:
    fields = ["note_id", "model_version", "text_hash", "generated_hashtags", "generated_category", "embedding"]
    with closing(MilvusClient(pipeline.milvus.uri, timeout=30)) as client:
        found = client.query(
            pipeline.alias, filter='note_id != ""', output_fields=fields, limit=16_384, consistency_level="Strong"
        )
    return {
        row["note_id"]: {
            **{field: row[field] for field in fields},
            "generated_hashtags": list(row["generated_hashtags"]),
        }
        for row in found
    }


def comparable(found: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """With each embedding as the bytes of its 32-bit floats."""
    return {
        key: {**value, "embedding": np.asarray(value["embedding"], np.float32).tobytes()}
        for key, value in found.items()
    }


def unpublished(
    committed: Mapping[int, int], entries: Iterable[LedgerEntry], last: View, reference: HashReference
) -> list[str]:
    """Notes of which a version below a committed offset is neither in the topic nor followed there by a newer one.

    ``last`` is the last record of each key, and was read after ``committed``.
    """
    history: dict[str, list[LedgerEntry]] = {}
    for entry in entries:
        if not entry.broken and entry.key is not None:
            history.setdefault(entry.key.decode(), []).append(entry)
    faults = []
    for note_id, versions in history.items():
        versions.sort(key=lambda entry: entry.offset)
        done = [entry for entry in versions if entry.offset < committed.get(entry.partition, 0)]
        if not done:
            continue
        allowed = [text_hash(entry, reference) for entry in versions[len(done) - 1 :]]
        found = last.get(note_id, {"text_hash": "no record at all"})
        if (None if found is None else found["text_hash"]) not in allowed:
            faults.append(f"{note_id}: {done[-1].partition}@{done[-1].offset} is committed, the topic has {found}")
    return faults


def text_hash(entry: LedgerEntry, reference: HashReference) -> str | None:
    record = parse_record(entry.key, entry.value, 0)
    return reference.text_hash(record.note) if isinstance(record, NoteRecord) else None


class VectorsWatch(CommitWatch):
    """Looks at the topic of vectors instead of Milvus."""

    def __init__(self, pipeline: Pipeline, topic: str) -> None:
        super().__init__(pipeline)
        self._topic = topic

    def _look(self) -> None:
        committed = self._pipeline.committed()
        if not committed:
            return
        last = dict(read_to_its_end(self._pipeline.kafka.bootstrap_servers, self._topic))
        self.faults += unpublished(committed, self._pipeline.entries(), last, HashReference())
        self.looks += 1


def assert_equal_to_milvus(pipeline: Pipeline, records: list[tuple[str, dict[str, Any] | None]]) -> None:
    assert settled_verdict(pipeline).faults == []
    topic, stored = comparable(view(records)), comparable(rows(pipeline))
    assert topic.keys() == stored.keys()
    assert topic == stored


def vectors_topic(pipeline: Pipeline) -> str:
    return f"{pipeline.topic}.vectors.{pipeline.program.reference.model_version}"


@pytest.fixture
def pipeline(tmp_path: Path, kafka_server: KafkaServer, milvus_server: MilvusServer) -> Iterator[Pipeline]:
    name = f"view-{uuid4().hex[:8]}"
    kafka_server.create_topic(name, PARTITIONS, {"cleanup.policy": "compact"})
    kafka_server.create_topic(f"{name}.dead-letter")
    environment = {"NOTELLM_KAFKA_VECTORS_TOPIC_PREFIX": f"{name}.vectors"}
    program = hash_program(seconds_per_note=0.02)
    with Pipeline(tmp_path, kafka_server, milvus_server, program, name=name, environment=environment) as running:
        yield running


def test_topic_and_milvus_hold_the_same(pipeline: Pipeline) -> None:
    topic = vectors_topic(pipeline)
    script = operations(OPERATIONS)
    killed = pipeline.start_updater()
    killed.wait_for(" assigned ")
    with VectorsWatch(pipeline, topic) as watch:
        pipeline.publish(*script)
        share = pipeline.wait_until_committed(0.3)
        killed.kill()
        assert 0.3 <= share <= 0.7, "killed too late to prove anything"
        assert pipeline.committed_share() <= 0.7
        again = pipeline.start_updater()
        pipeline.wait_until_committed(1.0)
    assert watch.faults == []
    assert watch.looks >= 3
    entries, committed = pipeline.entries(), pipeline.committed()
    assert unpublished(committed, entries, {}, HashReference()) != [], "the watch can find something"
    records = read_to_its_end(pipeline.kafka.bootstrap_servers, topic)
    assert_equal_to_milvus(pipeline, records)
    assert len(records) > len(view(records)) > KEYS // 2
    assert any(value is None for _, value in records), "deletions are there as tombstones"
    assert again.stop() == 0
    assert len(read_to_its_end(pipeline.kafka.bootstrap_servers, topic)) == len(records)


def test_no_offset_is_committed_while_the_topic_takes_nothing(pipeline: Pipeline, kafka_server: KafkaServer) -> None:
    topic = vectors_topic(pipeline)
    # It refuses records that are older than that, and the time to send one is enough.
    kafka_server.create_topic(topic, PARTITIONS, {"cleanup.policy": "compact", OLDEST: "0"})
    updater = pipeline.start_updater()
    updater.wait_for(" assigned ")
    pipeline.publish(*map(note_publication, short_notes(20)), Publication(b"note-0000", None))
    wait_until(lambda: len(rows(pipeline)) == 19, "the rows in Milvus")
    time.sleep(1.0)  # ten times as long as the updater waits between commits
    assert pipeline.committed() == {}
    assert read_to_its_end(kafka_server.bootstrap_servers, topic) == []
    alter(kafka_server, topic, OLDEST, str(2**63 - 1))
    pipeline.wait_until_committed(1.0)
    assert_equal_to_milvus(pipeline, read_to_its_end(kafka_server.bootstrap_servers, topic))
    assert updater.stop() == 0


def alter(kafka: KafkaServer, topic: str, name: str, value: str) -> None:
    admin = AdminClient({"bootstrap.servers": kafka.bootstrap_servers})
    entry = ConfigEntry(name, value, incremental_operation=AlterConfigOpType.SET)
    resource = ConfigResource(ConfigResource.Type.TOPIC, topic, incremental_configs=[entry])
    admin.incremental_alter_configs([resource])[resource].result(10)
