"""Clicks from JSON Lines and Parquet: the same clicks from both, and every fault named with its place."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.streams.formula import Click
from tests.streams.logs import click_logs
from training.errors import TrainingDataError
from training.evaluation import click_file
from training.evaluation.click_file import Clicks, read_clicks

in_one_folder = settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True
)
COLUMNS = ("user_id", "note_id", "clicked_at")


def clicks_of(read: Clicks) -> list[Click]:
    rows = zip(read.users, read.notes, read.clicked_at, strict=True)
    return [(read.user_ids[user], read.note_ids[note], int(at)) for user, note, at in rows]


def json_lines(file: Path, log: list[Click]) -> Path:
    lines = [json.dumps(dict(zip(COLUMNS, click, strict=True)), ensure_ascii=False) + "\n" for click in log]
    file.write_text("".join(lines), encoding="utf-8")
    return file


def parquet(file: Path, log: list[Click], types: tuple[Any, ...] = (pa.string(), pa.string(), pa.int64())) -> Path:
    columns = [pa.array([click[place] for click in log], types[place]) for place in range(3)]
    pq.write_table(pa.table(columns, names=list(COLUMNS)), file, row_group_size=7)
    return file


@in_one_folder
@given(log=click_logs(), part=st.sampled_from([1, 3, 100_000]), write=st.sampled_from([json_lines, parquet]))
def test_what_was_written_is_read_in_its_order(
    tmp_path: Path, log: list[Click], part: int, write: Callable[[Path, list[Click]], Path]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(click_file, "_ROWS", part)
        read = read_clicks(write(tmp_path / "clicks", log))
    assert clicks_of(read) == log
    assert len(read) == len(log)
    # Each id stands once.
    assert len(set(read.user_ids)) == len(read.user_ids) == len({user for user, _, _ in log})
    assert len(set(read.note_ids)) == len(read.note_ids) == len({note for _, note, _ in log})


def test_blank_lines_and_other_fields_pass(tmp_path: Path) -> None:
    (tmp_path / "clicks.jsonl").write_text(
        '\n{"user_id":"u","note_id":"n","clicked_at":5,"page":[1]}\r\n  \n{"clicked_at":0,"note_id":"n","user_id":"v"}'
    )
    assert clicks_of(read_clicks(tmp_path / "clicks.jsonl")) == [("u", "n", 5), ("v", "n", 0)]


@pytest.mark.parametrize(
    "types", [(pa.large_string(), pa.string(), pa.int32()), (pa.string(), pa.string(), pa.uint64())]
)
def test_parquet_of_like_types_is_read(tmp_path: Path, types: tuple[Any, ...]) -> None:
    log = [("u", "笔", 5), ("v", "笔", 2**31 - 1)]
    assert clicks_of(read_clicks(parquet(tmp_path / "clicks", log, types))) == log


def refusal(file: Path) -> str:
    with pytest.raises(TrainingDataError) as caught:
        read_clicks(file)
    text = str(caught.value)
    assert text.startswith(f"--clicks: {file}")
    assert "\n" not in text
    return text.removeprefix(f"--clicks: {file}")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("[1]", "value: Expected `object`, got `array`; a click is a JSON object"),
        ("{", "value: not UTF-8 JSON"),
        ('{"user_id":"u","note_id":"n"}', "clicked_at: missing; it must be there"),
        ('{"user_id":"u","clicked_at":1}', "note_id: missing; it must be there"),
        ('{"user_id":"u","note_id":"n","clicked_at":1.5}', "clicked_at: Expected `int`, got `float`"),
        ('{"user_id":"u","note_id":"n","clicked_at":-1}', "clicked_at: Expected `int` >= 0"),
        (f'{{"user_id":"u","note_id":"n","clicked_at":{2**53 + 1}}}', "clicked_at: Expected `int` <= 9007199254740992"),
        ('{"user_id":"","note_id":"n","clicked_at":1}', "user_id: Expected `str` of length >= 1"),
        (f'{{"user_id":"{"用" * 22}","note_id":"n","clicked_at":1}}', "user_id: 66 bytes; allowed are 1 to 64 bytes"),
        (
            '{"user_id":"u","note_id":"n\\u0007","clicked_at":1}',
            "note_id: contains a control character; none is allowed",
        ),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, line: str, words: str) -> None:
    file = json_lines(tmp_path / "clicks.jsonl", [("u", "n", 1)])
    file.write_text(file.read_text() + "\n" + line + "\n")
    assert refusal(file).startswith(f", line 3: {words}")


@pytest.mark.parametrize(
    ("clicked_at", "kind", "shown"),
    [
        (2**63 + 1, pa.uint64(), 2**63 + 1),
        (2**53 + 1, pa.int64(), 2**53 + 1),
        (-1, pa.int64(), -1),
        (None, pa.int64(), None),
    ],
)
def test_a_wrong_time_in_parquet_is_named(tmp_path: Path, clicked_at: Any, kind: Any, shown: Any) -> None:
    log = [("u", "n", 1)] * 9 + [("u", "n", clicked_at)]
    file = parquet(tmp_path / "clicks", log, (pa.string(), pa.string(), kind))
    assert refusal(file) == f", row 10: clicked_at: {shown}; allowed is an integer from 0 to 9007199254740992"


@pytest.mark.parametrize(
    ("note", "words"),
    [
        (None, "note_id: null; it must be a string"),
        ("", "note_id: 0 bytes; allowed are 1 to 64 bytes of UTF-8"),
        ("n\x07", "note_id: contains a control character; none is allowed"),
    ],
)
def test_a_wrong_id_in_parquet_is_named(tmp_path: Path, note: Any, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(click_file, "_ROWS", 4)
    file = parquet(tmp_path / "clicks", [("u", "n", 1)] * 9 + [("u", note, 1)])
    assert refusal(file) == f", row 10: {words}"


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({"user_id": ["u"], "clicked_at": [1]}, " has no column note_id; it must be there, and be a string"),
        (
            {"user_id": ["u"], "note_id": ["n"]},
            " has no column clicked_at; it must be there, and be an integer, in mill",
        ),
        ({"user_id": [1], "note_id": ["n"], "clicked_at": [1]}, ", column user_id is int64; allowed is a string"),
        (
            {"user_id": ["u"], "note_id": ["n"], "clicked_at": [1.0]},
            ", column clicked_at is double; allowed is an integer, in milliseconds UTC",
        ),
        (
            {"user_id": ["u"], "note_id": ["n"], "clicked_at": pa.array([1], pa.timestamp("ms"))},
            ", column clicked_at is timestamp[ms]; allowed is an integer, in milliseconds UTC",
        ),
    ],
)
def test_wrong_columns_of_parquet_are_named(tmp_path: Path, table: dict[str, Any], words: str) -> None:
    pq.write_table(pa.table(table), tmp_path / "clicks")
    assert refusal(tmp_path / "clicks").startswith(words)


def test_a_column_that_is_there_twice_is_named(tmp_path: Path) -> None:
    table = pa.table([["u"], ["v"], ["n"], [1]], names=["user_id", "user_id", "note_id", "clicked_at"])
    pq.write_table(table, tmp_path / "clicks")
    assert refusal(tmp_path / "clicks") == " has 2 columns user_id; allowed is one"


def test_text_that_is_no_utf_8_is_refused(tmp_path: Path) -> None:
    offsets, letters = pa.array([0, 2], pa.int32()).buffers()[1], pa.py_buffer(b"\xff\xfe")
    ids = pa.Array.from_buffers(pa.string(), 1, [None, offsets, letters])
    pq.write_table(pa.table([ids, ["n"], [1]], names=list(COLUMNS)), tmp_path / "clicks")
    assert refusal(tmp_path / "clicks").startswith(" cannot be read as Parquet: 'utf-8' codec can't decode byte 0xff")


def test_a_file_that_cannot_be_read_is_named_in_one_line(tmp_path: Path) -> None:
    assert refusal(tmp_path / "absent") == " cannot be read: No such file or directory"
    assert refusal(tmp_path) == " cannot be read: Is a directory"
    whole = parquet(tmp_path / "whole", [("u", "n", 1)]).read_bytes()
    (tmp_path / "cut").write_bytes(whole[:100])
    assert refusal(tmp_path / "cut").startswith(" cannot be read as Parquet: ")
    # A page's header of zeros: pyarrow says so in two lines.
    (tmp_path / "zeros").write_bytes(whole[:4] + bytes(60) + whole[64:])
    assert refusal(tmp_path / "zeros").startswith(" cannot be read: ")
