"""The encoder that the settings ask for."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from consumers.encoder_process import EncoderProcess
from notellm.bundle import read_manifest
from notellm.encoder import NoteEncoder
from notellm.settings import EncoderSettings

__all__ = ["load_encoder", "open_encoder"]

log = logging.getLogger(__name__)


@contextmanager
def open_encoder(settings: EncoderSettings) -> Iterator[EncoderProcess | NoteEncoder]:
    """For an updater: in a process of its own, unless ``in_process`` is set. Warns where parity is not proven.

    Raises :class:`notellm.errors.EncoderError`, or :class:`notellm.errors.BundleError` in process.
    """
    with contextlib.nullcontext(load_encoder(settings)) if settings.in_process else _process(settings) as encoder:
        parity = read_manifest(settings.bundle).parity_on(encoder.provider)
        if parity is None or not parity.passed:
            log.warning(
                "bundle %s: its parity with torch is %s on %s; settle it with: notellm check --bundle %s --provider %s",
                settings.bundle, "unproven" if parity is None else "not what it should be", encoder.provider,
                settings.bundle, encoder.provider,
            )  # fmt: skip
        yield encoder


def _process(settings: EncoderSettings) -> EncoderProcess:
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
