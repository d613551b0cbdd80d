"""A collection that another updater has made again gets nothing from one that has not noticed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from consumers.errors import CollectionGone
from consumers.in_memory import MemorySink, MemoryTopic
from consumers.protocols import Row
from tests.consumers.running_updater import RunningUpdater, note, titles


class MadeAgain:
    """Under the same name: it takes every write, and only a look at it tells."""

    def __init__(self) -> None:
        self.inner = MemorySink()
        self.made_again = False

    def stored(self, note_ids: Sequence[str]) -> Mapping[str, Row]:
        return self.inner.stored(note_ids)

    def upsert(self, rows: Sequence[Row]) -> None:
        self.inner.upsert(rows)

    def delete(self, note_ids: Sequence[str]) -> None:
        self.inner.delete(note_ids)

    def check(self) -> None:
        if self.made_again:
            raise CollectionGone("it was dropped and made again")


def test_whoever_takes_partitions_over_looks_before_it_writes() -> None:
    """Their last owner has noticed, has left the group and fills the new collection; this one goes on where it was."""
    topic = MemoryTopic(partitions=1)
    sink = MadeAgain()
    running = RunningUpdater(topic, sink=sink).start()
    topic.publish(b"a", note("a", "before"))
    running.wait_until_done()
    assert running.source.order(lambda: running.source.revoke([0])).wait(10)
    sink.made_again = True
    topic.publish(b"a", note("a", "an edit that the new filling may have passed already"))
    topic.publish(b"a", None)
    assert running.source.order(lambda: running.source.assign([0])).wait(10)
    running.join()
    assert isinstance(running.error, CollectionGone)
    assert titles(sink.inner.rows) == {"a": "before"}
    assert topic.committed == {0: 1}
