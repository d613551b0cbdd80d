"""One row of the click table: the clicks of one user on one UTC day.

A click rewrites the row that it is in, and the changelog carries that row: a day's clicks, not a week's.

Key: the day in 4 bytes, big-endian, then the user_id in UTF-8. Value: MessagePack, one flat array ``[ms, note_id, ms,
note_id, ...]``, milliseconds since the day began, sorted by (ms, note_id).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from typing import Literal, NamedTuple

import msgspec

from notellm.clicks import Click
from streams.errors import SourceError
from streams.rules import DAY_MS

__all__ = ["Added", "add_click", "read_row", "row_key", "user_and_day"]

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(list[int | str])
_DAY_BYTES = 4


class Added(NamedTuple):
    """The row as it is now, what became of the click, and what fell out of the row for it."""

    row: bytes
    outcome: Literal["accepted", "duplicate", "evicted"]
    evicted: int = 0


def row_key(user_id: str, day: int) -> bytes:
    return day.to_bytes(_DAY_BYTES, "big") + user_id.encode()


def user_and_day(key: bytes) -> tuple[str, int]:
    """Raises :class:`SourceError` for bytes that no :func:`row_key` has made."""
    try:
        return key[_DAY_BYTES:].decode(), int.from_bytes(key[:_DAY_BYTES], "big")
    except UnicodeDecodeError:
        raise SourceError(f"the changelog's key {key[:80]!r} is not one of ours") from None


def add_click(row: bytes | None, click: Click, clicks_per_day: int) -> Added:
    """``row`` is the one of the click's user and day, None where there is none yet.

    ``evicted`` counts the clicks that fell out; the outcome is "evicted" when the click itself did.
    """
    ms = click.clicked_at % DAY_MS
    if row is None:
        return Added(_encoder.encode([ms, click.note_id]), "accepted")
    flat = _decoder.decode(row)
    clicks = list(zip(flat[::2], flat[1::2], strict=True))
    place = bisect_left(clicks, (ms, click.note_id))
    if place < len(clicks) and clicks[place] == (ms, click.note_id):
        return Added(row, "duplicate")
    over = max(len(clicks) + 1 - clicks_per_day, 0)
    if place < over:
        return Added(row, "evicted", 1)  # older than all that stay
    flat[2 * place : 2 * place] = [ms, click.note_id]
    return Added(_encoder.encode(flat[2 * over :]), "accepted", over)


def read_row(key: bytes, row: bytes) -> Iterator[Click]:
    """The row's clicks, by (clicked_at, note_id). Raises :class:`SourceError`."""
    user_id, day = user_and_day(key)
    try:
        flat = _decoder.decode(row)
        for ms, note_id in zip(flat[::2], flat[1::2], strict=True):
            yield Click(user_id=user_id, note_id=note_id, clicked_at=day * DAY_MS + ms)  # type: ignore[operator, arg-type]
    except (msgspec.MsgspecError, ValueError, TypeError):
        raise SourceError(f"the changelog's row of {user_id!r} is not one of ours") from None
