"""A refresh from files, from end to end: what is read, what is refused, what is left when it is killed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import duckdb
import pytest
from typer.testing import CliRunner

from commands.app import app
from notellm.errors import SettingsError
from streams import refresh as refreshing
from streams.cooccurrence import PairOptions
from streams.errors import EngineError, SnapshotError, SourceError
from streams.refresh import Refresh, refresh, window_of
from streams.schedule import beats, parse_every
from streams.snapshot import Snapshot, read_snapshot, snapshots
from tests.streams.formula import Click, formula, read_pairs, write_clicks
from tests.support.processes import CommandProcess, run_command, wait_until

DAY = 86_400_000
END = 20_000 * DAY
CLICKS: list[Click] = [
    ("u1", "tea", END - 5), ("u1", "cake", END - 4), ("u1", "tea", END - 3), ("u1", "tea", END - 3),
    ("u2", "tea", END - DAY), ("u2", "cake", END - 1), ("u2", "old", END - 8 * DAY), ("u2", "next", END),
    ("u3", "gone", END - 7 * DAY), ("u3", "cake", END - 2),
]  # fmt: skip
NOTES: list[dict[str, Any]] = [
    {
        "note_id": "tea", "title": "Tea", "hashtags": ["#Green"], "published_at": END - 1,
        "attributes": {"b": 1, "a": "x"},
    },
    {"note_id": "cake", "title": "Cake", "published_at": END - 9 * DAY},
    {"note_id": "lonely", "title": "Nobody", "published_at": END - 2},
]  # fmt: skip


def lines(rows: Iterable[Any]) -> bytes:
    return b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)


def click_lines(clicks: Iterable[Click]) -> bytes:
    return lines({"user_id": user, "note_id": note, "clicked_at": at} for user, note, at in clicks)


@pytest.fixture(autouse=True)
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures take a second, and have tests of their own; the commands below draw them."""
    monkeypatch.setattr(refreshing, "refresh_reports", lambda _: None)


@pytest.fixture
def job(tmp_path: Path) -> Refresh:
    (tmp_path / "clicks.jsonl").write_bytes(click_lines(CLICKS))
    (tmp_path / "notes.jsonl").write_bytes(lines(NOTES))
    return Refresh(
        out=tmp_path / "out", clicks=(tmp_path / "clicks.jsonl",), notes=tmp_path / "notes.jsonl", as_of=END, threads=2
    )


def with_(job: Refresh, **others: Any) -> Refresh:
    return Refresh(**{**vars(job), **others})


def notes_of(snapshot: Snapshot) -> list[tuple[Any, ...]]:
    return duckdb.read_parquet(str(snapshot.notes_path)).fetchall()


def inside(clicks: Iterable[Click], start: int = END - 7 * DAY, end: int = END) -> list[Click]:
    return [click for click in clicks if start <= click[2] < end]


