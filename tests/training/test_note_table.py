"""Notes from files: the same through either format, and one line about a file that holds something else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from notellm.messages import Note
from tests.training.data_files import json_lines, parquet
from training import note_table
from training.errors import TrainingDataError
from training.note_table import NoteTable, read_note_table

NOTES = [
    Note(
        note_id="kyoto",
        title="Two days in Kyoto",
        content="Tea,\nthen a temple.\n",
        hashtags=["京都", "tea"],
        category="travel",
        published_at=1_795_000_000_000,
    ),
    Note(note_id="ramen", title="", content="Ramen at home", hashtags=[], category="", published_at=0),
    Note(note_id="né 🍁", title="café crème", content="", hashtags=["one"], category="food", published_at=2**53 + 1),
]
COLUMNS = ("note_id", "title", "content", "hashtags", "category", "published_at")


def write(folder: Path, kind: str, notes: list[Note]) -> Path:
    if kind == "jsonl":
        return json_lines(folder / "notes.jsonl", notes)
    columns: dict[str, Any] = {name: [getattr(note, name) for note in notes] for name in COLUMNS}
    columns["hashtags"] = pa.array(columns["hashtags"], pa.list_(pa.string()))
    # As a snapshot has it, and in another order.
    return parquet(folder / "notes.parquet", {"attributes": ["{}"] * len(notes), **dict(reversed(columns.items()))})


def all_of(table: NoteTable) -> list[Note]:
    return [table.note(row) for row in range(len(table))]


def refusal(file: Path) -> str:
    with pytest.raises(TrainingDataError) as caught:
        read_note_table(file)
    line = str(caught.value)
    assert line.startswith(f"notes: {file}")
    assert "\n" not in line
    return line.removeprefix(f"notes: {file}")


each_format = pytest.mark.parametrize("kind", ["jsonl", "parquet"])


@each_format
def test_every_field_comes_through(tmp_path: Path, kind: str) -> None:
    assert all_of(read_note_table(write(tmp_path, kind, NOTES))) == NOTES


@each_format
def test_the_last_of_two_notes_with_one_id_counts(tmp_path: Path, kind: str) -> None:
    edited = msgspec.structs.replace(NOTES[0], title="Three days in Kyoto")
    table = read_note_table(write(tmp_path, kind, [NOTES[0], NOTES[1], edited, NOTES[2]]))
    assert table.rows == {"kyoto": 2, "ramen": 1, "né 🍁": 3}
    assert table.live_rows() == [1, 2, 3]
    assert table.note(table.rows["kyoto"]).title == "Three days in Kyoto"


@settings(deadline=None, max_examples=20)
@given(wanted=st.sets(st.integers(0, 9)), part=st.integers(1, 11))
def test_only_what_is_wanted_is_kept_however_the_file_is_read_in_parts(
    tmp_path_factory: pytest.TempPathFactory, wanted: set[int], part: int
) -> None:
    notes = [Note(note_id=str(number), title=f"title {number}", published_at=number) for number in range(10)]
    folder = tmp_path_factory.getbasetemp()
    for kind in ("jsonl", "parquet"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(note_table, "_LINES", part)
            table = read_note_table(write(folder, kind, notes), lambda note: int(note.note_id) in wanted)
        assert all_of(table) == [notes[number] for number in sorted(wanted)]
        assert table.rows == {str(number): row for row, number in enumerate(sorted(wanted))}


def test_json_lines_come_through_the_door_of_the_topic(tmp_path: Path) -> None:
    line = {"note_id": "a", "title": "  Tea ", "hashtags": ["#tea", "tea", " "], "unknown": 1}
    (note,) = all_of(read_note_table(json_lines(tmp_path / "notes.jsonl", [line])))
    assert (note.title, note.hashtags, note.category, note.published_at) == ("Tea", ["tea"], "", 0)


def test_what_is_null_in_parquet_is_as_if_it_were_not_there(tmp_path: Path) -> None:
    columns = {
        "note_id": ["a"],
        "title": ["Tea"],
        "content": pa.array([None], pa.string()),
        "hashtags": pa.array([None], pa.list_(pa.string())),
        "category": pa.array([None], pa.string()),
        "published_at": [5],
    }
    (note,) = all_of(read_note_table(parquet(tmp_path / "notes.parquet", columns)))
    assert note == Note(note_id="a", title="Tea", published_at=5)


@each_format
def test_a_file_of_no_notes_is_a_table_of_none(tmp_path: Path, kind: str) -> None:
    table = read_note_table(write(tmp_path, kind, []))
    assert (len(table), table.live_rows()) == (0, [])


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b"{", "Input data was truncated"),
        (b"null", "Expected `object`, got `null`"),
        (b'{"title": "x"}', "missing required field `note_id`"),
        (b'{"note_id": "", "title": "x"}', "key"),
        (b'{"note_id": "a"}', "title, content, hashtags: all blank"),
        (b'{"note_id": "a", "title": 7}', "title"),
        (b'{"note_id": "\xff", "title": "x"}', "can't decode byte 0xff"),
        (b'{"x": ' + b"[" * 100_000, "recursion"),
    ],
    ids=["cut", "null", "no id", "blank id", "blank", "number", "bytes", "deep"],
)
def test_a_line_that_is_no_note_is_named_by_its_number(tmp_path: Path, line: bytes, said: str) -> None:
    file = json_lines(tmp_path / "notes.jsonl", NOTES)
    file.write_bytes(file.read_bytes() + line + b"\n")
    found = refusal(file)
    assert found.startswith(", line 4 is no note: ")
    assert said in found


@pytest.mark.parametrize("column", COLUMNS)
def test_a_parquet_file_without_a_column_says_which(tmp_path: Path, column: str) -> None:
    columns = {name: [getattr(NOTES[0], name)] for name in COLUMNS if name != column}
    file = parquet(tmp_path / "notes.parquet", columns)
    assert refusal(file) == f" has no column {column!r}; needed are {', '.join(COLUMNS)}"


@pytest.mark.parametrize(
    ("field", "values", "said"),
    [
        ("note_id", pa.array([None], pa.string()), "missing required field `note_id`"),
        ("title", [7], "title: Expected `str`, got `int`"),
        ("hashtags", [[None]], "hashtags: Expected `str`, got `null`"),
        ("published_at", ["yesterday"], "published_at: Expected `int`, got `str`"),
        ("published_at", [-5], "published_at: Expected `int` >= 0"),
    ],
    ids=["no id", "title", "hashtags", "published_at", "before 1970"],
)
def test_a_value_of_another_type_is_named(tmp_path: Path, field: str, values: Any, said: str) -> None:
    columns = {name: [getattr(NOTES[0], name)] for name in COLUMNS} | {field: values}
    found = refusal(parquet(tmp_path / "notes.parquet", columns))
    assert found.startswith(", row 1 is no note: ")
    assert said in found


def test_a_file_that_is_not_there_or_not_parquet_is_one_line(tmp_path: Path) -> None:
    assert refusal(tmp_path / "none.jsonl") == " cannot be read: No such file or directory"
    assert refusal(tmp_path / "none.parquet").startswith(" cannot be read as Parquet: ")
    (tmp_path / "text.parquet").write_bytes(b"note_id,title\n")
    assert refusal(tmp_path / "text.parquet").startswith(" cannot be read as Parquet: ")
