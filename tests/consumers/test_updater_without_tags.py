"""A note that has its vector, but whose tags cannot be had: searchable without them, and a dead letter says so."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest

from consumers.in_memory import HashEncoder, MemoryTopic
from notellm.encoder import EncodedBatch
from notellm.errors import NoteRefused
from notellm.prompt import Prompt
from tests.consumers.running_updater import RunningUpdater, WatchedSink, note


class SpeechlessEncoder(HashEncoder):
    """Embeds everything, and refuses to tag what says "speechless"."""

    def stream(self, prompts: Sequence[Prompt]) -> Iterator[EncodedBatch]:
        for batch in super().stream(prompts):
            for index in batch.indices:
                if batch.tags is not None and "speechless" in prompts[index].text:
                    raise NoteRefused(index, "the model has no words")
            yield batch


@pytest.mark.parametrize("vectors_first", [True, False])
@pytest.mark.parametrize("who", ["the model", "Milvus"])
def test_the_note_is_searchable_without_tags_and_a_dead_letter(who: str, vectors_first: bool) -> None:
    topic = MemoryTopic()
    encoder = SpeechlessEncoder() if who == "the model" else HashEncoder()
    sink = WatchedSink(refused_tags={"hash"} if who == "Milvus" else set())
    for number in range(6):
        topic.publish(f"n{number}".encode(), note(f"n{number}", "speechless" if number == 3 else "Kyoto"))
    with RunningUpdater(topic, encoder=encoder, sink=sink, vectors_first=vectors_first) as running:
        running.wait_until_done()
    if who == "Milvus" and not vectors_first:
        # Nothing was written before: Milvus might as well have refused the vector.
        assert {reason for _, _, reason in running.dead} == {"milvus_refused"}
        assert sink.rows == {}
        return
    without = [note_id for note_id, row in sink.rows.items() if not row.generated_hashtags]
    assert without == (["n3"] if who == "the model" else list(sink.rows))
    assert len(sink.rows) == 6
    row = sink.rows["n3"]
    assert row.embedding.tolist() == encoder.embed("speechless\n\n").tolist()
    assert (row.title, row.generated_category, row.text_hash) == ("speechless", "", "")
    letters = [(partition, offset) for partition, offset, _ in running.dead]
    assert letters == [(row.source_partition, row.source_offset)] or who == "Milvus"
    assert len(running.dead) == len(without)
    assert {reason for _, _, reason in running.dead} == {"tags_refused"}


def test_its_next_edit_is_tried_again_even_with_the_same_text() -> None:
    topic = MemoryTopic()
    encoder = SpeechlessEncoder()
    topic.publish(b"n", note("n", "speechless"))
    with RunningUpdater(topic, encoder=encoder) as running:
        running.wait_until_done()
        topic.publish(b"n", note("n", "speechless", attributes={"public": True}))
        running.wait_until_done()
    assert len(running.dead) == 2
    assert running.sink.rows["n"].attributes == {"public": True}


def test_the_dead_letter_holds_the_offset_until_it_is_safe() -> None:
    topic = MemoryTopic(partitions=1)
    with RunningUpdater(topic, encoder=SpeechlessEncoder()) as running:
        poll = running.dead_letters.poll
        running.dead_letters.poll = lambda: None  # type: ignore[method-assign]
        topic.publish(b"n", note("n", "speechless"))
        topic.publish(b"m", note("m"))
        while "m" not in running.sink.rows or not running.dead_letters.sent:
            pass
        assert topic.committed.get(0, 0) == 0
        running.dead_letters.poll = poll  # type: ignore[method-assign]
        running.wait_until_done()
