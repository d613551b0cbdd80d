"""Whatever way the same tokens reach the graph, and whatever the graph can take, the model says the same."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from notellm.bundle import Capabilities, open_bundle
from notellm.graph_session import GraphOutput, GraphSession, Ints, KVCache
from notellm.sequences import SequenceRunner
from tests.export.tiny import tiny

ROWS = st.lists(st.lists(st.integers(2, 399), min_size=1, max_size=20), min_size=1, max_size=6)
GUIDANCE = st.lists(st.integers(2, 399), min_size=1, max_size=5)
PREFIX = [5, 6, 7, 8]
BOUND = 1e-4
ALL_CAPABILITIES = [
    Capabilities(prefix_cache=prefix_cache, multi_token_past=multi_token_past, kv_layout=layout)
    for prefix_cache, multi_token_past, layout in itertools.product(
        (True, False), (True, False), ("batch_heads_tokens_dim", "batch_heads_positions_dim")
    )
]
each_capability_set = pytest.mark.parametrize(
    "capabilities",
    ALL_CAPABILITIES,
    ids=lambda c: f"prefix={c.prefix_cache}-several={c.multi_token_past}-{c.kv_layout.split('_')[2]}",
)


@dataclass
class PaperGraph:
    """One attention head, worked out in numpy as plainly as can be. It takes nothing that it cannot do."""

    capabilities: Capabilities
    shapes: list[tuple[int, int, int]] = field(default_factory=list)
    """Rows, new tokens and cached tokens of every run."""

    VOCABULARY, SIZE, POSITIONS = 50, 8, 200
    _draw = np.random.default_rng(3)
    tokens = _draw.normal(size=(VOCABULARY, SIZE))
    places = _draw.normal(size=(POSITIONS, SIZE))
    to_query, to_key, to_value = _draw.normal(size=(3, SIZE, SIZE))

    def alone(self, ids: Sequence[int]) -> np.ndarray[Any, Any]:
        """What to expect: the last token's output, of one row, with neither padding nor cache."""
        x = self.tokens[ids] + self.places[: len(ids)]
        scores = x @ self.to_key @ (x[-1] @ self.to_query)
        weights = np.exp(scores - scores.max())
        return (weights / weights.sum()) @ (x @ self.to_value)

    def empty_cache(self, rows: int) -> KVCache:
        return self._cache(np.zeros((rows, 0, self.SIZE)), np.zeros((rows, 0, self.SIZE)))

    def run(
        self, ids: Ints, mask: Ints, positions: Ints, last: Ints, past: KVCache, *, embeddings_only: bool = False
    ) -> GraphOutput:
        (rows, new), cached = ids.shape, past.tokens
        self.shapes.append((rows, new, cached))
        can = self.capabilities
        assert past.rows == rows == len(mask) == len(last)
        assert new == 1 or not cached or rows == 1 or can.multi_token_past
        x = self.tokens[ids] + self.places[positions]
        old_keys, old_values = (value.numpy()[:, 0] for value in past.values)
        assert mask.shape[1] == cached + new
        if can.kv_layout == "batch_heads_tokens_dim":
            keys = np.concatenate([old_keys, x @ self.to_key], axis=1)
            values = np.concatenate([old_values, x @ self.to_value], axis=1)
            slots = np.tile(np.arange(cached, cached + new), (rows, 1))
            real = mask > 0
        else:
            lengths = mask.sum(axis=1)
            assert (mask == (np.arange(mask.shape[1]) < lengths[:, None])).all()
            assert (positions[np.arange(rows), last] == lengths - 1).all()
            slots = positions
            spare = ((0, 0), (0, new), (0, 0))
            keys, values = np.pad(old_keys, spare), np.pad(old_values, spare)
            each = np.arange(rows)[:, None]
            keys[each, slots], values[each, slots] = x @ self.to_key, x @ self.to_value
            real = np.ones(keys.shape[:2], bool)
        causal = np.arange(keys.shape[1]) <= slots[:, :, None]
        scores = np.where(causal & real[:, None], (x @ self.to_query) @ keys.transpose(0, 2, 1), -np.inf)
        weights = np.exp(scores - scores.max(axis=2, keepdims=True))
        output = ((weights / weights.sum(axis=2, keepdims=True)) @ values)[np.arange(rows), last]
        return GraphOutput(output, None if embeddings_only else output, self._cache(keys, values))

    @staticmethod
    def _cache(*arrays: np.ndarray[Any, Any]) -> KVCache:
        return KVCache([onnxruntime.OrtValue.ortvalue_from_numpy(array[:, None].copy()) for array in arrays])


SHORT_ROWS = st.lists(st.lists(st.integers(0, 49), min_size=1, max_size=12), min_size=1, max_size=5)
STEPS = st.lists(st.lists(st.integers(0, 49), min_size=1, max_size=4), min_size=1, max_size=5)


