"""One spelling per hashtag: what authors write and what the model writes pass through here."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable

__all__ = ["clean_hashtag", "clean_hashtags"]

# The full-width number sign becomes '#' by NFKC.
_LEADING = "#"


def clean_hashtag(text: str) -> str:
    """``" ＃Kyoto "`` -> ``"Kyoto"``: NFKC, outer blanks and leading number signs off. May be empty."""
    cleaned = unicodedata.normalize("NFKC", text).strip()
    while cleaned.startswith(_LEADING):
        cleaned = cleaned.lstrip(_LEADING).strip()
    return cleaned


def clean_hashtags(texts: Iterable[str], *, without: Iterable[str] = ()) -> list[str]:
    """Clean each, drop the empty ones and those equal by casefold to an earlier one or to one of ``without``."""
    seen = {clean_hashtag(text).casefold() for text in without}
    kept: list[str] = []
    for text in texts:
        tag = clean_hashtag(text)
        folded = tag.casefold()
        if tag and folded not in seen:
            seen.add(folded)
            kept.append(tag)
    return kept
