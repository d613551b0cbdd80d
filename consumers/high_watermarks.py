"""The ends of partitions, asked for without waiting: for a consumer that is paused, and is told nothing by fetches."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from concurrent.futures import Future
from typing import Any

from confluent_kafka import KafkaException, TopicPartition
from confluent_kafka.admin import AdminClient, OffsetSpec

from consumers.kafka_client import client_properties, make_client
from notellm.settings import KafkaSettings

__all__ = ["AskedHighWatermarks"]

_EVERY_SECONDS = 2.0
_ANSWER_SECONDS = 5.0


class AskedHighWatermarks:
    """One question at a time is under way; the answer is taken at a later call. Not thread-safe."""

    def __init__(self, settings: KafkaSettings, topic: str) -> None:
        self._settings = settings
        self._topic = topic
        self._admin: AdminClient | None = None  # a connection of its own, which most updaters never need
        self._asked: dict[int, Future[Any]] = {}
        self._known: dict[int, int] = {}
        self._ask_at = 0.0

    def latest(self, partitions: Iterable[int]) -> Mapping[int, int]:
        """What is known by now; asks again when that is some seconds old."""
        wanted = list(partitions)
        self._take()
        if wanted and not self._asked and time.monotonic() >= self._ask_at:
            self._ask(wanted)
        return {partition: self._known[partition] for partition in wanted if partition in self._known}

    def forget(self) -> None:
        """Fetches know better from now on."""
        self._asked, self._known = {}, {}

    def _ask(self, partitions: list[int]) -> None:
        if self._admin is None:
            self._admin = make_client(AdminClient, client_properties(self._settings))
        places = {TopicPartition(self._topic, partition): OffsetSpec.latest() for partition in partitions}
        asked = self._admin.list_offsets(places, request_timeout=_ANSWER_SECONDS)
        self._asked = {place.partition: answer for place, answer in asked.items()}
        self._ask_at = time.monotonic() + _EVERY_SECONDS

    def _take(self) -> None:
        for partition, answer in list(self._asked.items()):
            if not answer.done():
                continue
            del self._asked[partition]
            try:
                self._known[partition] = int(answer.result().offset)
            except KafkaException:
                continue  # asked again soon
