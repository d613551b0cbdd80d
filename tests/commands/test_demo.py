"""The demo as a whole, with a tiny model, and what it decides to publish."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from notellm.errors import InvalidMessage
from notellm.messages import parse_record
from tests.conftest import REPOSITORY
from tests.support.pipeline import script_of, short_notes
from tests.support.processes import run_command

REPORT = {
    "published", "live", "searchable", "deleted", "dead_letters", "lost", "stale", "resurrected", "notes_per_s",
    "freshness_ms", "idle_freshness_ms", "model_version", "machine",
}  # fmt: skip


@pytest.mark.integration
def test_demo_reports_what_it_did(tmp_path: Path, tiny_bundle: Path) -> None:
    done = run_command(
        "demo", "--bundle", str(tiny_bundle), "--work", str(tmp_path / "demo"), cwd=REPOSITORY, seconds=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    report = msgspec.json.decode((tmp_path / "demo" / "report.json").read_bytes())
    assert set(report) >= REPORT
    assert (report["lost"], report["stale"], report["resurrected"]) == (0, 0, 0)
    assert report["live"] == report["searchable"] >= 400
    assert report["deleted"] >= 45
    assert report["dead_letters"] == 7
    assert report["published"] > report["live"] + report["deleted"]
    for freshness in (report["freshness_ms"], report["idle_freshness_ms"]):
        assert 0 < freshness["p50"] <= freshness["p99"]


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
