"""A batch of sequences inside the model: prefill after the instruction's prefix, then go on from the KV cache.

How a graph may be driven differs (:class:`notellm.bundle.Capabilities`); here, and nowhere else, that is made up for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from notellm.bundle import Capabilities
from notellm.graph_session import Cache, GraphOutput

__all__ = ["Graph", "SequenceRunner", "Sequences"]

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]

_EVERYTHING = Capabilities()


class Graph(Protocol):
    """What a runner needs of a loaded graph; see :class:`notellm.graph_session.GraphSession`.

    A graph is only ever given the caches that it made.
    """

    @property
    def provider(self) -> Literal["cpu", "cuda"]: ...

    def empty_cache(self, rows: int) -> Any: ...

    def run(
        self,
        input_ids: Ints,
        attention_mask: Ints,
        position_ids: Ints,
        last_index: Ints,
        past: Any,
        *,
        embeddings_only: bool = False,
    ) -> GraphOutput: ...


@dataclass(frozen=True)
class Sequences:
    """B sequences so far: ``mask [B, T]`` is the graph's attention_mask of them, ``logits [B, V]`` what comes next.

    Rows are padded on the right, so a slot and a position differ: ``next_position [B]`` counts real tokens only.
    """

    cache: Cache
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


def _mask_by_slot(sequences: Sequences, new: int) -> Ints:
    """New tokens stand behind all others, padding included."""
    return np.concatenate([sequences.mask, np.ones((sequences.rows, new), np.int64)], axis=1)


def _mask_by_length(sequences: Sequences, new: int) -> Ints:
    """New tokens stand at their row's own positions, over its padding; the mask only counts."""
    lengths = sequences.next_position + new
    return (np.arange(sequences.mask.shape[1] + new) < lengths[:, None]).astype(np.int64)


_MASKS: dict[str, Callable[[Sequences, int], Ints]] = {
    "batch_heads_tokens_dim": _mask_by_slot,
    "batch_heads_positions_dim": _mask_by_length,
}


class SequenceRunner:
    """Runs a graph over batches whose sequences all begin with ``prefix_ids``, in the way that the graph allows."""

    def __init__(self, graph: Graph, prefix_ids: Sequence[int], capabilities: Capabilities = _EVERYTHING) -> None:
        self._graph = graph
        self._mask_after = _MASKS[capabilities.kv_layout]
        self._several_at_once = capabilities.multi_token_past
        # A prompt after a cached prefix is several tokens after a past: it takes both.
        cached = capabilities.prefix_cache and capabilities.multi_token_past
        self._in_front = [] if cached else list(prefix_ids)
        self._prefix = self._read(prefix_ids) if cached else graph.empty_cache(1)
        self._shared = self._prefix

    def embed(self, batch: Sequence[Sequence[int]]) -> Floats:
        """Ids of each row -> ``[B, D]``: the embedding at each row's last id."""
        return self._graph.run(*self._feeds(batch), embeddings_only=True).embeddings

    def prefill(self, batch: Sequence[Sequence[int]]) -> tuple[Floats, Sequences]:
        """As :meth:`embed`, and the sequences to go on from."""
        feeds = self._feeds(batch)
        output = self._graph.run(*feeds)
        assert output.cache is not None
        assert output.logits is not None
        _, mask, _, last, past = feeds
        return output.embeddings, Sequences(output.cache, mask, past.tokens + last + 1, output.logits)

    def extend(self, sequences: Sequences, ids: Ints) -> Sequences:
        """Feed ``ids [B, S]``: the same number of new tokens to every row."""
        # A batch of one row has no row that could be shorter: every graph takes several tokens there.
        at_once = ids.shape[1] if self._several_at_once or sequences.rows == 1 else 1
        for start in range(0, ids.shape[1], at_once):
            sequences = self._feed(sequences, ids[:, start : start + at_once])
        return sequences

    def guide(self, sequences: Sequences, guidance: Sequence[int]) -> Sequences:
        """Feed the same ``guidance`` to every row."""
        return self.extend(sequences, np.tile(np.array(guidance, np.int64), (sequences.rows, 1)))

    def _feed(self, sequences: Sequences, ids: Ints) -> Sequences:
        rows, new = ids.shape
        mask = self._mask_after(sequences, new)
        positions = sequences.next_position[:, None] + np.arange(new)
        output = self._graph.run(ids, mask, positions, np.full(rows, new - 1), sequences.cache)
        assert output.cache is not None
        assert output.logits is not None
        return Sequences(output.cache, mask, sequences.next_position + new, output.logits)

    def _read(self, prefix_ids: Sequence[int]) -> Cache:
        ids = np.array([prefix_ids], np.int64)
        positions = np.arange(ids.shape[1])[None]
        last = np.array([ids.shape[1] - 1])
        output = self._graph.run(ids, np.ones_like(ids), positions, last, self._graph.empty_cache(1))
        assert output.cache is not None
        return output.cache

    def _prefix_of(self, rows: int) -> Cache:
        """The prefix's cache for each of ``rows``; batches of one size follow each other, so the last one is kept."""
        shared = self._shared
        if shared.rows != rows:
            self._shared = shared = self._prefix.select([0] * rows)
        return shared

    def _feeds(self, batch: Sequence[Sequence[int]]) -> tuple[Ints, Ints, Ints, Ints, Cache]:
        rows, cached = len(batch), self._prefix.tokens
        whole = [np.array([*self._in_front, *ids], np.int64) for ids in batch]
        lengths = np.array([len(ids) for ids in whole])
        longest = int(lengths.max())
        real = np.arange(longest) < lengths[:, None]
        ids = np.zeros((rows, longest), np.int64)
        ids[real] = np.concatenate(whole)
        mask = np.concatenate([np.ones((rows, cached), np.int64), real.astype(np.int64)], axis=1)
        positions = np.broadcast_to(np.arange(cached, cached + longest), (rows, longest))
        return ids, mask, positions, lengths - 1, self._prefix_of(rows)
