"""A checkpoint in memory that can be exported: NoteLLM, tokenizer, token ids, and the names of its architecture."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedTokenizerFast

from export.architectures import Architecture, architecture_of, check_config
from notellm.prompt import TokenIds
from training.base_model import load_notellm
from training.checkpoint_folder import Description
from training.model import NoteLLM

__all__ = ["Checkpoint", "load_checkpoint"]


@dataclass(frozen=True)
class Checkpoint:
    """``name`` is what the bundle calls its base; it holds no path of this machine."""

    name: str
    model: NoteLLM
    tokenizer: PreTrainedTokenizerFast
    architecture: Architecture
    token_ids: TokenIds
    description: Description | None

    @property
    def weight_bytes(self) -> int:
        """Size of the weights in float32, a tied table counted once."""
        return sum(parameter.numel() * 4 for parameter in self.model.parameters())


def load_checkpoint(source: str) -> Checkpoint:
    """Load what :func:`training.base_model.load_notellm` takes, if its architecture can be exported.

    Raises :class:`export.errors.ExportError`, :class:`training.errors.BaseModelError` or
    :class:`training.errors.CheckpointError` with one line that says what is wrong.
    """
    loaded = load_notellm(source, check_type=architecture_of)
    config = loaded.model.base.config
    architecture = architecture_of(config.model_type)
    check_config(architecture, config.get_text_config())
    return Checkpoint(loaded.name, loaded.model, loaded.tokenizer, architecture, loaded.token_ids, loaded.description)
