"""What Milvus acknowledged, published again: one record per note and version, for readers of Kafka."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from threading import Lock

from confluent_kafka import KafkaError, KafkaException, Message, Producer
from prometheus_client import Counter

from consumers.errors import UpdaterError
from consumers.kafka_client import client_properties, make_client
from consumers.kafka_topics import vectors_topic
from consumers.protocols import Row
from notellm.messages import NoteVector, encode_note_vector
from notellm.settings import KafkaSettings

__all__ = ["KafkaNoteVectors", "note_vector"]

log = logging.getLogger(__name__)

VECTORS = Counter("notellm_note_vectors_total", "Records that the note-vectors topic acknowledged.", ["kind"])

_BATCH_BYTES = 1_000_000  # librdkafka's own default
_SAY_EVERY_SECONDS = 10.0


def note_vector(row: Row) -> NoteVector:
    """The message of a row. Of each 32-bit float the shortest digits that give it back, a third of the bytes."""
    return NoteVector(
        note_id=row.note_id,
        model_version=row.model_version,
        text_hash=row.text_hash,
        embedding=[float(str(number)) for number in row.embedding],
        generated_hashtags=row.generated_hashtags,
        generated_category=row.generated_category,
    )


def _always() -> bool:
    return True


@dataclass(frozen=True, eq=False)
class _Outgoing:
    note_id: str
    value: bytes | None
    delivered: Callable[[], None]
    alive: Callable[[], bool]


class KafkaNoteVectors:
    """See :class:`consumers.protocols.NoteVectors`. Waits for the brokers without end; nothing is dropped or overtaken.

    Each note has a lane, and only the first of a lane is with the client: what follows waits until Kafka has
    acknowledged it. So a record that must be produced again is never behind a newer one of its note.

    ``alive`` says whether a record may still be written: false once its partition has another owner. It is asked each
    time a record is handed to the client. :meth:`purge` takes back what the client has not delivered and asks again.

    One risk is left. What was on the wire, or in the client of a process that was frozen (SIGSTOP) for longer than its
    session, may arrive after a newer record of the next owner. It then stays the note's last until the note changes;
    Milvus is not concerned.
    """

    def __init__(self, settings: KafkaSettings, model_version: str, *, max_message_bytes: int | None = None) -> None:
        self._topic = vectors_topic(settings, model_version)
        self._lanes: dict[str, deque[_Outgoing]] = {}
        self._lock = Lock()  # of the lanes: the writer's thread sends, the poller's polls
        self._again: deque[_Outgoing] = deque()  # heads of lanes that the client does not have
        self._failure: UpdaterError | None = None
        self._say_at = 0.0
        self._producer: Producer = make_client(
            Producer,
            {
                # A broker holds its topic's limit against a whole batch.
                "batch.size": min(_BATCH_BYTES, max_message_bytes or _BATCH_BYTES),
                **client_properties(settings),
                "partitioner": "murmur2_random",
                "enable.idempotence": True,
                "acks": "all",
                "message.timeout.ms": 0,
            },
        )

    def send(self, row: Row, delivered: Callable[[], None], alive: Callable[[], bool] = _always) -> None:
        self._put(_Outgoing(row.note_id, encode_note_vector(note_vector(row)), delivered, alive))

    def delete(self, note_id: str, delivered: Callable[[], None], alive: Callable[[], bool] = _always) -> None:
        self._put(_Outgoing(note_id, None, delivered, alive))

    def poll(self) -> None:
        for _ in range(len(self._again)):
            self._hand_over(self._again.popleft())
        self._producer.poll(0)
        self._check()

    def purge(self) -> None:
        """Take back what is not delivered: what is alive goes out again, of the rest nothing is heard any more.

        To be called when a partition went before all of it was delivered.
        """
        self._producer.purge(in_queue=True, in_flight=True, blocking=True)
        self.poll()

    @property
    def undelivered(self) -> int:
        with self._lock:
            return sum(map(len, self._lanes.values()))

    def close(self, timeout_s: float) -> None:
        """Deliver what is left, for at most so long; nothing is sent any more when this returns."""
        deadline = time.monotonic() + timeout_s
        try:
            while self.undelivered and time.monotonic() < deadline:
                self.poll()
                time.sleep(0.01)
        finally:
            left = self.undelivered
            self._producer.purge(in_queue=True, in_flight=True, blocking=True)
            with self._lock:
                self._lanes.clear()
            if left:
                log.warning("%d records for %s were not delivered; their notes are read again", left, self._topic)

    def _put(self, outgoing: _Outgoing) -> None:
        self._check()
        with self._lock:
            lane = self._lanes.setdefault(outgoing.note_id, deque())
            lane.append(outgoing)
            first = len(lane) == 1
        if first:
            self._hand_over(outgoing)

    def _hand_over(self, head: _Outgoing | None) -> None:
        """Produce the head of a lane; those that may not be written any more make way for the next."""
        while head is not None and not head.alive():
            head = self._advance(head)
        if head is None:
            return
        try:
            self._producer.produce(
                self._topic,
                key=head.note_id.encode(),
                value=head.value,
                on_delivery=partial(self._on_delivery, head),
            )
        except BufferError:
            self._again.append(head)  # the client's own queue is full
        except KafkaException as error:
            self._recover(head, error.args[0])

    def _on_delivery(self, head: _Outgoing, error: KafkaError | None, message: Message) -> None:
        del message
        if error is not None:
            self._recover(head, error)
            return
        VECTORS.labels("tombstone" if head.value is None else "vector").inc()
        following = self._advance(head)
        head.delivered()
        self._hand_over(following)

    def _advance(self, head: _Outgoing) -> _Outgoing | None:
        """``head`` is done with: who is next in its lane?"""
        with self._lock:
            lane = self._lanes.get(head.note_id)
            if lane is None:
                return None  # closed meanwhile
            lane.popleft()
            if lane:
                return lane[0]
            del self._lanes[head.note_id]
            return None

    def _recover(self, head: _Outgoing, error: KafkaError) -> None:
        if error.fatal() or error.code() == KafkaError._FATAL:  # noqa: SLF001 - that is its public name
            self._failure = UpdaterError(f"topic {self._topic!r} cannot be written any more: {error.str()}")
        elif error.code() == KafkaError.MSG_SIZE_TOO_LARGE:
            self._failure = UpdaterError(
                f"topic {self._topic!r} refuses the vector of note {head.note_id!r}, {len(head.value or b'')} bytes; "
                "raise the topic's max.message.bytes, and message.max.bytes if kafka.properties sets it"
            )
        elif error.code() not in (KafkaError._PURGE_QUEUE, KafkaError._PURGE_INFLIGHT):  # noqa: SLF001
            self._say(f"a record for {self._topic} could not be delivered, trying again: {error.str()}")
        self._again.append(head)

    def _say(self, text: str) -> None:
        """A broker that refuses one record refuses thousands: one line now and then says it."""
        if time.monotonic() >= self._say_at:
            self._say_at = time.monotonic() + _SAY_EVERY_SECONDS
            log.warning(text)

    def _check(self) -> None:
        if self._failure is not None:
            raise self._failure
