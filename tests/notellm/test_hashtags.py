"""One spelling per hashtag."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from notellm.hashtags import clean_hashtag, clean_hashtags


@pytest.mark.parametrize(
    ("written", "cleaned"),
    [
        ("kyoto", "kyoto"),
        ("  #kyoto\n", "kyoto"),
        ("＃kyoto", "kyoto"),
        ("## # kyoto", "kyoto"),
        ("ｋｙｏｔｏ", "kyoto"),
        ("cafe\u0301", "café"),
        ("c#", "c#"),
        ("slow travel", "slow travel"),
        ("#", ""),
        ("\u3000", ""),
    ],
)
def test_hashtag_loses_its_sign_and_blanks_and_is_nfkc(written: str, cleaned: str) -> None:
    assert clean_hashtag(written) == cleaned


def test_first_spelling_stays_and_so_does_the_order() -> None:
    assert clean_hashtags(["Tea", "#kyoto", "TEA", "＃ｔｅａ", "", "Straße", "STRASSE"]) == ["Tea", "kyoto", "Straße"]


def test_hashtags_of_someone_else_are_left_out() -> None:
    assert clean_hashtags(["tea", "Kyoto", "zen"], without=["＃KYOTO"]) == ["tea", "zen"]


@given(st.lists(st.text(max_size=10) | st.sampled_from(["#a", "＃A", " a", "#＃a"])))
def test_clean_hashtags_are_clean(texts: list[str]) -> None:
    cleaned = clean_hashtags(texts)
    assert clean_hashtags(cleaned) == cleaned
    assert {tag.casefold() for tag in cleaned} == {clean_hashtag(text).casefold() for text in texts} - {""}
