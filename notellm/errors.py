"""Every error that this package raises on purpose.

::

    NoteLLMError
    ├── InvalidMessage        a record that is neither a note nor a tombstone: a dead letter
    ├── SettingsError         a setting that is unknown, wrong or missing
    ├── BundleError           a bundle that is not there, not whole or not for this program
    └── EncoderError
        ├── RuntimeMissing    onnxruntime is not installed
        ├── ProviderMissing   the execution provider asked for is not to be had
        └── NoteRefused       the model cannot encode this one note
"""

from __future__ import annotations

__all__ = [
    "BundleError",
    "EncoderError",
    "InvalidMessage",
    "NoteLLMError",
    "NoteRefused",
    "ProviderMissing",
    "RuntimeMissing",
    "SettingsError",
]


class NoteLLMError(Exception):
    """Base of all. Its text is one line, made for the person who reads it."""


class InvalidMessage(NoteLLMError):
    """A record that the door refuses. ``reason`` is a short fixed word (a metric label), ``field`` what is wrong."""

    def __init__(self, reason: str, field: str, detail: str) -> None:
        super().__init__(f"{field}: {detail}")
        self.reason = reason
        self.field = field


class SettingsError(NoteLLMError):
    """A setting that is unknown, wrong or missing; says its name, its value and what is allowed."""


class BundleError(NoteLLMError):
    """A bundle that is not there, not whole or not for this program."""


class EncoderError(NoteLLMError):
    """The encoder cannot start or cannot go on."""


class RuntimeMissing(EncoderError):
    """onnxruntime is not installed."""


class ProviderMissing(EncoderError):
    """The execution provider that was asked for is not to be had here."""


class NoteRefused(EncoderError):
    """The model cannot encode one note; ``index`` is its place in the batch."""

    def __init__(self, index: int, detail: str) -> None:
        super().__init__(detail)
        self.index = index
