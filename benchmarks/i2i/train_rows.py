"""The trained rows: NoteLLM in two ways, and MiniLM on the same pairs. And what is embedded without training."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping
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
from notellm.messages import Note
from notellm.note_file import read_notes
from notellm.settings import TrainingSettings
from training.evaluation.click_file import Clicks, read_clicks
from training.evaluation.minilm import MiniLM
from training.evaluation.note_text import note_text
from training.evaluation.pair_scores import UNIT, keep_pairs, pair_scores
from training.evaluation.protocol import clicks_on_notes, order_of_ids
from training.evaluation.readers import read_embeddings
from training.train import TrainingPlan, train
from training.training_data import DataFiles
from training.watch import Watch

__all__ = ["ROWS", "DataFolder", "Trained", "embed_with_base", "embed_with_minilm", "train_row"]

Matrix = NDArray[np.float32]

# Of what every row shares, --set changes all of them; a row's own settings are what makes it that row.
SHARED: Final[Mapping[str, Any]] = {"note_tokens": 64, "save_every": 1_000_000, "validate_every": 1_000_000}
ROWS: Final[Mapping[str, Mapping[str, Any]]] = {
    "minilm_tuned": {"generative_weight": 0.0, "learning_rate": 1e-4},
    "contrastive": {"generative_weight": 0.0},
    "notellm": {},
}


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
        notes_file = folder / "notes.jsonl"
        notes = list({note.note_id: note for note in read_notes(notes_file, published_at=0)}.values())
        return cls(notes_file, notes, read_clicks(folder / "clicks.jsonl"), train_end, hash_file(notes_file))

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
    embeddings: Matrix
    steps: int
    tokens: int
    seconds: float
    settings: dict[str, Any]
    curve: list[tuple[int, float]]


def train_row(
    row: str, data: DataFolder, *, base: str, folder: Path, changes: Mapping[str, Any], seed: int, tell: Watch
) -> Trained:
    """Train one of :data:`ROWS` in ``folder`` and embed all notes. Goes on where an earlier try was killed."""
    settings = TrainingSettings(**{**SHARED, **ROWS[row], **changes, "seed": seed})
    pairs = folder / "pairs.parquet"
    if not pairs.exists():
        data.write_pairs(pairs)
    files = DataFiles(pairs, data.notes_file)
    began = time.monotonic()
    if row == "minilm_tuned":
        matrix, curve = tune_minilm(files, data.notes, settings, tell)
        return Trained(matrix, settings.steps, curve[-1][0], time.monotonic() - began, settings.model_dump(), curve)
    out = folder / "checkpoint"
    plan = TrainingPlan(base=base, files=files, out=out, categories=["other"], settings=settings)
    outcome = train(plan, tell)
    if not outcome.done:
        raise SystemExit(f"{folder}: stopped after step {outcome.metrics['step']}; the same command goes on from there")
    lines = [msgspec.json.decode(line) for line in (out / "metrics.jsonl").read_bytes().splitlines()]
    curve = [(line["tokens"], line["contrastive"]) for line in lines if line["part"] == "train"]
    shutil.copy(out / "loss.png", folder / "loss.png")
    matrix = embed_with_base(str(out), data.notes, lambda share: None)
    last = outcome.metrics
    return Trained(matrix, last["step"], last["tokens"], last["seconds"], settings.model_dump(), curve)


def embed_with_base(source: str, notes: list[Note], progress: Callable[[float], None]) -> Matrix:
    """``[N, D]`` by a checkpoint, or by a base that was never trained."""
    roomy = {"token_budget": 65_536, "max_rows": 512} if torch.cuda.is_available() else {}
    with open_torch_encoder(source, **roomy) as encoder:
        return read_embeddings(encoder, notes, progress)


def embed_with_minilm(notes: list[Note], progress: Callable[[float], None]) -> Matrix:
    return MiniLM.load().embed([note_text(note) for note in notes], progress)
