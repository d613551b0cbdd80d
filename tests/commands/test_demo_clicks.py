"""``notellm demo --clicks`` as a whole, and whether its check would notice."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from confluent_kafka.admin import AdminClient

from commands.demo_clicks import _faults
from commands.demo_clicks_check import Expected, expect
from commands.simulate import Truth, read_truth
from notellm.clicks import Click, encode_click
from streams.report import report_path
from streams.snapshot import latest_snapshot
from tests.commands.handmade_snapshot import DAY_MS, END, STATISTICS_OF_NOTHING, make_snapshot
from tests.commands.in_process import run_here
from tests.conftest import REPOSITORY, missing
from tests.support.kafka_server import KafkaServer
from tests.support.processes import run_command, wait_until

UNIT = 10**12


@pytest.fixture(scope="module")
def streams_python() -> Path:
    python = REPOSITORY / ".venv-streams" / "bin" / "python"
    if not python.is_file():
        missing(".venv-streams is not there; make it with: make streams")
    return python


@pytest.mark.integration
def test_demo_shows_the_way_of_clicks_and_leaves_nothing_on_a_kafka_of_your_own(
    tmp_path: Path, kafka_server: KafkaServer, streams_python: Path
) -> None:
    del streams_python
    admin = AdminClient({"bootstrap.servers": kafka_server.bootstrap_servers})

    def left_behind() -> set[str]:
        groups = {group.group_id for group in admin.list_consumer_groups().result(10).valid}
        return {name for name in {*admin.list_topics(timeout=10).topics, *groups} if name.startswith("notellm-demo-")}

    before = left_behind()
    work = tmp_path / "demo"
    done = run_command(
        "demo", "--clicks", "--work", str(work), "--kafka", kafka_server.bootstrap_servers, cwd=REPOSITORY, seconds=180
    )
    assert done.returncode == 0, done.stdout + done.stderr + (work / "clicks" / "worker.log").read_text("utf-8")
    assert "Traceback" not in done.stdout + done.stderr
    snapshot = latest_snapshot(work / "clicks" / "snapshots")
    truth = list(read_truth(work / "clicks" / "truth.jsonl"))
    # 200 a day are kept of the bot, who made 300 or more: something must have been dropped.
    clicks = sum(line.kind in ("click", "bot") for line in truth)
    assert 20_000 < snapshot.statistics.clicks < clicks
    assert snapshot.manifest.rows > 4_000
    assert f"│ clicks that count, by the snapshot       │ {snapshot.statistics.clicks:,} │" in done.stdout
    assert (
        f"│ dead letters                             │     {sum(line.kind == 'broken' for line in truth)} │"
        in done.stdout
    )
    assert "Every click that counts is in the snapshot" in done.stdout
    assert "leads to: 10" in done.stdout
    assert str(report_path(snapshot)) in done.stdout
    assert report_path(snapshot).is_file()
    wait_until(lambda: left_behind() <= before, "the demo's topics and group to go", seconds=20)


def test_without_the_app_or_the_jars_it_is_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notes = str(REPOSITORY / "data" / "notes.jsonl")
    monkeypatch.chdir(tmp_path)

    def line() -> str:
        done = run_here("demo", "--clicks", "--notes", notes)
        assert done.returncode == 1
        assert done.stdout == ""
        (only,) = done.stderr.splitlines()
        return only

    assert line() == (
        "error: .venv-streams/bin/python is not there, which has the Faust app; make it with: make streams"
    )
    fake = tmp_path / ".venv-streams" / "bin" / "python"
    fake.parent.mkdir(parents=True)
    fake.touch()
    assert line().startswith(("error: build/servers/kafka is not there; ", "error: no java "))


def truth_of(kind: str, user: str, note: str = "", clicked_at: int = 0) -> Truth:
    value = None if kind == "forget" else encode_click(Click(user_id=user, note_id=note, clicked_at=clicked_at))
    return Truth(kind, clicked_at, user.encode(), value)  # type: ignore[arg-type]


def test_what_must_be_there_is_read_from_what_was_published() -> None:
    start = END - DAY_MS
    truth = [
        truth_of("click", "gone", "a", start + 1),
        truth_of("click", "gone", "b", start + 2),
        truth_of("click", "u", "a", start),
        truth_of("doubled", "u", "a", start),
        truth_of("click", "u", "b", start + 5),
        truth_of("late", "u", "c", start + 6),
        truth_of("future", "u", "c", start + 7),
        Truth("broken", start + 8, b"u", b"{}"),
        truth_of("click", "u", "a", start + 9),
        truth_of("click", "u", "tied", start + 9),
        truth_of("forget", "gone"),
        truth_of("click", "v", "a", start - 1),
        truth_of("click", "v", "b", start + 1),
        *(truth_of("bot", "bot", f"n{number}", start + number) for number in range(6)),
    ]
    found = expect(truth, start, END, clicks_per_day=4)
    assert found.clicks == 4 + 1 + 4
    assert found.users == 3
    third, quarter = UNIT // 3, UNIT // 4
    of_u = {("a", "b"): third, ("b", "a"): third, ("a", "tied"): third, ("b", "tied"): third}
    of_bot = {(f"n{a}", f"n{b}"): quarter for a in range(2, 6) for b in range(a + 1, 6)}
    assert {pair: score for pair, (score, _, _) in found.pairs.items()} == {**of_u, **of_bot}
    # Equal scores: the smaller id first.
    assert (found.pairs["a", "b"][2], found.pairs["a", "tied"][2], found.pairs["n2", "n5"][2]) == (1, 2, 3)


def test_only_ten_partners_within_the_bounds() -> None:
    everybody = [truth_of("click", f"u{user}", "z", END - 1) for user in range(31)]
    everybody += [truth_of("click", f"u{user}", "a", END - 2) for user in range(31)]
    many = [truth_of("click", "reader", f"n{number:03}", END - 1000 + number) for number in range(12)]
    few = [truth_of("click", "machine", f"m{number:03}", END - 1000 + number) for number in range(101)]
    found = expect([*everybody, *many, *few], END - DAY_MS, END, clicks_per_day=1000)
    assert ("a", "z") in found.pairs, "31 users of 2 notes each make 15.5"
    assert [rank for (source, _), (_, _, rank) in sorted(found.pairs.items()) if source == "n000"] == [*range(1, 11)]
    assert not any(source.startswith("m") for source, _ in found.pairs), "1 of 101 is below 0.01"


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"clicks": 2}, "the snapshot counts 2 clicks, the published records make 3"),
        ({"users": 9}, "the snapshot counts 9 users, the published records make 1"),
        ({"pairs": [("a", "b", 0.5, 1, 1)]}, "1 pairs are not as the formula says; the first: a -> c is None, it"),
        (
            {"pairs": [("a", "b", 0.5, 1, 1), ("a", "c", 0.25000000000000006, 1, 2)]},
            "1 pairs are not as the formula says; the first: a -> c is (0.25000000000000006, 1, 2), it should be "
            "(0.25, 1, 2) (score, users, rank)",
        ),
        (
            {"pairs": [("a", "b", 0.5, 1, 1), ("a", "c", 0.25, 1, 2), ("c", "a", 0.5, 1, 1)]},
            "1 pairs are not as the formula says; the first: c -> a is (0.5, 1, 1), it should be None",
        ),
    ],
)
def test_the_check_notices(tmp_path: Path, change: dict[str, object], line: str) -> None:
    pairs = change.pop("pairs", [("a", "b", 0.5, 1, 1), ("a", "c", 0.25, 1, 2)])
    statistics = msgspec.structs.replace(STATISTICS_OF_NOTHING, **{"clicks": 3, "users": 1, **change})
    snapshot = make_snapshot(tmp_path, pairs, {}, statistics=statistics)  # type: ignore[arg-type]
    expected = Expected(3, 1, {("a", "b"): (UNIT // 2, 1, 1), ("a", "c"): (UNIT // 4, 1, 2)})
    (fault,) = _faults(snapshot, expected)
    assert fault.startswith(line)


def test_the_check_is_content_with_what_is_right(tmp_path: Path) -> None:
    statistics = msgspec.structs.replace(STATISTICS_OF_NOTHING, clicks=3, users=1)
    snapshot = make_snapshot(tmp_path, [("a", "b", 0.5, 1, 1)], {}, statistics=statistics)
    assert _faults(snapshot, Expected(3, 1, {("a", "b"): (UNIT // 2, 1, 1)})) == []
