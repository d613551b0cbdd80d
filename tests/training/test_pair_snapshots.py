"""What ``notellm pairs refresh`` leaves behind is opened by its manifest, whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from streams.snapshot import Snapshot
from tests.commands.handmade_snapshot import make_snapshot
from training.errors import TrainingDataError
from training.note_table import read_note_table
from training.pairs import open_snapshot, read_pairs

TITLES = {"osaka": "大阪", "kyoto": "Two days in Kyoto"}
PAIRS = [("kyoto", "osaka", 2.5, 7, 1), ("osaka", "kyoto", 0.5, 2, 1), ("kyoto", "deleted", 1.25, 5, 2)]


@pytest.fixture
def snapshot(tmp_path: Path) -> Snapshot:
    """Published by the code that publishes them all."""
    return make_snapshot(tmp_path, PAIRS, TITLES)


def refusal(folder: Path) -> str:
    with pytest.raises(TrainingDataError) as caught:
        open_snapshot(folder)
    assert str(caught.value).startswith("--pairs: ")
    return str(caught.value).removeprefix("--pairs: ")


def change(snapshot: Snapshot, **fields: Any) -> Path:
    file = snapshot.path / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    return file


def test_a_snapshot_is_its_pairs_and_the_notes_of_its_own_time(snapshot: Snapshot) -> None:
    files = open_snapshot(snapshot.path)
    assert (files.name, files.pairs, files.notes) == (snapshot.name, snapshot.pairs_path, snapshot.notes_path)
    notes = read_note_table(files.notes)
    assert {notes.note(row).note_id: notes.note(row).title for row in notes.live_rows()} == TITLES
    pairs = read_pairs(files.pairs, notes)
    found = zip(pairs.sources.tolist(), pairs.targets.tolist(), pairs.scores.tolist(), strict=True)
    there = {(notes.note(a).note_id, notes.note(b).note_id, score) for a, b, score in found}
    assert there == {("kyoto", "osaka", 2.5), ("osaka", "kyoto", 0.5)}
    assert pairs.skipped == 1  # that with the deleted note


@pytest.mark.parametrize("which", ["pairs", "notes"])
def test_one_byte_that_differs_is_found(snapshot: Snapshot, which: str) -> None:
    file = snapshot.pairs_path if which == "pairs" else snapshot.notes_path
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert refusal(snapshot.path) == f"{file} is not what its manifest says; make the snapshot again"


@pytest.mark.parametrize("which", ["pairs", "notes"])
def test_a_file_that_is_missing_is_named(snapshot: Snapshot, which: str) -> None:
    file = snapshot.pairs_path if which == "pairs" else snapshot.notes_path
    file.unlink()
    assert refusal(snapshot.path) == f"{file} cannot be read: No such file or directory"


def test_without_its_manifest_a_folder_is_no_snapshot(snapshot: Snapshot) -> None:
    (snapshot.path / "manifest.json").unlink()
    assert refusal(snapshot.path) == f"{snapshot.path} is no snapshot: manifest.json: No such file or directory"


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"{}", b'{"format_version": "\xff"}', b'{"x": ' + b"[" * 100_000],
    ids=["empty", "cut", "list", "bare", "bytes", "deep"],
)  # fmt: skip
def test_a_damaged_manifest_is_one_line(snapshot: Snapshot, content: bytes) -> None:
    file = snapshot.path / "manifest.json"
    file.write_bytes(content)
    line = refusal(snapshot.path)
    assert line.startswith(f"{file} is no manifest: ")
    assert "\n" not in line


def test_a_format_of_tomorrow_is_refused(snapshot: Snapshot) -> None:
    file = change(snapshot, format_version=2)
    assert refusal(snapshot.path) == f"{file}: format_version is 2, this program reads 1"


def test_a_manifest_that_does_not_vouch_for_the_pairs_is_refused(snapshot: Snapshot) -> None:
    file = change(snapshot, files={})
    assert refusal(snapshot.path) == f"{file} names no pairs.parquet"
