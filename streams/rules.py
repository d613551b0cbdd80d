"""Which clicks are kept, by rules that a reader of the raw topic can apply as well as the app.

A record of ``note-clicks`` is, in this order:

1. a dead letter, when it is no click (:func:`notellm.clicks.parse_click`);
2. a forget: everything of its user at lower offsets of its partition goes;
3. ``late`` or ``future``: its ``clicked_at`` against the record's own timestamp, so that a second reading of the topic,
   a year later, judges the same;
4. ``duplicate``: the user clicked that note at that millisecond already;
5. accepted. Of one user and one UTC day only the newest ``clicks_per_day`` stay, by (clicked_at, note_id): what falls
   out is ``evicted``, the click itself perhaps.

The app's table ends somewhere: a click of a day that has left it (:class:`streams.click_table.ClickTable`) is
``expired``. No window of a refresh reaches so far.

What is left after a sequence of records is, for each user after the last forget, the newest ``clicks_per_day`` distinct
clicks of each day: the same whatever the order of its clicks, and whether a part of it was read twice.
"""

from __future__ import annotations

from typing import Literal

from notellm.clicks import Click

__all__ = ["DAY_MS", "Mistimed", "day_of", "mistimed"]

DAY_MS = 24 * 60 * 60 * 1000
Mistimed = Literal["late", "future"]


def mistimed(click: Click, timestamp_ms: int, allowed_lateness_ms: int, future_tolerance_ms: int) -> Mistimed | None:
    """``timestamp_ms`` is the record's; below 0 where it has none, and then no rule applies."""
    if timestamp_ms < 0:
        return None
    if timestamp_ms - click.clicked_at > allowed_lateness_ms:
        return "late"
    if click.clicked_at - timestamp_ms > future_tolerance_ms:
        return "future"
    return None


def day_of(clicked_at: int) -> int:
    """Days since 1970-01-01 UTC."""
    return clicked_at // DAY_MS
