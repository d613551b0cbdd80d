"""Pairs from files: what is a pair, what is skipped, and what is said of a file that is none."""

from __future__ import annotations

import decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.training.data_files import json_lines, parquet
from training import pairs as pairs_module
from training.errors import TrainingDataError
from training.note_table import NoteTable, read_note_table
from training.pairs import PairTable, read_pairs

IDS = ["kyoto", "osaka", "東京", "nara"]
PAIR = {"source_id": "kyoto", "target_id": "osaka", "score": 2.5}
# Unknown notes and pairs with itself are among them.
PAIRS = st.lists(
    st.tuples(st.sampled_from([*IDS, "gone", ""]), st.sampled_from([*IDS, "unborn"]), st.floats(1e-6, 1e6)), max_size=12
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pairs")


@pytest.fixture(scope="module")
def notes(folder: Path) -> NoteTable:
    return read_note_table(json_lines(folder / "notes.jsonl", [{"note_id": each, "title": "t"} for each in IDS]))


def columns_of(pairs: list[tuple[str, str, float]]) -> dict[str, Any]:
    sources, targets, scores = ([pair[place] for pair in pairs] for place in range(3))
    return {
        "rank": pa.array(range(len(pairs)), pa.int32()),
        "score": pa.array(scores, pa.float64()),
        "target_id": pa.array(targets, pa.string()),
        "source_id": pa.array(sources, pa.string()),
    }


def written(folder: Path, pairs: list[tuple[str, str, float]]) -> list[Path]:
    """The same pairs in both formats, with columns in another order and one too many."""
    lines = [{"users": 3, "score": score, "target_id": b, "source_id": a} for a, b, score in pairs]
    return [json_lines(folder / "pairs.jsonl", lines), parquet(folder / "pairs.parquet", columns_of(pairs))]


def refusal(file: Path, notes: NoteTable) -> str:
    with pytest.raises(TrainingDataError) as caught:
        read_pairs(file, notes)
    line = str(caught.value)
    assert line.startswith(f"--pairs: {file}")
    return line.removeprefix(f"--pairs: {file}")


@settings(deadline=None, max_examples=25)
@given(pairs=PAIRS, part=st.integers(1, 5))
def test_every_pair_of_two_notes_is_there_in_order_and_all_others_are_counted(
    folder: Path, notes: NoteTable, pairs: list[tuple[str, str, float]], part: int
) -> None:
    wanted = [(IDS.index(a), IDS.index(b), score) for a, b, score in pairs if a != b and {a, b} <= set(IDS)]
    for file in written(folder, pairs):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pairs_module, "_ROWS", part)
            if not wanted:
                assert refusal(file, notes) == f" holds no pair of two notes to learn from ({len(pairs)} skipped)"
                continue
            table = read_pairs(file, notes)
        assert list(zip(table.sources.tolist(), table.targets.tolist(), table.scores.tolist(), strict=True)) == wanted
        assert (len(table), table.skipped) == (len(wanted), len(pairs) - len(wanted))


@settings(deadline=None, max_examples=50)
@given(
    pairs=st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8)), min_size=1, max_size=12),
    rows=st.lists(st.integers(0, 8), min_size=1, max_size=8),
)
def test_two_notes_are_known_as_a_pair_whichever_way_round(pairs: list[tuple[int, int]], rows: list[int]) -> None:
    sources, targets = np.array(pairs, np.int64).T
    known = PairTable.of(sources, targets, np.ones(len(pairs)), 9).known(np.array(rows))
    assert known.tolist() == [[(a, b) in pairs or (b, a) in pairs for b in rows] for a in rows]


def test_json_lines_without_a_score_count_once(tmp_path: Path, notes: NoteTable) -> None:
    file = json_lines(tmp_path / "pairs.jsonl", [{"source_id": "kyoto", "target_id": "nara"}])
    assert read_pairs(file, notes).scores.tolist() == [1.0]


@pytest.mark.parametrize(
    ("scores", "wanted"),
    [
        (pa.array([3, 4], pa.int32()), [3.0, 4.0]),
        (pa.array([0.5, 0.25], pa.float32()), [0.5, 0.25]),
        (pa.array([decimal.Decimal("1.50"), decimal.Decimal("2.25")]), [1.5, 2.25]),
    ],
    ids=["int", "float32", "decimal"],
)
def test_whatever_number_parquet_has_is_a_score(
    tmp_path: Path, notes: NoteTable, scores: Any, wanted: list[float]
) -> None:
    ids = pa.array(["kyoto", "nara"]).dictionary_encode()
    columns = {"source_id": ids, "target_id": pa.array(["nara", "osaka"], pa.large_string()), "score": scores}
    table = read_pairs(parquet(tmp_path / "pairs.parquet", columns), notes)
    assert table.scores.dtype == np.float64
    assert table.scores.tolist() == wanted
    assert table.sources.tolist() == [0, 3]


