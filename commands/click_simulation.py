"""People, and a few machines, who click on notes: made up, in the order in which their records arrive.

Pure and seeded: the same notes and the same plan give the same records, byte for byte.
"""

from __future__ import annotations

import heapq
import random
from bisect import bisect
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Literal, NamedTuple, TypeAlias

import msgspec

from notellm.clicks import Click, encode_click
from notellm.errors import NoteLLMError
from notellm.messages import Note

__all__ = ["KINDS", "Kind", "Plan", "SimulatedRecord", "simulate_clicks"]

Kind: TypeAlias = Literal["click", "bot", "doubled", "late", "future", "broken", "forget"]
KINDS: dict[Kind, str] = {
    "click": "a person's",
    "bot": "a machine's, hundreds a day",
    "doubled": "a record that was sent again",
    "late": "further behind its record than is allowed",
    "future": "further ahead of its record than is allowed",
    "broken": "no click at all",
    "forget": "a null value: forget this user",
}

_SECOND, _MINUTE, _HOUR, _DAY = 1_000, 60_000, 3_600_000, 86_400_000
_LONGEST_SESSION = 30
_LONGEST_PAUSE = 4 * _MINUTE
_SESSION_CLICKS = 6.0  # on average
_INTERESTS = 3
_DRIFT = 0.15  # of one interest, per day
_REDRAWS = 20


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What to simulate. ``late``, ``future``, ``doubled`` and ``broken`` are shares: so many more for each click.

    The records' timestamps, and the clicks of people and bots, are in [start_ms, end_ms).
    """

    users: int
    clicks: int
    start_ms: int
    end_ms: int
    seed: int = 0
    bots: int = 1
    forgets: int = 0
    late: float = 0.01
    future: float = 0.002
    doubled: float = 0.02
    broken: float = 0.002
    allowed_lateness_ms: int = _DAY
    future_tolerance_ms: int = 300 * _SECOND


class SimulatedRecord(NamedTuple):
    """``click`` is what the value says, None of a broken one and of a forget."""

    kind: Kind
    timestamp_ms: int
    key: bytes | None
    value: bytes | None
    click: Click | None


class _Session(NamedTuple):
    """Sorted by time; ``clicks`` is 0 for a forget. Bots come after the people, by number."""

    start_ms: int
    user: int
    clicks: int


def simulate_clicks(notes: Sequence[Note], plan: Plan) -> Iterator[SimulatedRecord]:
    """By timestamp. What is in memory is a plan of the sessions and what is going on at one moment.

    A user's activity is long-tailed. Users come back in sessions of some clicks, in the evening rather than at noon,
    each about one of their interests: a category, in which a note that shares a hashtag with the last one, or a popular
    one, is next. Interests drift from day to day. Nobody clicks a note before its published_at. Some phones were
    offline, so their records come hours later. Raises :class:`NoteLLMError` for notes that cannot be clicked.
    """
    draw = random.Random(plan.seed)
    world = _World(notes, plan, draw)
    sessions = _sessions(plan, draw)
    return _in_order(sessions, world, plan, draw)


def _sessions(plan: Plan, draw: random.Random) -> list[_Session]:
    activity = list(accumulate(draw.lognormvariate(0.0, 1.1) for _ in range(plan.users)))
    found: list[_Session] = []
    left = plan.clicks
    while left:
        user = bisect(activity, draw.random() * activity[-1])
        clicks = min(1 + int(draw.expovariate(1 / (_SESSION_CLICKS - 0.5))), _LONGEST_SESSION, left)
        left -= clicks
        found.append(_Session(_moment(plan, draw), user, clicks))
    for bot in range(plan.bots):
        days = range(plan.start_ms, plan.end_ms - _DAY + 1, _DAY)
        found += [_Session(day, plan.users + bot, draw.randint(300, 900)) for day in days]
    # Who is to be forgotten has clicked before, and may click again.
    people = [session for session in found if session.user < plan.users]
    forgotten: dict[int, _Session] = {}
    for session in draw.sample(people, len(people)) if plan.forgets else ():
        if len(forgotten) == plan.forgets:
            break
        later = min(session.start_ms + draw.randrange(_HOUR, _DAY), plan.end_ms - 1)
        forgotten.setdefault(session.user, _Session(later, session.user, 0))
    found += forgotten.values()
    return sorted(found)


def _moment(plan: Plan, draw: random.Random) -> int:
    """When a session begins: so that it ends in time."""
    latest = max(plan.end_ms - _LONGEST_SESSION * _LONGEST_PAUSE, plan.start_ms + 1)
    for _ in range(_REDRAWS):
        day = draw.randrange(plan.start_ms, latest) // _DAY
        hour = draw.gauss(20.5, 2.5) if draw.random() < 0.6 else draw.uniform(0, 24)
        moment = day * _DAY + int(hour * _HOUR) % _DAY
        if plan.start_ms <= moment < latest:
            return moment
    return draw.randrange(plan.start_ms, latest)


def _in_order(sessions: list[_Session], world: _World, plan: Plan, draw: random.Random) -> Iterator[SimulatedRecord]:
    """Records come later than their sessions begin: those that wait for their turn stand in a heap."""
    waiting: list[tuple[int, int, SimulatedRecord]] = []
    number = 0
    for session in sessions:
        while waiting and waiting[0][0] < session.start_ms:
            yield heapq.heappop(waiting)[2]
        for record in _records(session, world, plan, draw):
            number += 1
            heapq.heappush(waiting, (record.timestamp_ms, number, record))
    while waiting:
        yield heapq.heappop(waiting)[2]


def _records(session: _Session, world: _World, plan: Plan, draw: random.Random) -> Iterator[SimulatedRecord]:
    is_bot = session.user >= plan.users
    user_id = f"bot-{session.user - plan.users}" if is_bot else f"user-{session.user}"
    key = user_id.encode()
    if not session.clicks:
        yield SimulatedRecord("forget", session.start_ms, key, None, None)
        return
    clicks = world.bot_clicks(session) if is_bot else world.clicks(session)
    for clicked_at, note_id in clicks:
        click = Click(user_id=user_id, note_id=note_id, clicked_at=clicked_at)
        timestamp = _arrival(clicked_at, plan, draw)
        value = encode_click(click)
        yield SimulatedRecord("bot" if is_bot else "click", timestamp, key, value, click)
        yield from _disturbances(click, timestamp, key, value, plan, draw)


def _arrival(clicked_at: int, plan: Plan, draw: random.Random) -> int:
    """Seconds later as a rule, minutes now and then, hours once in a hundred clicks; never so late that it is late."""
    luck = draw.random()
    longest = 2 * _SECOND if luck < 0.95 else 10 * _MINUTE if luck < 0.99 else 12 * _HOUR
    delay = min(draw.randrange(20, longest), plan.allowed_lateness_ms)
    return min(clicked_at + delay, plan.end_ms - 1)


def _disturbances(
    click: Click, timestamp: int, key: bytes, value: bytes, plan: Plan, draw: random.Random
) -> Iterator[SimulatedRecord]:
    if draw.random() < plan.doubled:
        latest = min(click.clicked_at + plan.allowed_lateness_ms, plan.end_ms - 1)
        again = max(min(timestamp + draw.randrange(_SECOND, 10 * _MINUTE), latest), timestamp)
        yield SimulatedRecord("doubled", again, key, value, click)
    if draw.random() < plan.late:
        behind = plan.allowed_lateness_ms + draw.randrange(_SECOND, 3 * _DAY)
        late = msgspec.structs.replace(click, clicked_at=max(timestamp - behind, 0))
        yield SimulatedRecord("late", timestamp, key, encode_click(late), late)
    if draw.random() < plan.future:
        ahead = plan.future_tolerance_ms + draw.randrange(_SECOND, _DAY)
        future = msgspec.structs.replace(click, clicked_at=timestamp + ahead)
        yield SimulatedRecord("future", timestamp, key, encode_click(future), future)
    if draw.random() < plan.broken:
        broken_key, broken_value = draw.choice(_broken(click, key, value))
        yield SimulatedRecord("broken", timestamp, broken_key, broken_value, None)


def _broken(click: Click, key: bytes, value: bytes) -> list[tuple[bytes | None, bytes]]:
    """One of each kind."""
    fields = msgspec.to_builtins(click)
    return [
        (key, value[:-7]),
        (key, b""),
        (key, b"null"),
        (None, value),
        (b"somebody-else", value),
        (key, msgspec.json.encode({**fields, "clicked_at": "yesterday"})),
        (key, msgspec.json.encode({**fields, "note_id": ""})),
        (key, msgspec.json.encode({"user_id": click.user_id, "clicked_at": click.clicked_at})),
        (b"\xff" + key, value),
    ]


class _World:
    """The notes by what they are about, and what each user likes at the moment."""

    def __init__(self, notes: Sequence[Note], plan: Plan, draw: random.Random) -> None:
        self._draw = draw
        self._notes = draw.sample(list(notes), len(notes))  # the first are the popular ones
        # published_at is below 0 where the notes' file has none.
        self._old = [place for place, note in enumerate(self._notes) if note.published_at < plan.start_ms]
        if len(self._old) < 2:
            raise NoteLLMError(
                f"--notes: {len(self._old)} of {len(notes)} notes are published before the first click, at "
                f"{plan.start_ms} ms; two or more are needed: choose a later --as-of, or leave published_at out"
            )
        categories: dict[str, list[int]] = {}
        self._tags: dict[str, list[int]] = {}
        for place, note in enumerate(self._notes):
            topic = note.category or (note.hashtags[0].casefold() if note.hashtags else "")
            categories.setdefault(topic, []).append(place)
            for tag in note.hashtags:
                self._tags.setdefault(tag.casefold(), []).append(place)
        self._topics = [_Topic(places) for places in categories.values()]
        self._popular = list(accumulate(len(places) ** 0.5 for places in categories.values()))
        self._interests: dict[int, tuple[int, list[int]]] = {}

    def clicks(self, session: _Session) -> Iterator[tuple[int, str]]:
        """(clicked_at, note_id), about one interest."""
        draw = self._draw
        topic = self._topics[draw.choice(self._likes(session.user, session.start_ms // _DAY))]
        clicked_at, place = session.start_ms, -1
        for number in range(session.clicks):
            if number:
                clicked_at += min(max(int(draw.lognormvariate(10.0, 1.0)), _SECOND), _LONGEST_PAUSE)  # 22 s
            place = self._next(topic, place, clicked_at)
            yield clicked_at, self._notes[place].note_id

    def bot_clicks(self, session: _Session) -> Iterator[tuple[int, str]]:
        """At an even pace, on anything."""
        pace = 23 * _HOUR / session.clicks
        for number in range(session.clicks):
            place = self._old[self._draw.randrange(len(self._old))]
            yield session.start_ms + int((number + self._draw.random()) * pace), self._notes[place].note_id

    def _likes(self, user: int, day: int) -> list[int]:
        """A few topics; the same one twice when it is loved."""
        since, likes = self._interests.get(user, (day, []))
        while len(likes) < _INTERESTS:
            likes.append(self._any_topic())
        for _ in range(since, day):
            if self._draw.random() < _DRIFT * _INTERESTS:
                likes[self._draw.randrange(_INTERESTS)] = self._any_topic()
        self._interests[user] = day, likes
        return likes

    def _any_topic(self) -> int:
        return bisect(self._popular, self._draw.random() * self._popular[-1])

    def _next(self, topic: _Topic, last: int, now: int) -> int:
        for _ in range(_REDRAWS):
            place = self._similar(last) if last >= 0 and self._draw.random() < 0.5 else topic.any(self._draw)
            if place != last and self._notes[place].published_at <= now:
                return place
        return self._old[self._old[0] == last]

    def _similar(self, place: int) -> int:
        """A note with one of its hashtags, itself perhaps."""
        tags = self._notes[place].hashtags
        if not tags:
            return place
        return self._draw.choice(self._tags[self._draw.choice(tags).casefold()])


class _Topic:
    """Notes about one thing; their popularity falls as Zipf says."""

    def __init__(self, places: list[int]) -> None:
        self._places = places
        self._popularity = list(accumulate(1 / (rank + 3) ** 0.8 for rank in range(len(places))))

    def any(self, draw: random.Random) -> int:
        return self._places[bisect(self._popularity, draw.random() * self._popularity[-1])]