class TestClicks:
    def test_lines_of_the_window(self, job: Refresh) -> None:
        written = refresh(job)
        assert read_pairs(written.pairs_path) == formula(inside(CLICKS))
        found = written.statistics
        assert found.dropped == {"duplicate": 1, "outside_window": 2, "power_user": 0}
        assert found.read == len(CLICKS) == found.clicks + sum(found.dropped.values())
        assert (found.users, found.clicked_notes, found.pairs) == (3, 3, 3)
        assert found.pairs_with_deleted_notes == 1  # gone -> cake
        assert (found.new_notes.published, found.new_notes.with_pair) == (2, 1)

    def test_parquet_is_the_same(self, job: Refresh, tmp_path: Path) -> None:
        from_lines = refresh(job)
        from_parquet = refresh(with_(job, clicks=(write_clicks(CLICKS, tmp_path / "clicks.any"),)))
        assert from_parquet.manifest.files == from_lines.manifest.files

    def test_several_files_are_one_log(self, job: Refresh, tmp_path: Path) -> None:
        (tmp_path / "one.jsonl").write_bytes(click_lines(CLICKS[::2]) + b"\n")
        two = write_clicks(CLICKS[1::2], tmp_path / "two.parquet")
        together = refresh(with_(job, clicks=(tmp_path / "one.jsonl", two)))
        assert together.manifest.files == refresh(job).manifest.files
        assert [file.path for file in together.manifest.source.files] == [  # type: ignore[union-attr]
            str(tmp_path / "one.jsonl"), str(two),
        ]  # fmt: skip

    def test_engine_and_threads_do_not_change_a_byte(self, job: Refresh, tmp_path: Path) -> None:
        many = [(f"u{at % 97}", f"n{at * at % 1009}", END - 1 - at) for at in range(6000)]
        clicks = (write_clicks(many, tmp_path / "many.parquet"),)
        one, three = (
            refresh(with_(job, clicks=clicks, threads=threads, out=tmp_path / str(threads))) for threads in (1, 3)
        )
        assert one.manifest.files == three.manifest.files
        assert one.manifest.notes == three.manifest.notes
        assert one.name == three.name

    def test_options_reach_the_formula_and_the_manifest(self, job: Refresh) -> None:
        options = PairOptions(symmetric=True, max_distance=1)
        written = refresh(with_(job, options=options))
        assert read_pairs(written.pairs_path) == formula(inside(CLICKS), options)
        assert written.manifest.settings == options

    @pytest.mark.parametrize(
        ("line", "complaint"),
        [
            (b"tea", "value: not UTF-8 JSON"),
            (b"\xff", "value: not UTF-8 JSON"),
            (b"[]", "value: Expected `object`, got `array`"),
            (b'{"note_id": "n", "clicked_at": 1}', "user_id: missing"),
            (b'{"user_id": 1, "note_id": "n", "clicked_at": 1}', "user_id: Expected `str`, got `int`"),
            (b'{"user_id": "", "note_id": "n", "clicked_at": 1}', "user_id: "),
            (b'{"user_id": "u", "note_id": "n\\u0007", "clicked_at": 1}', "note_id: contains a control character"),
            (
                b'{"user_id": "u", "note_id": "\xe7\xac\x94\xe7\xac\x94'.ljust(110, b"n") + b'", "clicked_at": 1}',
                "note_id: ",
            ),
            (b'{"user_id": "u", "note_id": "n", "clicked_at": 1.5}', "clicked_at: Expected `int`, got `float`"),
            (b'{"user_id": "u", "note_id": "n", "clicked_at": "1"}', "clicked_at: Expected `int`, got `str`"),
            (b'{"user_id": "u", "note_id": "n", "clicked_at": true}', "clicked_at: Expected `int`, got `bool`"),
            (b'{"user_id": "u", "note_id": "n", "clicked_at": -1}', "clicked_at: Expected `int` >= 0"),
            (b'{"user_id": "u", "note_id": "n", "clicked_at": 9007199254740993}', "clicked_at: Expected `int` <= "),
        ],
    )
    def test_a_line_that_is_no_click_is_named(self, job: Refresh, tmp_path: Path, line: bytes, complaint: str) -> None:
        (tmp_path / "clicks.jsonl").write_bytes(click_lines(CLICKS[:2]) + line + b"\n")
        with pytest.raises(SourceError) as error:
            refresh(job)
        assert str(error.value).startswith(f"--clicks: {tmp_path / 'clicks.jsonl'}, line 3: {complaint}")
        assert snapshots(job.out) == []

    @pytest.mark.parametrize(
        ("rows", "complaint"),
        [
            (
                "SELECT 'u' AS user_id, NULL::VARCHAR AS note_id, 1 AS clicked_at",
                "row 2: note_id: null; allowed is 1 to",
            ),
            ("SELECT '', 'n', 1", "row 2: user_id: ''; allowed is 1 to 64 bytes"),
            ("SELECT repeat('笔', 22), 'n', 1", "row 2: user_id: '笔笔"),
            ("SELECT 'u', 'a' || chr(7), 1", "row 2: note_id: 'a\\x07'; allowed is 1 to 64 bytes of UTF-8, no control"),
            ("SELECT 'u', 'a' || chr(133), 1", "row 2: note_id: 'a\\x85'"),
            ("SELECT 'u', 'n', -1", "row 2: clicked_at: -1; allowed is an integer from 0 to"),
            ("SELECT 'u', 'n', 9007199254740993", "row 2: clicked_at: 9007199254740993"),
        ],
    )
    def test_a_row_that_is_no_click_is_named(self, job: Refresh, tmp_path: Path, rows: str, complaint: str) -> None:
        file = tmp_path / "clicks.parquet"
        good = "SELECT 'u' AS user_id, 'n' AS note_id, 1::BIGINT AS clicked_at"
        duckdb.sql(f"COPY ({good} UNION ALL {rows}) TO '{file}' (FORMAT parquet)")
        with pytest.raises(SourceError) as error:
            refresh(with_(job, clicks=(file,)))
        assert str(error.value).startswith(f"--clicks: {file}, {complaint}")

    @pytest.mark.parametrize(
        ("columns", "complaint"),
        [
            ("'u' AS user_id, 'n' AS note_id", "has no column clicked_at; it must be there"),
            ("1 AS user_id, 'n' AS note_id, 1 AS clicked_at", "column user_id is INTEGER; allowed is a string"),
            (
                "'u' AS user_id, 'n' AS note_id, now() AS clicked_at",
                "column clicked_at is TIMESTAMP WITH TIME ZONE; all",
            ),
            (
                "'u' AS user_id, 'n' AS note_id, 1.0::DOUBLE AS clicked_at",
                "column clicked_at is DOUBLE; allowed is an int",
            ),
        ],
    )
    def test_columns_of_another_type_are_named(
        self, job: Refresh, tmp_path: Path, columns: str, complaint: str
    ) -> None:
        file = tmp_path / "clicks.parquet"
        duckdb.sql(f"COPY (SELECT {columns}) TO '{file}' (FORMAT parquet)")
        with pytest.raises(SourceError, match=complaint):
            refresh(with_(job, clicks=(file,)))

    def test_files_that_cannot_be_read_are_named(self, job: Refresh, tmp_path: Path) -> None:
        with pytest.raises(SourceError, match=r"--clicks: .*nowhere cannot be read: No such file"):
            refresh(with_(job, clicks=(tmp_path / "nowhere",)))
        (tmp_path / "half.parquet").write_bytes(b"PAR1 and no more")
        with pytest.raises(SourceError, match=r"half.parquet cannot be read as Parquet"):
            refresh(with_(job, clicks=(tmp_path / "half.parquet",)))


