"""A run's folder. What it leaves is a NoteLLM checkpoint (:mod:`training.checkpoint_folder`); beside that stand::

RUN/run.json          what it was started with; a run goes on only with the same
    metrics.jsonl     one line per step, and one per look at the validation part
    loss.png          the same as curves
    states/           what a killed run goes on from (:mod:`training.training_state`); gone when it is done
"""

from __future__ import annotations

import fcntl
import os
import shutil
from pathlib import Path
from typing import Any

import msgspec

from training.checkpoint_folder import is_checkpoint
from training.errors import TrainingError

__all__ = ["RunFolder", "RunRecord"]

# They change how long a run takes or what it leaves on the way, and not what it learns.
_FREE = {"save_every", "keep_states", "validate_every", "validation_pairs", "chunk_notes", "gradient_checkpointing"}


class RunRecord(msgspec.Struct, frozen=True, kw_only=True):
    """``run.json``: ``data`` maps each file to its sha256, ``settings`` are all of [training]."""

    base: str
    data: dict[str, str]
    processes: int
    categories: list[str]
    settings: dict[str, Any]
    redraw_partners: bool = False


class RunFolder:
    """The paths in a run's folder, and what may be there when a training begins.

    Inside ``with``, once opened, it is this process's alone: two trainings would mix their metrics and states.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = -1
        self.states = path / "states"
        self.metrics = path / "metrics.jsonl"
        self.plot = path / "loss.png"
        self._record = path / "run.json"

    def open(self, record: RunRecord, *, force: bool) -> None:
        """Make it, or find it as an earlier start with the same ``record`` left it.

        Raises :class:`TrainingError` for a folder that is done, is something else, was started with other settings, or
        has another training running in it.
        """
        if self.path.exists() and not self.path.is_dir():
            raise TrainingError(f"--out {self.path}: is a file; choose another name")
        self.path.mkdir(parents=True, exist_ok=True)
        if any(self.path.iterdir()):
            if not self._record.is_file():
                raise TrainingError(f"--out {self.path}: is no run (it holds no {self._record.name}); choose another")
            self._hold()
            if force:
                for entry in self.path.iterdir():
                    shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
            elif is_checkpoint(self.path):
                raise TrainingError(f"--out {self.path}: is done; give --force to train it anew")
            else:
                self._compare(record)
        else:
            self._hold()
        if not self._record.is_file():
            _write(self._record, msgspec.json.format(msgspec.json.encode(record), indent=2) + b"\n")

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *error: object) -> None:
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def _hold(self) -> None:
        """On the folder itself: the lock ends with the process, however that ends, and leaves no file."""
        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise TrainingError(
                f"--out {self.path}: another training runs in it; wait for it, or choose another"
            ) from None
        self._lock = descriptor

    def keep_metrics_until(self, step: int) -> None:
        """Lines of steps that a killed run had done after its last state go: they will be done again."""
        if not self.metrics.exists():
            return
        lines = [line for line in self.metrics.read_bytes().splitlines() if _step_of(line) <= step]
        _write(self.metrics, b"".join(line + b"\n" for line in lines))

    def add_metrics(self, line: dict[str, Any]) -> None:
        with self.metrics.open("ab") as file:
            file.write(msgspec.json.encode(line) + b"\n")

    def read_metrics(self) -> list[dict[str, Any]]:
        return [msgspec.json.decode(line) for line in self.metrics.read_bytes().splitlines()]

    def remove_states(self) -> None:
        shutil.rmtree(self.states, ignore_errors=True)

    def _compare(self, record: RunRecord) -> None:
        try:
            earlier = msgspec.json.decode(self._record.read_bytes(), type=RunRecord)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise TrainingError(f"{self._record}: cannot be read: {error}; start anew with --force") from None
        was, now = _flat(earlier), _flat(msgspec.json.decode(msgspec.json.encode(record), type=RunRecord))
        for name in sorted(was.keys() | now.keys()):
            if was.get(name) != now.get(name):
                raise TrainingError(
                    f"--out {self.path}: was started with {name} {was.get(name)!r}, now it is {now.get(name)!r}; "
                    "go on with the same, choose another folder, or start anew with --force"
                )


def _write(file: Path, content: bytes) -> None:
    """Beside, then renamed: a kill must not cost what a run goes on with."""
    partial = file.with_name(f".{file.name}")
    partial.write_bytes(content)
    partial.rename(file)


def _flat(record: RunRecord) -> dict[str, Any]:
    fixed = {f"training.{name}": value for name, value in record.settings.items() if name not in _FREE}
    return {
        "--base": record.base,
        "processes": record.processes,
        "--categories": record.categories,
        "--redraw-partners": record.redraw_partners,
        **{f"data {name}": value for name, value in record.data.items()},
        **fixed,
    }


def _step_of(line: bytes) -> float:
    try:
        return float(msgspec.json.decode(line)["step"])
    except (msgspec.MsgspecError, KeyError, TypeError):
        # Half a line, where the run was killed.
        return float("inf")
