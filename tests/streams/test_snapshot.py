"""Snapshots on disk: whole or not there, one writer at a time, old ones pruned."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

import msgspec
import pytest

from streams.cooccurrence import PairOptions
from streams.errors import SnapshotError
from streams.publishing import only_run, prune, publish
from streams.snapshot import (
    Engine,
    FilesSource,
    Snapshot,
    SourceFile,
    Window,
    latest_snapshot,
    open_snapshot,
    read_snapshot,
    snapshots,
)
from streams.statistics import NewNotes, NoteCounts, Statistics

SOURCE = FilesSource([SourceFile("clicks.jsonl", "0" * 64, 1)])
STATISTICS = Statistics(
    read=2, forgets=0, dropped={"duplicate": 0}, clicks=2, users=1, clicked_notes=2, power_users=0, days=[],
    ordered_pairs=1, below_min=0, above_max=0, beyond_top=0, pairs=1, sources=1, targets=1, scores=[], partners=[],
    partner_of=[], notes=NoteCounts(2, 0, 0, 2), new_notes=NewNotes(0, 0), pairs_with_deleted_notes=0,
)  # fmt: skip


def write(out: Path, end: int, *, pairs: bytes = b"pairs", notes: bytes = b"notes") -> Snapshot:
    """A snapshot whose files hold these bytes: nothing here looks into them."""
    with only_run(out) as work:
        (work / "p").write_bytes(pairs)
        (work / "n").write_bytes(notes)
        return publish(
            out, work, window=Window(0, end, "all"), settings=PairOptions(), engine=Engine("duckdb", "2"),
            source=SOURCE, notes_source=SOURCE, pairs=work / "p", notes=work / "n", statistics=STATISTICS,
        )  # fmt: skip


def files(out: Path) -> set[str]:
    return {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}


class TestReading:
    def test_gives_what_was_written(self, tmp_path: Path) -> None:
        written = write(tmp_path, 100)
        read = read_snapshot(written.path)
        assert read == written
        assert read.name.startswith("100-")
        assert read.pairs_path.read_bytes() == b"pairs"
        assert read.notes_path.read_bytes() == b"notes"
        assert read.statistics == STATISTICS
        assert read.manifest.rows == 1
        assert read.manifest.source == SOURCE

    def test_the_newest_is_that_of_the_last_window(self, tmp_path: Path) -> None:
        for end in (200, 1000, 300):
            write(tmp_path, end)
        assert [each.manifest.window.end for each in snapshots(tmp_path)] == [200, 300, 1000]
        assert latest_snapshot(tmp_path).manifest.window.end == 1000
        assert open_snapshot(tmp_path) == latest_snapshot(tmp_path)
        assert open_snapshot(snapshots(tmp_path)[0].path).manifest.window.end == 200

    def test_says_where_there_is_none(self, tmp_path: Path) -> None:
        assert snapshots(tmp_path / "nowhere") == []
        with pytest.raises(SnapshotError, match="no snapshot there; notellm pairs refresh"):
            latest_snapshot(tmp_path)

    def test_without_a_manifest_it_is_none(self, tmp_path: Path) -> None:
        written = write(tmp_path, 100)
        (written.path / "manifest.json").unlink()
        assert snapshots(tmp_path) == []
        with pytest.raises(SnapshotError, match=r"no manifest.json there, so it is no snapshot"):
            read_snapshot(written.path)

    @pytest.mark.parametrize("name", ["pairs.parquet", "statistics.json", "notes"])
    def test_refuses_a_file_that_is_not_the_one_written(self, tmp_path: Path, name: str) -> None:
        written = write(tmp_path, 100)
        file = written.notes_path if name == "notes" else written.path / name
        file.write_bytes(file.read_bytes() + b" ")
        with pytest.raises(SnapshotError, match=f"{file.name} is not the file that was written"):
            read_snapshot(written.path)
        file.unlink()
        with pytest.raises(SnapshotError, match=f"{file.name} cannot be read"):
            read_snapshot(written.path)

    def test_refuses_another_format(self, tmp_path: Path) -> None:
        written = write(tmp_path, 100)
        manifest = written.path / "manifest.json"
        manifest.write_text(manifest.read_text().replace('"format_version": 1', '"format_version": 2'))
        with pytest.raises(SnapshotError, match="format_version is 2, this program reads 1"):
            read_snapshot(written.path)

    @pytest.mark.parametrize("content", ["", "{}", "[]", '{"format_version": 1}', '{"format_version": "1"}'])
    def test_refuses_a_manifest_that_is_none(self, tmp_path: Path, content: str) -> None:
        written = write(tmp_path, 100)
        (written.path / "manifest.json").write_text(content)
        with pytest.raises(SnapshotError, match=r"manifest.json cannot be read"):
            read_snapshot(written.path)


class TestPublishing:
    def test_the_layout(self, tmp_path: Path) -> None:
        written = write(tmp_path, 100)
        notes = "notes/f46a1c3eb87bf98dbb52df0eb3f7cb2bcd6bc0f2f9c5eb6d7e7d2bb7e1b4e13a.parquet"
        assert written.manifest.notes.path.startswith("notes/")
        assert len(written.manifest.notes.path) == len(notes)
        folder = f"pairs/{written.name}"
        assert files(tmp_path) - {".lock"} == {
            f"{folder}/pairs.parquet", f"{folder}/statistics.json", f"{folder}/manifest.json",
            written.manifest.notes.path,
        }  # fmt: skip

    def test_the_same_again_is_the_same_snapshot(self, tmp_path: Path) -> None:
        first = write(tmp_path, 100)
        assert write(tmp_path, 100) == first
        assert len(snapshots(tmp_path)) == 1

    def test_other_pairs_of_the_same_window_are_another_snapshot(self, tmp_path: Path) -> None:
        write(tmp_path, 100)
        write(tmp_path, 100, pairs=b"others")
        assert len(snapshots(tmp_path)) == 2

    def test_a_broken_one_in_its_place_is_replaced(self, tmp_path: Path) -> None:
        first = write(tmp_path, 100)
        first.pairs_path.write_bytes(b"broken")
        assert read_snapshot(write(tmp_path, 100).path).pairs_path.read_bytes() == b"pairs"

    def test_notes_that_are_the_same_are_shared(self, tmp_path: Path) -> None:
        assert write(tmp_path, 100).notes_path == write(tmp_path, 200).notes_path
        assert write(tmp_path, 300, notes=b"others").notes_path != latest_snapshot(tmp_path).path
        assert len(list((tmp_path / "notes").iterdir())) == 2


class TestOneRun:
    def test_a_second_is_told_who_holds_it(self, tmp_path: Path) -> None:
        with (
            only_run(tmp_path),
            pytest.raises(SnapshotError, match=rf"written to by another run \(process {os.getpid()}, since 20.*--wait"),
            only_run(tmp_path),
        ):
            pass

    def test_a_second_may_wait(self, tmp_path: Path) -> None:
        began = threading.Event()
        order = []

        def second() -> None:
            began.set()
            with only_run(tmp_path, wait=True):
                order.append("second")

        thread = threading.Thread(target=second)
        with only_run(tmp_path):
            thread.start()
            began.wait()
            thread.join(0.3)
            order.append("first")
        thread.join(10)
        assert order == ["first", "second"]

    def test_what_a_killed_one_left_is_gone(self, tmp_path: Path) -> None:
        left = tmp_path / ".work" / "snapshot"
        left.mkdir(parents=True)
        (left / "manifest.json").write_text("{}")
        assert snapshots(tmp_path) == []
        with only_run(tmp_path) as work:
            assert list(work.iterdir()) == []
        assert not work.exists()

    def test_a_folder_that_cannot_be_is_one_line(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(SnapshotError, match=r"--out: .*cannot be written to"), only_run(tmp_path / "file"):
            pass


class TestPruning:
    def test_keeps_the_newest_and_their_notes(self, tmp_path: Path) -> None:
        written = [write(tmp_path, end, notes=b"notes %d" % (end // 200)) for end in range(100, 600, 100)]
        gone = prune(tmp_path, 2, written[-1])
        assert [each.name for each in snapshots(tmp_path)] == [written[3].name, written[4].name]
        assert {path.name for path in (tmp_path / "pairs").iterdir()} == {written[3].name, written[4].name}
        assert {path.name for path in (tmp_path / "notes").iterdir()} == {written[4].notes_path.name}
        assert len(gone) == 5
        for each in snapshots(tmp_path):
            read_snapshot(each.path)

    def test_never_the_one_just_written(self, tmp_path: Path) -> None:
        newer = [write(tmp_path, end) for end in (1000, 2000)]
        old = write(tmp_path, 10, notes=b"old")
        prune(tmp_path, 1, old)
        assert [each.name for each in snapshots(tmp_path)] == [old.name, newer[1].name]
        read_snapshot(old.path)

    def test_notes_that_nobody_names_and_folders_without_a_manifest_go(self, tmp_path: Path) -> None:
        written = write(tmp_path, 100)
        (tmp_path / "notes" / "abc.parquet").write_text("of a run that was killed")
        (tmp_path / "pairs" / "90-aaaaaaaa").mkdir()
        assert prune(tmp_path, 7, written) == ["notes/abc.parquet"]
        assert [path.name for path in (tmp_path / "pairs").iterdir()] == [written.name]

    def test_takes_nothing_away_while_a_manifest_cannot_be_read(self, tmp_path: Path) -> None:
        other, written = write(tmp_path, 100, notes=b"others"), write(tmp_path, 200)
        (other.path / "manifest.json").write_text(json.dumps({"format_version": 99}))
        before = files(tmp_path)
        with pytest.raises(SnapshotError, match="format_version is 99"):
            prune(tmp_path, 1, written)
        assert files(tmp_path) == before


def test_statistics_of_another_shape_are_one_line(tmp_path: Path) -> None:
    written = write(tmp_path, 100)
    (written.path / "statistics.json").write_bytes(msgspec.json.encode({"read": -1}))
    with pytest.raises(SnapshotError, match=r"statistics.json cannot be read"):
        _ = read_snapshot(written.path, verify=False).statistics
