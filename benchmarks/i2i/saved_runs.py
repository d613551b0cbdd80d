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

__all__ = ["RunError", "SavedRun", "commit", "read_curve", "read_run", "read_runs", "run_folder", "save_run"]


class RunError(Exception):
    """A saved run that does not belong to what is asked for."""


class SavedRun(msgspec.Struct, kw_only=True):
    """``name`` is the row of the table; ``tokens`` are those that the model read in training."""

    name: str
    row: str
    seed: int
    base: str
    data_sha256: str
    train_end: int
    settings: dict[str, Any]
    steps: int
    tokens: int
    seconds: float
    device: str
    commit: str
    command: str


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


def read_run(folder: Path) -> SavedRun | None:
    """None where there is none, or one that was not finished."""
    file = folder / "run.json"
    return msgspec.json.decode(file.read_bytes(), type=SavedRun) if file.exists() else None


def read_curve(folder: Path) -> list[tuple[int, float]]:
    return msgspec.json.decode((folder / "curve.json").read_bytes(), type=list[tuple[int, float]])


def read_runs(runs: Path, data_sha256: str, train_end: int) -> dict[str, list[tuple[SavedRun, Path]]]:
    """Runs by name, their seeds in order.

    Raises :class:`RunError` for one on other notes or clicks, one that may have learnt what it is asked, and for seeds
    of one name that differ in more than the seed.
    """
    found: dict[str, list[tuple[SavedRun, Path]]] = {}
    for folder in sorted(runs.glob("*")):
        run = read_run(folder)
        if run is None:
            continue
        if run.data_sha256 != data_sha256:
            raise RunError(f"{folder} was trained on other notes or clicks; give another --runs, or train it again")
        if run.train_end != train_end:
            raise RunError(f"{folder} learnt from clicks before {run.train_end}, and --train-end is {train_end}")
        found.setdefault(run.name, []).append((run, folder))
    for name, each in found.items():
        if len({msgspec.json.encode([run.base, {**run.settings, "seed": 0}]) for run, _ in each}) > 1:
            raise RunError(f"{name}: its seeds were trained with different settings; they are no mean of one thing")
    return {name: sorted(each, key=lambda one: one[0].seed) for name, each in found.items()}


def commit() -> str:
    """The commit of this code; GIT_COMMIT names it where the copy has no history."""
    if named := os.environ.get("GIT_COMMIT"):
        return named
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short=12", "HEAD"]
    try:
        asked = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return "unknown"
    return asked.stdout.strip() or "unknown"
