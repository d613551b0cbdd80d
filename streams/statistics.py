"""``statistics.json``: what a snapshot was made of, what each rule dropped, and how its pairs are spread.

Every record or row that was read is counted exactly once::

    read == clicks + forgets + sum(dropped.values())
"""

from __future__ import annotations

from typing import Annotated, Final

import msgspec

__all__ = ["RULES", "Day", "Degree", "NewNotes", "NoteCounts", "ScoreBin", "Statistics", "decode_statistics"]

# Why a click does not count, in the order in which the rules apply; the keys of Statistics.dropped.
RULES: Final = {
    "dead_letter": "is no click",
    "late": "its time is too far behind its record's",
    "future": "its time is too far ahead of its record's",
    "forgotten": "its user was forgotten after it",
    "duplicate": "the user clicked that note at that millisecond already",
    "evicted": "the user has as many newer clicks on that day as are kept",
    "outside_window": "its time is not within the window",
    "power_user": "its user clicked more notes than max_notes_per_user",
}

_Count = Annotated[int, msgspec.Meta(ge=0)]


class Day(msgspec.Struct, frozen=True):
    """One UTC day of the window, ``2026-11-17``; the clicks that count, and the users who made them."""

    day: str
    clicks: _Count
    users: _Count


class ScoreBin(msgspec.Struct, frozen=True):
    """Pairs with ``low <= score < high``; ten bins to each power of ten, the empty ones left out."""

    low: float
    high: float
    pairs: _Count


class Degree(msgspec.Struct, frozen=True):
    """``notes`` notes have from ``low`` to ``high`` partners, both included."""

    low: _Count
    high: _Count
    notes: _Count


class NewNotes(msgspec.Struct, frozen=True):
    """Live notes that were published within the window, and how many of them stand in a pair, on either side."""

    published: _Count
    with_pair: _Count


class NoteCounts(msgspec.Struct, frozen=True):
    """Records or lines of notes: how many were read, were no notes, and how many notes are deleted and live."""

    read: _Count
    invalid: _Count
    deleted: _Count
    live: _Count


class Statistics(msgspec.Struct, frozen=True, kw_only=True):
    """See the module. A rule that the source cannot see (the app applied it already) is absent from ``dropped``."""

    read: Annotated[int, msgspec.Meta(ge=0, description="Records, rows or lines of clicks that were read.")]
    forgets: Annotated[int, msgspec.Meta(ge=0, description="Those of them that forget a user.")]
    dropped: Annotated[dict[str, int], msgspec.Meta(description="Rule of RULES -> clicks that it dropped.")]
    clicks: Annotated[int, msgspec.Meta(ge=0, description="Clicks that count: within the window, each once.")]
    users: Annotated[int, msgspec.Meta(ge=0, description="Users who made them.")]
    clicked_notes: Annotated[int, msgspec.Meta(ge=0, description="Notes that they clicked.")]
    power_users: Annotated[int, msgspec.Meta(ge=0, description="Users left out by max_notes_per_user.")]
    days: list[Day]
    ordered_pairs: Annotated[int, msgspec.Meta(ge=0, description="Pairs that any user made, before bounds and top.")]
    below_min: Annotated[int, msgspec.Meta(ge=0, description="Those of them below min_score.")]
    above_max: Annotated[int, msgspec.Meta(ge=0, description="Those of them above max_score.")]
    beyond_top: Annotated[int, msgspec.Meta(ge=0, description="Those within bounds that rank after the top.")]
    pairs: Annotated[int, msgspec.Meta(ge=0, description="Those that are left: the rows of pairs.parquet.")]
    sources: Annotated[int, msgspec.Meta(ge=0, description="Notes that have a partner: distinct source_id.")]
    targets: Annotated[int, msgspec.Meta(ge=0, description="Notes that are one: distinct target_id.")]
    scores: list[ScoreBin]
    partners: Annotated[list[Degree], msgspec.Meta(description="Of the sources: how many targets each has.")]
    partner_of: Annotated[list[Degree], msgspec.Meta(description="Of the targets: how many sources have it.")]
    notes: NoteCounts
    new_notes: NewNotes
    pairs_with_deleted_notes: Annotated[
        int, msgspec.Meta(ge=0, description="Pairs with a note that is not in the notes file: deleted, or never there.")
    ]


_decoder = msgspec.json.Decoder(Statistics)


def decode_statistics(content: bytes) -> Statistics:
    """Raises :class:`msgspec.MsgspecError`."""
    return _decoder.decode(content)
