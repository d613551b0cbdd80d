"""``model_version``: 16 hex of everything that decides a row in Milvus, and of nothing else."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import msgspec
import torch

from notellm.bundle import FORMAT_VERSION, Precision, TagLimits
from notellm.prompt import PromptLimits, Template, TokenIds
from training.model import NoteLLM

__all__ = ["model_version"]

_EXACT = ("fp32", "fp16")


def model_version(
    model: NoteLLM,
    *,
    tokenizer_json: bytes,
    template: Template,
    prompt_limits: PromptLimits,
    tag_limits: TagLimits,
    categories: list[str],
    token_ids: TokenIds,
    settings: Mapping[str, object],
    precision: Precision = "fp32",
    recipe: str = "",
) -> str:
    """The same model exported twice, here or elsewhere, has the same version; any change of a row's maker has another.

    ``settings`` is the part of the config that no tensor shows, such as the rotary base.
    fp32 and fp16 of one model fill the same collection: neither is part of it. A precision
    below fp16 is, with its recipe.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().to(torch.float32).contiguous().numpy().tobytes())
    digest.update(tokenizer_json)
    rest = [FORMAT_VERSION, template, prompt_limits, tag_limits, categories, token_ids, settings]
    if precision not in _EXACT:
        rest += [precision, recipe]
    digest.update(msgspec.json.encode(rest, order="sorted"))
    return digest.hexdigest()[:16]
