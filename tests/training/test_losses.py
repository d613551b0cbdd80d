"""Each loss, and what it pulls where, against the paper's formula number by number."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.training import formula
from training.losses import answer_loss_sum, contrastive_loss, gather_rows, mix_losses, recall_at_1

CLOSE = {"rtol": 1e-6, "atol": 1e-6}
many = settings(max_examples=40, deadline=None, derandomize=True)


@dataclass(frozen=True)
class Batch:
    """``masked`` may hold anything: the partner's own place and every negative of a row, too."""

    vectors: Tensor
    partner: Tensor
    masked: Tensor
    temperature: Tensor

    def formula(self) -> float:
        return formula.contrastive(
            self.vectors.tolist(), self.partner.tolist(), self.masked.tolist(), self.temperature.item()
        )

    def loss(self) -> Tensor:
        return contrastive_loss(self.vectors, self.partner, self.masked, self.temperature)


@st.composite
def batches(draw: st.DrawFn, hottest: float = 4.0) -> Batch:
    pairs, dim = draw(st.integers(1, 5)), draw(st.integers(1, 6))
    numbers = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    # Fewer different notes than places: some come again, with the very same vector.
    different = numbers.normal(size=(draw(st.integers(1, 2 * pairs)), dim))
    chosen = different[numbers.integers(len(different), size=2 * pairs)]
    vectors = torch.from_numpy(chosen / np.linalg.norm(chosen, axis=1, keepdims=True))
    masked = numbers.random((2 * pairs, 2 * pairs)) < draw(st.sampled_from([0.0, 0.3, 0.8, 1.0]))
    order = numbers.permutation(2 * pairs)
    partner = np.empty(2 * pairs, np.int64)
    partner[order[0::2]], partner[order[1::2]] = order[1::2], order[0::2]
    temperature = torch.tensor(draw(st.floats(-3, hottest)), dtype=torch.float64)
    return Batch(vectors, torch.from_numpy(partner), torch.from_numpy(masked), temperature)


def slope(loss: Callable[[], float], number: Tensor, step: float = 1e-5) -> Tensor:
    """The gradient by finite differences: each of its numbers is moved, there and back, on its own."""
    result = torch.zeros_like(number)
    flat, slopes = number.view(-1), result.view(-1)
    for place in range(len(flat)):
        kept = flat[place].item()
        flat[place] = kept + step
        above = loss()
        flat[place] = kept - step
        below = loss()
        flat[place] = kept
        slopes[place] = (above - below) / (2 * step)
    return result


class TestContrastiveLoss:
    @many
    @given(batches())
    def test_is_the_formula(self, batch: Batch) -> None:
        torch.testing.assert_close(batch.loss().item(), batch.formula(), **CLOSE)

    @many
    @given(batches(hottest=2.0), st.floats(0.05, 1.5))
    def test_near_negatives_weigh_more_where_they_are_to(self, batch: Batch, hardness: float) -> None:
        slow = formula.contrastive(
            batch.vectors.tolist(), batch.partner.tolist(), batch.masked.tolist(), batch.temperature.item(), hardness
        )
        fast = contrastive_loss(batch.vectors, batch.partner, batch.masked, batch.temperature, hardness)
        torch.testing.assert_close(fast.item(), slow, **CLOSE)

    @many
    @given(batches(hottest=2.0))
    def test_pulls_where_the_formula_does(self, batch: Batch) -> None:
        expected = [slope(batch.formula, number) for number in (batch.vectors, batch.temperature)]
        batch.vectors.requires_grad_()
        batch.temperature.requires_grad_()
        found = torch.autograd.grad(batch.loss(), [batch.vectors, batch.temperature])
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)

    def test_of_two_pairs_at_right_angles_is_what_one_works_out_by_hand(self) -> None:
        # The partner counts e^tau = 2, each of the two negatives e^0 = 1: -log(2 / (2 + 1 + 1)).
        vectors = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
        tau = torch.tensor(math.log(math.log(2)))
        loss = contrastive_loss(vectors, torch.tensor([1, 0, 3, 2]), torch.eye(4).bool(), tau)
        assert loss.item() == pytest.approx(math.log(2), abs=1e-6)

    def test_of_one_pair_is_nothing(self) -> None:
        vectors = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        assert contrastive_loss(vectors, torch.tensor([1, 0]), torch.eye(2).bool(), torch.tensor(3.0)).item() == 0

    def test_a_masked_note_neither_counts_nor_moves(self) -> None:
        vectors = torch.nn.functional.normalize(torch.randn(4, 3, generator=torch.Generator().manual_seed(1)), dim=1)
        masked = torch.eye(4).bool()
        masked[0, 2] = masked[0, 3] = True
        vectors.requires_grad_()
        some = contrastive_loss(vectors, torch.tensor([1, 0, 3, 2]), masked, torch.tensor(0.0))
        masked[1:] = True
        alone = contrastive_loss(vectors, torch.tensor([1, 0, 3, 2]), masked, torch.tensor(0.0))
        assert some.item() > 0
        assert alone.item() == 0
        assert not torch.autograd.grad(alone, vectors)[0].any()


