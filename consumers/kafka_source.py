"""Notes from Kafka: a consumer group member that decides for itself where each partition begins."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping, Sequence

import msgspec
from confluent_kafka import (
    OFFSET_BEGINNING,
    OFFSET_INVALID,
    Consumer,
    KafkaError,
    KafkaException,
    Message,
    TopicPartition,
)

from consumers.errors import OffsetOutOfRange, UpdaterError
from consumers.high_watermarks import AskedHighWatermarks
from consumers.kafka_client import client_properties, make_client
from consumers.missed_tombstones import Start, TombstoneWatch, read_start, write_start
from consumers.outages import WAITING
from consumers.protocols import Record, SourceEvents
from notellm.settings import KafkaSettings

__all__ = ["KafkaSource"]

log = logging.getLogger(__name__)

_COOPERATIVE = "cooperative-sticky"
# A broker that is restarted hands its groups over within this time; the client asks again meanwhile.
_OFFSETS_SECONDS = 30.0
_COMMIT_AGAIN_SECONDS = 1.0
_SAY_ERRORS_EVERY_SECONDS = 10.0


class _Broker(msgspec.Struct):
    state: str
    nodeid: int


class _Statistics(msgspec.Struct):
    """The part of librdkafka's statistics that tells whether brokers can be reached."""

    brokers: dict[str, _Broker]

    @property
    def is_connected(self) -> bool:
        return any(broker.state == "UP" and broker.nodeid >= 0 for broker in self.brokers.values())


_statistics = msgspec.json.Decoder(_Statistics)


