"""Pairs from a real Kafka: the raw topic and the app's changelog give the same, and both are the formula's.

The changelog is written here, by the functions that the app uses: whether the app itself does so is tests elsewhere.
"""

from __future__ import annotations

import random
import struct
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

import duckdb
import msgspec
import pytest
from confluent_kafka import Producer

from notellm.clicks import Click as ClickMessage
from notellm.clicks import encode_click
from notellm.settings import KafkaSettings, Settings, StreamsSettings
from streams import refresh as refreshing
from streams.click_topics import changelog_topic
from streams.day_row import add_click, row_key
from streams.errors import SourceError
from streams.refresh import Refresh, refresh
from streams.rules import DAY_MS, day_of
from streams.snapshot import Snapshot
from tests.streams.formula import Click, formula, read_pairs
from tests.support.kafka_server import KafkaServer
from tests.support.processes import run_command

pytestmark = pytest.mark.integration

PARTITIONS = 3
END = 20_000 * DAY_MS + DAY_MS // 2
LATE_S, FUTURE_S, A_DAY = 3600, 60, 5


@pytest.fixture(autouse=True)
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refreshing, "refresh_reports", lambda _: None)


@dataclass
class Log:
    """Topics of a test's own, and what an obvious reader of them holds."""

    kafka: KafkaServer
    settings: Settings
    producer: Producer
    # By user, then by (clicked_at, note_id): of whom nothing is forgotten yet.
    clicks: dict[str, set[tuple[int, str]]] = field(default_factory=lambda: defaultdict(set))
    rows: dict[bytes, bytes] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=lambda: defaultdict(int))

    def click(self, user: str, note: str, at: int, *, written: int | None = None) -> None:
        """``written`` is the record's timestamp: the click's own time, if it is not said."""
        written = at if written is None else written
        message = ClickMessage(user_id=user, note_id=note, clicked_at=at)
        self._send("clicks", user, encode_click(message), written)
        if written - at > LATE_S * 1000:
            self.counts["late"] += 1
            return
        if at - written > FUTURE_S * 1000:
            self.counts["future"] += 1
            return
        if (at, note) in self.clicks[user]:
            self.counts["duplicate"] += 1
        self.clicks[user].add((at, note))
        key = row_key(user, day_of(at))
        added = add_click(self.rows.get(key), message, A_DAY)
        if self.rows.get(key) != added.row:
            self.rows[key] = added.row
            self._send_row(key, added.row, user)

    def forget(self, user: str, written: int) -> None:
        self._send("clicks", user, None, written)
        self.counts["forgotten"] += len(self.clicks.pop(user, ()))
        for key in [key for key in self.rows if key[4:] == user.encode()]:
            del self.rows[key]
            self._send_row(key, None, user)

    def broken(self, user: str, value: bytes, written: int) -> None:
        self._send("clicks", user, value, written)
        self.counts["dead_letter"] += 1

    def note(self, note_id: str, value: bytes | None, *, written: int = END) -> None:
        self._send("notes", note_id, value, written)

    def surviving(self) -> list[Click]:
        """The newest of each user's day, within the window."""
        kept = []
        for user, clicks in self.clicks.items():
            days = defaultdict(list)
            for at, note in sorted(clicks):
                days[day_of(at)].append((user, note, at))
            for day in days.values():
                self.counts["evicted"] += len(day[:-A_DAY])
                kept += day[-A_DAY:]
        return [click for click in kept if END - 7 * DAY_MS <= click[2] < END]

    def refresh(self, out: Path, source: str, **more: Any) -> Snapshot:
        self.producer.flush(30)
        return refresh(
            Refresh(out=out, source=source, as_of=END, settings=self.settings, threads=2, **more)  # type: ignore[arg-type]
        )

    def _send(self, topic: str, key: str, value: bytes | None, written: int) -> None:
        name = self.settings.streams.clicks_topic if topic == "clicks" else self.settings.kafka.notes_topic
        self.producer.produce(name, value, key.encode(), _partition(key), timestamp=written)
        self.producer.poll(0)

    def _send_row(self, key: bytes, row: bytes | None, user: str) -> None:
        self.producer.produce(changelog_topic(self.settings.streams), row, key, _partition(user))
        self.producer.poll(0)


def _partition(key: str) -> int:
    return sum(key.encode()) % PARTITIONS


