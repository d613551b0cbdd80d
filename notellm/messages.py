"""The messages: bytes in, a typed object out, or :class:`InvalidMessage`.

A record of the ``notes`` topic is a :class:`Note` or a :class:`Tombstone`. That door is strict about identity and
types, and lenient about size: what is too long is cut to :data:`LIMITS` and named in ``trimmed``. A record of a
``note-vectors`` topic is a :class:`NoteVector` or a :class:`Tombstone`. Whatever the bytes, nothing else is raised.
"""

from __future__ import annotations

import math
from typing import Annotated, Final

import msgspec

from notellm.decoding import ID_BYTES, check_id, decode_id_key, decode_object
from notellm.errors import InvalidMessage
from notellm.hashtags import clean_hashtags

__all__ = [
    "LIMITS",
    "Limits",
    "Note",
    "NoteRecord",
    "NoteVector",
    "Scalar",
    "Tombstone",
    "encode_note_vector",
    "parse_note_vector",
    "parse_record",
]

NoteId = Annotated[
    str, msgspec.Meta(min_length=1, max_length=64, description="1 to 64 bytes of UTF-8, no control characters.")
]
Scalar = str | int | float | bool | None


class Limits(msgspec.Struct, frozen=True):
    """What a note keeps. Characters are Unicode code points; the rest of a longer field is cut off and counted."""

    id_bytes: int = ID_BYTES
    title: int = 512
    category: int = 128
    hashtags: int = 32
    hashtag: int = 64
    attributes: int = 32
    attributes_bytes: int = 8 * 1024


LIMITS: Final = Limits()
_INT64: Final = range(-(2**63), 2**63)
_TIMESTAMP_ABSENT: Final = -1


class Note(msgspec.Struct, frozen=True, kw_only=True):
    """What a person published. Unknown fields pass and are dropped."""

    note_id: NoteId
    title: Annotated[str, msgspec.Meta(description="Kept to 512 characters.")] = ""
    content: Annotated[str, msgspec.Meta(description="Any length; the prompt reads as much as its budget holds.")] = ""
    hashtags: Annotated[
        list[str],
        msgspec.Meta(description="NFKC, leading # and blanks off, duplicates dropped; kept to 32 of 64 characters."),
    ] = msgspec.field(default_factory=list)
    category: Annotated[str, msgspec.Meta(description="The author's own word. Kept to 128 characters.")] = ""
    published_at: Annotated[
        int, msgspec.Meta(ge=0, le=2**63 - 1, description="Milliseconds UTC. Missing: the record's own timestamp.")
    ] = _TIMESTAMP_ABSENT
    attributes: Annotated[
        dict[str, Scalar],
        msgspec.Meta(description="Flat scalars to filter by, such as author_id; kept to 32 within 8 KiB."),
    ] = msgspec.field(default_factory=dict)


class NoteVector(msgspec.Struct, frozen=True, kw_only=True):
    """What the model made of a note's last version. Fields may be added; pass over those that you do not know."""

    note_id: NoteId
    model_version: Annotated[
        str, msgspec.Meta(pattern="^[0-9a-f]{16}$", description="The model; vectors of two models do not compare.")
    ]
    text_hash: Annotated[
        str, msgspec.Meta(pattern="^[0-9a-f]{64}$", description="SHA-256 of the exact text that the model read.")
    ]
    embedding: Annotated[list[float], msgspec.Meta(min_length=1, description="A unit vector of 32-bit floats.")]
    generated_hashtags: Annotated[list[str], msgspec.Meta(description="The model's own, none of the author's.")]
    generated_category: Annotated[str, msgspec.Meta(description="One of the bundle's categories.")]


class Tombstone(msgspec.Struct, frozen=True):
    """A null value: the note is deleted."""

    note_id: str


class NoteRecord(msgspec.Struct, frozen=True):
    """A valid note and the names of the fields that were cut to their limits."""

    note: Note
    trimmed: tuple[str, ...] = ()


_decoder = msgspec.json.Decoder(Note)
_vector_decoder = msgspec.json.Decoder(NoteVector)


def parse_record(key: bytes | None, value: bytes | None, timestamp_ms: int) -> NoteRecord | Tombstone:
    """Read one record of the ``notes`` topic.

    ``timestamp_ms`` is the record's own time; it stands in for a missing ``published_at``.
    Raises :class:`InvalidMessage`, and nothing else, when the record is a dead letter.
    """
    note_id = decode_id_key(key, "note_id")
    if value is None:
        return Tombstone(note_id)
    note = decode_object(value, _decoder, "a note", key_field="note_id")
    if check_id(note.note_id, "note_id") != note_id:
        raise InvalidMessage("key_mismatch", "note_id", "is not the record's key; the two must be equal")
    return _tidy(note, timestamp_ms)


def encode_note_vector(vector: NoteVector) -> bytes:
    """The value of a ``note-vectors`` record; its key is the note_id."""
    return msgspec.json.encode(vector)


def parse_note_vector(key: bytes | None, value: bytes | None) -> NoteVector | Tombstone:
    """Read one record of the ``note-vectors`` topic. Raises :class:`InvalidMessage`, and nothing else."""
    note_id = decode_id_key(key, "note_id")
    if value is None:
        return Tombstone(note_id)
    vector = decode_object(value, _vector_decoder, "a note vector", key_field="note_id")
    if vector.note_id != note_id:
        raise InvalidMessage("key_mismatch", "note_id", "is not the record's key; the two must be equal")
    return vector


def _tidy(note: Note, timestamp_ms: int) -> NoteRecord:
    _check_numbers(note.attributes)
    trimmed: list[str] = []
    title = _cut(note.title.strip(), LIMITS.title, "title", trimmed)
    category = _cut(note.category.strip(), LIMITS.category, "category", trimmed)
    hashtags = clean_hashtags(note.hashtags)
    if not (title or note.content.strip() or hashtags):
        raise InvalidMessage("no_text", "title, content, hashtags", "all blank; at least one must hold text")
    short = clean_hashtags(tag[: LIMITS.hashtag] for tag in hashtags)[: LIMITS.hashtags]
    if short != hashtags:
        trimmed.append("hashtags")
    attributes = _cut_attributes(note.attributes)
    if len(attributes) != len(note.attributes):
        trimmed.append("attributes")
    published_at = max(timestamp_ms, 0) if note.published_at == _TIMESTAMP_ABSENT else note.published_at
    tidy = Note(
        note_id=note.note_id,
        title=title,
        content=note.content,
        hashtags=short,
        category=category,
        published_at=published_at,
        attributes=attributes,
    )
    return NoteRecord(tidy, tuple(trimmed))


def _cut(text: str, limit: int, field: str, trimmed: list[str]) -> str:
    if len(text) > limit:
        trimmed.append(field)
    return text[:limit].rstrip()


def _check_numbers(attributes: dict[str, Scalar]) -> None:
    for name, value in attributes.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise InvalidMessage("not_finite", f"attributes.{name[:64]}", "a number that is not finite; it must be")
        if isinstance(value, int) and value not in _INT64:
            raise InvalidMessage("not_finite", f"attributes.{name[:64]}", "an integer beyond 64 bits; it must fit")


def _cut_attributes(attributes: dict[str, Scalar]) -> dict[str, Scalar]:
    """The first attributes, in the author's order, that fit into both limits."""
    kept: dict[str, Scalar] = {}
    size = 2
    for name, value in attributes.items():
        size += len(msgspec.json.encode(name)) + len(msgspec.json.encode(value)) + 2
        if len(kept) == LIMITS.attributes or size > LIMITS.attributes_bytes:
            break
        kept[name] = value
    return kept
