"""Notes from a file, through the same door as those that come by Kafka."""

from __future__ import annotations

from pathlib import Path

import msgspec

from notellm.errors import NoteLLMError
from notellm.messages import Note, NoteRecord, parse_record

__all__ = ["read_notes"]


def read_notes(file: Path, *, published_at: int) -> list[Note]:
    """JSON Lines. ``published_at`` is for those that have none. Raises :class:`NoteLLMError` that names the line."""
    notes: list[Note] = []
    try:
        lines = file.read_bytes().splitlines()
    except OSError as error:
        raise NoteLLMError(f"--notes: {file} cannot be read: {error.strerror}") from None
    for number, line in enumerate(lines, 1):
        try:
            record = parse_record(msgspec.json.decode(line)["note_id"].encode(), line, published_at)
        except (NoteLLMError, msgspec.MsgspecError, KeyError, AttributeError, TypeError) as error:
            raise NoteLLMError(f"--notes: {file}, line {number} is no note: {error}") from None
        assert isinstance(record, NoteRecord)
        notes.append(record.note)
    return notes
