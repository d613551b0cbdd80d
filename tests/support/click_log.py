"""A log of clicks with everything in it that can be wrong with one, and its reading by hand.

Imports nothing of streams/: what is left is worked out here from the text of its rules.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import msgspec
from confluent_kafka import OFFSET_BEGINNING, Consumer, Producer, TopicPartition

__all__ = [
    "BOT",
    "Draft",
    "Limits",
    "Reading",
    "Record",
    "click_log",
    "latest_rows",
    "publish",
    "read_by_hand",
    "read_topic",
    "rows_of",
]

DAY = 24 * 60 * 60 * 1000
HOUR = 60 * 60 * 1000
BOT = "bot-🤖"

Place = tuple[str, int, int]
Kept = tuple[str, str, int]  # user, note, when


@dataclass(frozen=True)
class Limits:
    """The settings that decide."""

    window_days: int = 2
    lateness_ms: int = HOUR
    tolerance_ms: int = 60_000
    clicks_per_day: int = 12


@dataclass(frozen=True)
class Draft:
    key: bytes | None
    value: bytes | None
    timestamp: int
    headers: tuple[tuple[str, bytes], ...] = ()


@dataclass(frozen=True)
class Record:
    place: Place
    timestamp: int
    key: bytes | None
    value: bytes | None
    headers: tuple[tuple[str, bytes | None], ...]


@dataclass
class Reading:
    """Every record of a log is in exactly one of the first seven; evicted are those of the accepted that fell out."""

    dead_letters: set[Place] = field(default_factory=set)
    forgets: set[Place] = field(default_factory=set)
    late: set[Place] = field(default_factory=set)
    future: set[Place] = field(default_factory=set)
    duplicates: set[Place] = field(default_factory=set)
    accepted: dict[Place, Kept] = field(default_factory=dict)
    forgotten: set[Place] = field(default_factory=set)  # accepted, and then their user was forgotten
    evicted: set[Place] = field(default_factory=set)
    expired: set[Place] = field(default_factory=set)

    @property
    def left(self) -> set[Kept]:
        gone = self.forgotten | self.evicted | self.expired
        return {kept for place, kept in self.accepted.items() if place not in gone}


def click_log(records: int, limits: Limits, seed: int = 1) -> list[Draft]:
    """Six days until now, 40 users and a bot."""
    draw = random.Random(seed)
    now = int(time.time() * 1000)
    log: list[Draft] = []
    for number in range(records):
        at = now - 6 * DAY + 6 * DAY * number // records
        user = BOT if draw.random() < 0.15 else f"user-{int(40 * draw.random() ** 2)}-é"
        kind = draw.random()
        if kind < 0.06 and log:
            # Doubled: the same click again, a little later.
            log.append(_sooner(draw.choice(log[-30:]), at))
        elif kind < 0.10:
            log.append(_click(user, draw, at, at - limits.lateness_ms - draw.choice([1, 5000, 3 * DAY])))
        elif kind < 0.13:
            log.append(_click(user, draw, at, at + limits.tolerance_ms + draw.choice([1, 5000, 3 * DAY])))
        elif kind < 0.19:
            log.append(_broken(user, draw, at))
        elif kind < 0.21:
            log.append(Draft(user.encode(), None, at))
        else:
            log.append(
                _click(user, draw, at, at - draw.choice([0, 0, 1, 1000, limits.lateness_ms, -limits.tolerance_ms]))
            )
    # On every partition, with enough users: the last day's sweep has happened.
    return log + [_click(f"last-{number}", draw, now, now) for number in range(40)]


def _click(user: str, draw: random.Random, timestamp: int, clicked_at: int) -> Draft:
    value = {"user_id": user, "note_id": f"note-{draw.randrange(30)}", "clicked_at": clicked_at, "seen_ms": 12}
    return Draft(user.encode(), json.dumps(value).encode(), timestamp)


def _sooner(earlier: Draft, at: int) -> Draft:
    return Draft(earlier.key, earlier.value, min(at, earlier.timestamp + 60_000), earlier.headers)


def _broken(user: str, draw: random.Random, at: int) -> Draft:
    value = {"user_id": user, "note_id": "n", "clicked_at": at}
    headers = (("trace", b"\x00\xff"), ("trace", b"again"))
    return draw.choice(
        [
            Draft(user.encode(), b"{", at, headers),
            Draft(user.encode(), b"", at),
            Draft(user.encode(), b"\xff\xfe", at),
            Draft(user.encode(), b"null", at),
            Draft(None, json.dumps(value).encode(), at, headers),
            Draft(b"somebody else", json.dumps(value).encode(), at),
            Draft(user.encode(), json.dumps({**value, "note_id": "n" * 65}).encode(), at),
            Draft(user.encode(), json.dumps({**value, "note_id": 7}).encode(), at),
            Draft(user.encode(), json.dumps({**value, "clicked_at": "now"}).encode(), at),
            Draft(user.encode(), json.dumps({**value, "clicked_at": -1}).encode(), at),
            Draft(b"\xff", None, at),
        ]
    )


def publish(servers: str, topic: str, log: Sequence[Draft]) -> None:
    producer = Producer({"bootstrap.servers": servers, "partitioner": "murmur2_random"})
    for draft in log:
        producer.produce(topic, draft.value, draft.key, headers=list(draft.headers), timestamp=draft.timestamp)
    assert producer.flush(30) == 0


def read_topic(servers: str, topic: str, partitions: int) -> list[Record]:
    """All of it, in each partition's order."""
    found: list[Record] = []
    ends = 0
    properties = {"bootstrap.servers": servers, "group.id": "reader", "enable.partition.eof": True}
    with closing(Consumer(properties)) as consumer:
        consumer.assign([TopicPartition(topic, partition, OFFSET_BEGINNING) for partition in range(partitions)])
        deadline = time.monotonic() + 30
        while ends < partitions:
            assert time.monotonic() < deadline, f"{topic} does not come to its end"
            for message in consumer.consume(1000, timeout=0.1):  # it waits so long when there are fewer
                if message.error() is not None:
                    ends += 1
                else:
                    place = (message.topic(), message.partition(), message.offset())
                    headers = tuple(message.headers() or ())
                    found.append(Record(place, message.timestamp()[1], message.key(), message.value(), headers))
    return sorted(found, key=lambda record: record.place)


