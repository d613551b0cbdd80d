"""Whatever is read twice, and wherever a crash falls: what is left is what rules.py says is left."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from notellm.errors import InvalidMessage
from streams.click_table import ClickTable, Rules
from streams.in_memory import MemoryRows

DAY = 24 * 60 * 60 * 1000
RULES = Rules(lateness_ms=DAY // 2, tolerance_ms=1000, clicks_per_day=2, keep_ms=2 * DAY + DAY // 2)
START = 100 * DAY


@dataclass(frozen=True)
class Record:
    user: str
    timestamp: int
    note: str = ""  # none: a forget
    clicked_at: int = 0

    @property
    def value(self) -> bytes | None:
        if not self.note:
            return None
        click = {"user_id": self.user, "note_id": self.note, "clicked_at": self.clicked_at}
        return msgspec.json.encode(click)


def left_of(log: list[Record]) -> set[tuple[str, str, int]]:
    """The last sentence of rules.py, and expiry; nothing of the program."""
    highest = max(record.timestamp for record in log)
    clicks: dict[str, set[tuple[int, str]]] = defaultdict(set)
    for record in log:
        if not record.note:
            clicks[record.user].clear()
        elif -RULES.tolerance_ms <= record.timestamp - record.clicked_at <= RULES.lateness_ms:
            clicks[record.user].add((record.clicked_at, record.note))
    left = set()
    for user, theirs in clicks.items():
        for day in {at // DAY for at, _ in theirs}:
            if (day + 1) * DAY + RULES.keep_ms > highest // DAY * DAY:
                of_day = sorted(click for click in theirs if click[0] // DAY == day)
                left |= {(user, note, at) for at, note in of_day[-RULES.clicks_per_day :]}
    return left


def clicks_in(rows: dict[bytes, bytes]) -> set[tuple[str, str, int]]:
    found = set()
    for key, row in rows.items():
        flat = msgspec.msgpack.decode(row)
        for ms, note in zip(flat[::2], flat[1::2], strict=True):
            found.add((key[4:].decode(), note, int.from_bytes(key[:4], "big") * DAY + ms))
    return found


def latest(changelog: list[tuple[bytes, bytes | None]]) -> dict[bytes, bytes]:
    return {key: row for key, row in dict(changelog).items() if row is not None}


@st.composite
def logs(draw: st.DrawFn) -> list[Record]:
    log, now = [], START
    for _ in range(draw(st.integers(1, 30))):
        now += draw(st.sampled_from([0, 1, 60_000, DAY // 3, DAY, 4 * DAY]))
        timestamp = now - draw(st.sampled_from([0, 0, 0, 5, DAY // 4, 5 * DAY]))
        user = draw(st.sampled_from(["a", "b", "ü"]))
        behind = draw(st.sampled_from([0, 0, 1, 1000, DAY // 3, DAY // 2, DAY // 2 + 1, -1000, -1001]))
        note = draw(st.sampled_from(["n1", "n2", "n3", "", "n1"]))
        log.append(Record(user, timestamp, note, timestamp - behind if note else 0))
        if draw(st.booleans()) and note:
            log.append(log[-1])
    # Stream time is not in the changelog: a worker with an empty disk learns it from what it reads then.
    return [*log, Record("last", now, "n", now)]


CRASHES = st.lists(
    st.tuples(
        st.integers(0, 12),  # records handled
        st.sampled_from(["no round", "sent", "settled", "committed"]),  # how far the round got
        st.sampled_from(["goes on", "own disk", "empty disk"]),
    ),
    max_size=8,
)


@settings(max_examples=400, deadline=None)
@given(log=logs(), crashes=CRASHES)
def test_what_is_left_is_what_the_rules_say(log: list[Record], crashes: list[tuple[int, str, str]]) -> None:
    changelog: list[tuple[bytes, bytes | None]] = []
    rows = MemoryRows()
    table = ClickTable(rows, RULES)
    place = committed = 0
    for number, reached, then in [*crashes, (len(log), "committed", "goes on")]:
        for record in log[place : place + number]:
            table.handle(record.user.encode(), record.value, record.timestamp)
        place = min(place + number, len(log))
        if reached != "no round":
            table.sweep()
            changelog += table.take().items()
            if reached != "sent":
                table.settle(len(changelog) - 1)
                assert rows.rows == latest(changelog), "the disk is the changelog, neither behind nor ahead"
            if reached == "committed":
                committed = place
        if then != "goes on" or reached == "sent":
            if then == "empty disk":
                rows = MemoryRows()
            # As Faust recovers: from where the disk stands.
            rows.write(dict(changelog[rows.changelog_offset + 1 :]), rows.stream_ms(), len(changelog) - 1)
            table = ClickTable(rows, RULES)
            place = committed
    for record in log[place:]:
        table.handle(record.user.encode(), record.value, record.timestamp)
    table.sweep()
    changelog += table.take().items()
    table.settle(len(changelog) - 1)
    assert clicks_in(latest(changelog)) == left_of(log)
    assert rows.rows == latest(changelog)


def table_of(rows: MemoryRows, *, clock: float = 10**10) -> ClickTable:
    return ClickTable(rows, RULES, clock=lambda: clock)


def round_of(table: ClickTable) -> dict[bytes, bytes | None]:
    table.sweep()
    changes = dict(table.take())
    table.settle(0)
    return changes


def click(table: ClickTable, note: str, at: int, timestamp: int | None = None) -> str:
    record = Record("u", timestamp or at, note, at)
    return table.handle(b"u", record.value, record.timestamp)


def test_each_outcome_has_its_name() -> None:
    table = table_of(MemoryRows())
    at = START + DAY // 2
    assert click(table, "n2", at + 2) == "accepted"
    assert click(table, "n2", at + 2) == "duplicate"
    assert click(table, "n3", at + 3) == "accepted"
    assert click(table, "n1", at + 1) == "evicted"
    assert click(table, "n4", at + 4) == "accepted"
    assert click(table, "n4", at, at + DAY // 2 + 1) == "late"
    assert click(table, "n4", at + 1001, at) == "future"
    assert table.handle(b"u", None, at) == "forgotten"
    assert click(table, "n1", at + 9 * DAY) == "accepted"
    assert click(table, "n1", at) == "expired"
    assert table.counts == {
        "accepted": 4, "duplicate": 1, "evicted": 2, "late": 1, "future": 1, "forgotten": 1, "expired": 1,
    }  # fmt: skip
    with pytest.raises(InvalidMessage):
        table.handle(b"u", b"{", at)


def test_a_duplicate_writes_nothing() -> None:
    table = table_of(MemoryRows())
    click(table, "n1", START)
    assert len(round_of(table)) == 1
    click(table, "n1", START)
    assert round_of(table) == {}


def test_forgetting_leaves_a_tombstone_for_every_day_the_user_could_have() -> None:
    """The changelog may have rows that this worker has not seen: another one's, written at the last moment."""
    table = table_of(MemoryRows())
    table.handle(b"u", None, START + 10)
    days = {int.from_bytes(key[:4], "big") for key, row in round_of(table).items() if row is None}
    assert days >= {97, 98, 99, 100}
    assert len(days) < 10


