"""Every error that this package raises on purpose.

::

    notellm.errors.NoteLLMError
    ├── BaseModelError       a base model that cannot be loaded, or trained; one line says why
    ├── CheckpointError      a NoteLLM checkpoint that is not whole, or not for this program
    ├── TrainingDataError    pairs, notes, clicks or a split that cannot be read or do not fit each other
    └── TrainingError        a training that cannot start, or go on
"""

from __future__ import annotations

from notellm.errors import NoteLLMError

__all__ = ["BaseModelError", "CheckpointError", "TrainingDataError", "TrainingError"]


class BaseModelError(NoteLLMError):
    """A base model that cannot be loaded, or trained."""


class CheckpointError(NoteLLMError):
    """A NoteLLM checkpoint that is not whole, or not for this program."""


class TrainingDataError(NoteLLMError):
    """Pairs, notes, clicks or a split that cannot be read, or do not fit each other. Names file and field."""


class TrainingError(NoteLLMError):
    """A training that cannot start, or go on: its text says what to change."""
