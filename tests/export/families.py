"""A tiny random checkpoint of every family, with the feature that tells it from the others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from tests.export.tiny import PROJECTION_DIM, save_tokenizer
from training.checkpoint_folder import PROJECTION

__all__ = ["FAMILIES", "HIDDEN", "WINDOW", "save_family"]

# Enough for a fair test of 4 bits: the error of a sum of 128 products is smaller than that of one of 64.
HIDDEN = 128
# The shortest of the parity notes' prompts is longer, so every row is cut by it.
WINDOW = 24

_ROTARY = {"rope_type": "default", "rope_theta": 10000.0}

FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2": {
        # A little more than the others, or its biases make all notes alike.
        "initializer_range": 0.07,
        "tie_word_embeddings": True,
        "use_sliding_window": True,
        "sliding_window": WINDOW,
        "max_window_layers": 1,
    },
    "qwen3": {"tie_word_embeddings": False, "head_dim": 64},
    "mistral": {"tie_word_embeddings": False, "sliding_window": WINDOW},
    "gemma3_text": {
        "tie_word_embeddings": True,
        "head_dim": 32,
        "query_pre_attn_scalar": 32,
        "sliding_window": WINDOW,
        "layer_types": ["sliding_attention", "full_attention"],
        "final_logit_softcapping": 2.0,
        "pad_token_id": 0,
    },
    "phi3": {
        "tie_word_embeddings": False,
        "sliding_window": WINDOW,
        "pad_token_id": 0,
        "rope_parameters": {**_ROTARY, "partial_rotary_factor": 0.5},
    },
}


def save_family(folder: Path, model_type: str, **changes: Any) -> Path:
    """The weights are the same at every call. Biases and norms are random too: a graph that drops one is wrong."""
    folder.mkdir(parents=True, exist_ok=True)
    config = AutoConfig.for_model(
        model_type,
        **{
            "vocab_size": save_tokenizer(folder),
            "hidden_size": HIDDEN,
            "intermediate_size": HIDDEN * 3 // 2,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 1024,
            "initializer_range": 0.05,
            "bos_token_id": 0,
            "eos_token_id": 1,
            **FAMILIES[model_type],
            **changes,
        },
    )
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(7)
        model = AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
        model.save_pretrained(folder)
        save_file({"weight": torch.randn(PROJECTION_DIM, HIDDEN)}, folder / PROJECTION)
    return folder
