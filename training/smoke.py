"""A tiny set to try a machine and a base with: 16 pairs of notes that have nothing in common, to be learnt by heart."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import msgspec

from training.training_data import DataFiles

__all__ = ["RECALL", "SMOKE_SETTINGS", "write_smoke_data"]

# What recall@1 within the batch has to pass.
RECALL: Final = 0.9
SMOKE_SETTINGS: Final[Mapping[str, Any]] = {
    "steps": 14,
    "batch_pairs": 16,
    "method": "lora",
    "note_tokens": 32,
    "learning_rate": 1e-3,
    "projection_learning_rate": 1e-3,
    "temperature": 2.0,
    "whitening_notes": 64,
    "save_every": 5,
}
_PAIRS = 16
_WORDS = (
    "amber", "anchor", "apple", "arrow", "autumn", "bamboo", "barley", "basket", "beacon", "birch", "bottle",
    "branch", "breeze", "bridge", "bronze", "button", "candle", "canyon", "carpet", "cedar", "chalk", "cherry",
    "circle", "cliff", "clover", "cobalt", "copper", "coral", "cotton", "cradle", "crystal", "daisy", "desert",
    "dragon", "ember", "fabric", "falcon", "feather", "fiddle", "forest", "fossil", "garden", "ginger", "glacier",
    "granite", "hammer", "harbor", "hazel", "helmet", "honey", "indigo", "island", "ivory", "jacket", "jasmine",
    "kettle", "ladder", "lantern", "lemon", "linen", "marble", "meadow", "mirror", "needle",
)  # fmt: skip


def write_smoke_data(folder: Path) -> DataFiles:
    """Notes of words drawn at random, so that no text says which two belong together. Always the same."""
    draw = random.Random(7)
    notes = [
        {
            "note_id": f"smoke-{number:02d}",
            "title": " ".join(draw.sample(_WORDS, 4)),
            "hashtags": draw.sample(_WORDS, 2),
            "category": draw.choice(["travel", "food", "music", "books"]),
        }
        for number in range(2 * _PAIRS)
    ]
    pairs = [{"source_id": notes[n]["note_id"], "target_id": notes[n + _PAIRS]["note_id"]} for n in range(_PAIRS)]
    folder.mkdir(parents=True, exist_ok=True)
    files = DataFiles(pairs=folder / "pairs.jsonl", notes=folder / "notes.jsonl")
    for file, lines in ((folder / "notes.jsonl", notes), (folder / "pairs.jsonl", pairs)):
        file.write_bytes(b"".join(msgspec.json.encode(line) + b"\n" for line in lines))
    return files
