"""Which architectures can be exported. One more is one more row here, not a branch elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from export.errors import ExportError

__all__ = ["ARCHITECTURES", "Architecture", "architecture_of", "check_config", "max_positions", "sliding_window"]

_DECISIVE = (
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "rms_norm_eps",
    "rope_parameters",
)
_LAYER_TYPES = ("full_attention", "sliding_attention")
# The last two change with the length of what is read; see max_positions.
_ROTARY = ("default", "linear", "llama3", "yarn", "dynamic", "longrope")


@dataclass(frozen=True)
class Architecture:
    """Names by which a Hugging Face text config of this family gives the numbers that a bundle needs.

    ``decisive``: what of the config changes the result while every tensor stays the same.
    ``masks``: whether the model takes *one* mask for all layers, or one *by layer type*.
    ``windowed``: whether ``sliding_window`` of its config means anything to it.
    ``softcap``: the name of what bounds the logits, where the family has that.
    ``only``: values outside of which the graph would not be the model; anything else is refused.
    """

    name: str
    layers: str = "num_hidden_layers"
    kv_heads: str = "num_key_value_heads"
    max_positions: str = "max_position_embeddings"
    decisive: tuple[str, ...] = _DECISIVE
    masks: Literal["one", "by layer type"] = "one"
    windowed: bool = True
    softcap: str | None = None
    only: Mapping[str, tuple[object, ...]] = field(default_factory=dict)


ARCHITECTURES = {
    "llama": Architecture("Llama", windowed=False),
    "qwen2": Architecture("Qwen2", decisive=(*_DECISIVE, "sliding_window", "layer_types"), masks="by layer type"),
    "qwen3": Architecture("Qwen3", decisive=(*_DECISIVE, "sliding_window", "layer_types"), masks="by layer type"),
    # transformers' Mistral and Phi-3 do not look at layer_types: a checkpoint that has them means another model.
    "mistral": Architecture("Mistral", decisive=(*_DECISIVE, "sliding_window"), only={"layer_types": (None,)}),
    "gemma3_text": Architecture(
        "Gemma 3 (text)",
        decisive=(
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "hidden_activation",
            "rms_norm_eps",
            "rope_parameters",
            "query_pre_attn_scalar",
            "sliding_window",
            "layer_types",
            "final_logit_softcapping",
        ),
        masks="by layer type",
        softcap="final_logit_softcapping",
        only={"attn_logit_softcapping": (None,), "use_bidirectional_attention": (None, False)},
    ),
    "phi3": Architecture(
        "Phi-3",
        # max_position_embeddings: longrope's factor comes of it.
        decisive=(*_DECISIVE, "sliding_window", "max_position_embeddings"),
        only={"layer_types": (None,)},
    ),
}


def architecture_of(model_type: str) -> Architecture:
    """By the ``model_type`` of a checkpoint's config."""
    if model_type not in ARCHITECTURES:
        supported = ", ".join(f"{architecture.name} ({key})" for key, architecture in ARCHITECTURES.items())
        raise ExportError(f"architecture {model_type!r} is not supported; supported: {supported}")
    return ARCHITECTURES[model_type]


def check_config(architecture: Architecture, config: Any) -> None:
    """Raises :class:`ExportError` for a feature that the graph would leave out."""
    for name, allowed in architecture.only.items():
        _require(architecture, name, getattr(config, name, None), allowed)
    for layer_type in getattr(config, "layer_types", None) or ():
        _require(architecture, "layer_types", layer_type, _LAYER_TYPES)
    for rotary in _rotary_parameters(config):
        _require(architecture, "rope_type", rotary.get("rope_type", "default"), _ROTARY)


def sliding_window(architecture: Architecture, config: Any) -> int | None:
    """How many tokens a windowed layer sees, itself included; None where no layer is windowed."""
    window = getattr(config, "sliding_window", None) if architecture.windowed else None
    layer_types = getattr(config, "layer_types", None)
    if window is None or (layer_types is not None and "sliding_attention" not in layer_types):
        return None
    return int(window)


def max_positions(architecture: Architecture, config: Any) -> int:
    """How much the graph may read. Where the rotary embedding changes beyond a length, that length.

    A graph has one set of frequencies: in a batch, one long row would change the others'.
    """
    longest = int(getattr(config, architecture.max_positions))
    for rotary in _rotary_parameters(config):
        if rotary.get("rope_type") == "longrope":
            longest = min(longest, int(rotary["original_max_position_embeddings"]))
    return longest


def _rotary_parameters(config: Any) -> list[dict[str, Any]]:
    """One set, or one per layer type."""
    parameters = getattr(config, "rope_parameters", None) or {}
    nested = [part for part in parameters.values() if isinstance(part, dict)]
    return nested or [parameters]


def _require(architecture: Architecture, name: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed:
        raise ExportError(
            f"{architecture.name}: {name} is {value!r}, which the graph does not cover; "
            f"allowed: {', '.join(str(each) for each in allowed)}"
        )
