"""The categories that the model chooses among: one per line of a file."""

from __future__ import annotations

import unicodedata
from importlib import resources
from pathlib import Path

from notellm.errors import NoteLLMError

__all__ = ["default_categories", "read_categories"]


def default_categories() -> list[str]:
    """Those that ship: general ones of a community where people write about their lives."""
    return (resources.files("notellm") / "templates" / "categories.txt").read_text("utf-8").split()


def read_categories(file: Path) -> list[str]:
    """One category per line; blank lines are skipped. Raises :class:`NoteLLMError`.

    Two that differ only in case or Unicode form are refused: a tokenizer may make the same ids of both.
    """
    try:
        lines = [line.strip() for line in file.read_text("utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise NoteLLMError(f"--categories {file}: cannot be read as UTF-8 text: {error}") from None
    found = [line for line in lines if line]
    folded = [unicodedata.normalize("NFKC", line).casefold() for line in found]
    twice = [line for line, key in zip(found, folded, strict=True) if folded.count(key) > 1]
    if not found or twice or max(map(len, found)) > 128:
        wrong = f"{twice[0]!r} stands there twice" if twice else "no line, or one of more than 128 characters"
        raise NoteLLMError(f"--categories {file}: {wrong}; allowed are distinct lines of 1 to 128 characters")
    return found
