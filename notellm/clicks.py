"""The ``note-clicks`` messages: bytes in, a :class:`Click` or a :class:`Forget` out, or :class:`InvalidMessage`."""

from __future__ import annotations

from typing import Annotated

import msgspec

from notellm.decoding import ID_BYTES, check_id, decode_id_key, decode_object
from notellm.errors import InvalidMessage

__all__ = ["Click", "Forget", "encode_click", "parse_click"]

_Id = Annotated[
    str, msgspec.Meta(min_length=1, max_length=ID_BYTES, description="1 to 64 bytes of UTF-8, no control characters.")
]


class Click(msgspec.Struct, frozen=True, kw_only=True):
    """A person opened a note. Unknown fields pass and are dropped."""

    user_id: _Id
    note_id: _Id
    clicked_at: Annotated[int, msgspec.Meta(ge=0, le=2**53, description="Milliseconds UTC.")]


class Forget(msgspec.Struct, frozen=True):
    """A null value: everything that is known of the user goes."""

    user_id: str


_decoder = msgspec.json.Decoder(Click)


def parse_click(key: bytes | None, value: bytes | None) -> Click | Forget:
    """Read one record of the ``note-clicks`` topic. Raises :class:`InvalidMessage`, and nothing else."""
    user_id = decode_id_key(key, "user_id")
    if value is None:
        return Forget(user_id)
    click = decode_object(value, _decoder, "a click", key_field="user_id")
    if click.user_id != user_id:
        check_id(click.user_id, "user_id")
        raise InvalidMessage("key_mismatch", "user_id", "is not the record's key; the two must be equal")
    check_id(click.note_id, "note_id")
    return click


def encode_click(click: Click) -> bytes:
    """The value of a record; its key is the user_id."""
    return msgspec.json.encode(click)
