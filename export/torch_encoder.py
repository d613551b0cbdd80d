"""A checkpoint that reads notes without being exported: the same encoder, driving the torch module that is traced.

So that a training can be judged before its export, and an export be held against what it came from.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from export.build import ExportPlan, draft_manifest
from export.checkpoint import load_checkpoint
from export.graph import NoteGraph
from notellm.bundle import TOKENIZER, Bundle
from notellm.encoder import NoteEncoder
from notellm.graph_session import GraphOutput, Ints

__all__ = ["open_torch_encoder"]


@contextmanager
def open_torch_encoder(
    source: str, *, categories: list[str] | None = None, token_budget: int = 2048, max_rows: int = 16
) -> Iterator[NoteEncoder]:
    """Load what :func:`export.checkpoint.load_checkpoint` takes, on a GPU where there is one; in float32.

    Prompt and limits, and ``categories`` unless they are given, are those that an export without options would have.
    Raises what loading raises.
    """
    checkpoint = load_checkpoint(source)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        checkpoint.tokenizer.backend_tokenizer.save(str(path / TOKENIZER))
        manifest = draft_manifest(ExportPlan(source=source, out=path, categories=categories), checkpoint, path)
        shape = (manifest.layers, manifest.kv_heads, manifest.head_dim)
        graph = TorchGraph(NoteGraph(checkpoint.model, checkpoint.architecture), *shape)
        yield NoteEncoder(Bundle(path, manifest), graph, token_budget=token_budget, max_rows=max_rows)


@dataclass(frozen=True)
class TorchCache:
    """As :class:`notellm.graph_session.KVCache`: L pairs of ``[B, H, tokens, K]``."""

    layers: list[tuple[Tensor, Tensor]]

    @property
    def tokens(self) -> int:
        return int(self.layers[0][0].shape[2])

    @property
    def rows(self) -> int:
        return int(self.layers[0][0].shape[0])

    def select(self, rows: Sequence[int]) -> TorchCache:
        index = torch.tensor(list(rows), device=self.layers[0][0].device)
        return TorchCache([(keys[index], values[index]) for keys, values in self.layers])


class TorchGraph:
    """As :class:`notellm.graph_session.GraphSession`, without ONNX Runtime."""

    def __init__(self, module: NoteGraph, layers: int, kv_heads: int, head_dim: int) -> None:
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._module = module.eval().to(self._device)
        self._layers, self._kv_heads, self._head_dim = layers, kv_heads, head_dim

    @property
    def provider(self) -> Literal["cpu", "cuda"]:
        return "cuda" if self._device.type == "cuda" else "cpu"

    def empty_cache(self, rows: int) -> TorchCache:
        empty = torch.zeros((rows, self._kv_heads, 0, self._head_dim), device=self._device)
        return TorchCache([(empty, empty)] * self._layers)

    @torch.inference_mode()
    def run(
        self,
        input_ids: Ints,
        attention_mask: Ints,
        position_ids: Ints,
        last_index: Ints,
        past: TorchCache,
        *,
        embeddings_only: bool = False,
    ) -> GraphOutput:
        feeds = [
            torch.tensor(array, dtype=torch.int64, device=self._device)
            for array in (input_ids, attention_mask, position_ids, last_index)
        ]
        embeddings, logits, present = self._module(*feeds, past.layers)
        if embeddings_only:
            return GraphOutput(embeddings.cpu().numpy(), None, None)
        return GraphOutput(embeddings.cpu().numpy(), logits.cpu().numpy(), TorchCache(present))
