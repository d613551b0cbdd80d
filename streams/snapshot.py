"""Snapshots of training pairs on disk: where they lie, what their manifest says, how a reader finds a whole one.

::

    OUT/pairs/<window_end>-<8 hex>/pairs.parquet      source_id, target_id, score, users, rank
                                   statistics.json    see streams/statistics.py
                                   manifest.json      written last: without it, the folder is no snapshot
    OUT/notes/<sha256>.parquet                        the live notes, shared by the snapshots that saw the same ones

Reading needs neither DuckDB nor pyarrow. Writing is :mod:`streams.publishing`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Final, Literal

import msgspec

from notellm.bundle import FileEntry, hash_file
from streams.cooccurrence import PairOptions
from streams.errors import SnapshotError
from streams.statistics import Statistics, decode_statistics

__all__ = [
    "FORMAT_VERSION",
    "MANIFEST",
    "NOTES",
    "PAIRS",
    "SNAPSHOTS",
    "STATISTICS",
    "ChangelogSource",
    "Engine",
    "FilesSource",
    "Manifest",
    "NotesFile",
    "NotesTopic",
    "OffsetRange",
    "Snapshot",
    "Source",
    "SourceFile",
    "TopicSource",
    "Window",
    "latest_snapshot",
    "open_snapshot",
    "read_snapshot",
    "snapshots",
]

FORMAT_VERSION: Final = 1
PAIRS: Final = "pairs.parquet"
STATISTICS: Final = "statistics.json"
MANIFEST: Final = "manifest.json"
NOTES: Final = "notes"
SNAPSHOTS: Final = "pairs"


class Window(msgspec.Struct, frozen=True):
    """Clicks with ``start <= clicked_at < end``, in ms UTC. ``length`` is as it was asked for: ``7d`` or ``all``."""

    start: int
    end: int
    length: str


class SourceFile(msgspec.Struct, frozen=True):
    path: str
    sha256: str
    bytes: int


class OffsetRange(msgspec.Struct, frozen=True):
    """``start <= offset < end`` was read."""

    partition: int
    start: int
    end: int


class FilesSource(msgspec.Struct, frozen=True, tag="files"):
    files: list[SourceFile]


class TopicSource(msgspec.Struct, frozen=True, kw_only=True, tag="topic"):
    """The raw topic, and the rules that it was read by."""

    topic: str
    partitions: list[OffsetRange]
    allowed_lateness_s: int
    future_tolerance_s: int
    clicks_per_day: int


class ChangelogSource(msgspec.Struct, frozen=True, tag="changelog"):
    """The app's table; the app has applied the rules."""

    topic: str
    partitions: list[OffsetRange]


class NotesTopic(msgspec.Struct, frozen=True, tag="notes_topic"):
    topic: str
    partitions: list[OffsetRange]


Source = FilesSource | TopicSource | ChangelogSource


class NotesFile(msgspec.Struct, frozen=True):
    """``path`` is relative to the OUT folder."""

    path: str
    sha256: str
    bytes: int
    rows: int
    source: FilesSource | NotesTopic


class Engine(msgspec.Struct, frozen=True):
    name: Literal["duckdb", "spark"]
    version: str


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """``manifest.json``. ``created_at`` is in ms UTC, ``rows`` are those of pairs.parquet."""

    format_version: int
    window: Window
    settings: PairOptions
    engine: Engine
    source: Source
    rows: int
    files: dict[str, FileEntry]
    notes: NotesFile
    created_at: int


@dataclass(frozen=True)
class Snapshot:
    """``path`` is the snapshot's folder."""

    path: Path
    manifest: Manifest

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def pairs_path(self) -> Path:
        return self.path / PAIRS

    @property
    def notes_path(self) -> Path:
        return self.path.parent.parent / self.manifest.notes.path

    @cached_property
    def statistics(self) -> Statistics:
        try:
            return decode_statistics((self.path / STATISTICS).read_bytes())
        except (OSError, msgspec.MsgspecError) as error:
            raise SnapshotError(f"snapshot {self.path}: {STATISTICS} cannot be read: {error}") from None


_manifest_decoder = msgspec.json.Decoder(Manifest)


class _Version(msgspec.Struct):
    format_version: int


_version_decoder = msgspec.json.Decoder(_Version)


def read_snapshot(path: Path, *, verify: bool = True) -> Snapshot:
    """The snapshot in the folder ``path``, every file held against its sha256.

    Raises :class:`SnapshotError` when it is not there, not whole, or of a format that this program does not know.
    """
    snapshot = Snapshot(path, _read_manifest(path))
    if verify:
        for name, entry in snapshot.manifest.files.items():
            _verify(snapshot, path / name, entry.sha256)
        _verify(snapshot, snapshot.notes_path, snapshot.manifest.notes.sha256)
    return snapshot


def snapshots(out: Path) -> list[Snapshot]:
    """All snapshots under ``out``, the oldest first, their manifests read and their files not looked into.

    The order is that of the windows' ends, then of ``created_at``. A folder without a manifest is passed over.
    """
    folder = out / SNAPSHOTS
    if not folder.is_dir():
        return []
    found = [read_snapshot(path, verify=False) for path in folder.iterdir() if (path / MANIFEST).is_file()]
    return sorted(found, key=lambda each: (each.manifest.window.end, each.manifest.created_at, each.name))


def latest_snapshot(out: Path) -> Snapshot:
    """The newest snapshot under ``out``, verified. Raises :class:`SnapshotError` when there is none."""
    found = snapshots(out)
    if not found:
        raise SnapshotError(f"{out}: no snapshot there; notellm pairs refresh --out {out} makes one")
    return read_snapshot(found[-1].path)


def open_snapshot(path: Path) -> Snapshot:
    """What a person names: a snapshot's own folder, or an OUT folder, and then its newest snapshot; verified."""
    return read_snapshot(path) if (path / MANIFEST).is_file() else latest_snapshot(path)


def _read_manifest(path: Path) -> Manifest:
    try:
        content = (path / MANIFEST).read_bytes()
    except OSError:
        raise SnapshotError(f"{path}: no {MANIFEST} there, so it is no snapshot") from None
    try:
        version = _version_decoder.decode(content).format_version
        if version != FORMAT_VERSION:
            raise SnapshotError(
                f"snapshot {path}: format_version is {version}, this program reads {FORMAT_VERSION}; make it again"
            )
        return _manifest_decoder.decode(content)
    except msgspec.MsgspecError as error:
        raise SnapshotError(f"snapshot {path}: {MANIFEST} cannot be read: {error}") from None


def _verify(snapshot: Snapshot, path: Path, sha256: str) -> None:
    try:
        found = hash_file(path)
    except OSError as error:
        raise SnapshotError(f"snapshot {snapshot.path}: {path.name} cannot be read: {error.strerror}") from None
    if found != sha256:
        raise SnapshotError(
            f"snapshot {snapshot.path}: {path.name} is not the file that was written (sha256 {found[:16]}..., the "
            f"manifest says {sha256[:16]}...); make the snapshot again"
        )