def read_by_hand(records: Sequence[Record], limits: Limits) -> Reading:
    """One record after another, slowly."""
    reading = Reading()
    for record in records:
        click = _click_of(record)
        if click is None:
            if record.value is None and _is_id(record.key):
                reading.forgets.add(record.place)
                _forget(reading, record)
            else:
                reading.dead_letters.add(record.place)
            continue
        age = record.timestamp - click[2]
        if age > limits.lateness_ms:
            reading.late.add(record.place)
        elif -age > limits.tolerance_ms:
            reading.future.add(record.place)
        elif any(kept == click for place, kept in reading.accepted.items() if place not in reading.forgotten):
            reading.duplicates.add(record.place)
        else:
            reading.accepted[record.place] = click
    _evict(reading, limits)
    _expire(reading, records, limits)
    return reading


def _click_of(record: Record) -> Kept | None:
    try:
        value = json.loads((record.value or b"").decode())
        user, note, at = value["user_id"], value["note_id"], value["clicked_at"]
    except (ValueError, TypeError, KeyError):
        return None
    good = record.key == user.encode() and _is_id(record.key) and isinstance(note, str) and _is_id(note.encode())
    return (user, note, at) if good and isinstance(at, int) and at >= 0 else None


def _is_id(key: bytes | None) -> bool:
    try:
        return key is not None and 1 <= len(key) <= 64 and key.decode().isprintable()
    except UnicodeDecodeError:
        return False


def _forget(reading: Reading, record: Record) -> None:
    user = (record.key or b"").decode()
    reading.forgotten |= {
        place for place, kept in reading.accepted.items() if kept[0] == user and place[1] == record.place[1]
    }


def _evict(reading: Reading, limits: Limits) -> None:
    days: dict[tuple[str, int], list[tuple[int, str, Place]]] = {}
    for place, (user, note, at) in reading.accepted.items():
        if place not in reading.forgotten:
            days.setdefault((user, at // DAY), []).append((at, note, place))
    for clicks in days.values():
        reading.evicted |= {place for _, _, place in sorted(clicks)[: -limits.clicks_per_day]}


def _expire(reading: Reading, records: Sequence[Record], limits: Limits) -> None:
    highest: dict[int, int] = {}
    for record in records:
        highest[record.place[1]] = max(highest.get(record.place[1], 0), record.timestamp)
    keep = limits.window_days * DAY + limits.lateness_ms
    for place, (_, _, at) in reading.accepted.items():
        day_ended = (at // DAY + 1) * DAY
        if day_ended + keep <= highest[place[1]] // DAY * DAY:
            reading.expired.add(place)


def rows_of(rows: dict[bytes, bytes]) -> set[Kept]:
    """Rows as they are described: the day in 4 bytes and the user; ms since the day began and the note, in turn."""
    found: list[Any] = []
    for key, row in rows.items():
        flat = msgspec.msgpack.decode(row)
        day, user = int.from_bytes(key[:4], "big"), key[4:].decode()
        clicks = [(user, note, day * DAY + ms) for ms, note in zip(flat[::2], flat[1::2], strict=True)]
        assert clicks == sorted(clicks, key=lambda click: (click[2], click[1])), "a row is in order"
        found += clicks
    assert len(found) == len(set(found))
    return set(found)


def latest_rows(records: Sequence[Record]) -> dict[bytes, bytes]:
    """Of a changelog: the last row of every key that has not been deleted. A key is on one partition."""
    partitions: dict[bytes, set[int]] = {}
    last: dict[bytes, bytes | None] = {}
    for record in records:
        assert record.key is not None
        last[record.key] = record.value
        partitions.setdefault(record.key, set()).add(record.place[1])
    assert all(len(places) == 1 for places in partitions.values())
    return {key: row for key, row in last.items() if row is not None}
