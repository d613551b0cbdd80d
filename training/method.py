"""What of a base is trained, where the settings leave it open."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from notellm.settings import TrainingSettings
from training.base_model import count_parameters
from training.checkpoint_folder import BASE, read_description
from training.errors import TrainingError

__all__ = ["choose_base", "choose_method"]

# A billion of them take 22 GB with gradients and moments, which one GPU still has; several billions do not fit any.
_ALL_WEIGHTS_UP_TO: Final = 1_000_000_000


def choose_method(settings: TrainingSettings, base: str, begin: Path | None) -> TrainingSettings:
    """``settings`` with ``method`` settled.

    ``auto`` is what was trained before, where there is a run to go on from (``begin``). Else it is all weights, which
    finds more (docs/results.md), and an adapter for a base of more than a billion parameters. Raises
    :class:`BaseModelError` and :class:`CheckpointError`.
    """
    if settings.method != "auto":
        return settings
    whole = count_parameters(base) <= _ALL_WEIGHTS_UP_TO if begin is None else _is_whole(begin)
    return settings.model_copy(update={"method": "full" if whole else "lora"})


def choose_base(settings: TrainingSettings, base: str, begin: Path | None) -> str:
    """What to load: a run that was trained whole has a base of its own.

    Raises :class:`TrainingError` where ``begin`` was trained by the other method, and :class:`CheckpointError`.
    """
    if begin is None:
        return base
    whole = _is_whole(begin)
    if whole != (settings.method == "full"):
        trained = "full" if whole else "lora"
        raise TrainingError(
            f"--from {begin}: was trained with training.method = {trained!r}, and cannot go on with {settings.method!r}"
        )
    return str(begin / BASE) if whole else base


def _is_whole(run: Path) -> bool:
    return not read_description(run).adapter
