"""What becomes of notes when nothing goes wrong but the notes themselves."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from threading import Lock

import numpy as np
import pytest

from consumers.in_memory import HashEncoder, MemoryTopic
from consumers.protocols import Row
from notellm.encoder import EncodedBatch
from notellm.errors import NoteRefused
from notellm.prompt import Prompt
from tests.consumers.running_updater import RunningUpdater, WatchedSink, ends, note, titles, wait_until


class ChoosyEncoder(HashEncoder):
    """Refuses what says "refuse", and gives what says "nan" a vector of NaN."""

    def stream(self, prompts: Sequence[Prompt]) -> Iterator[EncodedBatch]:
        for index, prompt in enumerate(prompts):
            if "refuse" in prompt.text:
                yield from super().stream(prompts[:index])
                raise NoteRefused(index, "the model would not")
        yield from super().stream(prompts)

    def embed(self, text: str) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
        vector = super().embed(text)
        return vector * np.float32("nan") if "nan" in text else vector


class ExclusiveEncoder(HashEncoder):
    """Fails when two threads use it at a time, as a child process or a GPU might."""

    def __init__(self) -> None:
        super().__init__(seconds_per_note=0.002)
        self._turn = Lock()

    def stream(self, prompts: Sequence[Prompt]) -> Iterator[EncodedBatch]:
        assert self._turn.acquire(blocking=False), "two threads use the encoder at once"
        try:
            yield from super().stream(prompts)
        finally:
            self._turn.release()


def publish_behind_a_closed_sink(running: RunningUpdater, *records: tuple[str, bytes | None]) -> None:
    """One batch of all ``records``: they pile up behind a note that waits for Milvus."""
    running.sink.away = True
    running.topic.publish(b"first", note("first"))
    wait_until(lambda: running.source.polls > 20, "the poller to read the first note")
    for key, value in records:
        running.topic.publish(key.encode(), value)
    polls = running.source.polls
    wait_until(lambda: running.source.polls > polls + len(records) + 20, "the poller to read the rest")
    running.sink.away = False


def test_every_note_ends_as_its_last_version_and_the_offsets_reach_the_end() -> None:
    topic = MemoryTopic()
    with RunningUpdater(topic) as running:
        for version in range(3):
            for number in range(40):
                topic.publish(f"n{number}".encode(), note(f"n{number}", f"version {version} of {number}"))
        running.wait_until_done()
    assert titles(running.sink.rows) == {f"n{number}": f"version 2 of {number}" for number in range(40)}
    assert topic.committed == ends(topic)
    assert running.dead == []


def test_a_row_holds_what_the_note_and_the_model_say_and_where_it_came_from() -> None:
    topic = MemoryTopic()
    value = note(
        "n1", "Kyoto", content="maples", hashtags=["#kyoto"], category="travel", published_at=5, attributes={"a": 1}
    )
    record = topic.publish(b"n1", value, gap=7, partition=2)
    with RunningUpdater(topic) as running:
        running.wait_until_done()
    row = running.sink.rows["n1"]
    text = "Kyoto\nkyoto\nmaples"
    np.testing.assert_array_equal(row.embedding, running.encoder.embed(text))
    assert (row.title, row.hashtags, row.category, row.published_at) == ("Kyoto", ["kyoto"], "travel", 5)
    assert (row.generated_hashtags, row.generated_category) == (["hash"], "test")
    assert row.attributes == {"a": 1}
    assert row.model_version == running.encoder.model_version
    assert (row.source_epoch, row.source_partition, row.source_offset) == ("epoch", 2, record.offset)


def test_offsets_are_committed_across_gaps() -> None:
    topic = MemoryTopic()
    for number, gap in enumerate([0, 5, 1, 9]):
        topic.publish(f"n{number}".encode(), note(f"n{number}"), partition=0, gap=gap)
    with RunningUpdater(topic) as running:
        running.wait_until_done()
    assert topic.committed == {0: 19}


def test_a_tombstone_deletes_and_a_later_version_brings_the_note_back() -> None:
    topic = MemoryTopic()
    with RunningUpdater(topic) as running:
        for key in ("gone", "back"):
            topic.publish(key.encode(), note(key))
        running.wait_until_done()
        assert set(running.sink.rows) == {"gone", "back"}
        for key in ("gone", "back", "never there"):
            topic.publish(key.encode(), None)
        running.wait_until_done()
        assert running.sink.rows == {}
        topic.publish(b"back", note("back", "again"))
        running.wait_until_done()
    assert titles(running.sink.rows) == {"back": "again"}


def test_a_bad_edit_is_a_dead_letter_and_leaves_the_version_before_it() -> None:
    topic = MemoryTopic()
    topic.publish(b"n1", note("n1", "good"), partition=0)
    topic.publish(b"n1", b'{"note_id":"n1","title":7}', partition=0)
    topic.publish(b"n2", b"no JSON", partition=0)
    topic.publish(None, note("n3"), partition=0)
    with RunningUpdater(topic) as running:
        running.wait_until_done()
    assert titles(running.sink.rows) == {"n1": "good"}
    assert running.dead == [(0, 1, "wrong_type"), (0, 2, "not_json"), (0, 3, "no_key")]


def test_a_dead_letter_that_is_not_delivered_yet_holds_the_offset() -> None:
    topic = MemoryTopic()
    with RunningUpdater(topic) as running:
        running.dead_letters.poll = lambda: None  # type: ignore[method-assign]
        topic.publish(b"n1", note("n1"), partition=0)
        topic.publish(b"n2", b"no JSON", partition=0)
        topic.publish(b"n3", note("n3"), partition=0)
        wait_until(lambda: set(running.sink.rows) == {"n1", "n3"} and topic.committed == {0: 1}, "the notes beside it")
        del running.dead_letters.poll
        running.wait_until_done()
    assert topic.committed == {0: 3}


def test_in_a_batch_the_last_version_wins_and_only_it_is_encoded() -> None:
    topic = MemoryTopic(partitions=1)
    with RunningUpdater(topic, batch_notes=100) as running:
        versions = [("n1", note("n1", f"version {version}")) for version in range(20)]
        publish_behind_a_closed_sink(running, *versions, ("n2", note("n2")), ("n2", None))
        running.wait_until_done()
        assert running.encoder.encoded == 2
    assert titles(running.sink.rows) == {"first": "Kyoto in autumn", "n1": "version 19"}
    assert [row.title for row in running.sink.upserted if row.note_id == "n1"] == ["version 19", "version 19"]
    # The versions that gave way are settled with it.
    assert len(running.observer.settled_versions) == 23
    assert [offset for note_id, offset in running.observer.searchable_versions if note_id == "n1"] == [20]


def test_unchanged_text_does_not_run_the_model_and_renews_everything_else() -> None:
    topic = MemoryTopic()
    with RunningUpdater(topic) as running:
        topic.publish(b"n1", note("n1", attributes={"author_id": "a1", "old": True}))
        running.wait_until_done()
        before = running.sink.rows["n1"]
        topic.publish(b"n1", note("n1", attributes={"author_id": "a2"}, category="travel"))
        running.wait_until_done()
        after = running.sink.rows["n1"]
        assert running.encoder.encoded == 1
    assert (before.source_offset, after.source_offset) == (0, 1)
    assert (after.attributes, after.category) == ({"author_id": "a2"}, "travel")
    assert after.text_hash == before.text_hash
    assert after.generated_hashtags == before.generated_hashtags == ["hash"]
    np.testing.assert_array_equal(after.embedding, before.embedding)
    assert running.observer.searchable_versions == [("n1", 0), ("n1", 1)]


def test_vectors_first_writes_a_row_that_no_text_hash_vouches_for_and_then_the_whole_one() -> None:
    topic = MemoryTopic(partitions=1)
    stale = Row("n1", np.ones(8, np.float32), "old", [], "", ["old tag"], "old", 1, "m", "old", "epoch", 0, 0)
    sink = WatchedSink(rows={"n1": stale})
    topic.publish(b"n1", note("n1", "new"))
    with RunningUpdater(topic, sink=sink, vectors_first=True) as running:
        running.wait_until_done()
    first, final = sink.upserted
    assert (first.title, first.text_hash, first.generated_hashtags) == ("new", "", ["old tag"])
    assert (final.title, len(final.text_hash), final.generated_hashtags) == ("new", 64, ["hash"])
    np.testing.assert_array_equal(first.embedding, final.embedding)
    assert running.observer.searchable_versions == running.observer.settled_versions == [("n1", 0)]


def test_without_vectors_first_a_row_is_written_once_and_whole() -> None:
    topic = MemoryTopic(partitions=1)
    topic.publish(b"n1", note("n1"))
    with RunningUpdater(topic, vectors_first=False) as running:
        running.wait_until_done()
    (row,) = running.sink.upserted
    assert (len(row.text_hash), row.generated_hashtags) == (64, ["hash"])
    assert running.observer.searchable_versions == running.observer.settled_versions == [("n1", 0)]


def test_a_row_without_its_tags_is_no_reason_to_skip_the_model() -> None:
    topic = MemoryTopic(partitions=1)
    encoder = HashEncoder()
    topic.publish(b"n1", note("n1"))
    half = Row("n1", encoder.embed("x"), "Kyoto in autumn", [], "", [], "", 1, "m", "", "epoch", 0, 0)
    with RunningUpdater(topic, sink=WatchedSink(rows={"n1": half}), encoder=encoder) as running:
        running.wait_until_done()
        assert encoder.encoded == 1
    assert running.sink.rows["n1"].generated_hashtags == ["hash"]


@pytest.mark.parametrize("vectors_first", [True, False])
@pytest.mark.parametrize(
    ("title", "reason"), [("bad row", "milvus_refused"), ("refuse", "model_refused"), ("nan", "model_refused")]
)
def test_what_milvus_or_the_model_refuses_is_a_dead_letter_and_its_predecessor_in_the_batch_is_written(
    vectors_first: bool, title: str, reason: str
) -> None:
    topic = MemoryTopic(partitions=1)
    sink = WatchedSink(refused_titles={"bad row"})
    settings = {"batch_notes": 100, "vectors_first": vectors_first}
    with RunningUpdater(topic, sink=sink, encoder=ChoosyEncoder(), **settings) as running:
        publish_behind_a_closed_sink(
            running,
            *((f"n{number}", note(f"n{number}", f"note {number}")) for number in range(20)),
            ("edited", note("edited", "good")),
            ("edited", note("edited", title)),
            ("new", note("new", title)),
            ("deleted", note("deleted", "good")),
            ("deleted", None),
            ("deleted", note("deleted", title)),
            *((f"m{number}", note(f"m{number}", f"note {number}")) for number in range(20)),
        )
        running.wait_until_done()
    assert running.sink.rows["edited"].title == "good"
    assert set(running.sink.rows) == {"first", "edited", *(f"{k}{number}" for number in range(20) for k in "nm")}
    assert all(row.text_hash for row in running.sink.rows.values())
    assert sorted(running.dead) == [(0, offset, reason) for offset in (22, 23, 26)]


def test_a_refused_edit_leaves_the_version_that_an_earlier_batch_wrote() -> None:
    topic = MemoryTopic(partitions=1)
    sink = WatchedSink(refused_titles={"bad row"})
    with RunningUpdater(topic, sink=sink, encoder=ChoosyEncoder()) as running:
        for title in ("good", "bad row", "refuse", "nan"):
            topic.publish(b"n1", note("n1", title))
            running.wait_until_done()
    assert titles(running.sink.rows) == {"n1": "good"}
    assert running.dead == [(0, 1, "milvus_refused"), (0, 2, "model_refused"), (0, 3, "model_refused")]


def test_the_writer_and_the_encoders_thread_never_use_the_model_at_once() -> None:
    topic = MemoryTopic(partitions=1)
    sink = WatchedSink(refused_titles={"bad row"})
    with RunningUpdater(topic, sink=sink, encoder=ExclusiveEncoder(), batch_notes=4) as running:
        for number in range(60):
            topic.publish(f"n{number}".encode(), note(f"n{number}", f"good {number}"))
            topic.publish(f"n{number}".encode(), note(f"n{number}", "bad row"))
        running.wait_until_done()
    assert titles(sink.rows) == {f"n{number}": f"good {number}" for number in range(60)}
    assert len(running.dead) == 60


def test_a_thousand_refused_versions_of_one_note_become_a_thousand_dead_letters() -> None:
    topic = MemoryTopic(partitions=1)
    sink = WatchedSink(refused_titles={"bad row"})
    settings = {"batch_notes": 1024, "queue_notes": 2000}
    with RunningUpdater(topic, sink=sink, **settings) as running:
        publish_behind_a_closed_sink(
            running, ("n1", note("n1", "good")), *[("n1", note("n1", "bad row", content=str(v))) for v in range(1000)]
        )
        running.wait_until_done()
    assert titles(sink.rows)["n1"] == "good"
    assert len(set(running.dead)) == len(running.dead) == 1000


def test_a_key_on_a_partition_where_murmur2_would_not_put_it_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    topic = MemoryTopic()
    right = topic.publish(b"n1", note("n1")).partition
    caplog.set_level(logging.WARNING)
    with RunningUpdater(topic, topic_partitions=4) as running:
        running.wait_until_done()
        assert caplog.messages == []
        for _ in range(2):
            topic.publish(b"n1", note("n1"), partition=(right + 1) % 4)
        running.wait_until_done()
    assert len([message for message in caplog.messages if "murmur2" in message]) == 1
