"""What flows through the updater: one change per valid record, tied to the assignment that it came with."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from consumers.protocols import Record
from notellm.messages import Note

__all__ = ["Change", "Lease", "Outcome", "by_key"]


class Lease:
    """Our right to a partition, from assignment to revocation. Set by the poller, read by the stages.

    ``draining``: begin nothing new of it. ``over``: write nothing more of it, its next owner has it now.
    """

    def __init__(self, partition: int) -> None:
        self.partition = partition
        self.draining = False
        self.over = False


@dataclass(frozen=True)
class Change:
    """A note's new version, or its deletion where ``note`` is None."""

    record: Record
    lease: Lease
    note_id: str
    note: Note | None


@dataclass(frozen=True)
class Outcome:
    """What became of a record: safe (in Milvus or a flushed dead letter), or abandoned."""

    lease: Lease
    offset: int
    safe: bool


Report = Callable[[Outcome], None]


def by_key(changes: Iterable[Change]) -> dict[str, list[Change]]:
    """The versions of each note, oldest first. The last one wins; the others stand behind it should it be refused."""
    versions: dict[str, list[Change]] = {}
    for change in changes:
        versions.setdefault(change.note_id, []).append(change)
    return versions
