"""What may be learnt from, and what must never be: by the split, and by the time."""

from __future__ import annotations

import hashlib
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.commands.handmade_snapshot import make_snapshot
from tests.training.data_files import json_lines
from training.errors import TrainingDataError
from training.training_data import DataFiles, PairedNotes, read_training_data

IDS = [f"n{number}" for number in range(10)]
PARTS = ("train", "validation", "held_out")
# Of each note its part, or none of them; and when it was published.
NOTES = st.lists(st.tuples(st.sampled_from([*PARTS, None]), st.integers(0, 20)), min_size=len(IDS), max_size=len(IDS))
PAIRS = st.lists(st.tuples(st.sampled_from(IDS), st.sampled_from(IDS)), min_size=1, max_size=30)


def write(folder: Path, notes: list[tuple[str | None, int]], pairs: list[tuple[str, str]]) -> DataFiles:
    told = [
        {"note_id": each, "title": f"text of {each}", "published_at": at}
        for each, (_, at) in zip(IDS, notes, strict=True)
    ]
    split = {part: [each for each, (its, _) in zip(IDS, notes, strict=True) if its == part] for part in PARTS}
    (folder / "split.json").write_bytes(msgspec.json.encode(split))
    return DataFiles(
        pairs=json_lines(folder / "pairs.jsonl", [{"source_id": a, "target_id": b} for a, b in pairs]),
        notes=json_lines(folder / "notes.jsonl", told),
        split=folder / "split.json",
    )


def texts(paired: PairedNotes) -> list[str]:
    return [paired.notes.note(row).title for row in range(len(paired.notes))]


def ids_of(paired: PairedNotes) -> list[tuple[str, str]]:
    rows = zip(paired.pairs.sources.tolist(), paired.pairs.targets.tolist(), strict=True)
    return [(paired.notes.note(a).note_id, paired.notes.note(b).note_id) for a, b in rows]


@settings(deadline=None, max_examples=40)
@given(notes=NOTES, pairs=PAIRS, before=st.none() | st.integers(0, 21), with_split=st.booleans())
def test_nothing_of_another_part_or_of_a_later_time_is_ever_in_reach(
    tmp_path_factory: pytest.TempPathFactory,
    notes: list[tuple[str | None, int]],
    pairs: list[tuple[str, str]],
    before: int | None,
    with_split: bool,
) -> None:
    files = write(tmp_path_factory.getbasetemp(), notes, pairs)
    files = DataFiles(files.pairs, files.notes, files.split if with_split else None, before)
    of = dict(zip(IDS, notes, strict=True))
    allowed = [
        each
        for each in IDS
        if (not with_split or of[each][0] == "train") and (before is None or 0 < of[each][1] < before)
    ]
    wanted = [(a, b) for a, b in pairs if a in allowed and b in allowed and a != b]
    if not wanted:
        with pytest.raises(TrainingDataError, match=rf"holds no pair .* \({len(pairs)} skipped\)"):
            read_training_data(files)
        return
    data = read_training_data(files)
    # All notes of the table, and not only those that pairs lead to.
    assert texts(data.train) == [f"text of {each}" for each in allowed]
    assert ids_of(data.train) == wanted
    assert data.train.pairs.skipped == len(pairs) - len(wanted)
    watched = [each for each in IDS if of[each][0] == "validation"] if with_split else []
    looked_at = [(a, b) for a, b in pairs if a in watched and b in watched and a != b]
    assert (data.validation is None) == (not looked_at)
    if data.validation is not None:
        assert texts(data.validation) == [f"text of {each}" for each in watched]
        assert ids_of(data.validation) == looked_at


def test_a_note_of_the_very_moment_is_too_young(tmp_path: Path) -> None:
    notes: list[tuple[str | None, int]] = [("train", at) for at in (4, 5, 4, 6, 4, 0, 0, 0, 0, 0)]
    files = write(tmp_path, notes, [("n0", "n2"), ("n0", "n1"), ("n3", "n4")])
    data = read_training_data(DataFiles(files.pairs, files.notes, files.split, train_before=5))
    assert ids_of(data.train) == [("n0", "n2")]


