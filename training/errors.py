"""Every error that this package raises on purpose.

::

    notellm.errors.NoteLLMError
    └── CheckpointError      a NoteLLM checkpoint that is not whole, or not for this program; one line says why
"""

from __future__ import annotations

from notellm.errors import NoteLLMError

__all__ = ["CheckpointError"]


class CheckpointError(NoteLLMError):
    """A NoteLLM checkpoint that is not whole, or not for this program."""
