"""A trained system as the tables need it: its embedding of every note, and how it came about.

A run is a folder ``<runs>/<name>-<seed>/`` with ``embeddings.npy`` (``[N, D]``, a row a note, in the file's order),
``curve.json`` (tokens and contrastive loss on the way) and, written last, ``run.json``.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

__all__ = ["SavedRun", "commit", "read_runs", "run_folder", "save_run"]


class SavedRun(msgspec.Struct, kw_only=True):
    """``name`` is the row of the table; ``tokens`` are those that the model read in training."""

    name: str
    seed: int
    steps: int
    tokens: int
    seconds: float
    device: str
    commit: str
    command: str
    notes_sha256: str
    settings: dict[str, Any]


def run_folder(runs: Path, name: str, seed: int) -> Path:
    return runs / f"{name}-{seed}"


def save_run(folder: Path, run: SavedRun, embeddings: NDArray[np.float32], curve: list[tuple[int, float]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    # Ranks do not need more digits.
    np.save(folder / "embeddings.npy", embeddings.astype(np.float16))
    (folder / "curve.json").write_bytes(msgspec.json.encode(curve))
    partial = folder / ".run.json"
    partial.write_bytes(msgspec.json.format(msgspec.json.encode(run)))
    partial.rename(folder / "run.json")


def read_runs(runs: Path, notes_sha256: str) -> dict[str, list[tuple[SavedRun, Path]]]:
    """Runs by name, their seeds in order. Runs on other notes are an error: their rows would not be these notes."""
    found: dict[str, list[tuple[SavedRun, Path]]] = {}
    for file in sorted(runs.glob("*/run.json")):
        run = msgspec.json.decode(file.read_bytes(), type=SavedRun)
        if run.notes_sha256 != notes_sha256:
            raise SystemExit(f"{file.parent} was trained on other notes; give another --runs, or train it again")
        found.setdefault(run.name, []).append((run, file.parent))
    return {name: sorted(each, key=lambda one: one[0].seed) for name, each in found.items()}


def commit() -> str:
    """The code that runs. A copy without its history is told by GIT_COMMIT."""
    asked = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=False)
    return asked.stdout.strip() or os.environ.get("GIT_COMMIT", "unknown")