class KafkaSource:
    """See :class:`consumers.protocols.Source`.

    A partition without a committed offset is read from its beginning, by an explicit assignment; and
    ``auto.offset.reset=error`` makes an offset that is no longer there an error, never a silent jump.

    A commit that the group refuses, because a rebalance is under way or we are no member any more, is sent again while
    the partition is ours and forgotten when it is not: its next owner reads what it stood for again.

    Where ``delete_retention_ms`` of the topic is known, it says so when deletions may have been missed.
    """

    def __init__(self, settings: KafkaSettings, group_id: str, *, delete_retention_ms: int | None = None) -> None:
        self._topic = settings.notes_topic
        self._delete_retention_ms = delete_retention_ms
        self._settings = settings
        self._group_id = group_id
        self._cooperative = settings.assignor == _COOPERATIVE
        static = {"group.instance.id": settings.group_instance_id} if settings.group_instance_id else {}
        self._consumer: Consumer = make_client(
            Consumer,
            {
                # One poll may be a drain: the group must not throw us out meanwhile.
                "max.poll.interval.ms": 300_000,
                # A slow model reads little; megabytes fetched ahead would only be fetched again by the next owner.
                "queued.max.messages.kbytes": 16_384,
                "error_cb": self._on_error,
                "statistics.interval.ms": 5000,
                "stats_cb": self._on_statistics,
                **client_properties(settings),
                **static,
                "partition.assignment.strategy": settings.assignor,
                "group.id": group_id,
                "enable.auto.commit": False,
                "enable.auto.offset.store": False,
                "auto.offset.reset": "error",
                "on_commit": self._on_commit,
            },
        )
        self._events: SourceEvents | None = None
        self._brokers_away = ""
        self._say_errors_at = 0.0
        self._starts: dict[int, Start] = {}  # of each partition that is ours
        self._watches: dict[int, TombstoneWatch] = {}  # until one has given the alarm
        self._positions: dict[int, int] = {}  # what we last tried to commit
        self._refused: set[int] = set()  # partitions whose last commit failed
        self._commit_again_at = 0.0
        self._paused = False
        self._asked = AskedHighWatermarks(settings, self._topic)

    def subscribe(self, events: SourceEvents) -> None:
        self._events = events
        self._consumer.subscribe(
            [self._topic], on_assign=self._on_assign, on_revoke=self._on_revoke, on_lost=self._on_lost
        )

    def poll(self, timeout_s: float) -> Record | None:
        if self._refused and time.monotonic() >= self._commit_again_at:
            self._commit({partition: self._positions[partition] for partition in self._refused})
        message = self._consumer.poll(timeout_s)
        # Never "if not message": a Message is falsy when its value is empty or null, and every tombstone is.
        if message is None:
            return None
        error = message.error()
        if error is not None:
            self._raise(error, message)
            return None
        record = _record(message)
        self._look_for_missed_tombstones(record)
        return record

    def pause(self) -> None:
        self._paused = True
        self._consumer.pause(self._consumer.assignment())

    def resume(self) -> None:
        self._paused = False
        self._asked.forget()
        self._consumer.resume(self._consumer.assignment())

    def commit(self, positions: Mapping[int, int]) -> None:
        self._positions.update(positions)
        self._commit({**{partition: self._positions[partition] for partition in self._refused}, **positions})

    def high_watermarks(self) -> Mapping[int, int]:
        """What the last fetch said; while paused nothing is fetched, and the brokers are asked every few seconds.

        A record that a transaction's end marker follows leaves a lag of one: the marker has an offset and is no record.
        """
        known = self._fetched_high_watermarks()
        if self._paused:
            for partition, asked in self._asked.latest(self._starts).items():
                known[partition] = max(asked, known.get(partition, 0))
        return known

    def outage(self) -> str:
        return self._brokers_away

    def close(self) -> None:
        # A static member does not leave its group here: it has session.timeout.ms to come back.
        self._consumer.close()

    def _on_assign(self, consumer: Consumer, partitions: Sequence[TopicPartition]) -> None:
        assert self._events is not None
        now_ms = int(time.time() * 1000)
        starts: dict[int, Start] = {}
        places = self._committed(list(partitions))
        for place in places:
            if place.offset == OFFSET_INVALID:
                place.offset = OFFSET_BEGINNING
                starts[place.partition] = Start(None, now_ms, now_ms)
            else:
                starts[place.partition] = read_start(place.offset, place.metadata)
        if self._cooperative:
            consumer.incremental_assign(places)
        else:
            consumer.assign(places)
        self._starts.update(starts)
        if self._delete_retention_ms is not None:
            for partition, start in starts.items():
                self._watches[partition] = TombstoneWatch(start, self._delete_retention_ms)
        self._events.assigned({partition: start.offset for partition, start in starts.items()})
        if places:
            log.info("assigned %s", ", ".join(f"{place.partition} from {_place(place.offset)}" for place in places))

    def _committed(self, partitions: list[TopicPartition]) -> list[TopicPartition]:
        if not partitions:
            return []
        try:
            places: list[TopicPartition] = self._consumer.committed(partitions, timeout=_OFFSETS_SECONDS)
        except KafkaException as error:
            raise UpdaterError(f"the group's offsets cannot be read: {error.args[0].str()}") from None
        for place in places:
            if place.error is not None:
                raise UpdaterError(
                    f"{place.topic}[{place.partition}]: the group's offset cannot be read: {place.error.str()}"
                )
        return places

    def _on_revoke(self, consumer: Consumer, partitions: Sequence[TopicPartition]) -> None:
        assert self._events is not None
        going = [partition.partition for partition in partitions]
        positions = self._events.revoked(going)
        if positions:
            try:
                consumer.commit(offsets=self._offsets(positions), asynchronous=False)
            except KafkaException as error:
                # The next owner reads them again: at-least-once, and unchanged text costs it nothing.
                log.warning("commit at revocation failed: %s", error)
        self._let_go(going)
        self._unassign(consumer, partitions)

    def _on_lost(self, consumer: Consumer, partitions: Sequence[TopicPartition]) -> None:
        going = [partition.partition for partition in partitions]
        log.warning("partitions %s were lost to the group", going)
        self._lose(going)
        self._unassign(consumer, partitions)

    def _unassign(self, consumer: Consumer, partitions: Sequence[TopicPartition]) -> None:
        if self._cooperative:
            consumer.incremental_unassign(list(partitions))
        else:
            consumer.unassign()

    def _lose(self, partitions: Sequence[int]) -> None:
        assert self._events is not None
        self._let_go(partitions)
        self._events.lost(partitions)

    def _let_go(self, partitions: Iterable[int]) -> None:
        for partition in partitions:
            self._starts.pop(partition, None)
            self._watches.pop(partition, None)
            self._positions.pop(partition, None)
            self._refused.discard(partition)

    def _commit(self, positions: Mapping[int, int]) -> None:
        self._refused -= positions.keys()
        try:
            self._consumer.commit(offsets=self._offsets(positions), asynchronous=True)
        except KafkaException as error:
            self._commit_failed(positions, error.args[0].str())

    def _on_commit(self, error: KafkaError | None, offsets: Sequence[TopicPartition]) -> None:
        if error is not None and error.code() == KafkaError._NO_OFFSET:  # noqa: SLF001 - that is its public name
            return
        failed: dict[int, str] = {}
        for offset in offsets:
            reason = offset.error or error
            if reason is not None:
                failed[offset.partition] = reason.str()
        if failed:
            self._commit_failed(failed, ", ".join(sorted(set(failed.values()))))

    def _commit_failed(self, partitions: Iterable[int], reason: str) -> None:
        failed = set(partitions)
        log.warning("commit of partitions %s failed, what is ours of them is sent again: %s", sorted(failed), reason)
        self._refused |= failed & self._positions.keys()
        self._commit_again_at = time.monotonic() + _COMMIT_AGAIN_SECONDS

    def _offsets(self, positions: Mapping[int, int]) -> list[TopicPartition]:
        now_ms = int(time.time() * 1000)
        offsets = []
        for partition, position in positions.items():
            start = self._starts.get(partition)
            since = start.reading_since_ms if start is not None else 0
            offsets.append(TopicPartition(self._topic, partition, position, metadata=write_start(now_ms, since)))
        return offsets

    def _look_for_missed_tombstones(self, record: Record) -> None:
        watch = self._watches.get(record.partition)
        if watch and watch.may_have_missed(record.offset, record.timestamp_ms, int(time.time() * 1000)):
            log.warning(watch.warning(self._topic, record.partition))
            del self._watches[record.partition]  # said once

    def _on_error(self, error: KafkaError) -> None:
        if error.code() == KafkaError._ALL_BROKERS_DOWN:  # noqa: SLF001 - that is its public name
            self._brokers_away = error.str()
            WAITING.labels("Kafka").set(1)
        # Brokers that are away are dozens of errors a second.
        if time.monotonic() >= self._say_errors_at:
            self._say_errors_at = time.monotonic() + _SAY_ERRORS_EVERY_SECONDS
            log.warning("Kafka: %s", error.str())

    def _on_statistics(self, statistics: str) -> None:
        # The only place where librdkafka says that a broker is back.
        if self._brokers_away and _statistics.decode(statistics).is_connected:
            self._brokers_away = ""
            WAITING.labels("Kafka").set(0)

    def _fetched_high_watermarks(self) -> dict[int, int]:
        known: dict[int, int] = {}
        for partition in self._starts:
            try:
                _, high = self._consumer.get_watermark_offsets(TopicPartition(self._topic, partition), cached=True)
            except KafkaException:
                continue
            if high >= 0:
                known[partition] = high
        return known

    def _raise(self, error: KafkaError, message: Message) -> None:
        if error.code() == KafkaError._AUTO_OFFSET_RESET:  # noqa: SLF001 - that is its public name
            raise OffsetOutOfRange(
                f"{self._topic}[{message.partition()}]: the group's committed offset is no longer in the topic "
                f"({error.str()}); notes may have been lost before they were read. To read the partition from its "
                "beginning, delete the group's offset for it and start again"
            )
        if error.code() == KafkaError.INCONSISTENT_GROUP_PROTOCOL:
            raise UpdaterError(
                f"kafka.assignor: {self._settings.assignor!r} is not how the running updaters of group "
                f"{self._group_id!r} share the partitions out; give all of them the same, or stop them all to change it"
            )
        # What librdkafka cannot recover from comes as _FATAL, and only its text says what it was.
        if error.code() == KafkaError._FATAL or error.fatal():  # noqa: SLF001
            self._lose(list(self._starts))  # no callback of the group will come any more
            if KafkaError(KafkaError.FENCED_INSTANCE_ID).str() in error.str():
                raise UpdaterError(
                    f"kafka.group_instance_id: {self._settings.group_instance_id!r} is taken by another updater of "
                    f"group {self._group_id!r}, which goes on in place of this one; give each a name of its own"
                )
            raise UpdaterError(f"Kafka consumer: {error.str()}")
        log.warning("Kafka: %s", error.str())


def _record(message: Message) -> Record:
    key, value = message.key(), message.value()
    headers = message.headers() or []
    return Record(
        topic=str(message.topic()),
        partition=int(message.partition() or 0),
        offset=int(message.offset() or 0),
        timestamp_ms=message.timestamp()[1],
        key=key.encode() if isinstance(key, str) else key,
        value=value.encode() if isinstance(value, str) else value,
        headers=tuple((name, content.encode() if isinstance(content, str) else content) for name, content in headers),
    )


def _place(offset: int) -> str:
    return "its beginning" if offset == OFFSET_BEGINNING else str(offset)
