"""The demo as a whole, with a tiny model, and what it decides to publish."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from confluent_kafka.admin import AdminClient

from commands.demo import _read
from commands.demo_script import demo_script
from commands.ledger import read_ledger
from notellm.bundle import read_manifest
from notellm.errors import InvalidMessage
from notellm.messages import parse_record
from notellm.note_file import read_notes
from tests.conftest import REPOSITORY
from tests.support.kafka_server import KafkaServer
from tests.support.pipeline import script_of, short_notes
from tests.support.processes import run_command, wait_until
from training.split import read_split

MEASURED = {"notes_per_s", "freshness_ms", "idle_freshness_ms", "machine", "held_out"}
REPORT = MEASURED | {
    "published", "live", "searchable", "deleted", "dead_letters", "lost", "stale", "resurrected", "wrong_vectors",
    "model_version",
}  # fmt: skip
IDLE_NOTES = 50
DATA = REPOSITORY / "data"
EACH = 28


@pytest.fixture(scope="module")
def notes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A third of the shipped notes, as many of each category, with their split beside them."""
    folder = tmp_path_factory.mktemp("notes")
    chosen = [note for note in read_notes(DATA / "notes.jsonl", published_at=0) if int(note.note_id[-3:]) <= EACH]
    (folder / "notes.jsonl").write_bytes(b"".join(msgspec.json.encode(note) + b"\n" for note in chosen))
    ids = {note.note_id for note in chosen}
    split = {part: sorted(ids & of) for part, of in read_split(DATA / "split.json").items()}
    (folder / "split.json").write_bytes(msgspec.json.encode(split))
    return folder / "notes.jsonl"


def assert_demo_succeeds(bundle: Path, notes: Path, work: Path, *flags: str) -> None:
    """Whatever Kafka it runs on, its script decides every count of its report."""
    chosen = ("--notes", str(notes), "--bundle", str(bundle), "--work", str(work))
    done = run_command("demo", *chosen, *flags, cwd=REPOSITORY, seconds=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    report = msgspec.json.decode((work / "report.json").read_bytes())
    assert set(report) == REPORT
    script = demo_script(_read(notes))
    last = {one.key: one.value for one in script if not one.broken}
    live = sum(value is not None for value in last.values())
    assert {name: report[name] for name in REPORT - MEASURED} == {
        "published": len(script) + IDLE_NOTES,
        "live": live + IDLE_NOTES,
        "searchable": live + IDLE_NOTES,
        "deleted": len(last) - live,
        "dead_letters": 7,
        "lost": 0,
        "stale": 0,
        "resurrected": 0,
        "wrong_vectors": 0,
        "model_version": read_manifest(bundle).model_version,
    }
    assert live >= 400
    assert len(last) - live >= 45
    assert report["notes_per_s"] > 0
    assert report["held_out"]["counts.scored"] == len(read_split(notes.with_name("split.json"))["held_out"]) > 80
    assert report["held_out"]["category.illegal"] == 0
    for freshness in (report["freshness_ms"], report["idle_freshness_ms"]):
        assert 0 < freshness["p50"] <= freshness["p99"]
    assert len(list(read_ledger(work / "ledger.jsonl"))) == report["published"]


@pytest.mark.integration
def test_demo_reports_what_it_did(tmp_path: Path, notes: Path, tiny_bundle: Path) -> None:
    assert_demo_succeeds(tiny_bundle, notes, tmp_path / "demo")


@pytest.mark.integration
def test_demo_on_a_kafka_of_your_own_reports_the_same(
    tmp_path: Path, notes: Path, tiny_bundle: Path, kafka_server: KafkaServer
) -> None:
    def topics() -> set[str]:
        admin = AdminClient({"bootstrap.servers": kafka_server.bootstrap_servers})
        return set(admin.list_topics(timeout=10).topics)

    before = topics()
    assert_demo_succeeds(tiny_bundle, notes, tmp_path / "demo", "--kafka", kafka_server.bootstrap_servers)
    used = {entry.topic for entry in read_ledger(tmp_path / "demo" / "ledger.jsonl")}
    assert len(used) == 1, "a topic of its own"
    assert used.isdisjoint(before)
    # What remains is Kafka's own topic of group offsets.
    wait_until(lambda: topics() - {"__consumer_offsets"} <= before, "the demo's topics to go", seconds=20)


@pytest.mark.integration
def test_demo_with_a_kafka_that_is_not_there(tmp_path: Path, tiny_bundle: Path) -> None:
    flags = ("--bundle", str(tiny_bundle), "--work", str(tmp_path), "--kafka", "127.0.0.1:9")
    done = run_command("demo", *flags, cwd=REPOSITORY)
    assert done.returncode == 1
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: --kafka: '127.0.0.1:9' cannot be reached: ")


def test_script_edits_and_deletes_a_tenth_each() -> None:
    notes = {note.note_id.encode() for note in short_notes(200)}
    script = script_of(200)
    first, later = script[:200], script[200:]
    assert {one.key for one in first} == notes
    deleted = {one.key for one in later if one.value is None and not one.broken}
    edited = {one.key for one in later if one.value is not None and not one.broken} - deleted
    assert len(deleted) >= 20
    assert len(edited) >= 20
    assert script_of(200) == script, "the same at every run"


def test_script_breaks_what_it_says_it_breaks() -> None:
    for one in script_of(100):
        if one.broken:
            with pytest.raises(InvalidMessage):
                parse_record(one.key, one.value, 0)
        else:
            parse_record(one.key, one.value, 0)


def test_script_edits_half_without_changing_the_text() -> None:
    originals = {note.note_id: note for note in short_notes(200)}
    edits = [
        parse_record(one.key, one.value, 0).note  # type: ignore[union-attr]
        for one in script_of(200)[200:]
        if one.value is not None and not one.broken
    ]
    same = [note for note in edits if note.title == originals[note.note_id].title]
    assert len(same) >= 10
    assert len(edits) - len(same) >= 10
