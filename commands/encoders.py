"""The encoder that the settings ask for."""

from __future__ import annotations

from notellm.encoder import NoteEncoder
from notellm.settings import EncoderSettings

__all__ = ["load_encoder"]


def load_encoder(settings: EncoderSettings) -> NoteEncoder:
    """Raises :class:`notellm.errors.BundleError` or :class:`notellm.errors.EncoderError`."""
    return NoteEncoder.load(
        settings.bundle,
        settings.provider,
        threads=settings.threads,
        token_budget=settings.token_budget,
        max_rows=settings.max_rows,
    )