class TestRecall:
    @many
    @given(batches())
    def test_is_the_share_whose_partner_is_nearest(self, batch: Batch) -> None:
        # In whole numbers, as a tie must be one in either way of adding up.
        vectors = (batch.vectors * 3).round()
        expected = formula.recall(vectors.tolist(), batch.partner.tolist(), batch.masked.tolist())
        assert recall_at_1(vectors, batch.partner, batch.masked).item() == pytest.approx(expected, abs=1e-6)

    def test_a_tie_is_a_miss(self) -> None:
        same = torch.tensor([[1.0, 0.0]] * 4)
        assert recall_at_1(same, torch.tensor([1, 0, 3, 2]), torch.eye(4).bool()).item() == 0


class TestAnswerLoss:
    @many
    @given(tokens=st.integers(0, 12), words=st.integers(1, 30), seed=st.integers(0, 2**32 - 1))
    def test_is_the_formula_and_pulls_towards_the_answer(self, tokens: int, words: int, seed: int) -> None:
        numbers = np.random.default_rng(seed)
        logits = torch.from_numpy(numbers.normal(scale=2, size=(tokens, words)).astype(np.float32))
        answers = torch.from_numpy(numbers.integers(words, size=tokens))
        logits.requires_grad_()
        loss = answer_loss_sum(logits, answers)
        assert loss.item() == pytest.approx(formula.answer_loss(logits.tolist(), answers.tolist()), rel=1e-6, abs=1e-6)
        (found,) = torch.autograd.grad(loss, logits)
        for row, answer, pull in zip(logits.tolist(), answers.tolist(), found.tolist(), strict=True):
            whole = math.fsum(math.exp(each) for each in row)
            expected = [math.exp(each) / whole - (place == answer) for place, each in enumerate(row)]
            assert pull == pytest.approx(expected, abs=1e-6)

    def test_of_half_precision_is_computed_in_full(self) -> None:
        logits = torch.randn(20, 50, generator=torch.Generator().manual_seed(2)).bfloat16()
        expected = formula.answer_loss(logits.tolist(), [7] * 20)
        assert answer_loss_sum(logits, torch.tensor([7] * 20)).item() == pytest.approx(expected, rel=1e-6)


def test_losses_are_mixed_as_in_equation_7() -> None:
    assert mix_losses(torch.tensor(2.0), torch.tensor(4.0), 0.5).item() == pytest.approx((2 + 0.5 * 4) / 1.5)
    assert mix_losses(torch.tensor(2.0), torch.tensor(4.0), 0.0).item() == 2.0
    assert mix_losses(torch.tensor(2.0), torch.tensor(4.0), 1.0).item() == 3.0


def test_one_process_has_all_rows_itself() -> None:
    rows = torch.randn(3, 2)
    assert gather_rows(rows) is rows
