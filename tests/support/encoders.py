"""A deterministic test encoder for the encoder's process, and notes that do to it what a real model's bugs would."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator, Sequence

from consumers.in_memory import HashEncoder
from notellm.encoder import EncodedBatch
from notellm.errors import EncoderError, NoteRefused
from notellm.messages import Note
from notellm.prompt import Prompt

__all__ = ["HOSTILE", "HostileEncoder", "hostile"]

HOSTILE = "tests.support.encoders:hostile"


class HostileEncoder(HashEncoder):
    """A :class:`HashEncoder` that reads a note's title, and obeys it."""

    def build_prompts(self, notes: Sequence[Note]) -> list[Prompt]:
        for note in notes:
            if note.title == "kill the tokenizer":
                os.kill(os.getpid(), signal.SIGSEGV)
        return super().build_prompts(notes)

    def stream(self, prompts: Sequence[Prompt]) -> Iterator[EncodedBatch]:
        titles = [prompt.text.split("\n")[0] for prompt in prompts]
        for batch in super().stream(prompts):
            for index in batch.indices:
                _obey(titles[index], index, tagged=batch.tags is not None)
            yield batch


def _obey(title: str, index: int, *, tagged: bool) -> None:
    if title == "segfault" or (title == "segfault at the tags" and tagged):
        os.kill(os.getpid(), signal.SIGSEGV)
    if title == "take all memory":
        taken = [bytearray(64 << 20) for _ in range(1 << 16)]
        del taken
    if title == "hang":
        time.sleep(3600)
    if title == "raise":
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    if title == "refuse":
        raise NoteRefused(index, "no, thank you")
    if title == "segfault once" and not os.path.exists(marker := os.environ["TEST_MARKER"]):  # noqa: PTH110
        with open(marker, "w"):  # noqa: PTH123
            os.kill(os.getpid(), signal.SIGSEGV)


def hostile(
    embedding_dim: int = 8,
    model_version: str = "0123456789abcdef",
    seconds_per_note: float = 0.0,
    broken_while: str = "",
) -> HostileEncoder:
    """``broken_while``: a file; while it is there, the model cannot be loaded."""
    if broken_while and os.path.exists(broken_while):  # noqa: PTH110
        raise EncoderError("bundle: its disk is away")
    return HostileEncoder(embedding_dim=embedding_dim, model_version=model_version, seconds_per_note=seconds_per_note)
