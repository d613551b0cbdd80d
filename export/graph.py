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

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from training.model import NoteLLM

__all__ = ["OPSET", "NoteGraph", "kv_names", "write_onnx"]

OPSET = 23


class NoteGraph(nn.Module):
    """NoteLLM with the signature of the bundle's graph.

    Shapes: B rows, S new tokens, P cached tokens, D embedding, V vocabulary, L layers, H KV heads, K head size::

        input_ids      [B, S] int64      position_ids [B, S] int64
        attention_mask [B, P+S] int64    last_index   [B] int64
        past           L pairs of [B, H, P, K]
        -> note_embedding [B, D], logits [B, V], present: L pairs of [B, H, P+S, K]
    """

    def __init__(self, model: NoteLLM) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        last_index: Tensor,
        past: list[tuple[Tensor, Tensor]],
    ) -> tuple[Tensor, Tensor, list[tuple[Tensor, Tensor]]]:
        base = self.model.base
        cache = DynamicCache(ddp_cache_data=past)
        output = base.base_model(
            input_ids=input_ids,
            attention_mask=additive_mask(attention_mask, input_ids.shape[1], base.dtype),
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
        )
        rows = torch.arange(input_ids.shape[0], device=input_ids.device)
        hidden = output.last_hidden_state[rows, last_index]
        logits = base.get_output_embeddings()(hidden)
        present = [(layer.keys, layer.values) for layer in output.past_key_values.layers]
        return self.model.embed(hidden), logits, present


def additive_mask(attention_mask: Tensor, new_tokens: int, dtype: torch.dtype) -> Tensor:
    """``[B, P+S]`` of 0/1 -> ``[B, 1, S, P+S]`` of 0/-max: causal by slot, padding hidden.

    Every slot may look at itself, so that no row of the softmax is masked out whole (that would be NaN).
    """
    keys = attention_mask.shape[1]
    key_slot = torch.arange(keys, device=attention_mask.device)
    query_slot = torch.arange(new_tokens, device=attention_mask.device) + (keys - new_tokens)
    causal = key_slot[None, :] <= query_slot[:, None]
    itself = key_slot[None, :] == query_slot[:, None]
    visible = (causal[None] & (attention_mask[:, None, :] > 0)) | itself[None]
    return torch.where(visible, 0.0, torch.finfo(dtype).min).to(dtype)[:, None]


def kv_names(prefix: str, layers: int) -> list[str]:
    """``past_key_values.0.key, past_key_values.0.value, ...``: the order in which the graph takes and gives them."""
    return [f"{prefix}.{layer}.{part}" for layer in range(layers) for part in ("key", "value")]


def write_onnx(model: NoteLLM, path: Path) -> None:
    """Trace ``model`` and write ``path`` with its weights beside it in ``path.name + ".data"``."""
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
    with torch.no_grad(), _quiet():
        program = torch.onnx.export(
            NoteGraph(model).eval(),
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
    program.save(str(path), external_data=True)


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
