"""Which architectures can be exported. One more is one more row here, not a branch elsewhere."""

from __future__ import annotations

from dataclasses import dataclass

from export.errors import ExportError

__all__ = ["ARCHITECTURES", "Architecture", "architecture_of"]


@dataclass(frozen=True)
class Architecture:
    """Names by which a Hugging Face text config of this family gives the numbers that a bundle needs.

    ``decisive``: what of the config changes the result while every tensor stays the same.
    """

    name: str
    layers: str = "num_hidden_layers"
    kv_heads: str = "num_key_value_heads"
    max_positions: str = "max_position_embeddings"
    decisive: tuple[str, ...] = (
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "hidden_act",
        "rms_norm_eps",
        "rope_parameters",
    )


ARCHITECTURES = {
    "llama": Architecture("Llama"),
}


def architecture_of(model_type: str) -> Architecture:
    """By the ``model_type`` of a checkpoint's config."""
    if model_type not in ARCHITECTURES:
        supported = ", ".join(f"{architecture.name} ({key})" for key, architecture in ARCHITECTURES.items())
        raise ExportError(f"architecture {model_type!r} is not supported; supported: {supported}")
    return ARCHITECTURES[model_type]
