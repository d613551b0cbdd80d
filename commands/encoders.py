"""The encoder that the settings ask for."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from typing import Any

from consumers.encoder_process import EncoderProcess
from notellm.encoder import NoteEncoder
from notellm.settings import EncoderSettings

__all__ = ["load_encoder", "open_encoder"]


def open_encoder(settings: EncoderSettings) -> AbstractContextManager[EncoderProcess | NoteEncoder]:
    """For an updater: in a process of its own, unless ``in_process`` is set.

    Raises :class:`notellm.errors.EncoderError`, or :class:`notellm.errors.BundleError` in process.
    """
    if settings.in_process:
        return contextlib.nullcontext(load_encoder(settings))
    return EncoderProcess(
        "consumers.encoder_child:load_bundle",
        {**_arguments(settings), "path": str(settings.bundle)},
        memory_limit_mb=settings.memory_limit_mb,
        start_timeout_s=settings.start_timeout_s,
        answer_timeout_s=settings.answer_timeout_s,
    )


def load_encoder(settings: EncoderSettings) -> NoteEncoder:
    """In this process. Raises :class:`notellm.errors.BundleError` or :class:`notellm.errors.EncoderError`."""
    return NoteEncoder.load(settings.bundle, **_arguments(settings))


def _arguments(settings: EncoderSettings) -> dict[str, Any]:
    return settings.model_dump(include={"provider", "threads", "token_budget", "max_rows"})
