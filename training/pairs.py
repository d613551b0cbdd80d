"""Training pairs: a snapshot's ``pairs.parquet``, or a file of the same columns, as three arrays over a note table."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from notellm.bundle import FileEntry, hash_file
from training.errors import TrainingDataError
from training.note_table import NoteTable

__all__ = ["PairTable", "SnapshotFiles", "open_snapshot", "read_pairs"]

_COLUMNS = ("source_id", "target_id", "score")
_SCHEMA = pa.schema([("source_id", pa.string()), ("target_id", pa.string()), ("score", pa.float64())])
_ROWS = 100_000
_SNAPSHOT_FORMAT = 1

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


class _NotesFile(msgspec.Struct):
    path: str
    sha256: str


class _Manifest(msgspec.Struct):
    """What training needs of a snapshot's ``manifest.json``; streams/snapshot.py writes it."""

    format_version: int
    files: dict[str, FileEntry]
    notes: _NotesFile


@dataclass(frozen=True)
class SnapshotFiles:
    name: str
    pairs: Path
    notes: Path


@dataclass(frozen=True)
class PairTable:
    """P pairs over the rows of a note table: ``sources``, ``targets`` and ``scores``, each ``[P]``.

    ``skipped`` counts those of which a note is deleted, or not to be learnt from.
    """

    sources: Ints
    targets: Ints
    scores: Floats
    skipped: int
    _known: Ints
    _notes: int

    @classmethod
    def of(cls, sources: Ints, targets: Ints, scores: Floats, notes: int, skipped: int = 0) -> PairTable:
        both = np.concatenate([sources * notes + targets, targets * notes + sources])
        return cls(sources, targets, scores, skipped, np.unique(both), notes)

    def __len__(self) -> int:
        return len(self.sources)

    def known(self, rows: Ints) -> NDArray[np.bool_]:
        """``[M]`` note rows -> ``[M, M]``: whether the two are a pair, whichever way round."""
        keys = rows[:, None] * self._notes + rows[None, :]
        places = np.searchsorted(self._known, keys).clip(max=len(self._known) - 1)
        return np.asarray(self._known[places] == keys)


def open_snapshot(folder: Path) -> SnapshotFiles:
    """A snapshot's files, whole: their hashes are compared. Raises :class:`TrainingDataError`."""
    file = folder / "manifest.json"
    try:
        manifest = msgspec.json.decode(file.read_bytes(), type=_Manifest)
    except OSError as error:
        raise TrainingDataError(f"--pairs: {folder} is no snapshot: {file.name}: {error.strerror}") from None
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise TrainingDataError(f"--pairs: {file} is no manifest: {error}") from None
    if manifest.format_version != _SNAPSHOT_FORMAT:
        raise TrainingDataError(
            f"--pairs: {file}: format_version is {manifest.format_version}, this program reads {_SNAPSHOT_FORMAT}"
        )
    # pairs/<name>/ and notes/ stand side by side.
    notes = folder.parent.parent / manifest.notes.path
    pairs = folder / "pairs.parquet"
    written = manifest.files.get(pairs.name)
    if written is None:
        raise TrainingDataError(f"--pairs: {file} names no {pairs.name}")
    for path, sha256 in ((pairs, written.sha256), (notes, manifest.notes.sha256)):
        try:
            same = hash_file(path) == sha256
        except OSError as error:
            raise TrainingDataError(f"--pairs: {path} cannot be read: {error.strerror}") from None
        if not same:
            raise TrainingDataError(f"--pairs: {path} is not what its manifest says; make the snapshot again")
    return SnapshotFiles(folder.name, pairs, notes)


def read_pairs(file: Path, notes: NoteTable) -> PairTable:
    """Parquet or JSON Lines with source_id, target_id, score. Raises :class:`TrainingDataError`."""
    sources, targets, scores = [], [], []
    skipped = 0
    for part in _parquet(file) if file.suffix == ".parquet" else _json_lines(file):
        a, b = (
            np.array([notes.rows.get(note_id, -1) for note_id in part.column(name).to_pylist()], np.int64)
            for name in _COLUMNS[:2]
        )
        score = part.column("score").to_numpy(zero_copy_only=False)
        if not (np.isfinite(score).all() and (score > 0).all()):
            worst = score[~(np.isfinite(score) & (score > 0))][0]
            raise TrainingDataError(f"--pairs: {file}: score is {worst}; allowed are finite numbers above 0")
        fit = (a >= 0) & (b >= 0) & (a != b)
        skipped += int((~fit).sum())
        sources.append(a[fit])
        targets.append(b[fit])
        scores.append(score[fit])
    if not sum(map(len, sources)):
        raise TrainingDataError(f"--pairs: {file} holds no pair of two notes to learn from ({skipped} skipped)")
    return PairTable.of(np.concatenate(sources), np.concatenate(targets), np.concatenate(scores), len(notes), skipped)


def _parquet(file: Path) -> Iterator[pa.RecordBatch]:
    try:
        with pq.ParquetFile(file) as parquet:
            if missing := set(_COLUMNS) - set(parquet.schema_arrow.names):
                raise TrainingDataError(f"--pairs: {file} has no column {min(missing)!r}")
            for part in parquet.iter_batches(_ROWS, columns=list(_COLUMNS)):
                yield part.select(list(_COLUMNS)).cast(_SCHEMA)
    except (OSError, pa.ArrowException) as error:
        raise TrainingDataError(f"--pairs: {file} cannot be read as Parquet: {error}") from None


class _Pair(msgspec.Struct):
    source_id: str
    target_id: str
    score: float = 1.0


def _json_lines(file: Path) -> Iterator[pa.RecordBatch]:
    pairs: list[_Pair] = []
    try:
        with file.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                try:
                    pairs.append(msgspec.json.decode(line, type=_Pair))
                except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
                    raise TrainingDataError(f"--pairs: {file}, line {number} is no pair: {error}") from None
                if len(pairs) == _ROWS:
                    yield _batch(pairs)
                    pairs = []
    except OSError as error:
        raise TrainingDataError(f"--pairs: {file} cannot be read: {error.strerror}") from None
    yield _batch(pairs)


def _batch(pairs: list[_Pair]) -> pa.RecordBatch:
    return pa.RecordBatch.from_pydict({name: [getattr(pair, name) for pair in pairs] for name in _COLUMNS}, _SCHEMA)
