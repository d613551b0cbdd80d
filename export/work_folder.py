"""Where a bundle is made: a hidden folder beside its place, locked, and renamed into it when all is done."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from export.errors import ExportError

__all__ = ["move_into_place", "work_folder"]


@contextmanager
def work_folder(out: Path) -> Iterator[Path]:
    """An empty folder on the file system of ``out``, so that the last rename is atomic; gone again afterwards.

    Its lock is the operating system's, on the folder itself: a killed export leaves a folder that the next one sweeps,
    while a second export that comes at the same time ends with one line. Raises :class:`ExportError`.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    work = out.parent / f".{out.name}.partial"
    work.mkdir(exist_ok=True)
    lock = os.open(work, os.O_RDONLY | os.O_DIRECTORY)
    try:
        _lock(lock, work, out)
        for entry in work.iterdir():
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
        try:
            yield work
        finally:
            # Held until here, so that it can only be ours that is swept up.
            shutil.rmtree(work, ignore_errors=True)
    finally:
        os.close(lock)


def _lock(lock: int, work: Path, out: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        mine = work.exists() and os.fstat(lock).st_ino == work.stat().st_ino
    except BlockingIOError:
        mine = False
    if not mine:
        # Locked, or renamed between our opening it and our lock: the other export is about to be done.
        raise ExportError(
            f"--out {out}: another export is writing it at this moment; wait for it, or give another --out"
        )


def move_into_place(work: Path, out: Path) -> None:
    """A bundle that is there goes only when the new one is whole."""
    old = out.parent / f".{out.name}.replaced"
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        out.rename(old)
    work.rename(out)
    shutil.rmtree(old, ignore_errors=True)