@pytest.fixture
def log(kafka_server: KafkaServer) -> Log:
    own = uuid4().hex[:8]
    settings = Settings(
        kafka=KafkaSettings(bootstrap_servers=kafka_server.bootstrap_servers, notes_topic=f"notes-{own}"),
        streams=StreamsSettings(
            clicks_topic=f"clicks-{own}", app_id=f"app-{own}", allowed_lateness_s=LATE_S, future_tolerance_s=FUTURE_S,
            clicks_per_day=A_DAY,
        ),
    )  # fmt: skip
    # The times of these records are years ago: they must not be deleted for it.
    for topic in (settings.streams.clicks_topic, settings.kafka.notes_topic, changelog_topic(settings.streams)):
        kafka_server.create_topic(topic, PARTITIONS, {"retention.ms": "-1"})
    return Log(kafka_server, settings, Producer({"bootstrap.servers": kafka_server.bootstrap_servers, "linger.ms": 20}))


def fill(log: Log, seed: int) -> None:
    """A week and more of all that may happen."""
    chance = random.Random(seed)
    notes = [f"n{number}" for number in range(12)] + ["笔记", "🍵"]
    for at in range(END - 9 * DAY_MS, END + DAY_MS, DAY_MS // 40):
        user, note = f"u{chance.randrange(9)}", chance.choice(notes)
        kind = chance.random()
        if kind < 0.03:
            log.click(user, note, at - LATE_S * 1000 - 1, written=at)
        elif kind < 0.06:
            log.click(user, note, at + FUTURE_S * 1000 + 1, written=at)
        elif kind < 0.10:
            log.broken(user, chance.choice([b"", b"null", b"{}", b"\xff", b'{"user_id": "other"}']), at)
        elif kind < 0.12:
            log.forget(user, at)
        else:
            shift = chance.choice([0, 0, 0, LATE_S * 1000, -FUTURE_S * 1000])
            for _ in range(1 + (chance.random() < 0.1)):
                log.click(user, note, at - shift, written=at)
        if chance.random() < 0.05:  # a bot: its day has room for five
            for step in range(A_DAY + 3):
                log.click("bot", chance.choice(notes), at + step * 1000)


class TestSources:
    def test_both_are_the_formula_over_what_survives(self, log: Log, tmp_path: Path) -> None:
        fill(log, 1)
        log.note("n1", b'{"note_id": "n1", "title": "One"}')
        surviving = log.surviving()
        expected = formula(surviving)
        assert len(expected) > 60
        raw = log.refresh(tmp_path / "raw", "topic")
        table = log.refresh(tmp_path / "table", "changelog")
        assert read_pairs(raw.pairs_path) == expected
        assert read_pairs(table.pairs_path) == expected
        assert raw.manifest.files["pairs.parquet"] == table.manifest.files["pairs.parquet"]

    def test_every_record_is_counted_once(self, log: Log, tmp_path: Path) -> None:
        fill(log, 2)
        surviving = log.surviving()
        # From the beginning of the topic, so that all counts are those of the whole log.
        everything = log.refresh(tmp_path / "out", "topic", window="all")
        found = everything.statistics
        assert {rule: found.dropped[rule] for rule in ("dead_letter", "late", "future")} == {
            rule: log.counts[rule] for rule in ("dead_letter", "late", "future")
        }
        assert found.dropped["evicted"] == log.counts["evicted"] > 0
        # A duplicate of a click that is forgotten later is one or the other.
        ours = found.dropped["forgotten"] + found.dropped["duplicate"]
        assert ours == log.counts["forgotten"] + log.counts["duplicate"] > 0
        assert found.read == found.clicks + found.forgets + sum(found.dropped.values())
        week = log.refresh(tmp_path / "out", "topic").statistics
        assert week.clicks == len(surviving)
        assert week.read == week.clicks + week.forgets + sum(week.dropped.values()) < found.read

    def test_the_manifest_says_what_was_read(self, log: Log, tmp_path: Path) -> None:
        for number in range(30):
            log.click("u1", f"n{number % 3}", END - 30 + number)
        log.click("u1", "n1", END - 20 * DAY_MS)
        raw, table = (log.refresh(tmp_path / name, name).manifest.source for name in ("topic", "changelog"))
        [mine] = [each for each in raw.partitions if each.partition == _partition("u1")]  # type: ignore[union-attr]
        assert (raw.topic, mine.start, mine.end) == (log.settings.streams.clicks_topic, 0, 31)  # type: ignore[union-attr]
        assert raw.clicks_per_day == A_DAY  # type: ignore[union-attr]
        assert table.topic == changelog_topic(log.settings.streams)  # type: ignore[union-attr]
        assert sum(each.end - each.start for each in table.partitions) == 31  # type: ignore[union-attr]

    def test_what_is_older_than_the_window_is_not_even_read(self, log: Log, tmp_path: Path) -> None:
        for number in range(20):
            log.click("u1", f"n{number}", END - 30 * DAY_MS + number)
        log.click("u1", "a", END - 2)
        log.click("u1", "b", END - 1)
        written = log.refresh(tmp_path, "topic")
        assert written.statistics.read == 2
        assert len(read_pairs(written.pairs_path)) == 1

    def test_a_window_longer_than_the_apps_is_warned_of(
        self, log: Log, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        log.click("u1", "n1", END - 1)
        for window, source, warned in (("7d", "changelog", False), ("8d", "changelog", True), ("8d", "topic", False)):
            caplog.clear()
            log.refresh(tmp_path / f"{window}-{source}", source, window=window)
            assert ("longer than the 7 days" in caplog.text) == warned


class TestForget:
    def test_takes_the_user_out_of_both(self, log: Log, tmp_path: Path) -> None:
        fill(log, 3)
        log.click("erased", "n1", END - 5)
        log.click("erased", "only-theirs", END - 4)
        with_them = formula(log.surviving())
        assert any(target == "only-theirs" for _, target, *_ in with_them)
        log.forget("erased", END - 3)
        expected = formula(log.surviving())
        assert expected != with_them
        for source in ("topic", "changelog"):
            assert read_pairs(log.refresh(tmp_path / source, source).pairs_path) == expected
        # What they click after it counts again.
        log.click("erased", "n1", END - 2)
        log.click("erased", "n2", END - 1)
        expected = formula(log.surviving())
        for source in ("topic", "changelog"):
            assert read_pairs(log.refresh(tmp_path / source, source).pairs_path) == expected


class TestNotes:
    def test_the_last_valid_version_of_what_lives(self, log: Log, tmp_path: Path) -> None:
        log.click("u", "kept", END - 2)
        log.click("u", "deleted", END - 1)
        log.note("kept", b'{"note_id": "kept", "title": "Draft"}')
        log.note("kept", b'{"note_id": "kept", "title": "Final"}')
        log.note("kept", b'{"note_id": "kept", "title": 7}')
        log.note("deleted", b'{"note_id": "deleted", "title": "Gone"}')
        log.note("deleted", None)
        log.note("again", None)
        log.note("again", b'{"note_id": "again", "title": "Back"}', written=END - 7)
        log.note("never", b"not JSON")
        written = log.refresh(tmp_path, "topic")
        rows = duckdb.read_parquet(str(written.notes_path)).fetchall()
        assert [(row[0], row[1], row[5]) for row in rows] == [("again", "Back", END - 7), ("kept", "Final", END)]
        assert msgspec.to_builtins(written.statistics.notes) == {"read": 8, "invalid": 2, "deleted": 1, "live": 2}
        assert written.statistics.pairs_with_deleted_notes == 1
        assert read_pairs(written.pairs_path) == [("kept", "deleted", 0.5, 1, 1)]

    def test_a_key_on_two_partitions_takes_the_later_one(self, log: Log, tmp_path: Path) -> None:
        topic = log.settings.kafka.notes_topic
        for partition, title, written in ((0, "Newer", END - 1), (1, "Older", END - 2)):
            value = msgspec.json.encode({"note_id": "n", "title": title})
            log.producer.produce(topic, value, b"n", partition, timestamp=written)
        [row] = duckdb.read_parquet(str(log.refresh(tmp_path, "topic").notes_path)).fetchall()
        assert row[1] == "Newer"


class TestFaults:
    def test_a_row_that_is_not_ours_is_named(self, log: Log, tmp_path: Path) -> None:
        key = row_key("u1", day_of(END - DAY_MS))
        log.producer.produce(changelog_topic(log.settings.streams), b"{}", key)
        with pytest.raises(SourceError, match="the changelog's row of 'u1' is not one of ours"):
            log.refresh(tmp_path, "changelog")
        log.producer.produce(changelog_topic(log.settings.streams), b"{}", struct.pack(">I", 1) + b"\xff")
        with pytest.raises(SourceError, match=r"the changelog's key .* is not one of ours"):
            log.refresh(tmp_path, "changelog")

    def test_the_command_names_a_topic_that_is_not_there(self, log: Log, tmp_path: Path) -> None:
        server = log.kafka.bootstrap_servers
        done = run_command(
            "pairs", "refresh", "--kafka", server, "--out", str(tmp_path), env={"NOTELLM_STREAMS_APP_ID": "nobody"}
        )
        assert done.returncode == 1
        assert done.stderr.startswith(f"error: topic 'nobody-clicks-changelog' on {server}: ")
        assert done.stderr.count("\n") == 1

    @pytest.mark.long  # the client tries for ten seconds
    def test_the_command_names_a_kafka_that_is_not_there(self, tmp_path: Path) -> None:
        done = run_command("pairs", "refresh", "--kafka", "127.0.0.1:1", "--out", str(tmp_path))
        assert done.returncode == 1
        assert done.stderr.startswith("error: kafka.bootstrap_servers: '127.0.0.1:1' cannot be reached: ")
