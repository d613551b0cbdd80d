"""What a training reads: notes and pairs of the part that may be learnt from, and of the part that it is watched on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from notellm.bundle import hash_file
from notellm.messages import Note
from training.errors import TrainingDataError
from training.note_table import NoteTable, read_note_table
from training.pairs import PairTable, open_snapshot, read_pairs
from training.split import Part, Split, read_split

__all__ = ["DataFiles", "PairedNotes", "TrainingData", "read_training_data"]


@dataclass(frozen=True)
class DataFiles:
    """``pairs`` is a snapshot's folder, or a file of pairs beside which ``notes`` must be named.

    Without a ``split`` or ``train_before`` (ms UTC, of published_at) every note may be learnt from.
    """

    pairs: Path
    notes: Path | None = None
    split: Path | None = None
    train_before: int | None = None


@dataclass(frozen=True)
class PairedNotes:
    notes: NoteTable
    pairs: PairTable


@dataclass(frozen=True)
class TrainingData:
    """``validation`` is None where there is no split, or no pair within its validation part."""

    train: PairedNotes
    validation: PairedNotes | None
    sha256: dict[str, str]


def read_training_data(files: DataFiles) -> TrainingData:
    """Raises :class:`TrainingDataError`."""
    pairs_file, notes_file = _files(files)
    split = read_split(files.split) if files.split else None
    hashes = {"pairs": hash_file(pairs_file), "notes": hash_file(notes_file)}
    if files.split:
        hashes["split"] = hash_file(files.split)
    if files.train_before is not None:
        hashes["train_before"] = str(files.train_before)

    def may_learn(note: Note) -> bool:
        # A note that says no time may be a new one.
        old = files.train_before is None or 0 < note.published_at < files.train_before
        return old and (split is None or note.note_id in split["train"])

    notes = read_note_table(notes_file, may_learn)
    train = PairedNotes(notes, read_pairs(pairs_file, notes))
    return TrainingData(train, _validation(pairs_file, notes_file, split), hashes)


def _validation(pairs_file: Path, notes_file: Path, split: Split | None) -> PairedNotes | None:
    if split is None:
        return None
    part: Part = "validation"
    notes = read_note_table(notes_file, lambda note: note.note_id in split[part])
    try:
        return PairedNotes(notes, read_pairs(pairs_file, notes))
    except TrainingDataError:
        # No pair within the part: training goes on without being watched.
        return None


def _files(files: DataFiles) -> tuple[Path, Path]:
    if files.pairs.is_dir():
        snapshot = open_snapshot(files.pairs)
        return snapshot.pairs, files.notes or snapshot.notes
    if not files.pairs.is_file():
        raise TrainingDataError(f"--pairs: {files.pairs} is not there; give a snapshot's folder or a file of pairs")
    if files.notes is None:
        raise TrainingDataError(f"--notes: is needed with a file of pairs ({files.pairs})")
    if not files.notes.is_file():
        raise TrainingDataError(f"--notes: {files.notes} is not there")
    return files.pairs, files.notes
