"""A topic as a finite log: from a time, or its beginning, to where it ended when it was asked. No group, no commits."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from types import TracebackType

from confluent_kafka import Consumer, KafkaError, KafkaException, Message, TopicPartition

from notellm.settings import KafkaSettings
from streams.click_topics import make_client
from streams.errors import SourceError
from streams.snapshot import OffsetRange

__all__ = ["TopicLog"]

_BROKER_SECONDS = 10.0
_STALLED_SECONDS = 60.0
_BATCH = 2_000


class TopicLog:
    """Use as a context manager. Raises :class:`SourceError` when the topic cannot be read to its end.

    ``ranges`` is what is read of each partition: up to the high watermark of the moment of entering. With ``since_ms``
    from the first record with that timestamp or a later one: whatever stands before it has an earlier one.
    """

    def __init__(self, settings: KafkaSettings, topic: str, *, since_ms: int | None = None) -> None:
        self.topic = topic
        self.ranges: list[OffsetRange] = []
        self.truncated: list[int] = []
        """Partitions of which Kafka has already deleted the beginning, as far as it may have been asked for."""
        self._settings = settings
        self._since_ms = since_ms

    def __enter__(self) -> TopicLog:
        self._consumer: Consumer = make_client(
            Consumer,
            self._settings,
            {
                "group.id": "notellm-pairs",  # wanted by the client; nothing is ever committed to it
                "enable.auto.commit": False,
                "enable.auto.offset.store": False,
                "enable.partition.eof": True,
                "auto.offset.reset": "error",
            },
        )
        try:
            self.ranges = self._ask()
        except KafkaException as error:
            self._consumer.close()
            raise SourceError(f"topic {self.topic!r}: {error.args[0].str()}") from None
        except BaseException:
            self._consumer.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._consumer.close()

    def batches(self, progress: Callable[[float], None]) -> Iterator[list[Message]]:
        """Every record of the ranges, in order within its partition."""
        left = {each.partition: each.end for each in self.ranges if each.start < each.end}
        places = {each.partition: each.start for each in self.ranges}
        total = sum(each.end - each.start for each in self.ranges)
        self._consumer.assign([TopicPartition(self.topic, partition, places[partition]) for partition in left])
        heard = time.monotonic()
        while left:
            batch = []
            for message in self._consumer.consume(_BATCH, timeout=1.0):
                heard = time.monotonic()
                partition, offset = message.partition(), message.offset()
                error = message.error()
                if error is not None and error.code() != KafkaError._PARTITION_EOF:  # noqa: SLF001 - its public name
                    if error.retriable() or error.code() in (KafkaError._TRANSPORT, KafkaError._ALL_BROKERS_DOWN):  # noqa: SLF001
                        continue
                    raise SourceError(f"topic {self.topic!r}: {error.str()}")
                if partition not in left:
                    continue  # written after we asked
                if error is None and offset < left[partition]:
                    batch.append(message)
                # At the end of a partition the message is an error, and its offset the place after the last record.
                places[partition] = offset if error is not None else offset + 1
                if places[partition] >= left[partition]:
                    del left[partition]
            if batch:
                yield batch
            progress(_share(self.ranges, places, total))
            if time.monotonic() - heard > _STALLED_SECONDS:
                raise SourceError(
                    f"topic {self.topic!r} on {self._settings.bootstrap_servers}: nothing came for "
                    f"{_STALLED_SECONDS:.0f} s, and partitions {sorted(left)} are not read to their end"
                )
        progress(1.0)

    def _ask(self) -> list[OffsetRange]:
        try:
            found = self._consumer.list_topics(self.topic, timeout=_BROKER_SECONDS).topics[self.topic]
        except KafkaException as error:
            raise SourceError(
                f"kafka.bootstrap_servers: {self._settings.bootstrap_servers!r} cannot be reached: "
                f"{error.args[0].str()}"
            ) from None
        if found.error is not None:
            raise SourceError(f"topic {self.topic!r} on {self._settings.bootstrap_servers}: {found.error.str()}")
        ranges = []
        for partition in sorted(found.partitions):
            low, high = self._consumer.get_watermark_offsets(
                TopicPartition(self.topic, partition), timeout=_BROKER_SECONDS
            )
            start = self._start(partition, low, high)
            if low > 0 and start == low:
                self.truncated.append(partition)
            ranges.append(OffsetRange(partition, start, high))
        return ranges

    def _start(self, partition: int, low: int, high: int) -> int:
        if self._since_ms is None or self._since_ms <= 0 or low >= high:
            return low
        [place] = self._consumer.offsets_for_times(
            [TopicPartition(self.topic, partition, self._since_ms)], timeout=_BROKER_SECONDS
        )
        if place.error is not None:
            raise KafkaException(place.error)
        # Below 0: no record is that young.
        return high if place.offset < 0 else min(max(place.offset, low), high)


def _share(ranges: list[OffsetRange], places: dict[int, int], total: int) -> float:
    if total == 0:
        return 1.0
    return min(sum(places[each.partition] - each.start for each in ranges) / total, 1.0)
