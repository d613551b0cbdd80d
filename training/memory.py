"""How many notes may go through the model at a time: an estimate, so that a training does not die at its first step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from notellm.settings import TrainingSettings
from training.errors import TrainingError
from training.note_rows import ANSWER_TOKENS

__all__ = ["bytes_per_note", "bytes_per_trained", "free_bytes", "memory_errors", "notes_that_fit"]

# Of what is free: the estimate is no measurement, and others use the machine as well.
_SHARE = 0.7
_MEMINFO = Path("/proc/meminfo")


def bytes_per_note(config: Any, tokens: int, *, checkpointing: bool, bytes_per_number: int) -> int:
    """Activations that the backward pass of one note of ``tokens`` ids needs.

    Per layer and token: about 20 vectors of the hidden size (norms, attention, LoRA), 8 of the MLP's, and attention's
    scores and probabilities; with checkpointing one vector per layer, and all that for one layer. On top, the logits of
    an answer and their gradient in float32. Measured for smollm2 on a CPU: 3.0 MB a token, 3.9 estimated.
    """
    hidden, layers = config.hidden_size, config.num_hidden_layers
    layer = 20 * hidden + 8 * config.intermediate_size + 4 * config.num_attention_heads * tokens
    kept = layers * hidden + layer if checkpointing else layers * layer
    return int(tokens * kept * bytes_per_number + 3 * ANSWER_TOKENS * config.vocab_size * 4)


def bytes_per_trained(*, autocast: bool, processes: int) -> int:
    """What each trained parameter takes once training goes on, beside itself: its gradient and AdamW's two moments in
    float32; autocast's copy of it in bf16; and the buckets in which several processes exchange gradients.
    """
    return 12 + (2 if autocast else 0) + (4 if processes > 1 else 0)


def free_bytes(device: torch.device) -> int:
    """Of the device that trains; of a machine without ``/proc``, what a laptop has."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if not _MEMINFO.exists():
        return 8 * 2**30
    fields = dict(line.split(":", 1) for line in _MEMINFO.read_text("ascii").splitlines())
    return int(fields["MemAvailable"].split()[0]) * 1024


def notes_that_fit(per_note: int, free: int, batch: int) -> int:
    """Notes of a chunk, at most ``batch``. Raises :class:`TrainingError` where there is no room for two."""
    fit = int(free * _SHARE / per_note)
    if fit < 2:
        raise TrainingError(
            f"memory: a note needs about {per_note / 1e9:.1f} GB and {free / 1e9:.1f} GB are free; lower "
            'training.note_tokens, set training.gradient_checkpointing = true or training.method = "lora", or take a '
            "smaller base"
        )
    return min(fit, batch)


@contextmanager
def memory_errors(settings: TrainingSettings) -> Iterator[None]:
    """What torch says of memory that it cannot get, as a line that says what to lower."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        told = isinstance(error, torch.OutOfMemoryError | MemoryError) or "allocate memory" in str(error)
        if not told:
            raise
        chunk = settings.chunk_notes or "as many as fit"
        less = "" if settings.method == "lora" else 'training.method = "lora" or '
        raise TrainingError(
            f"memory: not enough for this training; lower training.chunk_notes (now {chunk}), training.note_tokens "
            f"(now {settings.note_tokens}), or set {less}training.gradient_checkpointing = true: "
            f"{str(error).splitlines()[0]}"
        ) from None
