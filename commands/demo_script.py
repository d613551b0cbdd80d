"""What the demo publishes, in order: every note, then edits, deletions and a few records that are broken."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import msgspec

from notellm.messages import Note

__all__ = ["FEWEST_NOTES", "Publication", "demo_script"]

FEWEST_NOTES = 60
_SEED = 20260101
_OTHERS = 15  # edited twice, deleted and published again, or given a bad edit


class Publication(msgspec.Struct, frozen=True):
    """One record to publish; ``broken`` when it must become a dead letter."""

    key: bytes | None
    value: bytes | None
    broken: bool = False


def demo_script(notes: Sequence[Note]) -> list[Publication]:
    """All ``notes``, then at least a tenth of them edited, another tenth deleted, and broken ones in between.

    Half of the edits change the text; the others only its attributes, so the model must not run for them. Some notes
    are edited twice in a row, some deleted and published again, and some get a bad edit, which must leave them as
    they are.
    """
    draw = random.Random(_SEED)
    tenth = (len(notes) + 9) // 10
    chosen = draw.sample(list(notes), 2 * tenth + _OTHERS)
    edited, deleted, rest = chosen[:tenth], chosen[tenth : 2 * tenth], chosen[2 * tenth :]
    later: list[list[Publication]] = [[_edit(note, number)] for number, note in enumerate(edited)]
    later += [[_edit(note, 2 * number), _edit(note, 2 * number + 2)] for number, note in enumerate(rest[:5])]
    later += [[Publication(note.note_id.encode(), None)] for note in deleted]
    later += [[Publication(note.note_id.encode(), None), _note(note)] for note in rest[5:10]]
    later += [[broken] for broken in _broken(rest[10:])]
    draw.shuffle(later)
    return [_note(note) for note in notes] + [publication for group in later for publication in group]


def _note(note: Note) -> Publication:
    return Publication(note.note_id.encode(), msgspec.json.encode(note))


def _edit(note: Note, number: int) -> Publication:
    if number % 2:
        changed = msgspec.structs.replace(note, attributes={**note.attributes, "likes": number})
    else:
        changed = msgspec.structs.replace(note, title=f"{note.title} (edit {number // 2 + 1})".strip())
    return _note(changed)


def _broken(victims: Sequence[Note]) -> Iterator[Publication]:
    """One of each kind. Those with a victim's key are bad edits of a note that is there."""
    ids = [note.note_id for note in victims]
    yield Publication(ids[0].encode(), b'{"note_id": "' + ids[0].encode() + b'", "title": ', broken=True)
    # No key at all would do for us, but a compacted topic refuses it.
    yield Publication(b"", b'{"note_id": "without-key", "title": "nobody knows where I belong"}', broken=True)
    yield Publication(ids[1].encode(), b'{"note_id": "another", "title": "not my key"}', broken=True)
    yield Publication(ids[2].encode(), msgspec.json.encode({"note_id": ids[2], "title": 42}), broken=True)
    yield Publication(ids[3].encode(), msgspec.json.encode({"note_id": ids[3], "title": " "}), broken=True)
    yield Publication(ids[4].encode(), b"", broken=True)
    yield Publication(b"broken-\xff", b"{}", broken=True)
