"""The ONNX graph of a bundle: one pass yields an embedding, the logits of one position and the KV cache.

Traced with ``torch.onnx.export(dynamo=True, opset_version=23)``: attention, rotary embedding and RMS norm become
native ONNX operators, and a past with several new tokens in a batch works. That is what lets the encoder cache the
instruction's prefix and feed guidance tokens at once.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

import onnx_ir as ir
import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from export.architectures import Architecture, sliding_window
from training.model import NoteLLM

__all__ = ["OPSET", "NoteGraph", "kv_names", "save_graph", "to_half", "trace"]

OPSET = 23
# Far below any attention score, and still finite when a kernel has added a score or multiplied by log2(e).
_HIDDEN = {torch.float32: -1e30, torch.float16: -3e4}


class NoteGraph(nn.Module):
    """NoteLLM with the signature of the bundle's graph.

    Shapes: B rows, S new tokens, P cached tokens, D embedding, V vocabulary, L layers, H KV heads, K head size::

        input_ids      [B, S] int64      position_ids [B, S] int64
        attention_mask [B, P+S] int64    last_index   [B] int64
        past           L pairs of [B, H, P, K]
        -> note_embedding [B, D], logits [B, V], present: L pairs of [B, H, P+S, K]

    Embedding and logits are float32, and the projection is computed in it, whatever the base's own precision.
    """

    def __init__(self, model: NoteLLM, architecture: Architecture) -> None:
        super().__init__()
        self.model = model
        config = model.base.config.get_text_config()
        self.by_layer_type = architecture.masks == "by layer type"
        self.window = sliding_window(architecture, config)
        self.softcap = getattr(config, architecture.softcap, None) if architecture.softcap else None

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        last_index: Tensor,
        past: list[tuple[Tensor, Tensor]],
    ) -> tuple[Tensor, Tensor, list[tuple[Tensor, Tensor]]]:
        base = self.model.base
        # Without a config: every layer keeps all tokens, also those with a window. A window counts real tokens, which
        # in a padded batch are not the last slots of the cache; the mask picks them.
        cache = DynamicCache(ddp_cache_data=past)
        output = base.base_model(
            input_ids=input_ids,
            attention_mask=self.masks(attention_mask, input_ids.shape[1]),
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
        )
        rows = torch.arange(input_ids.shape[0], device=input_ids.device)
        hidden = output.last_hidden_state[rows, last_index]
        logits = base.get_output_embeddings()(hidden).float()
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        present = [(layer.keys, layer.values) for layer in output.past_key_values.layers]
        return self.model.embed(hidden.float()), logits, present

    def masks(self, attention_mask: Tensor, new_tokens: int) -> Tensor | dict[str, Tensor]:
        """As the family takes them: one for all layers, or one by layer type."""
        dtype = self.model.base.dtype
        if not self.by_layer_type:
            return additive_mask(attention_mask, new_tokens, dtype, self.window)
        masks = {"full_attention": additive_mask(attention_mask, new_tokens, dtype)}
        if self.window is not None:
            masks["sliding_attention"] = additive_mask(attention_mask, new_tokens, dtype, self.window)
        return masks


def additive_mask(attention_mask: Tensor, new_tokens: int, dtype: torch.dtype, window: int | None = None) -> Tensor:
    """``[B, P+S]`` of 0/1 -> ``[B, 1, S, P+S]`` of 0 or far below: causal by slot, padding hidden.

    ``window`` hides what is that many *real* tokens back, or more: padding between two tokens does not count.
    Every slot may look at itself, so that no row of the softmax is masked out whole (that would be NaN).
    """
    keys = attention_mask.shape[1]
    key_slot = torch.arange(keys, device=attention_mask.device)
    query_slot = torch.arange(new_tokens, device=attention_mask.device) + (keys - new_tokens)
    causal = key_slot[None, :] <= query_slot[:, None]
    itself = key_slot[None, :] == query_slot[:, None]
    visible = causal[None] & (attention_mask[:, None, :] > 0)
    if window is not None:
        count = attention_mask.cumsum(dim=1)
        visible = visible & (count[:, keys - new_tokens :, None] - count[:, None, :] < window)
    return torch.where(visible | itself[None], 0.0, _HIDDEN[dtype]).to(dtype)[:, None]


def to_half(base: PreTrainedModel) -> None:
    """Float16 in place. Its buffers (rotary frequencies, say) stay float32, as they do when transformers loads halves.

    Frequencies in float16 would be wrong by a tenth of a radian at the hundredth token.
    """
    exact = {name: buffer.clone() for name, buffer in base.named_buffers()}
    base.half()
    for name, buffer in base.named_buffers():
        buffer.data = exact[name]


@contextlib.contextmanager
def _fixed_rotary(base: PreTrainedModel) -> Iterator[None]:
    """Without the branch on length that some rotary embeddings have; ``max_positions`` keeps the graph below it."""
    changed: list[tuple[nn.Module, object]] = []
    for module in base.modules():
        kind = getattr(module, "rope_type", None)
        if kind is not None:
            changed.append((module, kind))
            fixed = dict.fromkeys(kind, "default") if isinstance(kind, dict) else "default"
            setattr(module, "rope_type", fixed)  # noqa: B010 - mypy takes it for a module's parameter
    try:
        yield
    finally:
        for module, kind in changed:
            setattr(module, "rope_type", kind)  # noqa: B010


def kv_names(prefix: str, layers: int) -> list[str]:
    """``past_key_values.0.key, past_key_values.0.value, ...``: the order in which the graph takes and gives them."""
    return [f"{prefix}.{layer}.{part}" for layer in range(layers) for part in ("key", "value")]


def trace(model: NoteLLM, architecture: Architecture) -> ir.Model:
    """Trace ``model``; the weights are shared with it, not copied."""
    config = model.base.config.get_text_config()
    layers = int(config.num_hidden_layers)
    heads = int(config.num_key_value_heads)
    head_dim = int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    dtype = model.base.dtype
    # No dimension of the example may be 1 or equal another one, or the tracer takes it for a constant.
    rows, new, cached = 2, 7, 3
    example = (
        torch.zeros(rows, new, dtype=torch.int64),
        torch.ones(rows, cached + new, dtype=torch.int64),
        torch.arange(cached, cached + new).repeat(rows, 1),
        torch.tensor([new - 1, new - 3]),
        [
            (
                torch.zeros(rows, heads, cached, head_dim, dtype=dtype),
                torch.zeros(rows, heads, cached, head_dim, dtype=dtype),
            )
            for _ in range(layers)
        ],
    )
    dynamic = torch.export.Dim.DYNAMIC
    any_kv = {0: dynamic, 2: dynamic}
    shapes = (
        {0: dynamic, 1: dynamic},
        {0: dynamic, 1: dynamic},
        {0: dynamic, 1: dynamic},
        {0: dynamic},
        [(any_kv, any_kv) for _ in range(layers)],
    )
    with torch.no_grad(), _quiet(), _fixed_rotary(model.base):
        program = torch.onnx.export(
            NoteGraph(model, architecture).eval(),
            example,
            input_names=[
                "input_ids",
                "attention_mask",
                "position_ids",
                "last_index",
                *kv_names("past_key_values", layers),
            ],
            # Not "embedding": that name clashes with a node inside the graph.
            output_names=["note_embedding", "logits", *kv_names("present", layers)],
            dynamic_shapes=shapes,
            dynamo=True,
            opset_version=OPSET,
            verbose=False,
        )
    if program is None:
        raise RuntimeError("torch.onnx.export returned no program")
    _norms_in_float32(program.model)
    return program.model


def _norms_in_float32(model: ir.Model) -> None:
    """A norm that is computed in float32 in a float16 graph (Gemma's) gets the cast of its input back.

    The exporter takes that cast for part of ``RMSNormalization``, which ONNX Runtime has for one type at a time.
    """
    for node in list(model.graph):
        if node.op_type != "RMSNormalization":
            continue
        given, scale = node.inputs[0], node.inputs[1]
        if given is not None and scale is not None and given.dtype != scale.dtype:
            wide = ir.node("Cast", [given], {"to": ir.DataType.FLOAT}, name=f"{node.name}_wide")
            model.graph.insert_before(node, wide)
            node.replace_input_with(0, wide.outputs[0])


def save_graph(graph: ir.Model, path: Path) -> None:
    """Write ``path`` with its weights beside it in ``path.name + ".data"``."""
    for node in graph.graph.all_nodes():
        # Stack traces of the tracer: they hold paths of this machine.
        node.metadata_props.clear()
    ir.save(graph, path, external_data=f"{path.name}.data")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter prints its steps and warns about its own internals: neither says anything to our users."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
