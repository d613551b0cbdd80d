"""Bytes from strangers -> a typed object, or :class:`InvalidMessage`: what the doors of all topics have in common."""

from __future__ import annotations

import re
import unicodedata
from typing import Final, TypeVar

import msgspec

from notellm.errors import InvalidMessage

__all__ = ["ID_BYTES", "check_id", "decode_id_key", "decode_object"]

Message = TypeVar("Message")
ID_BYTES: Final = 64


def check_id(text: str, field: str) -> str:
    """Return ``text`` if it may be an id, else raise :class:`InvalidMessage` that names ``field``."""
    size = len(text.encode("utf-8", "surrogatepass"))
    if not 1 <= size <= ID_BYTES:
        raise InvalidMessage("bad_id", field, f"{size} bytes; allowed are 1 to {ID_BYTES} bytes of UTF-8")
    # ASCII that prints, which nearly all ids are, costs one look instead of one per character.
    if not (text.isascii() and text.isprintable()) and any(unicodedata.category(char) in ("Cc", "Cs") for char in text):
        raise InvalidMessage("bad_id", field, "contains a control character; none is allowed")
    return text


def decode_id_key(key: bytes | None, names: str) -> str:
    """The record's key, which must be the id that ``names`` says, such as ``note_id``."""
    if not key:
        raise InvalidMessage("no_key", "key", f"missing; the key must be the {names}")
    try:
        text = key.decode("utf-8")
    except UnicodeDecodeError:
        raise InvalidMessage("bad_id", "key", f"is not UTF-8; allowed are 1 to {ID_BYTES} bytes of UTF-8") from None
    return check_id(text, "key")


def decode_object(value: bytes, decoder: msgspec.json.Decoder[Message], what: str, *, key_field: str) -> Message:
    """The record's value: a JSON object whose ``key_field`` its caller compares with the key. ``what`` is "a note"."""
    if value.strip() == b"":
        raise InvalidMessage("not_json", "value", f"empty; {what} is a JSON object, a deletion is a null value")
    try:
        # As text: of bytes, the decoder would leave unread whether the fields that it skips are UTF-8.
        return decoder.decode(value.decode("utf-8"))
    except msgspec.ValidationError as error:
        raise _invalid_field(str(error), what, key_field) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidMessage("not_json", "value", f"not UTF-8 JSON ({error}); {what} is a JSON object") from None
    except RecursionError:
        raise InvalidMessage("not_json", "value", f"nested too deeply; {what} is a flat JSON object") from None


def _invalid_field(complaint: str, what: str, key_field: str) -> InvalidMessage:
    """Msgspec says ``Expected `str`, got `int` - at `$.title```: turn that into field, kind and what is allowed."""
    fault, _, path = complaint.partition(" - at `$")
    field = path.rstrip("`").lstrip(".")
    if not field:
        absent = re.search(r"required field `(\w+)`", fault)
        if absent is None:
            return InvalidMessage("not_object", "value", f"{fault}; {what} is a JSON object")
        if absent[1] != key_field:
            return InvalidMessage("wrong_type", absent[1], "missing; it must be there")
        return InvalidMessage("bad_id", key_field, "missing; it must be there and equal the record's key")
    top = field.split("[")[0].split(".")[0]
    if top in ("note_id", "user_id"):
        return InvalidMessage("bad_id", top, fault)
    if "out of range" in fault:
        return InvalidMessage("not_finite", top, "a number out of range; allowed are finite ones, integers of 64 bits")
    return InvalidMessage("wrong_type", top, fault)
