"""Moments as people type them: ``now``, milliseconds, or a date."""

from __future__ import annotations

import time
from datetime import UTC, datetime

from notellm.errors import NoteLLMError

__all__ = ["parse_moment", "say_moment"]

_LATEST = 2**53


def parse_moment(text: str, option: str) -> int:
    """Milliseconds UTC. Raises :class:`NoteLLMError` that names ``option`` and what is allowed."""
    word = text.strip()
    if word == "now":
        return time.time_ns() // 1_000_000
    try:
        moment = int(word) if word.isascii() and word.isdigit() else _from_date(word)
    except (ValueError, OverflowError):
        moment = -1
    if not 0 <= moment <= _LATEST:
        raise NoteLLMError(
            f"{option}: {text!r} is not allowed; give now, milliseconds UTC such as 1700000000000, or a date such as "
            "2026-11-24 or 2026-11-24T06:30+01:00 (UTC where it names no zone)"
        )
    return moment


def say_moment(moment_ms: int) -> str:
    """``2026-11-24 06:30:00 UTC``."""
    return f"{datetime.fromtimestamp(moment_ms / 1000, UTC):%Y-%m-%d %H:%M:%S} UTC"


def _from_date(text: str) -> int:
    moment = datetime.fromisoformat(text)
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return round(moment.timestamp() * 1000)
