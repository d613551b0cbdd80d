"""A note's terms by its script, and TF-IDF over them, against scikit-learn's own and a plain reading of the formula."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.feature_extraction.text import TfidfVectorizer

from notellm.messages import Note
from training.evaluation.note_text import note_terms, note_text, tfidf

quickly = settings(max_examples=40, deadline=None, derandomize=True)
WORDS = ["Kyoto", "maple", "the", "and", "x", "don't", "2nd", "MAPLE", "naïve", "Привет", "한국어", "snake_case"]
terms = st.sampled_from(["kyoto", "maple", "2nd", "书", "旅行"])


def test_text_is_a_line_each_of_what_the_note_has() -> None:
    assert note_text(Note(note_id="n", title="T", content="C c", hashtags=["a", "b c"])) == "T\nC c\na b c"
    assert note_text(Note(note_id="n", title=" ", hashtags=["a"])) == "a"
    assert note_text(Note(note_id="n", category="travel", attributes={"a": "b"})) == ""


@pytest.mark.parametrize(
    ("text", "terms"),
    [
        ("京都旅行", ["京都", "都旅", "旅行"]),
        ("书", ["书"]),
        ("京都，旅行。", ["京都", "旅行"]),
        ("Kyoto京都 trips to the X, 书!", ["kyoto", "京都", "trips", "书"]),
        ("3日間 10日", ["日間", "10", "日"]),
        ("人々 カメラ", ["人々", "カメ", "メラ"]),
        ("𠮷野家", ["𠮷野", "野家"]),
        ("maple Maple", ["maple", "maple"]),
        ("of the a ... !", []),
        ("", []),
    ],
)
def test_terms_by_script(text: str, terms: list[str]) -> None:
    assert note_terms(text) == terms


@quickly
@given(text=st.one_of(st.lists(st.sampled_from(WORDS)).map(" ".join), st.text(st.characters(max_codepoint=0x2FFF))))
def test_without_chinese_they_are_scikit_learn_s(text: str) -> None:
    assert note_terms(text) == TfidfVectorizer(stop_words="english").build_analyzer()(text)


def slow_cosines(documents: list[list[str]]) -> list[list[float]]:
    """(1 + ln tf) (ln((1 + N) / (1 + df)) + 1), of length 1."""
    found: list[dict[str, float]] = []
    seen_in = Counter(term for document in documents for term in set(document))
    for document in documents:
        weights = {
            term: (1 + math.log(times)) * (math.log((1 + len(documents)) / (1 + seen_in[term])) + 1)
            for term, times in Counter(document).items()
        }
        length = math.hypot(*weights.values())
        found.append({term: weight / length for term, weight in weights.items()})
    return [[sum(weight * b.get(term, 0.0) for term, weight in a.items()) for b in found] for a in found]


@quickly
@given(documents=st.lists(st.lists(terms, max_size=9), min_size=1, max_size=6))
def test_tfidf_is_the_formula(documents: list[list[str]]) -> None:
    rows = tfidf([" ".join(document) for document in documents])
    assert rows.dtype == np.float32
    np.testing.assert_allclose((rows @ rows.T).toarray(), slow_cosines(documents), atol=1e-5)


def test_texts_without_a_term_are_zeros() -> None:
    assert tfidf(["the", "", "x"]).toarray().tolist() == [[0], [0], [0]]
    assert tfidf(["the", "kyoto"]).toarray().tolist() == [[0], [1]]


def test_a_pair_of_characters_is_found_within_another_run() -> None:
    rows = tfidf(["去京都旅行", "旅行", "京城"])
    near = (rows @ rows.T).toarray()[0]
    assert near[1] > 0 == near[2]
