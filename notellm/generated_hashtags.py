"""What the model wrote after ``The hashtags are:``, read while it is being written."""

from __future__ import annotations

import re
import unicodedata

from notellm.hashtags import clean_hashtags
from notellm.messages import LIMITS

__all__ = ["answer_is_complete", "read_hashtags"]

# A new line ends the answer, and so does the quote-and-stop with which the prompt's own sentences end.
_END = re.compile(r'\n|"\s*[.。]')
_SEPARATORS = re.compile(r"[,，、;；|#＃]+")
_QUOTES_AND_STOPS = " \t\"'“”‘’«».。!！…:：-–*[](){}"


def read_hashtags(answer: str, author: list[str], most: int) -> list[str]:
    """At most ``most`` hashtags: none of the author's own, none twice, none longer than a note's hashtag may be."""
    tags = clean_hashtags(_split(answer), without=author)
    return [tag for tag in tags if len(tag) <= LIMITS.hashtag and not _has_rubbish(tag)][:most]


def answer_is_complete(answer: str, author: list[str], most: int) -> bool:
    """True once more tokens can add nothing: a new line, enough hashtags, or a model that repeats itself."""
    if _END.search(answer.lstrip()):
        return True
    finished = _split(answer)[:-1]
    distinct = clean_hashtags(finished)
    return len(distinct) < len(finished) or len(read_hashtags(",".join(finished), author, most)) == most


def _has_rubbish(tag: str) -> bool:
    """Control characters, or U+FFFD where the answer was cut inside a character."""
    return "\ufffd" in tag or any(unicodedata.category(character) == "Cc" for character in tag)


def _split(answer: str) -> list[str]:
    line = _END.split(answer.lstrip(), maxsplit=1)[0]
    parts = [part.strip(_QUOTES_AND_STOPS) for part in _SEPARATORS.split(line)]
    # A leading "#" makes an empty first part; an empty last part says that the one before it is finished.
    return [part for part in parts[:-1] if part] + parts[-1:]
