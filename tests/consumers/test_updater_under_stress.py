"""Milvus away, partitions taken away, stages that die: what is not safe is never committed."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence

import pytest

from consumers.errors import OffsetOutOfRange
from consumers.in_memory import HashEncoder, MemoryTopic
from consumers.protocols import Record, Row
from notellm.encoder import EncodedBatch
from notellm.prompt import Prompt
from tests.consumers.running_updater import DirectedSource, RunningUpdater, WatchedSink, note, wait_until


def publish(topic: MemoryTopic, *names: str, partition: int = 0) -> None:
    for name in names:
        topic.publish(name.encode(), note(name), partition=partition)


def names(count: int, letter: str = "n") -> list[str]:
    return [f"{letter}{number}" for number in range(count)]


class FailingEncoder(HashEncoder):
    """Dies, as no encoder should, at what says "die"."""

    def stream(self, prompts: Sequence[Prompt]) -> Iterator[EncodedBatch]:
        if any("die" in prompt.text for prompt in prompts):
            raise RuntimeError("the encoder died")
        yield from super().stream(prompts)


class FailingSource(DirectedSource):
    """Finds the offset of partition 1 out of range."""

    def poll(self, timeout_s: float) -> Record | None:
        record = super().poll(timeout_s)
        if record is not None and record.partition == 1:
            raise OffsetOutOfRange("notes[1]: the group's committed offset is no longer in the topic")
        return record


def stages() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name in ("encode", "write")}


class TestMilvusAway:
    def test_partitions_are_paused_polling_goes_on_and_nothing_is_lost_or_committed_meanwhile(self) -> None:
        topic = MemoryTopic()
        sink = WatchedSink(away=True)
        publish(topic, *names(60))
        with RunningUpdater(topic, sink=sink, queue_notes=8) as running:
            wait_until(lambda: running.source.pauses > 0, "a pause")
            polls = running.source.polls
            wait_until(lambda: running.source.polls > polls + 20, "polls while paused")
            assert topic.committed == {}
            assert sink.rows == {}
            sink.away = False
            running.wait_until_done()
        assert set(sink.rows) == set(names(60))

    def test_it_may_go_away_between_the_lookup_and_the_write(self) -> None:
        topic = MemoryTopic()
        sink = WatchedSink()
        publish(topic, *names(10))
        sink.gate.clear()
        with RunningUpdater(topic, sink=sink) as running:
            assert sink.waiting.wait(10)
            sink.away = True
            sink.gate.set()
            # The write in progress was already let in.
            wait_until(lambda: running.source.polls > 100, "some polls")
            assert topic.committed.get(0, 0) < 10
            sink.away = False
            running.wait_until_done()
        assert set(sink.rows) == set(names(10))

    def test_no_more_than_the_queue_is_ever_in_flight(self) -> None:
        topic = MemoryTopic()
        publish(topic, *names(100))
        in_flight: list[int] = []

        class CountingSource(DirectedSource):
            read = 0

            def poll(self, timeout_s: float) -> Record | None:
                record = super().poll(timeout_s)
                if record is not None:
                    self.read += 1
                    in_flight.append(self.read - len(running.observer.settled_versions))
                return record

        running = RunningUpdater(
            topic, source=CountingSource(topic), encoder=HashEncoder(seconds_per_note=0.001), queue_notes=10
        )
        with running:
            running.wait_until_done()
        # What is settled is reported a moment before the observer hears of it.
        assert 10 <= max(in_flight) <= 12

    def test_stopping_meanwhile_takes_no_longer_than_the_drain_and_commits_nothing(self) -> None:
        topic = MemoryTopic()
        publish(topic, "n1")
        running = RunningUpdater(topic, sink=WatchedSink(away=True), drain_timeout_s=0.2, retry_max_s=300).start()
        wait_until(lambda: running.source.polls > 20, "the note to be read")
        running.stop()
        assert running.error is None
        assert topic.committed == {}
        # The next one finds it where it was.
        with RunningUpdater(topic) as after:
            after.wait_until_done()
        assert set(after.sink.rows) == {"n1"}


class TestRevocation:
    def test_what_is_begun_is_finished_and_committed_and_the_rest_is_left_to_the_next_owner(self) -> None:
        topic = MemoryTopic()
        sink = WatchedSink()
        sink.gate.clear()
        publish(topic, *names(30))
        encoder = HashEncoder(seconds_per_note=0.02)
        with RunningUpdater(topic, sink=sink, encoder=encoder, batch_notes=5, vectors_first=False) as running:
            assert sink.waiting.wait(10)
            wait_until(lambda: running.source.polls > 60, "everything to be read")
            revoked = running.source.order(lambda: running.source.revoke([0]))
            assert not revoked.wait(0.05), "the revocation waits for the write that is in progress"
            sink.gate.set()
            assert revoked.wait(10)
            written = len(sink.upserted)
            assert 0 < written < 30
            assert topic.committed == {0: written}
            # The writer goes in order: once this one is there, nothing of partition 0 can follow.
            publish(topic, "barrier", partition=1)
            wait_until(lambda: "barrier" in sink.rows, "the barrier")
            assert len(sink.upserted) == written + 1
            assert running.source.order(lambda: running.source.assign([0])).wait(10)
            running.wait_until_done()
        assert set(sink.rows) == {*names(30), "barrier"}
        assert len(sink.upserted) == 31, "nothing was written twice"

    @pytest.mark.parametrize("take", ["revoke", "lose"])
    def test_nothing_is_written_or_committed_once_the_lease_is_over(self, take: str) -> None:
        topic = MemoryTopic()
        sink = WatchedSink(away=True)
        publish(topic, *names(5))
        topic.publish(b"n0", None, partition=0)
        with RunningUpdater(topic, sink=sink, drain_timeout_s=0.1) as running:
            wait_until(lambda: running.source.polls > 30, "everything to be read")
            assert running.source.order(lambda: getattr(running.source, take)([0])).wait(10)
            sink.away = False
            publish(topic, "barrier", partition=1)
            wait_until(lambda: "barrier" in sink.rows, "the barrier")
            assert set(sink.rows) == {"barrier"}
            assert sink.deleted == []
            assert {note_id for note_id, _ in running.observer.settled_versions} <= {"barrier"}
        assert topic.committed == {1: 1}

    def test_a_partition_that_comes_back_is_read_from_its_committed_offset(self) -> None:
        topic = MemoryTopic()
        sink = WatchedSink()
        too_early: list[Mapping[int, int]] = []

        class WatchfulSource(DirectedSource):
            def commit(self, positions: Mapping[int, int]) -> None:
                if positions.get(0, 0) > 1 and "n2" not in sink.rows:
                    too_early.append(positions)
                super().commit(positions)

        source, encoder = WatchfulSource(topic), HashEncoder(seconds_per_note=0.1)
        settings = {"drain_timeout_s": 0.1, "vectors_first": False}
        with RunningUpdater(topic, source=source, sink=sink, encoder=encoder, **settings) as running:
            publish(topic, "n1")
            running.wait_until_done()
            sink.away = True
            publish(topic, "n2")
            polls = running.source.polls
            wait_until(lambda: running.source.polls > polls + 20, "the note to be read")
            assert running.source.order(lambda: running.source.revoke([0])).wait(10)
            assert topic.committed == {0: 1}
            assert running.source.order(lambda: running.source.assign([0])).wait(10)
            sink.away = False
            running.wait_until_done()
        assert set(sink.rows) == {"n1", "n2"}
        # What became of it under the first lease says nothing about the second.
        assert too_early == []
        assert [row.note_id for row in sink.upserted] == ["n1", "n2"]

    def test_partitions_that_arrive_during_a_pause_are_paused_too(self) -> None:
        topic = MemoryTopic()
        sink = WatchedSink(away=True)
        publish(topic, *names(10))
        with RunningUpdater(topic, sink=sink, queue_notes=4) as running:
            wait_until(lambda: running.source.pauses == 1, "a pause")
            assert running.source.order(lambda: running.source.assign([3])).wait(10)
            assert running.source.pauses == 2
            sink.away = False
            running.wait_until_done()

    def test_the_offset_is_committed_again_as_an_earlier_commit_may_have_failed(self) -> None:
        topic = MemoryTopic()
        with RunningUpdater(topic) as running:
            publish(topic, "n1")
            running.wait_until_done()
            topic.committed.clear()  # the broker never got it
            assert running.source.order(lambda: running.source.revoke([0])).wait(10)
            assert topic.committed == {0: 1}


class TestDyingStages:
    def test_the_encoders_death_ends_run_and_commits_only_what_is_safe(self) -> None:
        topic = MemoryTopic()
        before = stages()
        running = RunningUpdater(topic, encoder=FailingEncoder()).start()
        publish(topic, "n0", "n1")
        running.wait_until_done()
        topic.publish(b"n2", note("n2", "die"), partition=0)
        publish(topic, "n3")
        running.join()
        assert isinstance(running.error, RuntimeError)
        assert topic.committed == {0: 2}
        assert stages() <= before

    def test_the_writers_death_ends_run_and_commits_only_what_is_safe(self) -> None:
        topic = MemoryTopic()

        def die(rows: Sequence[Row]) -> None:
            if any(row.note_id == "n5" for row in rows):
                raise RuntimeError("the writer died")

        publish(topic, *names(10))
        running = RunningUpdater(topic, sink=WatchedSink(before_upsert=die), batch_notes=2, queue_notes=3).start()
        running.join()
        assert isinstance(running.error, RuntimeError)
        assert set(running.sink.rows) <= set(names(6)) - {"n5"}
        assert topic.committed.get(0, 0) <= 5
        with RunningUpdater(topic) as after:
            after.wait_until_done()
        assert {**running.sink.rows, **after.sink.rows}.keys() == set(names(10))

    def test_the_sources_error_ends_run_after_the_rest_was_drained_and_committed(self) -> None:
        topic = MemoryTopic()
        sink = WatchedSink()
        sink.gate.clear()
        publish(topic, "n1")
        running = RunningUpdater(topic, source=FailingSource(topic), sink=sink).start()
        assert sink.waiting.wait(10)
        publish(topic, "out of range", partition=1)
        wait_until(lambda: running.source.closed, "the end to begin")
        sink.gate.set()
        running.join()
        assert isinstance(running.error, OffsetOutOfRange)
        assert set(sink.rows) == {"n1"}
        assert topic.committed == {0: 1}

    def test_the_stages_end_even_when_the_source_cannot_be_closed(self) -> None:
        class UnclosableSource(DirectedSource):
            def close(self) -> None:
                raise RuntimeError("cannot leave the group")

        before = stages()
        topic = MemoryTopic()
        running = RunningUpdater(topic, source=UnclosableSource(topic)).start()
        wait_until(lambda: running.source.polls > 3, "a few polls")
        running.stop()
        assert isinstance(running.error, RuntimeError)
        assert stages() <= before
