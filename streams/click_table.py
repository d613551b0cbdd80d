"""What one partition's records make of its rows: rules.py and day_row.py over a store, with no Kafka in sight.

Changes stay in memory until the changelog has them (:meth:`ClickTable.take`, :meth:`ClickTable.settle`): the store is
never ahead of the changelog, so that a click read again after a crash meets the rows that every other reader of the
changelog meets too.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple, Protocol

from notellm.clicks import Click, Forget, parse_click
from notellm.settings import StreamsSettings
from streams.day_row import add_click, row_key
from streams.rules import DAY_MS, day_of, mistimed

__all__ = ["ClickTable", "Outcome", "Rows", "Rules"]

Outcome = Literal["accepted", "duplicate", "late", "future", "evicted", "expired", "forgotten"]

# Rows that one sweep deletes: a new day must not hold up the clicks.
_SWEEP_ROWS = 5_000
_DAY_BYTES = 4


class Rows(Protocol):
    """The rows of one partition on disk, by key. Keys begin with their day."""

    def get(self, key: bytes) -> bytes | None: ...

    def days(self) -> list[int]:
        """Every day that has a row."""

    def first_keys(self, before: bytes, limit: int) -> list[bytes]:
        """The lowest keys, below ``before``."""

    def stream_ms(self) -> int:
        """As it was last written; -1 where it never was."""

    def write(self, changes: Mapping[bytes, bytes | None], stream_ms: int, changelog_offset: int | None) -> None:
        """All or nothing; None deletes. The offset is that of the last of these changes, None where there are none."""


class Rules(NamedTuple):
    lateness_ms: int
    tolerance_ms: int
    clicks_per_day: int
    keep_ms: int

    @classmethod
    def of(cls, settings: StreamsSettings) -> Rules:
        lateness_ms = settings.allowed_lateness_s * 1000
        return cls(
            lateness_ms=lateness_ms,
            tolerance_ms=settings.future_tolerance_s * 1000,
            clicks_per_day=settings.clicks_per_day,
            keep_ms=settings.window_days * DAY_MS + lateness_ms,
        )


class ClickTable:
    """One partition. ``counts`` is what became of its clicks since somebody last cleared it.

    Stream time is the highest record timestamp seen. Days that ended more than window and lateness before the UTC day
    that it is in are expired: their rows go, of silent users too, and a click of such a day is not taken in.
    """

    def __init__(self, rows: Rows, rules: Rules, clock: Callable[[], float] = time.time) -> None:
        self.counts: Counter[Outcome] = Counter()
        self.expired_rows = 0
        self._rows = rows
        self._rules = rules
        self._clock = clock
        self._open: dict[bytes, bytes | None] = {}
        self._sent: dict[bytes, bytes | None] = {}
        self._days = set(rows.days())
        self._stream_ms = -1
        self._first_day = 0  # that is kept
        self._swept_before = 0
        self._written_ms = rows.stream_ms()
        self._see(self._written_ms)

    @property
    def changed_rows(self) -> int:
        """Rows whose change is only in memory."""
        return len(self._open) + len(self._sent)

    def handle(self, key: bytes | None, value: bytes | None, timestamp_ms: int) -> Outcome:
        """Take one record in. Raises :class:`notellm.errors.InvalidMessage`, with nothing changed but stream time."""
        if timestamp_ms > self._stream_ms:
            self._see(timestamp_ms)
        message = parse_click(key, value)
        if isinstance(message, Forget):
            outcome: Outcome = self._forget(message.user_id)
        else:
            outcome = mistimed(message, timestamp_ms, self._rules.lateness_ms, self._rules.tolerance_ms) or self._add(
                message
            )
        self.counts[outcome] += 1
        return outcome

    def get(self, key: bytes) -> bytes | None:
        if key in self._open:
            return self._open[key]
        if key in self._sent:
            return self._sent[key]
        return self._rows.get(key)

    def sweep(self) -> None:
        """Delete expired rows, some at a time. Not between :meth:`take` and :meth:`settle`."""
        if self._swept_before == self._first_day:
            return
        before = self._first_day.to_bytes(_DAY_BYTES, "big")
        found = self._rows.first_keys(before, _SWEEP_ROWS)
        expired = {key for key in (*found, *self._open) if key[:_DAY_BYTES] < before}
        gone = [key for key in expired if self.get(key) is not None]
        self._open.update(dict.fromkeys(gone))
        self.expired_rows += len(gone)
        if len(found) < _SWEEP_ROWS:
            self._swept_before = self._first_day
            self._days = {day for day in self._days if day >= self._first_day}

    def take(self) -> Mapping[bytes, bytes | None]:
        """What has changed, for the changelog; with what was taken and never settled, as its round was cut off."""
        self._sent, self._open = {**self._sent, **self._open}, {}
        return self._sent

    def settle(self, changelog_offset: int | None) -> None:
        """The changelog has what was taken, the last of it at this offset."""
        if self._sent or self._stream_ms != self._written_ms:
            self._rows.write(self._sent, self._stream_ms, changelog_offset)
            self._written_ms = self._stream_ms
            self._sent = {}

    def _see(self, timestamp_ms: int) -> None:
        # A clock set wrong somewhere must not expire everybody's clicks.
        bounded = min(timestamp_ms, int(self._clock() * 1000) + DAY_MS)
        if bounded > self._stream_ms:
            self._stream_ms = bounded
            day_began = bounded - bounded % DAY_MS
            self._first_day = max((day_began - self._rules.keep_ms) // DAY_MS, 0)

    def _add(self, click: Click) -> Outcome:
        day = day_of(click.clicked_at)
        if day < self._first_day:
            return "expired"
        key = row_key(click.user_id, day)
        before = self.get(key)
        added = add_click(before, click, self._rules.clicks_per_day)
        if added.row != before:
            self._open[key] = added.row
            self._days.add(day)
        if added.outcome == "accepted":
            self.counts["evicted"] += added.evicted
        return added.outcome

    def _forget(self, user_id: str) -> Outcome:
        """A tombstone for every day on which the user could have a row, whether or not it is here."""
        newest = day_of(max(self._stream_ms, 0) + self._rules.tolerance_ms)
        for day in self._days.union(range(max(self._first_day - 1, 0), newest + 1)):
            self._open[row_key(user_id, day)] = None
        return "forgotten"
