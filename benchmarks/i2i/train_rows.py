"""The trained rows: NoteLLM in two ways, and MiniLM on the same pairs. And what is embedded without training."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from benchmarks.peers.minilm_pairs import tune_minilm
from export.torch_encoder import open_torch_encoder
from notellm.bundle import hash_file
from notellm.encoder import NoteEncoder
from notellm.messages import Note
from notellm.note_file import read_notes
from notellm.settings import TrainingSettings
from training.checkpoint_folder import is_checkpoint
from training.evaluation.click_file import Clicks, read_clicks
from training.evaluation.minilm import MiniLM
from training.evaluation.note_text import note_text
from training.evaluation.pair_scores import UNIT, keep_pairs, pair_scores
from training.evaluation.protocol import clicks_on_notes, order_of_ids
from training.evaluation.readers import read_embeddings
from training.train import TrainingPlan, train
from training.training_data import DataFiles
from training.watch import Watch

__all__ = [
    "ROWS",
    "DataFolder",
    "Stopped",
    "Trained",
    "embed_with_base",
    "embed_with_minilm",
    "open_encoder",
    "row_settings",
    "train_row",
]

Matrix = NDArray[np.float32]

# What every row begins with; --set may change it.
_SHARED: Final[Mapping[str, Any]] = {"note_tokens": 64, "save_every": 100, "validate_every": 1_000_000}
_SHARED_OF_ROW: Final[Mapping[str, Mapping[str, Any]]] = {"minilm_tuned": {"learning_rate": 3e-4}}
# What makes a row that row; --set may not.
ROWS: Final[Mapping[str, Mapping[str, Any]]] = {
    "minilm_tuned": {"generative_weight": 0.0},
    "contrastive": {"generative_weight": 0.0},
    "notellm": {},
}


class Stopped(Exception):
    """By Ctrl-C or SIGTERM."""


@dataclass(frozen=True)
class DataFolder:
    """``notes.jsonl`` and ``clicks.jsonl`` of a folder; of a note's versions the last counts."""

    notes_file: Path
    notes: list[Note]
    clicks: Clicks
    train_end: int
    sha256: str

    @classmethod
    def read(cls, folder: Path, train_end: int) -> DataFolder:
        notes_file, clicks_file = folder / "notes.jsonl", folder / "clicks.jsonl"
        notes = list({note.note_id: note for note in read_notes(notes_file, published_at=0)}.values())
        both = hash_file(notes_file)[:32] + hash_file(clicks_file)[:32]
        return cls(notes_file, notes, read_clicks(clicks_file), train_end, both)

    def write_pairs(self, file: Path) -> None:
        """The pairs that ``notellm pairs refresh --window all --as-of TRAIN_END`` would leave, to the last score."""
        ids = [note.note_id for note in self.notes]
        learnt = clicks_on_notes(self.clicks, ids).before(self.train_end)
        kept = keep_pairs(pair_scores(learnt), order_of_ids(ids)).tocoo()
        table = pa.table(
            {
                "source_id": [ids[row] for row in kept.row],
                "target_id": [ids[row] for row in kept.col],
                "score": kept.data / UNIT,
            }
        )
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_name(f".{file.name}")
        pq.write_table(table, partial)
        partial.rename(file)


@dataclass(frozen=True)
class Trained:
    """``seconds`` are those of the steps, without loading and embedding."""

    embeddings: Matrix
    steps: int
    tokens: int
    seconds: float
    curve: list[tuple[int, float]]


def row_settings(row: str, changes: Mapping[str, Any], seed: int) -> TrainingSettings:
    """Raises pydantic's ValidationError."""
    usual = {**_SHARED, **_SHARED_OF_ROW.get(row, {})}
    return TrainingSettings(**{**usual, **changes, **ROWS[row], "seed": seed})


def train_row(
    row: str, data: DataFolder, settings: TrainingSettings, *, base: str, folder: Path, watch: Watch
) -> Trained:
    """Train one of :data:`ROWS` in ``folder`` and embed all notes. Goes on from the last state of an earlier try.

    Raises :class:`Stopped`, and what training raises.
    """
    pairs = folder / "pairs.parquet"
    data.write_pairs(pairs)
    files = DataFiles(pairs, data.notes_file)
    if row == "minilm_tuned":
        tuned = tune_minilm(files, settings, watch)
        if tuned is None:
            raise Stopped(f"{folder}: stopped; MiniLM keeps no state, and begins anew")
        matrix = tuned.model.embed([note_text(note) for note in data.notes])
        return Trained(matrix, settings.steps, tuned.curve[-1][0], tuned.seconds, tuned.curve)
    out = folder / "checkpoint"
    # Where an earlier try was killed after its training, while it embedded, there is nothing left to train.
    if not is_checkpoint(out):
        plan = TrainingPlan(base=base, files=files, out=out, categories=["other"], settings=settings)
        outcome = train(plan, watch)
        if not outcome.done:
            step = outcome.metrics["step"]
            raise Stopped(f"{folder}: stopped after step {step}; the same command goes on from there")
    lines = [msgspec.json.decode(line) for line in (out / "metrics.jsonl").read_bytes().splitlines()]
    steps = [line for line in lines if line["part"] == "train"]
    shutil.copy(out / "loss.png", folder / "loss.png")
    last = steps[-1]
    curve = [(line["tokens"], line["contrastive"]) for line in steps]
    return Trained(embed_with_base(str(out), data.notes), last["step"], last["tokens"], last["seconds"], curve)


def open_encoder(source: str, categories: list[str] | None = None) -> AbstractContextManager[NoteEncoder]:
    """Through torch, in batches that fill a GPU where there is one."""
    roomy = {"token_budget": 65_536, "max_rows": 512} if torch.cuda.is_available() else {}
    return open_torch_encoder(source, categories=categories, **roomy)


def embed_with_base(source: str, notes: list[Note]) -> Matrix:
    """``[N, D]`` by a checkpoint, or by a base that was never trained."""
    with open_encoder(source) as encoder:
        return read_embeddings(encoder, notes)


def embed_with_minilm(notes: list[Note]) -> Matrix:
    return MiniLM.load().embed([note_text(note) for note in notes])
