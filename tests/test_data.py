"""Notes to publish and to learn from: they pass the door as they are, and no two are near-copies."""

from __future__ import annotations

import json
import unicodedata
from collections import Counter, defaultdict
from itertools import combinations
from pathlib import Path
from typing import Any

import msgspec
import pytest

from notellm.messages import NoteRecord, parse_record
from tests.conftest import REPOSITORY
from training.split import PARTS, Split, read_split

DATA = REPOSITORY / "data"
NEAR_COPY = 0.4


def read(file: Path) -> list[dict[str, Any]]:
    """Every line passes the door, and nothing of it is cut."""
    notes = []
    for line in file.read_bytes().splitlines():
        note = json.loads(line)
        record = parse_record(note["note_id"].encode(), line, 0)
        assert isinstance(record, NoteRecord)
        assert record.trimmed == (), note["note_id"]
        notes.append(note)
    return notes


def text_of(note: dict[str, Any]) -> str:
    return f"{note.get('title', '')}\n{note.get('content', '')}"


def is_chinese(text: str) -> bool:
    """More than half of its letters are Han characters."""
    letters = [character for character in text if character.isalpha()]
    return sum("\u4e00" <= character <= "\u9fff" for character in letters) > len(letters) / 2


def has_emoji(text: str) -> bool:
    return any(unicodedata.category(character) == "So" for character in text)


@pytest.fixture(scope="module")
def notes() -> list[dict[str, Any]]:
    return read(DATA / "notes.jsonl")


@pytest.fixture(scope="module")
def more() -> list[dict[str, Any]]:
    return read(DATA / "training_notes.jsonl")


class TestNotes:
    def test_there_are_enough_and_each_once(self, notes: list[dict[str, Any]]) -> None:
        assert len(notes) >= 1200
        assert len({note["note_id"] for note in notes}) == len(notes)

    def test_pass_the_door_unchanged(self, notes: list[dict[str, Any]]) -> None:
        for note in notes:
            record = parse_record(note["note_id"].encode(), msgspec.json.encode(note), 0)
            assert isinstance(record, NoteRecord)
            assert msgspec.to_builtins(record.note) == note

    def test_categories_are_those_of_the_bundle(self, notes: list[dict[str, Any]]) -> None:
        known = set((REPOSITORY / "notellm" / "templates" / "categories.txt").read_text("utf-8").split())
        used = {note["category"] for note in notes}
        assert used <= known
        assert len(used) >= 16

    def test_one_in_five_is_chinese(self, notes: list[dict[str, Any]]) -> None:
        assert sum(is_chinese(text_of(note)) for note in notes) >= len(notes) / 5

    def test_are_a_line_to_a_page_long(self, notes: list[dict[str, Any]]) -> None:
        lengths = sorted(len(text_of(note)) for note in notes)
        assert lengths[0] < 40
        assert lengths[len(lengths) // 2] > 100
        assert lengths[-1] > 1500

    def test_carry_hashtags_and_emoji_as_people_do(self, notes: list[dict[str, Any]]) -> None:
        tagged = sum(bool(note["hashtags"]) for note in notes)
        assert len(notes) * 0.8 < tagged < len(notes)
        assert sum(has_emoji(text_of(note)) for note in notes) > len(notes) / 4


class TestTrainingNotes:
    def test_add_as_many_to_each_category(self, notes: list[dict[str, Any]], more: list[dict[str, Any]]) -> None:
        counts = Counter(note["category"] for note in more)
        assert set(counts) == {note["category"] for note in notes}
        assert set(counts.values()) == {64}
        assert len({note["note_id"] for note in notes + more}) == len(notes) + len(more)

    def test_no_two_are_near_copies(self, notes: list[dict[str, Any]], more: list[dict[str, Any]]) -> None:
        """Jaccard similarity of the character 5-grams of title and content."""
        notes = notes + more
        grams = [{text[at : at + 5] for at in range(len(text) - 4)} for text in map(text_of, notes)]
        holders: dict[str, list[int]] = defaultdict(list)
        for number, own in enumerate(grams):
            for gram in own:
                holders[gram].append(number)
        # Only pairs that share a gram are ever looked at.
        shared = Counter(pair for numbers in holders.values() for pair in combinations(numbers, 2))
        near = [
            (notes[a]["note_id"], notes[b]["note_id"])
            for (a, b), count in shared.items()
            if count / (len(grams[a]) + len(grams[b]) - count) >= NEAR_COPY
        ]
        assert near == []


class TestSplit:
    @pytest.fixture(scope="class")
    def split(self) -> Split:
        return read_split(DATA / "split.json")

    def test_gives_every_note_one_part(
        self, notes: list[dict[str, Any]], more: list[dict[str, Any]], split: Split
    ) -> None:
        ids = [note_id for part in split.values() for note_id in part]
        assert sorted(ids) == sorted(note["note_id"] for note in notes + more)
        assert {note["note_id"] for note in more} <= split["train"]

    def test_is_60_15_25_of_every_category(self, notes: list[dict[str, Any]], split: Split) -> None:
        for category in {note["category"] for note in notes}:
            of_category = {note["note_id"] for note in notes if note["category"] == category}
            shares = [len(split[part] & of_category) / len(of_category) for part in PARTS]
            assert shares == pytest.approx([0.6, 0.15, 0.25], abs=0.01)

    def test_hashtags_recur(self, notes: list[dict[str, Any]], split: Split) -> None:
        """Else there would be nothing to learn of them."""
        learnt = {tag for note in notes if note["note_id"] in split["train"] for tag in note["hashtags"]}
        asked = [tag for note in notes if note["note_id"] in split["held_out"] for tag in note["hashtags"]]
        assert 0.7 < sum(tag in learnt for tag in asked) / len(asked) < 1


class TestKuaiRec:
    def test_holds_400_notes(self) -> None:
        notes = read(DATA / "kuairec" / "notes.jsonl")
        assert len(notes) == 400
        assert len({note["note_id"] for note in notes}) == 400

    def test_readme_carries_the_licence(self) -> None:
        readme = (DATA / "kuairec" / "README.md").read_text("utf-8")
        for words in ("https://creativecommons.org/licenses/by-sa/4.0/", "10.1145/3511808.3557220", "**Changed**"):
            assert words in readme
