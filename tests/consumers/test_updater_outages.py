"""What an operator sees while something is away, and what ends the updater."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
from prometheus_client import REGISTRY

from consumers.errors import CollectionGone, EncoderUnavailable
from consumers.in_memory import HashEncoder, MemoryNoteVectors, MemoryTopic
from notellm.encoder import EncodedBatch
from notellm.prompt import Prompt
from tests.consumers.running_updater import RunningUpdater, WatchedSink, note, wait_until


class AbsentEncoder(HashEncoder):
    """Goes away after its first batch, until it is told to be back."""

    def __init__(self) -> None:
        super().__init__()
        self.away = False

    def stream(self, prompts: Sequence[Prompt]) -> Iterator[EncodedBatch]:
        for place, batch in enumerate(super().stream(prompts)):
            if self.away and place > 1:
                raise EncoderUnavailable("was killed by SIGKILL")
            yield batch


def test_an_encoder_that_is_away_is_waited_for_and_no_note_is_refused() -> None:
    topic = MemoryTopic()
    encoder = AbsentEncoder()
    encoder.away = True
    for number in range(40):
        topic.publish(f"n{number}".encode(), note(f"n{number}", f"title {number}"))
    with RunningUpdater(topic, encoder=encoder) as running:
        seen = ["waiting for the encoder: was killed by SIGKILL"]
        wait_until(lambda: running.updater.readiness() == seen, "the outage to be seen")
        assert running.updater.health() == []
        assert REGISTRY.get_sample_value("notellm_waiting", {"what": "the encoder"}) == 1
        encoder.away = False
        running.wait_until_done()
        assert running.updater.readiness() == []
    assert REGISTRY.get_sample_value("notellm_waiting", {"what": "the encoder"}) == 0
    assert len(running.sink.rows) == 40
    assert running.dead == []


def test_milvus_away_is_seen_and_lag_grows_and_falls() -> None:
    topic = MemoryTopic(partitions=1)
    sink = WatchedSink(away=True)
    with RunningUpdater(topic, sink=sink) as running:
        for number in range(5):
            topic.publish(f"n{number}".encode(), note(f"n{number}"))
        wait_until(lambda: lag(0) == 5, "the lag to be 5")
        seen = ["waiting for Milvus: the in-memory sink is away"]
        wait_until(lambda: running.updater.readiness() == seen, "the outage to be seen")
        sink.away = False
        running.wait_until_done()
        wait_until(lambda: lag(0) == 0, "the lag to be 0")
    assert lag(0) is None, "the partition is not ours any more"


def lag(partition: int) -> float | None:
    return REGISTRY.get_sample_value("notellm_consumer_lag", {"partition": str(partition)})


def test_a_collection_that_was_dropped_ends_the_updater_even_when_it_is_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("consumers.write_stage._CHECK_SECONDS", 0.05)
    running = RunningUpdater(MemoryTopic()).start()
    running.sink.gone = True
    running.join()
    assert isinstance(running.error, CollectionGone)
    assert running.updater.health() == ["the in-memory collection was dropped"]


def test_a_record_is_safe_only_when_its_note_vector_is() -> None:
    topic = MemoryTopic(partitions=1)
    vectors = MemoryNoteVectors(held=True)
    with RunningUpdater(topic, note_vectors=vectors) as running:
        topic.publish(b"a", note("a"))
        topic.publish(b"b", note("b"))
        topic.publish(b"a", None)
        wait_until(lambda: vectors.latest.keys() == {"b"} and "a" not in running.sink.rows, "the rows to be written")
        assert topic.committed.get(0, 0) == 0
        vectors.held = False
        running.wait_until_done()
    assert vectors.latest == running.sink.rows
