"""What a person sees of one note's pairs."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from streams.snapshot import Snapshot
from tests.commands.handmade_snapshot import DAY_MS, END, make_snapshot
from tests.commands.in_process import run_here

PAIRS = [
    ("kyoto", "osaka", 2.5, 7, 1),
    ("kyoto", "gone", 1.25, 5, 2),
    ("kyoto", 'no"te', 0.0125, 1, 3),
    ("osaka", "kyoto", 0.5, 2, 4),
    ("tokyo", "kyoto", 0.75, 3, 2),
    ("gone", "kyoto", 0.25, 1, 1),
]
TITLES = {"kyoto": "Two days [in] Kyoto", "osaka": "大阪", "tokyo": "", 'no"te': "quoted", "alone": "Nobody saw me"}


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory: pytest.TempPathFactory) -> Snapshot:
    return make_snapshot(tmp_path_factory.mktemp("out"), PAIRS, TITLES)


def show(snapshot: Snapshot, note_id: str, *flags: str) -> tuple[int, str, str]:
    return run_here("pairs", "show", note_id, "--snapshot", str(snapshot.path), *flags)


def rows(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("│").split("│")] for line in text.splitlines() if line.startswith("│")]


def test_partners_both_ways_with_titles_and_deleted_ones_marked(snapshot: Snapshot) -> None:
    code, text, _ = show(snapshot, "kyoto")
    assert code == 0
    assert text.startswith("kyoto Two days [in] Kyoto\nleads to: 3")
    assert rows(text) == [
        ["1", "2.5000", "7", "osaka", "大阪"],
        ["2", "1.2500", "5", "gone", "deleted"],
        ["3", "0.0125", "1", 'no"te', "quoted"],
        ["2", "0.7500", "3", "tokyo", ""],
        ["4", "0.5000", "2", "osaka", "大阪"],
        ["1", "0.2500", "1", "gone", "deleted"],
    ]
    assert "is led to by: 3" in text


def test_a_deleted_note_that_leads_and_a_note_that_is_only_led_to(snapshot: Snapshot) -> None:
    code, text, _ = show(snapshot, "gone")
    assert (code, text.splitlines()[0]) == (0, "gone deleted")
    code, text, _ = show(snapshot, 'no"te')
    assert code == 0
    assert "leads to: none" in text
    assert rows(text) == [["3", "0.0125", "1", "kyoto", "Two days [in] Kyoto"]]


def test_long_tables_say_what_is_left(snapshot: Snapshot) -> None:
    code, text, _ = show(snapshot, "kyoto", "--limit", "1")
    assert code == 0
    assert [row[3] for row in rows(text)] == ["osaka", "tokyo"]
    assert text.count("and 2 more") == 2


def test_json_has_all_of_it(snapshot: Snapshot) -> None:
    code, text, _ = show(snapshot, "kyoto", "--json", "--limit", "1")
    assert code == 0
    answer = msgspec.json.decode(text)
    assert (answer["snapshot"], answer["title"], answer["deleted"]) == (snapshot.name, "Two days [in] Kyoto", False)
    assert answer["leads_to"][1] == {
        "note_id": "gone", "rank": 2, "score": 1.25, "users": 5, "title": "", "deleted": True
    }  # fmt: skip
    assert [one["note_id"] for one in answer["led_to_by"]] == ["tokyo", "osaka", "gone"]


@pytest.mark.parametrize(
    ("note_id", "why"),
    [("alone", "it is a live note that too few users clicked"), ("nowhere", "it is not in its notes file")],
)
def test_a_note_without_pairs_is_a_clear_line(snapshot: Snapshot, note_id: str, why: str) -> None:
    done = show(snapshot, note_id)
    assert done == (1, "", f"error: NOTE_ID: '{note_id}' has no pairs in {snapshot.path}; {why}\n")


def test_an_out_folder_means_its_newest_snapshot(tmp_path: Path) -> None:
    make_snapshot(tmp_path, PAIRS, TITLES)
    newest = make_snapshot(tmp_path, [("kyoto", "nara", 1.0, 1, 1)], TITLES, end=END + DAY_MS)
    done = run_here("pairs", "show", "kyoto", "--snapshot", str(tmp_path), "--json")
    assert msgspec.json.decode(done.stdout)["snapshot"] == newest.name


def test_a_snapshot_that_is_not_whole_is_a_clear_line(tmp_path: Path) -> None:
    snapshot = make_snapshot(tmp_path, PAIRS, TITLES)
    with snapshot.pairs_path.open("ab") as stream:
        stream.write(b"x")
    code, text, error = show(snapshot, "kyoto")
    assert (code, text) == (1, "")
    assert "pairs.parquet is not the file that was written" in error
    (snapshot.path / "manifest.json").unlink()
    code, _, error = show(snapshot, "kyoto")
    assert code == 1
    assert len(error.splitlines()) == 1
    assert "no snapshot" in error
