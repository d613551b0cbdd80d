"""The notes that generation is measured on, and the pairs that are made where nobody clicked."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.generation import _cleaned, _made_pairs
from notellm.messages import Note


def test_posts_without_text_and_boilerplate_tags_are_left_out(tmp_path: Path) -> None:
    posts = [
        {"note_id": "1", "title": "", "content": "a cat", "hashtags": ["cats"], "category": "pets"},
        {"note_id": "2", "title": " ", "content": "", "hashtags": ["cats"], "category": "pets"},
        {"note_id": "3", "title": "", "content": "", "hashtags": [], "category": ""},
        {"note_id": "1", "title": "again", "content": "", "hashtags": ["热门", "cats"], "category": "pets/dogs"},
        {"note_id": "4", "title": "", "content": "tea", "hashtags": ["Summer Strike"], "category": ""},
    ]
    file = tmp_path / "notes.jsonl"
    file.write_text("".join(json.dumps(post) + "\n" for post in posts))
    told = [(note.note_id, note.title, note.hashtags, note.category) for note in _cleaned(file)]
    assert told == [("1", "again", ["cats"], "pets"), ("4", "", [], "")]


def test_notes_that_share_a_rare_hashtag_are_pairs() -> None:
    def note(name: str, *tags: str) -> Note:
        return Note(note_id=name, title=name, hashtags=list(tags))

    common = [note(f"c{n}", "everyone") for n in range(31)]
    table = _made_pairs([note("a", "Cats", "tea"), note("b", "cats"), note("c", "tea", "cats"), note("d"), *common])
    pairs = {(row["source_id"], row["target_id"]): row["score"] for row in table.to_pylist()}
    # One of three's tag counts a third, one of two's a half; a tag of more than thirty says nothing.
    assert {pair: round(score, 6) for pair, score in pairs.items()} == {
        ("a", "b"): 0.333333,
        ("b", "c"): 0.333333,
        ("a", "c"): 0.833333,
    }