def test_forgetting_finds_rows_of_other_times_than_its_own() -> None:
    rows = MemoryRows()
    table = table_of(rows)
    click(table, "n1", START + 20 * DAY)
    round_of(table)
    again = table_of(rows)  # its disk alone knows of that day
    again.handle(b"u", None, START)
    round_of(again)
    assert rows.rows == {}


def test_silent_users_expire_too_some_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streams.click_table._SWEEP_ROWS", 3)
    rows = MemoryRows()
    table = table_of(rows)
    for number in range(8):
        user = f"u{number}"
        table.handle(user.encode(), Record(user, START, "n", START).value, START)
    round_of(table)
    assert len(rows.rows) == 8
    click(table, "n", START + 10 * DAY)
    left = []
    for _ in range(3):
        round_of(table)
        left.append(len(rows.rows))
    assert left == [6, 3, 1]
    assert table.expired_rows == 8


def test_a_clock_set_wrong_expires_nobody() -> None:
    rows = MemoryRows()
    table = table_of(rows, clock=START / 1000)
    click(table, "n1", START)
    click(table, "n2", START + 9000 * DAY)
    assert click(table, "n3", START + 1) == "accepted"
    round_of(table)
    assert {note for _, note, _ in clicks_in(rows.rows)} == {"n1", "n2", "n3"}