def test_a_note_that_says_no_time_may_be_a_new_one(tmp_path: Path) -> None:
    lines = [{"note_id": "a", "title": "a"}, *({"note_id": each, "title": each, "published_at": 1} for each in "bc")]
    pairs = [{"source_id": "a", "target_id": "b"}, {"source_id": "b", "target_id": "c"}]
    files = json_lines(tmp_path / "pairs.jsonl", pairs), json_lines(tmp_path / "notes.jsonl", lines)
    assert ids_of(read_training_data(DataFiles(*files)).train) == [("a", "b"), ("b", "c")]
    assert ids_of(read_training_data(DataFiles(*files, train_before=5)).train) == [("b", "c")]


def test_an_edit_that_came_too_late_leaves_what_was_known_then(tmp_path: Path) -> None:
    lines = [
        {"note_id": "a", "title": "as it was", "published_at": 1},
        {"note_id": "b", "title": "b", "published_at": 2},
        {"note_id": "a", "title": "as it is now", "published_at": 9},
    ]
    files = DataFiles(
        pairs=json_lines(tmp_path / "pairs.jsonl", [{"source_id": "a", "target_id": "b"}]),
        notes=json_lines(tmp_path / "notes.jsonl", lines),
        train_before=5,
    )
    assert texts(read_training_data(files).train) == ["as it was", "b"]


def test_a_run_knows_its_files_by_their_hashes(tmp_path: Path) -> None:
    notes: list[tuple[str | None, int]] = [("train", 1)] * 10
    files = write(tmp_path, notes, [("n0", "n1")])
    assert files.notes is not None
    assert files.split is not None

    def sha256(file: Path) -> str:
        return hashlib.sha256(file.read_bytes()).hexdigest()

    whole = read_training_data(DataFiles(files.pairs, files.notes)).sha256
    assert whole == {"pairs": sha256(files.pairs), "notes": sha256(files.notes)}
    narrowed = read_training_data(DataFiles(files.pairs, files.notes, files.split, train_before=7)).sha256
    assert narrowed == {**whole, "split": sha256(files.split), "train_before": "7"}


def test_a_snapshot_has_its_own_notes_and_others_may_stand_in(tmp_path: Path) -> None:
    pairs = [("n0", "n1", 2.0, 3, 1), ("n1", "gone", 1.0, 2, 1)]
    snapshot = make_snapshot(tmp_path / "out", pairs, {"n0": "of the snapshot", "n1": "of the snapshot"})
    data = read_training_data(DataFiles(snapshot.path))
    assert texts(data.train) == ["of the snapshot"] * 2
    assert (ids_of(data.train), data.train.pairs.skipped) == ([("n0", "n1")], 1)
    others = write(tmp_path, [(None, 0)] * 10, [("n0", "n1")])
    assert texts(read_training_data(DataFiles(snapshot.path, others.notes)).train)[0] == "text of n0"


def test_a_snapshot_that_was_changed_is_refused(tmp_path: Path) -> None:
    snapshot = make_snapshot(tmp_path, [("n0", "n1", 2.0, 3, 1)], {"n0": "a", "n1": "b"})
    with snapshot.pairs_path.open("ab") as stream:
        stream.write(b"x")
    with pytest.raises(TrainingDataError, match=r"pairs\.parquet is not what its manifest says"):
        read_training_data(DataFiles(snapshot.path))


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    files = write(tmp_path, [(None, 0)] * 10, [("n0", "n1")])
    nowhere = tmp_path / "nowhere"
    for given_files, line in (
        (DataFiles(nowhere), f"--pairs: {nowhere} is not there; give a snapshot's folder or a file of pairs"),
        (DataFiles(files.pairs), f"--notes: is needed with a file of pairs ({files.pairs})"),
        (DataFiles(files.pairs, nowhere), f"--notes: {nowhere} is not there"),
    ):
        with pytest.raises(TrainingDataError) as caught:
            read_training_data(given_files)
        assert str(caught.value) == line
