"""Made-up clicks are what they say they are, and the same at every run."""

from __future__ import annotations

from collections import Counter, defaultdict
from itertools import pairwise
from pathlib import Path

import msgspec
import pytest
from confluent_kafka import Consumer, TopicPartition

from commands.click_simulation import KINDS, Plan, SimulatedRecord, simulate_clicks
from commands.embedded import EmbeddedKafka
from commands.moments import parse_moment, say_moment
from commands.simulate import read_truth
from consumers.partitioner import murmur2_partition
from notellm.clicks import Click, Forget, parse_click
from notellm.errors import InvalidMessage, NoteLLMError
from notellm.messages import Note
from streams.rules import mistimed
from tests.commands.in_process import run_here
from tests.support.pipeline import short_notes
from tests.support.processes import run_command

END = 1_795_478_400_000  # 2026-11-24
DAY_MS = 86_400_000
PLAN = Plan(
    users=150, clicks=3000, start_ms=END - 7 * DAY_MS, end_ms=END, seed=7, bots=2, forgets=4, broken=0.02, future=0.02,
    future_tolerance_ms=DAY_MS // 4,
)  # fmt: skip


def notes() -> list[Note]:
    return [msgspec.structs.replace(note, published_at=0) for note in short_notes(200)]


@pytest.fixture(scope="module")
def records() -> list[SimulatedRecord]:
    return list(simulate_clicks(notes(), PLAN))


def test_the_same_seed_gives_the_same_records_and_another_one_others(records: list[SimulatedRecord]) -> None:
    assert list(simulate_clicks(notes(), PLAN)) == records
    assert list(simulate_clicks(notes(), msgspec.structs.replace(PLAN, seed=8))) != records


def test_every_kind_is_what_the_rules_make_of_it(records: list[SimulatedRecord]) -> None:
    known = {note.note_id for note in notes()}
    seen: set[tuple[bytes | None, bytes | None]] = set()
    for record in records:
        if record.kind == "broken":
            with pytest.raises(InvalidMessage):
                parse_click(record.key, record.value)
            continue
        click = parse_click(record.key, record.value)
        if record.kind == "forget":
            assert isinstance(click, Forget)
            continue
        assert click == record.click
        assert isinstance(click, Click)
        assert click.note_id in known
        expected = record.kind if record.kind in ("late", "future") else None
        assert mistimed(click, record.timestamp_ms, PLAN.allowed_lateness_ms, PLAN.future_tolerance_ms) == expected
        assert (record.kind == "doubled") == ((record.key, record.value) in seen)
        seen.add((record.key, record.value))
        if expected is None:
            assert PLAN.start_ms <= click.clicked_at < PLAN.end_ms
        assert click.user_id.startswith("bot-") or record.kind != "bot"


