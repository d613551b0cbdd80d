"""Ends a worker whose clicks wait while nothing moves. Faust can hang without a word: this is a thread of its own."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from threading import Thread
from typing import NamedTuple

from confluent_kafka import Consumer, KafkaException, TopicPartition
from prometheus_client import Gauge

from notellm.settings import Settings
from streams.click_topics import make_client

__all__ = ["Backlog", "StallTimer", "Watchdog"]

log = logging.getLogger(__name__)

WAITING = Gauge("notellm_clicks_waiting", "Records behind the committed offset.", ["partition"])

_ANSWER_SECONDS = 10.0


class Backlog(NamedTuple):
    """Of one partition: what is committed (-1001 where nothing is), and where it ends."""

    committed: int
    start: int
    end: int

    @property
    def waiting(self) -> int:
        return max(self.end - max(self.committed, self.start), 0)


class StallTimer:
    """For how long clicks have waited with nothing moving, on the partition where that is longest."""

    def __init__(self) -> None:
        self._since: dict[int, tuple[float, int]] = {}
        self._activity = -1

    def observe(self, now: float, backlogs: Mapping[int, Backlog], activity: int) -> float:
        """``backlogs`` of the partitions that count; a change of ``activity`` (a recovery that reads) is movement."""
        if activity != self._activity:
            self._since.clear()
            self._activity = activity
        stuck = {}
        for partition, backlog in backlogs.items():
            if backlog.waiting:
                since, committed = self._since.get(partition, (now, backlog.committed))
                stuck[partition] = (since if committed == backlog.committed else now, backlog.committed)
        self._since = stuck
        return max((now - since for since, _ in stuck.values()), default=0.0)


class Watchdog:
    """``owned`` names the partitions that this worker has; where it has none, all count: it may hang while it joins."""

    def __init__(
        self,
        settings: Settings,
        partitions: int,
        owned: Callable[[], set[int]],
        activity: Callable[[], int],
        end: Callable[[str], None],
    ) -> None:
        self._streams = settings.streams
        self._partitions = range(partitions)
        self._owned = owned
        self._activity = activity
        self._end = end
        # Never subscribes, so it is no member of the group.
        own = {"group.id": settings.streams.app_id, "enable.auto.commit": False}
        self._consumer: Consumer = make_client(Consumer, settings.kafka, own)

    def start(self) -> None:
        Thread(target=self._run, name="watchdog", daemon=True).start()

    def _run(self) -> None:
        timer = StallTimer()
        pause = min(self._streams.stall_s / 4, 10.0)
        while True:
            time.sleep(pause)
            try:
                backlogs = self._backlogs()
            except KafkaException as error:
                # What cannot be seen is no stall of ours; the clock starts again.
                log.debug("watchdog: %s", error)
                timer = StallTimer()
                continue
            owned = self._owned()
            for partition, backlog in backlogs.items():
                if partition in owned:
                    WAITING.labels(partition).set(backlog.waiting)
            counted = {partition: backlogs[partition] for partition in (owned or backlogs)}
            stalled = timer.observe(time.monotonic(), counted, self._activity())
            if stalled >= self._streams.stall_s:
                self._end(
                    f"clicks wait and no offset was committed for {stalled:.0f} s (streams.stall_s): this worker hangs"
                )
                return

    def _backlogs(self) -> dict[int, Backlog]:
        places = [TopicPartition(self._streams.clicks_topic, partition) for partition in self._partitions]
        backlogs = {}
        for place in self._consumer.committed(places, timeout=_ANSWER_SECONDS):
            start, end = self._consumer.get_watermark_offsets(place, timeout=_ANSWER_SECONDS)
            backlogs[place.partition] = Backlog(place.offset, start, end)
        return backlogs
