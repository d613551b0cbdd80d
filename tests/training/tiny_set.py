"""A dozen pairs of short notes, and what learns from them: a tiny model, its rows, its batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import torch
from tokenizers import Tokenizer

from notellm.messages import Note
from notellm.prompt import PromptBuilder, PromptLimits, load_template
from notellm.settings import TrainingSettings
from training.adaptation import adapt
from training.base_model import Base, load_base
from training.batches import PairBatches
from training.model import NoteLLM
from training.note_rows import HeldBack, RowBuilder
from training.note_table import NoteTable
from training.pairs import PairTable
from training.training_data import DataFiles

__all__ = ["CATEGORIES", "NOTES", "builder_of", "note_table", "pair_table", "tiny_batches", "tiny_model", "write_files"]

CATEGORIES = ["art", "travel", "food"]
_WORDS = ["amber", "anchor", "apple", "arrow", "autumn", "bamboo", "barley", "basket", "beacon", "birch", "bottle"]


def _note(number: int) -> Note:
    """Of every length; every fifth has no hashtags, every seventh a category that is never taught."""
    draw = np.random.default_rng([5, number])
    return Note(
        note_id=f"note-{number:02d}",
        title=" ".join(draw.choice(_WORDS, size=1 + number % 4)),
        content=" ".join(draw.choice(_WORDS, size=number % 9)),
        hashtags=[] if number % 5 == 0 else draw.choice(_WORDS, size=1 + number % 3, replace=False).tolist(),
        category="unheard of" if number % 7 == 0 else CATEGORIES[number % 3],
        published_at=1000 + number,
    )


NOTES = [_note(number) for number in range(24)]


def note_table(notes: list[Note]) -> NoteTable:
    names = ("note_id", "title", "content", "hashtags", "category", "published_at")
    types = {"hashtags": pa.list_(pa.string()), "published_at": pa.int64()}
    return NoteTable(
        pa.table({name: pa.array([getattr(note, name) for note in notes], types.get(name)) for name in names})
    )


def pair_table(
    pairs: list[tuple[int, int]], scores: list[float] | None = None, *, notes: int = len(NOTES)
) -> PairTable:
    sources, targets = np.array(pairs, np.int64).T
    return PairTable.of(sources, targets, np.array(scores or [1.0] * len(pairs)), notes)


def builder_of(base: Base, held_back: HeldBack = "one", category_hashtags: float = 1.0, tokens: int = 48) -> RowBuilder:
    template = load_template("en")
    tokenizer = Tokenizer.from_str(base.tokenizer.backend_tokenizer.to_str())
    prompts = PromptBuilder(tokenizer, template, PromptLimits(note=tokens), base.token_ids)
    return RowBuilder(prompts, template.answer_prefix, base.token_ids.eos[0], held_back, category_hashtags)


def tiny_model(folder: Path, **settings: Any) -> tuple[NoteLLM, Base]:
    """Adapted and in float32; the same at every call. No adapter is zero, as it would be at the start of a training."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        base = load_base(str(folder))
        given = {"lora_rank": 2, "lora_alpha": 4, "embedding_dim": 8, "temperature": 1.5, **settings}
        model, _ = adapt(base, TrainingSettings(**given))
        with torch.no_grad():
            for part in model.parameters():
                if part.requires_grad and part.ndim > 1:
                    part.add_(torch.randn_like(part) * 0.05)
    return model.train(), base


def tiny_batches(base: Base, settings: TrainingSettings, **more: Any) -> PairBatches:
    """Of pairs among which are both ways round, and notes that have several partners."""
    pairs = [(n, n + 12) for n in range(12)] + [(12, 0), (0, 13), (3, 4)]
    return PairBatches(
        note_table(NOTES), pair_table(pairs), builder_of(base), settings, categories=frozenset(CATEGORIES), **more
    )


def write_files(folder: Path) -> DataFiles:
    """The same as files, the last four pairs being the validation part."""
    folder.mkdir(parents=True, exist_ok=True)
    pairs = [{"source_id": f"note-{n:02d}", "target_id": f"note-{n + 12:02d}", "score": 1 + n % 3} for n in range(12)]
    train = [note.note_id for n, note in enumerate(NOTES) if n % 12 < 8]
    validation = [note.note_id for n, note in enumerate(NOTES) if n % 12 >= 8]
    files = DataFiles(folder / "pairs.jsonl", folder / "notes.jsonl", folder / "split.json")
    assert files.notes is not None
    assert files.split is not None
    for file, lines in ((files.pairs, pairs), (files.notes, NOTES)):
        file.write_bytes(b"".join(msgspec.json.encode(line) + b"\n" for line in lines))
    files.split.write_bytes(msgspec.json.encode({"train": train, "validation": validation, "held_out": []}))
    return files
