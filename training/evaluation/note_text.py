"""A note as plain words, for systems that know no language: its text, its terms, and TF-IDF over them.

The terms of a stretch of text are chosen by its script. Chinese characters and Japanese kana stand without blanks, so
that a run of them gives its pairs of neighbours (京都旅行: 京都, 都旅, 旅行; a single one gives itself). Every other
run of letters, digits and underscores of two characters or more is a word, in lower case, English stop words left out:
on a text without such characters just what scikit-learn does with ``stop_words="english"``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from scipy.sparse import csr_array
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS, TfidfVectorizer

from notellm.messages import Note

__all__ = ["note_terms", "note_text", "tfidf"]

# Kana and the iteration mark, Han of the basic plane (with extension A and compatibility), Han of the planes above.
_UNSPACED: Final = "\u3005\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_RUN: Final = re.compile(rf"(?P<unspaced>[{_UNSPACED}]+)|[^\W{_UNSPACED}]{{2,}}")


def note_text(note: Note) -> str:
    """Title, content and hashtags, a line each; of them those that the note has."""
    return "\n".join(part for part in (note.title, note.content, " ".join(note.hashtags)) if part.strip())


def note_terms(text: str) -> list[str]:
    """In the order of the text, as often as they come."""
    terms: list[str] = []
    for run in _RUN.finditer(text.lower()):
        found = run[0]
        if run["unspaced"] is None:
            if found not in ENGLISH_STOP_WORDS:
                terms.append(found)
        elif len(found) == 1:
            terms.append(found)
        else:
            terms += [found[place : place + 2] for place in range(len(found) - 1)]
    return terms


def tfidf(texts: Sequence[str]) -> Any:
    """A ``csr_array [N, terms]`` of float32, each row of length 1 (or 0, without a term): sublinear, smoothed idf."""
    terms = [note_terms(text) for text in texts]
    if not any(terms):
        return csr_array((len(texts), 1), dtype=np.float32)
    # The analyzer is given what it would make: tokenised once, also where there is nothing to be learnt.
    vectorizer = TfidfVectorizer(analyzer=list, sublinear_tf=True, dtype=np.float32)
    return csr_array(vectorizer.fit_transform(terms))
