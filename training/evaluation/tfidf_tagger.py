"""The tagger to beat: a note gets the hashtags of the most similar note that may be learnt from."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np

from notellm.messages import Note
from training.evaluation.note_text import note_text, tfidf

__all__ = ["TfidfTagger"]


class TfidfTagger:
    """Nearest by the cosine of TF-IDF over title and content. Raises :class:`ValueError` without a tagged note."""

    def __init__(self, known: Sequence[Note]) -> None:
        self._known = [note for note in known if note.hashtags]
        if not self._known:
            raise ValueError("no note to learn from has a hashtag")

    def tag(self, notes: Sequence[Note]) -> list[list[str]]:
        """Of two alike the first; a note that shares no term with any other gets no hashtag."""
        texts = [_without_hashtags(note) for note in (*self._known, *notes)]
        rows = tfidf(texts)
        similar = (rows[len(self._known) :] @ rows[: len(self._known)].T).toarray()
        best = np.argmax(similar, axis=1)
        return [
            list(self._known[place].hashtags) if similar[row, place] > 0 else []
            for row, place in enumerate(best.tolist())
        ]


def _without_hashtags(note: Note) -> str:
    return note_text(msgspec.structs.replace(note, hashtags=[]))