@each_capability_set
@settings(deadline=None, max_examples=25)
@given(rows=SHORT_ROWS, steps=STEPS, data=st.data())
def test_every_row_of_any_batch_says_what_it_says_alone(
    capabilities: Capabilities, rows: list[list[int]], steps: list[list[int]], data: st.DataObject
) -> None:
    graph = PaperGraph(capabilities)
    runner = SequenceRunner(graph, PREFIX, capabilities)
    so_far = [PREFIX + row for row in rows]
    embeddings, sequences = runner.prefill(rows)
    np.testing.assert_allclose(embeddings, [graph.alone(ids) for ids in so_far], atol=1e-9)
    np.testing.assert_allclose(runner.embed(rows), embeddings, atol=1e-9)
    for step in steps:
        chosen = data.draw(st.lists(st.integers(0, len(so_far) - 1), min_size=1, max_size=5))
        sequences = sequences.select(chosen)
        so_far = [so_far[row] for row in chosen]
        new = data.draw(st.permutations(range(len(chosen)))) if len(step) == 1 else None
        if new is None:
            sequences = runner.guide(sequences, step)
            so_far = [ids + step for ids in so_far]
        else:
            sequences = runner.extend(sequences, np.array(new, np.int64)[:, None])
            so_far = [[*ids, token] for ids, token in zip(so_far, new, strict=True)]
        np.testing.assert_allclose(sequences.logits, [graph.alone(ids) for ids in so_far], atol=1e-9)
        assert sequences.next_position.tolist() == [len(ids) for ids in so_far]


@each_capability_set
def test_the_graph_is_given_as_much_at_once_as_it_can_take(capabilities: Capabilities) -> None:
    graph = PaperGraph(capabilities)
    runner = SequenceRunner(graph, PREFIX, capabilities)
    several = capabilities.multi_token_past
    cached = len(PREFIX) if capabilities.prefix_cache and several else 0
    assert graph.shapes == ([(1, len(PREFIX), 0)] if cached else [])
    graph.shapes.clear()
    _, sequences = runner.prefill([[1, 2, 3], [4]])
    assert graph.shapes == [(2, 3 + len(PREFIX) - cached, cached)]
    graph.shapes.clear()
    runner.guide(sequences, [10, 11, 12])
    assert [new for _, new, _ in graph.shapes] == ([3] if several else [1, 1, 1])
    graph.shapes.clear()
    runner.guide(sequences.select([0]), [10, 11, 12])
    assert [new for _, new, _ in graph.shapes] == [3]


# The real operators


@pytest.fixture(scope="session")
def graph(tmp_path_factory: pytest.TempPathFactory) -> GraphSession:
    exported = tiny(tmp_path_factory.getbasetemp(), tied=True)
    return GraphSession(open_bundle(exported.bundle), "cpu", threads=1)


@settings(deadline=None, max_examples=40)
@given(rows=ROWS, cut=st.integers(0, 4))
def test_a_cached_prefix_of_any_length_changes_nothing(graph: GraphSession, rows: list[list[int]], cut: int) -> None:
    whole, _ = SequenceRunner(graph, PREFIX).prefill(rows)
    shorter, _ = SequenceRunner(graph, [1, *PREFIX[:cut]]).prefill([PREFIX[cut:] + row for row in rows])
    again, _ = SequenceRunner(graph, [1, *PREFIX]).prefill(rows)
    np.testing.assert_allclose(shorter, again, atol=BOUND)
    assert not np.allclose(whole, again, atol=BOUND)


@settings(deadline=None, max_examples=40)
@given(rows=ROWS, guidance=GUIDANCE)
def test_tokens_at_once_one_by_one_or_in_the_prompt_give_the_same_logits(
    graph: GraphSession, rows: list[list[int]], guidance: list[int]
) -> None:
    runner = SequenceRunner(graph, PREFIX)
    _, prefilled = runner.prefill(rows)
    at_once = runner.guide(prefilled, guidance)
    one_by_one = prefilled
    for token in guidance:
        one_by_one = runner.guide(one_by_one, [token])
    _, in_the_prompt = runner.prefill([row + guidance for row in rows])
    np.testing.assert_allclose(one_by_one.logits, at_once.logits, atol=BOUND)
    np.testing.assert_allclose(in_the_prompt.logits, at_once.logits, atol=BOUND)
    assert at_once.next_position.tolist() == [len(PREFIX) + len(row) + len(guidance) for row in rows]


@settings(deadline=None, max_examples=40)
@given(rows=ROWS, guidance=GUIDANCE, data=st.data())
def test_the_rows_that_are_selected_go_on_as_if_they_had_been_alone(
    graph: GraphSession, rows: list[list[int]], guidance: list[int], data: st.DataObject
) -> None:
    chosen = data.draw(st.lists(st.integers(0, len(rows) - 1), min_size=1, max_size=6))
    runner = SequenceRunner(graph, PREFIX)
    selected = runner.guide(runner.prefill(rows)[1].select(chosen), guidance)
    for place, row in enumerate(chosen):
        alone = runner.guide(runner.prefill([rows[row]])[1], guidance)
        np.testing.assert_allclose(selected.logits[place], alone.logits[0], atol=BOUND)


def test_going_on_leaves_the_sequences_as_they_were(graph: GraphSession) -> None:
    runner = SequenceRunner(graph, PREFIX)
    _, prefilled = runner.prefill([[9, 10, 11], [12]])
    first = runner.guide(prefilled, [20, 21]).logits
    runner.guide(prefilled, [30])
    np.testing.assert_array_equal(runner.guide(prefilled, [20, 21]).logits, first)


def test_embed_and_prefill_read_the_same_embedding(graph: GraphSession) -> None:
    runner = SequenceRunner(graph, PREFIX)
    rows = [[9, 10, 11], [12]]
    np.testing.assert_array_equal(runner.embed(rows), runner.prefill(rows)[0])
