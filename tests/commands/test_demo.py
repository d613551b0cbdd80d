"""The demo as a whole, with a tiny model, and what it decides to publish."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
from confluent_kafka.admin import AdminClient

from commands.ledger import read_ledger
from notellm.errors import InvalidMessage
from notellm.messages import parse_record
from tests.conftest import REPOSITORY
from tests.support.kafka_server import KafkaServer
from tests.support.pipeline import script_of, short_notes
from tests.support.processes import run_command, wait_until

REPORT = {
    "published", "live", "searchable", "deleted", "dead_letters", "lost", "stale", "resurrected", "notes_per_s",
    "freshness_ms", "idle_freshness_ms", "model_version", "machine",
}  # fmt: skip


COUNTS = (
    "published", "live", "searchable", "deleted", "dead_letters", "lost", "stale", "resurrected", "wrong_vectors",
    "model_version",
)  # fmt: skip


def run_demo(bundle: Path, work: Path, *flags: str) -> dict[str, Any]:
    done = run_command("demo", "--bundle", str(bundle), "--work", str(work), *flags, cwd=REPOSITORY, seconds=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    report: dict[str, Any] = msgspec.json.decode((work / "report.json").read_bytes())
    return report


def topics_of(kafka: KafkaServer) -> set[str]:
    return set(AdminClient({"bootstrap.servers": kafka.bootstrap_servers}).list_topics(timeout=10).topics)


@pytest.fixture(scope="module")
def embedded_report(tmp_path_factory: pytest.TempPathFactory, tiny_bundle: Path) -> dict[str, Any]:
    """Of the embedded default."""
    return run_demo(tiny_bundle, tmp_path_factory.mktemp("demo"))


@pytest.mark.integration
def test_demo_reports_what_it_did(embedded_report: dict[str, Any]) -> None:
    report = embedded_report
    assert set(report) >= REPORT
    assert (report["lost"], report["stale"], report["resurrected"]) == (0, 0, 0)
    assert report["live"] == report["searchable"] >= 400
    assert report["deleted"] >= 45
    assert report["dead_letters"] == 7
    assert report["published"] > report["live"] + report["deleted"]
    for freshness in (report["freshness_ms"], report["idle_freshness_ms"]):
        assert 0 < freshness["p50"] <= freshness["p99"]


@pytest.mark.integration
def test_demo_on_a_kafka_of_your_own_comes_to_the_same(
    tmp_path: Path, tiny_bundle: Path, embedded_report: dict[str, Any], kafka_server: KafkaServer
) -> None:
    before = topics_of(kafka_server)
    report = run_demo(tiny_bundle, tmp_path, "--kafka", kafka_server.bootstrap_servers)
    assert {name: report[name] for name in COUNTS} == {name: embedded_report[name] for name in COUNTS}
    assert report.keys() == embedded_report.keys()
    # Group offsets have a topic of Kafka's own, which stays.
    wait_until(lambda: topics_of(kafka_server) - {"__consumer_offsets"} <= before, "the demo's topics to go")
    entries = list(read_ledger(tmp_path / "ledger.jsonl"))
    assert {entry.topic for entry in entries}.isdisjoint(before), "it has used a topic of its own"
    assert len(entries) == report["published"]


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
