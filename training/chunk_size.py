"""How many notes of a batch go through the model at a time."""

from __future__ import annotations

import os

import torch
from accelerate import Accelerator
from torch import nn

from notellm.settings import TrainingSettings
from training.base_model import Base
from training.memory import bytes_per_note, bytes_per_trained, free_bytes, notes_that_fit
from training.note_rows import ANSWER_TOKENS, RowBuilder
from training.watch import Watch

__all__ = ["choose_chunk"]


def choose_chunk(
    base: Base,
    trained: nn.Module,
    builder: RowBuilder,
    settings: TrainingSettings,
    accelerator: Accelerator,
    watch: Watch,
) -> int:
    """The setting, or what the memory that is free has room for.

    Raises :class:`training.errors.TrainingError` where that is less than two notes.
    """
    batch = 2 * settings.batch_pairs
    if settings.chunk_notes:
        return min(settings.chunk_notes, batch)
    # A note that fills its budget; the instruction is read once per chunk, but where nothing is cached.
    instruction = len(builder.prefix_ids) if settings.gradient_checkpointing else 0
    per_note = bytes_per_note(
        base.model.config.get_text_config(),
        instruction + builder.longest_question + ANSWER_TOKENS,
        checkpointing=settings.gradient_checkpointing,
        bytes_per_number=2 if accelerator.mixed_precision == "bf16" else 4,
    )
    chunk = notes_that_fit(per_note, _free_everywhere(trained, accelerator), batch)
    if chunk < batch:
        watch.say(
            f"memory: the {batch} notes of a batch go through the model {chunk} at a time, which costs a pass more; "
            "training.chunk_notes sets another number"
        )
    return chunk


def _free_everywhere(trained: nn.Module, accelerator: Accelerator) -> int:
    """What is left for activations, the same for every process: chunked and whole batches talk in another order."""
    device = accelerator.device
    free = free_bytes(device)
    if device.type == "cpu":
        free //= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    numbers = sum(part.numel() for part in trained.parameters() if part.requires_grad)
    free -= numbers * bytes_per_trained(
        autocast=accelerator.mixed_precision == "bf16", processes=accelerator.num_processes
    )
    return int(accelerator.gather(torch.tensor([max(free, 0)], device=device)).min())
