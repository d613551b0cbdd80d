"""States of a training that a killed run goes on from: one folder each, whole or not there.

::

    RUN/states/step-00000050/    parameters.safetensors   what is trained, and nothing else
                                 progress.pt              optimiser, schedule
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from training.errors import TrainingError

if TYPE_CHECKING:
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler

__all__ = ["load_state", "newest_state", "save_state"]

_PARAMETERS = "parameters.safetensors"
_PROGRESS = "progress.pt"


def save_state(
    states: Path, step: int, model: nn.Module, optimizer: Optimizer, scheduler: LRScheduler, *, keep: int
) -> None:
    """After ``step`` steps. Older states go, until ``keep`` are left."""
    partial = states / f".step-{step:08d}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    trained = {name: part.detach().contiguous() for name, part in model.named_parameters() if part.requires_grad}
    save_file(trained, partial / _PARAMETERS)
    progress = {"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}
    torch.save(progress, partial / _PROGRESS)
    for file in partial.iterdir():
        # A rename may reach the disk before the files do.
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    whole = states / f"step-{step:08d}"
    shutil.rmtree(whole, ignore_errors=True)
    partial.rename(whole)
    for old in sorted(states.glob("step-*"))[:-keep]:
        shutil.rmtree(old)


def newest_state(states: Path) -> tuple[int, Path] | None:
    """The number of steps that are done, and the folder that holds them."""
    found = sorted(states.glob("step-*"))
    return (int(found[-1].name.removeprefix("step-")), found[-1]) if found else None


def load_state(folder: Path, model: nn.Module, optimizer: Optimizer, scheduler: LRScheduler) -> None:
    """Raises :class:`TrainingError` where it is of another model, or cannot be read."""
    trained = {name: part for name, part in model.named_parameters() if part.requires_grad}
    try:
        tensors = load_file(folder / _PARAMETERS)
        progress: dict[str, Any] = torch.load(folder / _PROGRESS, map_location="cpu", weights_only=True)
        if tensors.keys() != trained.keys():
            raise TrainingError(f"state {folder}: is of another model; start anew with --force")
        with torch.no_grad():
            for name, part in trained.items():
                part.copy_(tensors[name])
        optimizer.load_state_dict(progress["optimizer"])
        scheduler.load_state_dict(progress["scheduler"])
    except (OSError, SafetensorError, RuntimeError, ValueError, KeyError, EOFError) as error:
        raise TrainingError(f"state {folder}: cannot be read: {error}; remove it, or start anew with --force") from None
    except UnpicklingError:
        # What torch says is an essay, and advises to trust the file.
        raise TrainingError(
            f"state {folder}: cannot be read: {_PROGRESS} is damaged; remove it, or start anew with --force"
        ) from None
