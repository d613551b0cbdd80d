"""A batch of sequences inside the model: prefill after the cached prefix, then go on from the KV cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from notellm.graph_session import GraphOutput, KVCache

__all__ = ["Graph", "SequenceRunner", "Sequences"]

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]


class Graph(Protocol):
    """What a runner needs of a loaded graph; see :class:`notellm.graph_session.GraphSession`."""

    def empty_cache(self, rows: int) -> KVCache: ...

    def run(
        self,
        input_ids: Ints,
        attention_mask: Ints,
        position_ids: Ints,
        last_index: Ints,
        past: KVCache,
        *,
        embeddings_only: bool = False,
    ) -> GraphOutput: ...


@dataclass(frozen=True)
class Sequences:
    """B sequences so far: ``mask [B, T]`` tells the cache's real slots from padding, ``logits [B, V]`` what comes next.

    Rows are padded on the right, so a slot and a position differ: ``next_position [B]`` counts real tokens only.
    """

    cache: KVCache
    mask: Ints
    next_position: Ints
    logits: Floats

    @property
    def rows(self) -> int:
        return len(self.next_position)

    def select(self, rows: Sequence[int]) -> Sequences:
        """The sequences of ``rows``; where that is all of them, nothing is copied."""
        if list(rows) == list(range(self.rows)):
            return self
        return Sequences(self.cache.select(rows), self.mask[rows], self.next_position[rows], self.logits[rows])


class SequenceRunner:
    """Runs a graph over batches whose sequences all begin with ``prefix_ids``, whose cache is computed here, once."""

    def __init__(self, graph: Graph, prefix_ids: Sequence[int]) -> None:
        self._graph = graph
        ids = np.array([prefix_ids], np.int64)
        positions = np.arange(ids.shape[1])[None]
        output = graph.run(ids, np.ones_like(ids), positions, np.array([ids.shape[1] - 1]), graph.empty_cache(1))
        assert output.cache is not None
        self._prefix = output.cache

    def embed(self, batch: Sequence[Sequence[int]]) -> Floats:
        """Ids of each row -> ``[B, D]``: the embedding at each row's last id."""
        return self._graph.run(*self._feeds(batch), embeddings_only=True).embeddings

    def prefill(self, batch: Sequence[Sequence[int]]) -> tuple[Floats, Sequences]:
        """As :meth:`embed`, and the sequences to go on from."""
        feeds = self._feeds(batch)
        output = self._graph.run(*feeds)
        assert output.cache is not None
        assert output.logits is not None
        _, mask, _, last, _ = feeds
        return output.embeddings, Sequences(output.cache, mask, self._prefix.tokens + last + 1, output.logits)

    def extend(self, sequences: Sequences, ids: Ints) -> Sequences:
        """Feed ``ids [B, S]``: the same number of new tokens to every row."""
        rows, new = ids.shape
        mask = np.concatenate([sequences.mask, np.ones((rows, new), np.int64)], axis=1)
        positions = sequences.next_position[:, None] + np.arange(new)
        output = self._graph.run(ids, mask, positions, np.full(rows, new - 1), sequences.cache)
        assert output.cache is not None
        assert output.logits is not None
        return Sequences(output.cache, mask, sequences.next_position + new, output.logits)

    def guide(self, sequences: Sequences, guidance: Sequence[int]) -> Sequences:
        """Feed the same ``guidance`` to every row."""
        return self.extend(sequences, np.tile(np.array(guidance, np.int64), (sequences.rows, 1)))

    def _feeds(self, batch: Sequence[Sequence[int]]) -> tuple[Ints, Ints, Ints, Ints, KVCache]:
        rows, cached = len(batch), self._prefix.tokens
        lengths = np.array([len(ids) for ids in batch])
        longest = int(lengths.max())
        real = np.arange(longest) < lengths[:, None]
        ids = np.zeros((rows, longest), np.int64)
        ids[real] = np.concatenate([np.asarray(row, np.int64) for row in batch])
        mask = np.concatenate([np.ones((rows, cached), np.int64), real.astype(np.int64)], axis=1)
        positions = np.broadcast_to(np.arange(cached, cached + longest), (rows, longest))
        return ids, mask, positions, lengths - 1, self._prefix.select([0] * rows)
