"""Every error that this package raises on purpose.

::

    notellm.errors.NoteLLMError
    ├── UpdaterError             the updater cannot start or cannot go on; one line says why
    │   ├── OffsetOutOfRange     a committed offset is no longer in the topic
    │   ├── CollectionMismatch   the collection that is there is not this model's
    │   ├── CollectionGone       the collection was dropped behind the updater's back
    │   └── SecondWriter         another updater writes to the same Milvus Lite server
    ├── Unavailable              nothing is wrong with the notes: try again, for ever
    │   ├── EncoderUnavailable   the encoder's process does not start
    │   └── SinkUnavailable      Milvus is away, slow or out of quota
    ├── RowRefused               Milvus refuses a row for its own content: a dead letter
    └── Stopped                  the updater was told to stop while it waited
"""

from __future__ import annotations

from typing import ClassVar

from notellm.errors import NoteLLMError

__all__ = [
    "CollectionGone",
    "CollectionMismatch",
    "EncoderUnavailable",
    "OffsetOutOfRange",
    "RowRefused",
    "SecondWriter",
    "SinkUnavailable",
    "Stopped",
    "Unavailable",
    "UpdaterError",
]


class UpdaterError(NoteLLMError):
    """The updater cannot start or cannot go on."""


class OffsetOutOfRange(UpdaterError):
    """A committed offset is no longer in the topic: notes were lost before they were read."""


class CollectionMismatch(UpdaterError):
    """The collection that is there is not this model's."""


class CollectionGone(UpdaterError):
    """The collection was dropped while the updater ran: whoever starts again creates it and fills it anew."""


class SecondWriter(UpdaterError):
    """Another updater writes to the same Milvus Lite server, which takes one writer."""


class Unavailable(NoteLLMError):
    """Something cannot be had now, and nothing is wrong with the notes. ``what`` is its name."""

    what: ClassVar[str]


class EncoderUnavailable(Unavailable):
    """The encoder's process does not start, or cannot encode even a harmless note."""

    what = "the encoder"


class SinkUnavailable(Unavailable):
    """Milvus cannot be reached or will not take anything now."""

    what = "Milvus"


class RowRefused(NoteLLMError):
    """Milvus refuses at least one of the rows for what it holds."""


class Stopped(NoteLLMError):
    """The updater was told to stop while it waited for something."""