def test_counts_are_those_that_were_asked_for(records: list[SimulatedRecord]) -> None:
    counts = Counter(record.kind for record in records)
    assert set(counts) == set(KINDS)
    assert counts["click"] == PLAN.clicks
    assert counts["forget"] == PLAN.forgets
    everybody = counts["click"] + counts["bot"]
    for kind in ("late", "doubled", "broken"):
        assert 0.5 < counts[kind] / (getattr(PLAN, kind) * everybody) < 1.5
    of_bots = Counter(
        (record.key, record.click.clicked_at // DAY_MS) for record in records if record.kind == "bot" and record.click
    )
    assert len(of_bots) == 2 * 7
    assert min(of_bots.values()) >= 300
    assert max(of_bots.values()) <= 900


def test_records_come_by_their_timestamps_and_within_the_stretch(records: list[SimulatedRecord]) -> None:
    timestamps = [record.timestamp_ms for record in records]
    assert timestamps == sorted(timestamps)
    assert PLAN.start_ms <= timestamps[0]
    assert timestamps[-1] < PLAN.end_ms
    clicked = [record.click.clicked_at for record in records if record.kind == "click" and record.click]
    assert clicked != sorted(clicked), "some phones were offline"


def test_people_are_long_tailed_come_in_sessions_and_have_interests(records: list[SimulatedRecord]) -> None:
    of_user: dict[str, list[Click]] = defaultdict(list)
    for record in records:
        if record.kind == "click" and record.click is not None:
            of_user[record.click.user_id].append(record.click)
    counts = sorted(map(len, of_user.values()))
    assert counts[-1] > 4 * counts[len(counts) // 2]
    pauses: list[int] = []
    same_category = total = 0
    category = {note.note_id: note.category for note in notes()}
    for clicks in of_user.values():
        clicks.sort(key=lambda click: click.clicked_at)
        for one, next_one in pairwise(clicks):
            pause = next_one.clicked_at - one.clicked_at
            pauses.append(pause)
            if pause < 240_000:
                total += 1
                same_category += category[one.note_id] == category[next_one.note_id]
    short = sum(pause <= 240_000 for pause in pauses)
    long = sum(pause >= 1_800_000 for pause in pauses)
    assert short > 0.6 * len(pauses)
    assert long > 0.05 * len(pauses)
    assert same_category > 0.5 * total, "against 1 in 16 by chance"


def test_nobody_clicks_what_is_not_published_yet() -> None:
    middle = END - 3 * DAY_MS
    mixed = [msgspec.structs.replace(note, published_at=middle if n % 2 else 0) for n, note in enumerate(notes())]
    late_ones = {note.note_id for note in mixed if note.published_at}
    clicks = [
        record.click for record in simulate_clicks(mixed, PLAN) if record.kind in ("click", "bot") and record.click
    ]
    assert all(click.clicked_at >= middle for click in clicks if click.note_id in late_ones)
    assert sum(click.note_id in late_ones for click in clicks) > 100


def test_notes_of_the_future_are_refused() -> None:
    future = [msgspec.structs.replace(note, published_at=END) for note in notes()]
    with pytest.raises(NoteLLMError, match="0 of 200 notes are published before the first click"):
        next(simulate_clicks(future, PLAN))


def test_one_user_one_click_two_notes() -> None:
    plan = Plan(users=1, clicks=1, start_ms=END - DAY_MS, end_ms=END, bots=0)
    (record,) = [record for record in simulate_clicks(notes()[:2], plan) if record.kind == "click"]
    assert record.key == b"user-0"


@pytest.mark.parametrize(
    ("text", "moment"),
    [
        ("1700000000000", 1_700_000_000_000),
        ("2026-11-24", END),
        ("2026-11-24T01:00+01:00", END),
        ("2026-11-24T00:00:00Z", END),
    ],
)
def test_a_moment_is_what_people_type(text: str, moment: int) -> None:
    assert parse_moment(text, "--as-of") == moment
    assert say_moment(END) == "2026-11-24 00:00:00 UTC"


@pytest.mark.parametrize("text", ["", "yesterday", "-5", "2026-13-01", "9" * 30, "١٢٣"])
def test_a_moment_that_is_none_is_a_clear_line(text: str) -> None:
    with pytest.raises(NoteLLMError, match=r"^--as-of: .* is not allowed; give now, milliseconds UTC such as"):
        parse_moment(text, "--as-of")


ARGUMENTS = ("simulate", "clicks", "--as-of", "2026-11-24", "--users", "50", "--clicks", "500", "--forgets", "2")


def test_a_file_holds_the_clicks_of_people_and_bots(tmp_path: Path) -> None:
    file, truth = tmp_path / "new" / "clicks.jsonl", tmp_path / "truth.jsonl"
    done = run_here(*ARGUMENTS, "--out", str(file), "--truth", str(truth))
    assert done.returncode == 0, done.stderr
    lines = file.read_bytes().splitlines()
    told = list(read_truth(truth))
    assert lines == [line.value for line in told if line.kind in ("click", "bot")]
    assert len({(click.user_id, click.note_id, click.clicked_at) for click in map(_decoded, lines)}) == len(lines)
    assert {line.kind for line in told} >= {"click", "bot", "doubled", "late", "forget"}
    assert "│ click   │     500 │" in done.stdout
    assert f"--seed 0 --as-of {END}" in done.stdout
    again = run_here(*ARGUMENTS, "--out", str(tmp_path / "again.jsonl"))
    assert again.returncode == 0
    assert (tmp_path / "again.jsonl").read_bytes() == file.read_bytes()
    assert [path.name for path in tmp_path.rglob("*.partial")] == []


def _decoded(line: bytes) -> Click:
    return msgspec.json.decode(line, type=Click)


@pytest.mark.integration
def test_kafka_gets_all_of_them_with_their_timestamps_where_javas_producer_would_put_them(
    tmp_path: Path, embedded_kafka: EmbeddedKafka
) -> None:
    embedded_kafka.create_topics("note-clicks")
    truth = tmp_path / "truth.jsonl"
    done = run_command(*ARGUMENTS, "--kafka", embedded_kafka.bootstrap_servers, "--truth", str(truth))
    assert done.returncode == 0, done.stderr
    told = {(line.partition, line.offset): line for line in read_truth(truth)}
    consumer = Consumer({
        "bootstrap.servers": embedded_kafka.bootstrap_servers, "group.id": "test", "auto.offset.reset": "earliest",
    })  # fmt: skip
    consumer.assign([TopicPartition("note-clicks", partition, 0) for partition in range(4)])
    read = 0
    while read < len(told):
        message = consumer.poll(10)
        assert message is not None, f"{read} of {len(told)}"
        assert message.error() is None
        line = told[message.partition(), message.offset()]
        assert (message.key(), message.value()) == (line.key, line.value)
        assert message.timestamp()[1] == line.timestamp_ms
        if line.key is not None:
            assert message.partition() == murmur2_partition(line.key, 4)
        read += 1
    consumer.close()
    order = [line.timestamp_ms for line in read_truth(truth) if line.partition == 0]
    assert order == sorted(order)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("--as-of", "tomorrow"), "error: --as-of: 'tomorrow' is not allowed; give now, "),
        (("--as-of", "now", "--start", "now"), "error: --start: with --as-of there is one too many"),
        (("--as-of", "1000"), "error: --days: 7 days before 1970-01-01 00:00:01 UTC is before 1970"),
        (("--notes", "nowhere.jsonl"), "error: --notes: nowhere.jsonl cannot be read: No such file"),
        (("--out", "/dev/null/x"), "error: --out: /dev/null/x cannot be written: "),
    ],
)
def test_a_bad_option_is_one_clear_line(arguments: tuple[str, ...], line: str, tmp_path: Path) -> None:
    done = run_here("simulate", "clicks", "--out", str(tmp_path / "clicks.jsonl"), *arguments)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.splitlines()[-1].startswith(line)
    assert list(tmp_path.iterdir()) == []
