"""What a snapshot of the demo's clicks must hold, from what was published: the rules and the formula, read plainly.

Nothing of streams/ is used, so that a fault there cannot be on both sides.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import NamedTuple

from commands.simulate import Truth
from notellm.clicks import Click, parse_click

__all__ = ["Expected", "expect"]

_DAY_MS = 86_400_000
_UNIT = 10**12
_LEAST, _MOST = _UNIT // 100, 30 * _UNIT
_TOP = 10

Pairs = dict[tuple[str, str], tuple[int, int, int]]


class Expected(NamedTuple):
    """``pairs``: (source, target) -> (score in units of 1e-12, users, rank)."""

    clicks: int
    users: int
    pairs: Pairs


def expect(truth: Iterable[Truth], start_ms: int, end_ms: int, clicks_per_day: int) -> Expected:
    """``truth`` must have the records of each user in their order."""
    of_user: dict[str, set[tuple[int, str]]] = defaultdict(set)
    for line in truth:
        if line.kind == "forget" and line.key is not None:
            of_user.pop(line.key.decode(), None)
        elif line.kind in ("click", "bot", "doubled"):
            click = parse_click(line.key, line.value)
            assert isinstance(click, Click)
            of_user[click.user_id].add((click.clicked_at, click.note_id))
    kept = {user: _kept(clicks, start_ms, end_ms, clicks_per_day) for user, clicks in of_user.items()}
    kept = {user: clicks for user, clicks in kept.items() if clicks}
    return Expected(sum(map(len, kept.values())), len(kept), _pairs(kept.values()))


def _kept(clicks: set[tuple[int, str]], start_ms: int, end_ms: int, clicks_per_day: int) -> list[tuple[int, str]]:
    days: dict[int, list[tuple[int, str]]] = defaultdict(list)
    for clicked_at, note_id in sorted(clicks):
        days[clicked_at // _DAY_MS].append((clicked_at, note_id))
    newest = [click for day in days.values() for click in day[-clicks_per_day:]]
    return [click for click in newest if start_ms <= click[0] < end_ms]


def _pairs(users: Iterable[list[tuple[int, str]]]) -> Pairs:
    units: Counter[tuple[str, str]] = Counter()
    behind: Counter[tuple[str, str]] = Counter()
    for clicks in users:
        first: dict[str, int] = {}
        last: dict[str, int] = {}
        for clicked_at, note_id in sorted(clicks):
            first.setdefault(note_id, clicked_at)
            last[note_id] = clicked_at
        for source, begun in first.items():
            for target, ended in last.items():
                if source != target and begun < ended:
                    units[source, target] += _UNIT // len(first)
                    behind[source, target] += 1
    by_source: dict[str, list[tuple[int, str]]] = defaultdict(list)
    for (source, target), score in units.items():
        if _LEAST <= score <= _MOST:
            by_source[source].append((-score, target))
    return {
        (source, target): (-score, behind[source, target], rank)
        for source, targets in by_source.items()
        for rank, (score, target) in enumerate(sorted(targets)[:_TOP], 1)
    }
