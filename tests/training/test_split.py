"""A split is three parts that have no note in common."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from training.errors import TrainingDataError
from training.split import read_split


def write(folder: Path, content: bytes) -> Path:
    (folder / "split.json").write_bytes(content)
    return folder / "split.json"


def refusal(file: Path) -> str:
    with pytest.raises(TrainingDataError) as caught:
        read_split(file)
    assert str(caught.value).startswith(f"--split: {file}")
    return str(caught.value).removeprefix(f"--split: {file}")


def test_each_part_holds_its_ids(tmp_path: Path) -> None:
    split = read_split(write(tmp_path, b'{"held_out": [], "train": ["a", "b"], "validation": ["\xe4\xba\xac"]}'))
    assert split == {"train": {"a", "b"}, "validation": {"京"}, "held_out": set()}


@pytest.mark.parametrize(
    ("parts", "found"),
    [
        (["train", "validation"], "['train', 'validation']"),
        (["train", "validation", "held_out", "test"], "['held_out', 'test', 'train', 'validation']"),
        (["train", "valid", "held_out"], "['held_out', 'train', 'valid']"),
        ([], "[]"),
    ],
    ids=str,
)
def test_the_parts_are_those_three(tmp_path: Path, parts: list[str], found: str) -> None:
    file = write(tmp_path, msgspec.json.encode({part: [] for part in parts}))
    assert refusal(file) == f" has the parts {found}; allowed are train, validation, held_out"


@pytest.mark.parametrize(
    "content",
    [
        b'{"train": ["a", "b"], "validation": [], "held_out": ["b"]}',
        b'{"train": ["b", "a", "b"], "validation": [], "held_out": []}',
        b'{"train": [], "validation": ["b"], "held_out": ["b"]}',
    ],
    ids=["train and held out", "one part", "validation and held out"],
)
def test_a_note_that_stands_there_twice_is_named(tmp_path: Path, content: bytes) -> None:
    assert refusal(write(tmp_path, content)) == ": 'b' stands there twice; each note has one part"


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b'{"train": "a"}', b'{"train": [1]}', b'{"train": ["\xff"]}', b'{"train": ' + b"[" * 100_000],
    ids=["empty", "list", "text", "number", "bytes", "deep"],
)
def test_what_is_no_split_is_one_line(tmp_path: Path, content: bytes) -> None:
    line = refusal(write(tmp_path, content))
    assert line.startswith(" is no split: ")
    assert "\n" not in line


def test_a_file_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    assert refusal(tmp_path / "none.json") == " cannot be read: No such file or directory"
