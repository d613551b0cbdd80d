"""Whatever way the same tokens reach the graph, the model says the same."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from notellm.bundle import open_bundle
from notellm.graph_session import GraphSession
from notellm.sequences import SequenceRunner
from tests.export.tiny import tiny

ROWS = st.lists(st.lists(st.integers(2, 399), min_size=1, max_size=20), min_size=1, max_size=6)
GUIDANCE = st.lists(st.integers(2, 399), min_size=1, max_size=5)
PREFIX = [5, 6, 7, 8]
BOUND = 1e-4


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
