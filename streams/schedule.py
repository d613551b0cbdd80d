"""Again and again, at times that do not drift: however long a run takes, the next one begins on the same grid."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator
from typing import Final

from notellm.errors import SettingsError

__all__ = ["beats", "parse_every"]

_UNITS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86_400}


def parse_every(text: str, option: str = "--every") -> float:
    """Seconds. Raises :class:`SettingsError` that names the option."""
    found = re.fullmatch(r"([1-9]\d{0,5})([smhd])", text, re.ASCII)
    if found is None:
        raise SettingsError(f"{option}: {text!r} is not allowed: a time is, such as 30s, 15m, 1h or 1d")
    return int(found[1]) * _UNITS[found[2]]


def beats(every_s: float, stop: threading.Event, clock: Callable[[], float] = time.monotonic) -> Iterator[int]:
    """0 at once, then a number every ``every_s``, until ``stop`` is set.

    A beat that passed while its predecessor was being served is left out: two runs never follow at once to catch up.
    """
    began, beat = clock(), 0
    while not stop.is_set():
        yield beat
        beat = max(beat, int((clock() - began) // every_s)) + 1
        stop.wait(max(began + beat * every_s - clock(), 0.0))
