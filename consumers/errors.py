"""Every error that this package raises on purpose.

::

    notellm.errors.NoteLLMError
    ├── UpdaterError             the updater cannot start or cannot go on; one line says why
    │   ├── OffsetOutOfRange     a committed offset is no longer in the topic
    │   ├── CollectionMismatch   the collection that is there is not this model's
    │   └── SecondWriter         another updater writes to the same Milvus Lite server
    ├── SinkUnavailable          Milvus is away, slow or out of quota: try again, for ever
    ├── RowRefused               Milvus refuses a row for its own content: a dead letter
    └── Stopped                  the updater was told to stop while it waited
"""

from __future__ import annotations

from notellm.errors import NoteLLMError

__all__ = [
    "CollectionMismatch",
    "OffsetOutOfRange",
    "RowRefused",
    "SecondWriter",
    "SinkUnavailable",
    "Stopped",
    "UpdaterError",
]


class UpdaterError(NoteLLMError):
    """The updater cannot start or cannot go on."""


class OffsetOutOfRange(UpdaterError):
    """A committed offset is no longer in the topic: notes were lost before they were read."""


class CollectionMismatch(UpdaterError):
    """The collection that is there is not this model's."""


class SecondWriter(UpdaterError):
    """Another updater writes to the same Milvus Lite server, which takes one writer."""


class SinkUnavailable(NoteLLMError):
    """Milvus cannot be reached or will not take anything now. Nothing is wrong with the rows."""


class RowRefused(NoteLLMError):
    """Milvus refuses at least one of the rows for what it holds."""


class Stopped(NoteLLMError):
    """The updater was told to stop while it waited for something."""