class TestNotes:
    def test_are_the_contract_sorted_by_id(self, job: Refresh) -> None:
        written = refresh(job)
        assert notes_of(written) == [
            ("cake", "Cake", "", [], "", END - 9 * DAY, "{}"),
            ("lonely", "Nobody", "", [], "", END - 2, "{}"),
            ("tea", "Tea", "", ["Green"], "", END - 1, '{"a":"x","b":1}'),
        ]
        described = duckdb.sql(f"DESCRIBE SELECT * FROM read_parquet('{written.notes_path}')").fetchall()
        assert [row[1] for row in described] == [
            "VARCHAR",
            "VARCHAR",
            "VARCHAR",
            "VARCHAR[]",
            "VARCHAR",
            "BIGINT",
            "VARCHAR",
        ]
        assert written.manifest.notes.rows == 3

    def test_the_last_line_of_a_note_counts(self, job: Refresh, tmp_path: Path) -> None:
        (tmp_path / "notes.jsonl").write_bytes(lines([{"note_id": "tea", "title": "Draft"}, *NOTES]))
        written = refresh(job)
        assert [row[1] for row in notes_of(written)] == ["Cake", "Nobody", "Tea"]
        assert (written.statistics.notes.read, written.statistics.notes.live) == (4, 3)

    def test_the_same_notes_are_the_same_file(self, job: Refresh, tmp_path: Path) -> None:
        first = refresh(job)
        (tmp_path / "notes.jsonl").write_bytes(lines([{"note_id": "tea", "title": "Draft"}, *NOTES[::-1]]))
        assert refresh(with_(job, as_of=END + 1)).notes_path == first.notes_path

    def test_a_line_that_is_no_note_is_named(self, job: Refresh, tmp_path: Path) -> None:
        (tmp_path / "notes.jsonl").write_bytes(lines(NOTES) + b'{"note_id": "x", "title": 1}\n{"note_id": "y"}\n')
        with pytest.raises(SourceError) as error:
            refresh(job)
        first, second = str(error.value).splitlines()
        assert first == f"--notes: {tmp_path / 'notes.jsonl'}, line 4: title: Expected `str`, got `int`"
        assert second.endswith("line 5: title, content, hashtags: all blank; at least one must hold text")

    def test_none_at_all(self, job: Refresh, tmp_path: Path) -> None:
        (tmp_path / "notes.jsonl").write_bytes(b"")
        written = refresh(job)
        assert notes_of(written) == []
        assert written.statistics.pairs_with_deleted_notes == 3


