"""Asking a model: each answer in its note's place, and the author's hashtags only where they may be seen."""

from __future__ import annotations

import numpy as np
import pytest

from notellm.encoder import Tags
from notellm.messages import Note
from tests.training.evaluation.word_reader import WordReader
from training.evaluation import readers
from training.evaluation.readers import read_embeddings, read_tags

# Of many lengths, so that the reader's order is not that of the notes.
NOTES = [
    Note(note_id=f"n{place}", title=f"title{place}", content="word " * (place * 7 % 10), hashtags=[f"secret{place}"])
    for place in range(10)
]
TAGS = {f"title{place}": Tags([f"tag{place}"], f"category{place}") for place in range(10)}


@pytest.fixture(params=[1, 4, 512])
def reader(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> WordReader:
    monkeypatch.setattr(readers, "_AT_ONCE", request.param)
    return WordReader(TAGS)


def test_tags_are_each_note_s_own(reader: WordReader) -> None:
    assert read_tags(reader, NOTES) == list(TAGS.values())


def test_embeddings_are_each_note_s_own(reader: WordReader) -> None:
    found = read_embeddings(reader, NOTES)
    wanted = [reader.embed(prompt.text) for prompt in reader.build_prompts(NOTES)]
    np.testing.assert_array_equal(found, wanted)
    assert found.dtype == np.float32


def test_for_tags_the_author_s_hashtags_are_withheld(reader: WordReader) -> None:
    read_tags(reader, NOTES)
    assert len(reader.asked) == len(NOTES)
    for prompt, embed_only in reader.asked:
        assert "secret" not in prompt.text
        assert prompt.author_hashtags == []
        assert not embed_only
    # All else is there, and the notes themselves are as they were.
    assert sorted(prompt.text for prompt, _ in reader.asked) == sorted(f"{n.title}\n\n{n.content}" for n in NOTES)
    assert NOTES[3].hashtags == ["secret3"]


def test_for_embeddings_they_are_not(reader: WordReader) -> None:
    read_embeddings(reader, NOTES)
    assert [prompt.author_hashtags for prompt, _ in reader.asked] == [note.hashtags for note in NOTES]
    for note, (prompt, embed_only) in zip(NOTES, reader.asked, strict=True):
        assert note.hashtags[0] in prompt.text
        assert embed_only


def test_progress_counts_each_note_once(reader: WordReader) -> None:
    for read in (read_tags, read_embeddings):
        shares: list[float] = []
        read(reader, NOTES, shares.append)
        assert shares == sorted(set(shares))
        assert shares[-1] == 1.0


def test_of_no_notes_there_is_nothing(reader: WordReader) -> None:
    assert read_tags(reader, []) == []
    assert read_embeddings(reader, []).shape == (0, 0)
    assert reader.asked == []
