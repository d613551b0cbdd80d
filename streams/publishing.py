"""Writing snapshots: one run at a time, whole or not at all, and old ones pruned.

All that a run writes lies in ``OUT/.work`` until it is whole and on the disk; then the notes file and the snapshot's
folder are renamed to their places. A run that is killed leaves ``OUT/.work``, which no reader looks at, or a notes file
that no snapshot names; the next run takes both away.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import filelock
import msgspec

from notellm.bundle import FileEntry, hash_file
from streams.cooccurrence import PairOptions
from streams.errors import SnapshotError
from streams.snapshot import (
    FORMAT_VERSION,
    MANIFEST,
    NOTES,
    PAIRS,
    SNAPSHOTS,
    STATISTICS,
    Engine,
    FilesSource,
    Manifest,
    NotesFile,
    NotesTopic,
    Snapshot,
    Source,
    Window,
    read_snapshot,
    snapshots,
)
from streams.statistics import Statistics

__all__ = ["only_run", "prune", "publish"]

_LOCK: Final = ".lock"
_HOLDER: Final = ".lock.json"
_WORK: Final = ".work"


class _Holder(msgspec.Struct):
    pid: int
    since: str


@contextmanager
def only_run(out: Path, *, wait: bool = False) -> Iterator[Path]:
    """The work folder, empty, for as long as no other run writes to ``out``.

    Raises :class:`SnapshotError` that names the other run, unless it is to ``wait`` for its end.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(out / _LOCK)
        lock.acquire(timeout=-1 if wait else 0)
    except filelock.Timeout:
        raise SnapshotError(
            f"--out: {out} is being written to by {_holder(out)}; wait for its end, or give --wait"
        ) from None
    except OSError as error:
        raise SnapshotError(f"--out: {out} cannot be written to: {error.strerror}") from None
    work = out / _WORK
    try:
        since = datetime.now(UTC).isoformat(timespec="seconds")
        (out / _HOLDER).write_bytes(msgspec.json.encode(_Holder(os.getpid(), since)))
        shutil.rmtree(work, ignore_errors=True)  # of a run that was killed
        work.mkdir()
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)
        (out / _HOLDER).unlink(missing_ok=True)
        lock.release()


def publish(
    out: Path,
    work: Path,
    *,
    window: Window,
    settings: PairOptions,
    engine: Engine,
    source: Source,
    notes_source: FilesSource | NotesTopic,
    pairs: Path,
    notes: Path,
    statistics: Statistics,
) -> Snapshot:
    """Make a snapshot of the files ``pairs`` and ``notes``, which are in ``work``.

    Where a whole one of the same name is there already, it has the same content, and stays.
    """
    folder = work / "snapshot"
    folder.mkdir()
    pairs.rename(folder / PAIRS)
    (folder / STATISTICS).write_bytes(_json(statistics))
    notes_hash = hash_file(notes)
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        window=window,
        settings=settings,
        engine=engine,
        source=source,
        rows=statistics.pairs,
        files={name: _entry(folder / name) for name in (PAIRS, STATISTICS)},
        notes=NotesFile(
            path=f"{NOTES}/{notes_hash}.parquet",
            sha256=notes_hash,
            bytes=notes.stat().st_size,
            rows=statistics.notes.live,
            source=notes_source,
        ),
        created_at=0,
    )
    # Without the time: the same clicks, notes and settings give the same name.
    name = f"{window.end}-{hashlib.sha256(_json(manifest)).hexdigest()[:8]}"
    (folder / MANIFEST).write_bytes(_json(msgspec.structs.replace(manifest, created_at=time.time_ns() // 1_000_000)))
    for file in (notes, *folder.iterdir(), folder):
        _sync(file)
    _move(notes, out / manifest.notes.path)
    target = out / SNAPSHOTS / name
    if target.exists() and not _is_whole(target):
        shutil.rmtree(target)
    if not target.exists():
        _move(folder, target)
    return read_snapshot(target, verify=False)


def prune(out: Path, keep: int, written: Snapshot) -> list[str]:
    """All but the newest ``keep`` snapshots go, and the notes files that no snapshot names. Returns the names.

    ``written`` stays in any case, even when its window ended before those of the others.
    """
    found = snapshots(out)
    staying = {each.path for each in found[-keep:]} | {written.path}
    gone = []
    for snapshot in found:
        if snapshot.path not in staying:
            # The manifest first: what is left after a kill is no snapshot.
            (snapshot.path / MANIFEST).unlink()
            gone.append(snapshot.name)
    for folder in (out / SNAPSHOTS).iterdir():
        if folder.is_dir() and not (folder / MANIFEST).exists():
            shutil.rmtree(folder)
    named = {each.notes_path.name for each in found if each.path in staying}
    for file in (out / NOTES).iterdir():
        if file.name not in named:
            file.unlink()
            gone.append(f"{NOTES}/{file.name}")
    return gone


def _holder(out: Path) -> str:
    try:
        holder = msgspec.json.decode((out / _HOLDER).read_bytes(), type=_Holder)
    except (OSError, msgspec.MsgspecError):
        return "another run"  # it has just begun, or just ended
    return f"another run (process {holder.pid}, since {holder.since})"


def _is_whole(path: Path) -> bool:
    try:
        read_snapshot(path)
    except SnapshotError:
        return False
    return True


def _json(value: object) -> bytes:
    return msgspec.json.format(msgspec.json.encode(value), indent=2) + b"\n"


def _entry(file: Path) -> FileEntry:
    return FileEntry(hash_file(file), file.stat().st_size)


def _move(path: Path, target: Path) -> None:
    target.parent.mkdir(exist_ok=True)
    path.rename(target)
    _sync(target.parent)
    _sync(target.parent.parent)


def _sync(path: Path) -> None:
    """A file, or the names in a folder, onto the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