class TestWindow:
    def test_is_as_long_as_it_says(self) -> None:
        assert (window_of("7d", END).start, window_of("7d", END).end) == (END - 7 * DAY, END)
        assert window_of("90m", END).start == END - 90 * 60_000
        assert window_of("all", END).start == 0
        assert window_of("9d", DAY).start == 0

    @pytest.mark.parametrize("length", ["7", "0d", "-1d", "7w", "d", "", "7 d", "٧d", "ALL"])
    def test_says_what_is_allowed(self, length: str) -> None:
        with pytest.raises(
            SettingsError, match=r"--window: .* is not allowed: all is, or a time such as 7d, 24h or 90m"
        ):
            window_of(length, END)


class TestWholeOrNot:
    def test_prunes_and_leaves_nothing_else(self, job: Refresh) -> None:
        for day in range(4):
            refresh(with_(job, as_of=END + day * DAY, keep=2))
        assert [each.manifest.window.end for each in snapshots(job.out)] == [END + 2 * DAY, END + 3 * DAY]
        for each in snapshots(job.out):
            read_snapshot(each.path)
        assert {path.name for path in job.out.iterdir()} == {"pairs", "notes", ".lock"}

    def test_an_error_leaves_what_was_there(self, job: Refresh, monkeypatch: pytest.MonkeyPatch) -> None:
        before = refresh(job)

        def full(*_: object, **__: object) -> None:
            raise EngineError("the disk is full")

        monkeypatch.setattr(refreshing, "measure", full)
        with pytest.raises(EngineError, match="the disk is full"):
            refresh(with_(job, as_of=END + 1))
        assert [each.name for each in snapshots(job.out)] == [before.name]
        assert not (job.out / ".work").exists()

    def test_killed_at_any_step_it_leaves_nothing_that_looks_whole(self, tmp_path: Path, job: Refresh) -> None:
        many = [(f"u{at % 997}", f"n{at * at % 5003}", END - 1 - at) for at in range(60_000)]
        clicks = write_clicks(many, tmp_path / "many.parquet")
        arguments = [
            "pairs", "refresh", "--clicks", str(clicks), "--notes", str(tmp_path / "notes.jsonl"),
            "--out", str(job.out), "--as-of", str(END),
        ]  # fmt: skip
        in_the_middle = 0
        for step in ("stage.duckdb", "clicks.parquet", "found", "write.duckdb"):
            reached = job.out / ".work" / step
            run = CommandProcess(tmp_path / "run.log", *arguments)
            while not reached.exists() and run.is_running:
                time.sleep(0.001)
            run.kill()
            if (job.out / ".work").exists():
                in_the_middle += 1
                assert snapshots(job.out) == []
            else:
                shutil.rmtree(job.out)  # it was faster
        assert in_the_middle >= 2
        done = run_command(*arguments)
        assert done.returncode == 0, done.stderr
        [whole] = snapshots(job.out)
        assert read_pairs(read_snapshot(whole.path).pairs_path) != []
        assert {path.name for path in job.out.iterdir()} == {"pairs", "notes", "reports", ".lock"}

    def test_two_at_once(self, job: Refresh, monkeypatch: pytest.MonkeyPatch) -> None:
        inside_it, go_on = threading.Event(), threading.Event()
        stage = refreshing.stage_click_files

        def slow(*arguments: Any) -> Any:
            inside_it.set()
            go_on.wait(30)
            return stage(*arguments)

        monkeypatch.setattr(refreshing, "stage_click_files", slow)
        first = threading.Thread(target=refresh, args=(job,))
        first.start()
        inside_it.wait(30)
        try:
            with pytest.raises(SnapshotError, match=rf"another run \(process {os.getpid()}, since .*--wait"):
                refresh(with_(job, as_of=END + 1))
        finally:
            go_on.set()
            first.join(30)
        assert len(snapshots(job.out)) == 1


