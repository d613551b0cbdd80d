"""Every error that this package raises on purpose.

::

    NoteLLMError
    └── StreamsError            clicks cannot be read or kept
        ├── SourceError         a file or topic of clicks or notes that cannot be read, or is not what it should be
        ├── EngineError         the co-occurrence engine is not installed, or gave up
        ├── SnapshotError       a snapshot that is not there, not whole, or being written by another run
        └── WorkerError         the Faust worker cannot start or cannot go on
"""

from __future__ import annotations

from notellm.errors import NoteLLMError

__all__ = ["EngineError", "SnapshotError", "SourceError", "StreamsError", "WorkerError"]


class StreamsError(NoteLLMError):
    """Clicks cannot be read or kept."""


class SourceError(StreamsError):
    """A file or topic of clicks or notes that cannot be read, or is not what it should be."""


class EngineError(StreamsError):
    """The co-occurrence engine is not installed, or gave up."""


class SnapshotError(StreamsError):
    """A snapshot that is not there, not whole, or being written by another run."""


class WorkerError(StreamsError):
    """The Faust worker cannot start or cannot go on."""
