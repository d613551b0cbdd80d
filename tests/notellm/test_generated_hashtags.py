"""What the model wrote after ``The hashtags are:``."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from notellm.generated_hashtags import answer_is_complete, read_hashtags
from notellm.hashtags import clean_hashtag

_answers = st.text(st.sampled_from('ab ,#\n".。，\ufffd') | st.characters(), max_size=60)


@pytest.mark.parametrize(
    ("answer", "tags"),
    [
        (" kyoto, tea", ["kyoto", "tea"]),
        (" #kyoto #tea", ["kyoto", "tea"]),
        ("京都，抹茶、禅", ["京都", "抹茶", "禅"]),
        (' "kyoto", "slow travel".', ["kyoto", "slow travel"]),
        ("\n\n kyoto\nThe category is: travel", ["kyoto"]),
        ('kyoto". The category is: travel', ["kyoto"]),
        ('京都”，“抹茶"。类别是', ["京都", "抹茶"]),
        ("Kyoto, tea, KYOTO", ["Kyoto", "tea"]),
        ("kyoto, caf\ufffd", ["kyoto"]),
        ("kyoto, " + "x" * 65, ["kyoto"]),
        ("", []),
        (" ,,#; ", []),
    ],
)
def test_answer_is_read_as_hashtags(answer: str, tags: list[str]) -> None:
    assert read_hashtags(answer, [], 5) == tags


def test_authors_own_hashtags_are_not_echoed() -> None:
    assert read_hashtags("kyoto, ＴＥＡ, zen", ["#Kyoto", "tea"], 5) == ["zen"]


def test_no_more_than_asked_for() -> None:
    assert read_hashtags("a, b, c", [], 2) == ["a", "b"]


@given(_answers, st.lists(st.text(max_size=5), max_size=5), st.integers(0, 8))
def test_whatever_the_answer_the_hashtags_are_clean(answer: str, author: list[str], most: int) -> None:
    tags = read_hashtags(answer, author, most)
    folded = [tag.casefold() for tag in tags]
    assert len(tags) <= most
    assert len(set(folded)) == len(folded)
    assert not set(folded) & {clean_hashtag(tag).casefold() for tag in author}
    assert all(0 < len(tag) <= 64 and "\n" not in tag for tag in tags)


@pytest.mark.parametrize(
    ("answer", "complete"),
    [
        ("", False),
        ("\n", False),
        (" kyoto", False),
        (" kyoto, tea", False),
        (" kyoto\n", True),
        (' kyoto".', True),
        ('京都"。', True),
        ("a, b, c", False),  # The third may still be growing.
        ("a, b, c,", True),
        ("a, a", False),
        ("a, A, ", True),
        ("#a #b #c #", True),
    ],
)
def test_answer_is_complete_when_more_can_add_nothing(answer: str, complete: bool) -> None:
    assert answer_is_complete(answer, [], 3) is complete


def test_authors_hashtags_do_not_complete_an_answer() -> None:
    assert not answer_is_complete("a, b, c, ", ["c"], 3)
    assert answer_is_complete("a, b, c, d,", ["c"], 3)


@given(_answers, _answers, st.lists(st.sampled_from("ab"), max_size=2), st.integers(1, 4))
def test_complete_answer_stays_complete(answer: str, more: str, author: list[str], most: int) -> None:
    if answer_is_complete(answer, author, most):
        assert answer_is_complete(answer + more, author, most)