class TestCommand:
    def arguments(self, tmp_path: Path) -> list[str]:
        return [
            "refresh", "--clicks", str(tmp_path / "clicks.jsonl"), "--notes", str(tmp_path / "notes.jsonl"),
            "--out", str(tmp_path / "out"), "--as-of", str(END),
        ]  # fmt: skip

    def test_prints_what_it_made(self, job: Refresh, tmp_path: Path) -> None:
        more = ["--max-distance", "1", "--session-gap", "2h", "--symmetric", "--top", "3"]
        done = run_command("pairs", *self.arguments(tmp_path), *more)
        assert done.returncode == 0, done.stderr
        [written] = snapshots(job.out)
        assert str(written.path) in done.stdout
        assert "duckdb" in done.stdout
        options = PairOptions(max_distance=1, session_gap_ms=7_200_000, symmetric=True, top=3)
        assert written.manifest.settings == options
        assert read_pairs(written.pairs_path) == formula(inside(CLICKS), options)

    @pytest.mark.parametrize(
        ("more", "complaint"),
        [
            (["--kafka", "127.0.0.1:1"], "--kafka and --clicks: clicks have one source"),
            (["--window", "7 days"], "--window: '7 days' is not allowed"),
            (["--every", "1h"], "--as-of: '1728000000000' is not allowed with --every"),
            (["--session-gap", "x"], "--session-gap: 'x' is not allowed"),
            (["--min-score", "31"], "max_score: 30.0 is not allowed: min_score is 31.0, above it"),
            (["--memory-limit", "lots"], "memory_limit: 'lots' is not allowed: a size is, such as 4GB or 512MiB"),
        ],
    )
    def test_refuses_in_one_line(self, job: Refresh, tmp_path: Path, more: list[str], complaint: str) -> None:
        # In this process: it ends before it begins.
        done = CliRunner().invoke(app, ["pairs", *self.arguments(tmp_path), *more])
        assert done.exit_code == 1
        assert done.stderr.startswith(f"error: {complaint}")
        assert done.stderr.count("\n") == 1
        assert not job.out.exists() or snapshots(job.out) == []

    def test_without_its_extra_the_others_work(self, job: Refresh, tmp_path: Path) -> None:
        (tmp_path / "hidden").mkdir()
        (tmp_path / "hidden" / "duckdb.py").write_text("raise ModuleNotFoundError('no duckdb', name='duckdb')")
        env = {"PYTHONPATH": f"{tmp_path / 'hidden'}:{Path.cwd()}"}
        done = run_command("pairs", "refresh", "--clicks", "x", "--notes", "y", env=env)
        assert done.returncode == 1
        assert done.stderr == "error: duckdb is not installed; install the extra: pip install 'notellm[pairs]'\n"
        assert run_command("similar", "--help", env=env).returncode == 0

    def test_every_goes_on_after_a_failure_until_it_is_told_to_end(self, job: Refresh, tmp_path: Path) -> None:
        (tmp_path / "clicks.jsonl").rename(tmp_path / "away")
        run = CommandProcess(
            tmp_path / "run.log", "pairs", "refresh", "--clicks", str(tmp_path / "clicks.jsonl"), "--notes",
            str(tmp_path / "notes.jsonl"), "--out", str(job.out), "--window", "all", "--every", "1s",
        )  # fmt: skip
        try:
            run.wait_for("this refresh failed: --clicks:")
            (tmp_path / "away").rename(tmp_path / "clicks.jsonl")
            wait_until(lambda: len(snapshots(job.out)) >= 2, "two snapshots")
        finally:
            status = run.stop()
        assert status == 0
        assert "Traceback" not in run.text()
        assert not (job.out / ".work").exists()
        for each in snapshots(job.out):
            read_snapshot(each.path)

    @pytest.mark.parametrize(
        ("more", "status", "last"),
        [
            (["--as-of", str(END)], 1, "error: stopped; no snapshot was written"),
            (["--every", "1h"], 0, "stopped"),
        ],
        ids=["once", "every"],
    )
    def test_told_to_end_in_the_middle_it_writes_none(
        self, tmp_path: Path, job: Refresh, more: list[str], status: int, last: str
    ) -> None:
        many = [(f"u{at % 300}", f"n{at * at % 50_021}", END - 1 - at) for at in range(200_000)]
        clicks = write_clicks(many, tmp_path / "many.parquet")
        run = CommandProcess(
            tmp_path / "run.log", "pairs", "refresh", "--clicks", str(clicks), "--notes",
            str(tmp_path / "notes.jsonl"), "--out", str(job.out), "--window", "all", "--threads", "1", *more,
        )  # fmt: skip
        wait_until((job.out / ".work" / "found").exists, "the engine at work")
        os.kill(run.pid, signal.SIGTERM)
        wait_until(lambda: not run.is_running, "its end", 30)
        assert run.stop() == status
        assert run.text() == f"{last}\n"
        assert snapshots(job.out) == []
        assert not (job.out / ".work").exists()


class TestSchedule:
    def test_does_not_drift_and_leaves_out_what_it_missed(self) -> None:
        now, waits, stop = [100.0], [], threading.Event()

        def wait(seconds: float) -> bool:
            waits.append(seconds)
            now[0] += seconds
            return False

        stop.wait = wait  # type: ignore[method-assign, assignment]
        began = []
        for _, took in zip(beats(10, stop, lambda: now[0]), [1, 9, 10, 25, 0, 0], strict=False):
            began.append(now[0])
            now[0] += took
        assert began == [100, 110, 120, 140, 170, 180]

    def test_ends_between_two_beats(self) -> None:
        stop = threading.Event()
        numbers = []
        begin = time.monotonic()
        for number in beats(3600, stop):
            numbers.append(number)
            threading.Timer(0.1, stop.set).start()
        assert numbers == [0]
        assert time.monotonic() - begin < 60

    @pytest.mark.parametrize("text", ["", "1", "0s", "1w", "-1h", "1.5h"])
    def test_says_what_is_allowed(self, text: str) -> None:
        with pytest.raises(SettingsError, match=r"--every: .* is not allowed: a time is, such as 30s, 15m, 1h or 1d"):
            parse_every(text)
