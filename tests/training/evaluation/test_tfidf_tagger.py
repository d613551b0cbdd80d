"""The tagger that copies the hashtags of the most similar note."""

from __future__ import annotations

import pytest

from notellm.messages import Note
from training.evaluation.tfidf_tagger import TfidfTagger


def note(title: str, *hashtags: str, content: str = "") -> Note:
    return Note(note_id=title or "n", title=title, content=content, hashtags=list(hashtags))


KNOWN = [
    note("maple leaves kyoto", "autumn", "Kyoto"),
    note("ramen noodles", "food"),
    note("ramen noodles broth"),
    note("旧书店", "书店"),
]


def test_a_note_gets_the_hashtags_of_the_most_similar() -> None:
    asked = [note("noodles"), note("leaves", content="in Kyoto"), note("一家书店")]
    assert TfidfTagger(KNOWN).tag(asked) == [["food"], ["autumn", "Kyoto"], ["书店"]]


def test_nothing_is_learnt_from_a_note_without_hashtags() -> None:
    assert TfidfTagger(KNOWN).tag([note("ramen noodles broth")]) == [["food"]]


def test_hashtags_are_no_text_on_either_side() -> None:
    # By its own hashtag it would be ramen, and "food" would be found by name.
    asked = [note("kyoto", "ramen"), note("food"), note("", "ramen")]
    assert TfidfTagger(KNOWN).tag(asked) == [["autumn", "Kyoto"], [], []]


def test_a_note_that_shares_no_term_gets_none() -> None:
    assert TfidfTagger(KNOWN).tag([note("bicycles"), note("the"), note("")]) == [[], [], []]


def test_of_two_alike_the_first_counts() -> None:
    known = [note("bread", "first"), note("bread", "second")]
    assert TfidfTagger(known).tag([note("bread"), note("bread butter")]) == [["first"], ["first"]]


def test_what_is_given_is_a_copy() -> None:
    found = TfidfTagger(KNOWN).tag([note("noodles")])
    found[0].append("more")
    assert KNOWN[1].hashtags == ["food"]


def test_of_no_notes_there_is_nothing() -> None:
    assert TfidfTagger(KNOWN).tag([]) == []


@pytest.mark.parametrize("known", [[], [note("ramen")]])
def test_no_tagged_note_is_refused(known: list[Note]) -> None:
    with pytest.raises(ValueError, match="no note to learn from has a hashtag"):
        TfidfTagger(known)
