"""Which notes may be learnt from, and which are kept apart to measure with: a JSON file of ids beside the notes.

::

    {"train": ["travel-001", ...], "validation": [...], "held_out": [...]}
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, TypeAlias, get_args

import msgspec

from training.errors import TrainingDataError

__all__ = ["PARTS", "Part", "Split", "read_split"]

Part: TypeAlias = Literal["train", "validation", "held_out"]
PARTS: tuple[Part, ...] = get_args(Part)
Split: TypeAlias = Mapping[Part, frozenset[str]]


def read_split(file: Path) -> Split:
    """Raises :class:`TrainingDataError` for a part that is unknown or missing, and for a note in two parts."""
    try:
        found = msgspec.json.decode(file.read_bytes(), type=dict[str, list[str]])
    except OSError as error:
        raise TrainingDataError(f"--split: {file} cannot be read: {error.strerror}") from None
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise TrainingDataError(f"--split: {file} is no split: {error}") from None
    if found.keys() != set(PARTS):
        raise TrainingDataError(f"--split: {file} has the parts {sorted(found)}; allowed are {', '.join(PARTS)}")
    counts = Counter(note_id for ids in found.values() for note_id in ids)
    if twice := [note_id for note_id, count in counts.items() if count > 1]:
        raise TrainingDataError(f"--split: {file}: {twice[0]!r} stands there twice; each note has one part")
    return {part: frozenset(found[part]) for part in PARTS}
