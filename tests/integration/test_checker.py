"""The demo's checker finds each fault that it is there for: one is planted at a time."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
from pymilvus import MilvusClient

from commands.checker import Verdict
from commands.embedded import EmbeddedKafka, MilvusLite
from tests.support.pipeline import Pipeline, bundle_program, note_publication, short_notes

pytestmark = pytest.mark.integration

NOTES = 15  # fewer than the checker samples, so it encodes every one again


@pytest.fixture(scope="module")
def settled(tmp_path_factory: pytest.TempPathFactory, tiny_bundle: Path) -> Iterator[Pipeline]:
    """Notes, an edit, a deletion and a broken record, all settled, and the updater gone."""
    folder = tmp_path_factory.mktemp("checker")
    kafka = EmbeddedKafka()
    kafka.create_topics("notes", "notes.dead-letter")
    milvus = MilvusLite(folder / "milvus", log=folder / "milvus.log")
    milvus.start()
    with Pipeline(folder, kafka, milvus, bundle_program(tiny_bundle)) as pipeline:
        notes = short_notes(NOTES)
        pipeline.publish(*map(note_publication, notes))
        pipeline.publish(note_publication(msgspec.structs.replace(notes[1], title="edited")))
        pipeline.publish(msgspec.structs.replace(note_publication(notes[2]), value=None))
        pipeline.publish(msgspec.structs.replace(note_publication(notes[3]), value=b"{", broken=True))
        updater = pipeline.start_updater()
        pipeline.wait_until_committed(1.0)
        assert updater.stop() == 0
        yield pipeline
    milvus.stop()


def check(pipeline: Pipeline) -> tuple[int, Verdict]:
    """As the demo runs it: another process."""
    out = pipeline.folder / "verdict.json"
    command = [sys.executable, "-m", "commands.checker", "--ledger", str(pipeline.folder / "ledger.jsonl")]
    command += ["--milvus", pipeline.milvus.uri, "--kafka", pipeline.kafka.bootstrap_servers]
    command += ["--bundle", pipeline.program.arguments[-1], "--out", str(out)]
    done = subprocess.run(command, capture_output=True, timeout=120, check=False)
    assert b"Traceback" not in done.stderr, done.stderr.decode()
    return done.returncode, msgspec.json.decode(out.read_bytes(), type=Verdict)


def test_nothing_planted(settled: Pipeline) -> None:
    status, verdict = check(settled)
    assert (status, verdict.faults) == (0, [])
    assert (verdict.live, verdict.searchable, verdict.deleted, verdict.dead_letters) == (NOTES - 1, NOTES - 1, 1, 1)


def lost_row(client: MilvusClient) -> None:
    client.delete("notes", filter='note_id == "note-0005"')


def rolled_back_row(client: MilvusClient) -> None:
    """The first version of a note that was edited, as it was then."""
    row = client.query("notes", filter='note_id == "note-0001"', output_fields=["*"])[0]
    row.update(title="Day 1 of the sourdough diary", source_offset=row["source_offset"] - 1)
    client.upsert(live_name(client), [row])


def resurrected_row(client: MilvusClient) -> None:
    row = client.query("notes", filter='note_id == "note-0006"', output_fields=["*"])[0]
    client.upsert(live_name(client), [{**row, "note_id": "note-0002"}])


def wrong_vector(client: MilvusClient) -> None:
    rows = client.query("notes", filter='note_id in ["note-0007", "note-0008"]', output_fields=["*"])
    rows[0]["embedding"] = rows[1]["embedding"]
    client.upsert(live_name(client), [rows[0]])


def live_name(client: MilvusClient) -> str:
    return str(client.describe_alias("notes")["collection_name"])


@pytest.mark.parametrize(
    ("plant", "counter"),
    [
        (lost_row, "lost"),
        (rolled_back_row, "stale"),
        (resurrected_row, "resurrected"),
        (wrong_vector, "wrong_vectors"),
    ],
)
def test_each_fault_is_found(settled: Pipeline, plant: Callable[[MilvusClient], None], counter: str) -> None:
    client = MilvusClient(settled.milvus.uri)
    before = client.query("notes", filter='note_id != ""', output_fields=["*"])
    try:
        plant(client)
        status, verdict = check(settled)
        assert status == 1
        counters = {name: getattr(verdict, name) for name in ("lost", "stale", "resurrected", "wrong_vectors")}
        assert counters == {**dict.fromkeys(counters, 0), counter: 1}
    finally:
        client.delete("notes", filter='note_id == "note-0002"')
        client.upsert(live_name(client), before)
        client.close()


def test_a_dead_letter_that_is_missing(settled: Pipeline) -> None:
    """The ledger claims one more broken record than there are dead letters."""
    ledger = settled.folder / "ledger.jsonl"
    content = ledger.read_bytes()
    try:
        ledger.write_bytes(content + content.splitlines()[-1].replace(b'"offset":', b'"offset":9') + b"\n")
        status, verdict = check(settled)
        assert status == 1
        assert verdict.missing_dead_letters == 1
    finally:
        ledger.write_bytes(content)