@pytest.mark.parametrize(
    ("score", "named"),
    [(0.0, "0.0"), (-1.5, "-1.5"), (float("nan"), "nan"), (float("inf"), "inf"), (None, "nan")],
    ids=str,
)
def test_a_score_that_cannot_be_a_weight_is_named(
    tmp_path: Path, notes: NoteTable, score: float | None, named: str
) -> None:
    columns = columns_of([("kyoto", "osaka", 1.0), ("nara", "kyoto", 1.0)])
    file = parquet(tmp_path / "pairs.parquet", columns | {"score": pa.array([1.0, score], pa.float64())})
    assert refusal(file, notes) == f": score is {named}; allowed are finite numbers above 0"


def test_a_score_of_zero_in_json_lines_is_named(tmp_path: Path, notes: NoteTable) -> None:
    file = json_lines(tmp_path / "pairs.jsonl", [PAIR, PAIR | {"score": 0}])
    assert refusal(file, notes) == ": score is 0.0; allowed are finite numbers above 0"


@pytest.mark.parametrize("column", ["source_id", "target_id", "score"])
def test_a_parquet_file_without_a_column_says_which(tmp_path: Path, notes: NoteTable, column: str) -> None:
    columns = columns_of([("kyoto", "osaka", 1.0)])
    del columns[column]
    assert refusal(parquet(tmp_path / "pairs.parquet", columns), notes) == f" has no column {column!r}"


@pytest.mark.parametrize(
    "columns",
    [{"score": ["many"]}, {"score": [[1.0]]}, {"source_id": [["kyoto"]]}, {"target_id": [{"id": "osaka"}]}],
    ids=str,
)
def test_a_column_of_another_type_is_one_line(tmp_path: Path, notes: NoteTable, columns: dict[str, Any]) -> None:
    file = parquet(tmp_path / "pairs.parquet", {name: [value] for name, value in PAIR.items()} | columns)
    line = refusal(file, notes)
    assert line.startswith(" cannot be read as Parquet: ")
    assert "\n" not in line


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b"{", "Input data was truncated"),
        (b"", "Input data was truncated"),
        (b'["kyoto", "osaka", 1]', "Expected `object`, got `array`"),
        (b'{"source_id": "kyoto", "score": 1}', "missing required field `target_id`"),
        (b'{"source_id": 7, "target_id": "osaka"}', "Expected `str`, got `int` - at `$.source_id`"),
        (b'{"source_id": "kyoto", "target_id": "osaka", "score": "1"}', "got `str` - at `$.score`"),
        (b'{"source_id": "\xff", "target_id": "osaka"}', "can't decode byte 0xff"),
        (b'{"source_id": ' + b"[" * 100_000, ""),
        (b'{"other": ' + b"[" * 100_000, "recursion"),
    ],
    ids=["cut", "blank", "array", "lacks", "number", "text", "bytes", "brackets", "deep"],
)
def test_a_line_that_is_no_pair_is_named_by_its_number(
    tmp_path: Path, notes: NoteTable, line: bytes, said: str
) -> None:
    file = json_lines(tmp_path / "pairs.jsonl", [PAIR])
    file.write_bytes(file.read_bytes() + line + b"\n")
    found = refusal(file, notes)
    assert found.startswith(", line 2 is no pair: ")
    assert said in found


def test_a_file_that_is_not_there_or_not_parquet_is_one_line(tmp_path: Path, notes: NoteTable) -> None:
    assert refusal(tmp_path / "none.jsonl", notes) == " cannot be read: No such file or directory"
    assert refusal(tmp_path / "none.parquet", notes).startswith(" cannot be read as Parquet: ")
    (tmp_path / "text.parquet").write_bytes(b"source_id,target_id,score\n")
    assert refusal(tmp_path / "text.parquet", notes).startswith(" cannot be read as Parquet: ")


def test_a_file_cut_short_is_one_line(tmp_path: Path, notes: NoteTable) -> None:
    file = parquet(tmp_path / "pairs.parquet", columns_of([("kyoto", "osaka", 1.0)] * 1000))
    file.write_bytes(file.read_bytes()[:-200])
    assert refusal(file, notes).startswith(" cannot be read as Parquet: ")
