"""The projection's start makes the notes' hidden states white, and is the same for the same notes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from training.whitening import whitening_projection

SIZE, NOTES = 12, 300


def states(seed: int = 0, notes: int = NOTES) -> Tensor:
    """As a language model's: one strong common direction, and others of very different strength."""
    draw = torch.Generator().manual_seed(seed)
    turn = torch.linalg.qr(torch.randn(SIZE, SIZE, generator=draw))[0]
    strengths: Tensor = torch.logspace(1, -0.5, SIZE)
    return (torch.randn(notes, SIZE, generator=draw) * strengths).matmul(turn) + 30.0


@pytest.mark.parametrize("dim", [1, 5, SIZE])
def test_projected_states_have_mean_zero_and_the_identity_as_covariance(dim: int) -> None:
    hidden = states()
    with torch.no_grad():
        projected = whitening_projection(hidden, dim)(hidden).double().numpy()
    assert projected.shape == (NOTES, dim)
    np.testing.assert_allclose(projected.mean(axis=0), 0, atol=1e-4)
    np.testing.assert_allclose(np.atleast_2d(np.cov(projected, rowvar=False)), np.eye(dim), atol=1e-4)


def test_it_keeps_the_strongest_directions_the_strongest_first() -> None:
    hidden = states().double().numpy()
    weight = whitening_projection(states(), 4).weight.detach().double().numpy()
    # By another road: the singular vectors of the centred states.
    _, singular, directions = np.linalg.svd(hidden - hidden.mean(axis=0), full_matrices=False)
    wanted = directions[:4] / (singular[:4, None] / np.sqrt(NOTES - 1))
    signs = np.sign((weight * wanted).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(weight * signs, wanted, rtol=1e-3, atol=1e-5)


def test_the_sign_is_that_of_the_largest_number_so_the_order_of_notes_decides_nothing() -> None:
    hidden = states()
    first = whitening_projection(hidden, SIZE)
    again = whitening_projection(hidden, SIZE)
    assert torch.equal(first.weight, again.weight)
    assert torch.equal(first.bias, again.bias)
    largest = first.weight.gather(1, first.weight.abs().argmax(dim=1, keepdim=True))
    assert (largest > 0).all()
    shuffled = whitening_projection(hidden[torch.randperm(NOTES, generator=torch.Generator().manual_seed(1))], SIZE)
    torch.testing.assert_close(shuffled.weight, first.weight, rtol=1e-3, atol=1e-5)
    # The other half of the eigenvectors that eigh may choose: mirrored states have the mirrored projection.
    mirrored = whitening_projection(-hidden, SIZE)
    torch.testing.assert_close(mirrored.weight, first.weight, rtol=1e-3, atol=1e-5)


def test_a_direction_in_which_notes_hardly_differ_is_not_blown_up() -> None:
    draw = torch.Generator().manual_seed(2)
    hidden = torch.randn(NOTES, 3, generator=draw) * torch.tensor([2.0, 1.0, 1e-5])
    weight = whitening_projection(hidden, 3).weight.detach()
    strongest = float(torch.linalg.eigvalsh(torch.cov(hidden.double().T))[-1])
    # The floor is a ten-thousandth of the strongest variance: a hundred times its length, and not 200,000 times.
    assert float(weight[2].norm()) == pytest.approx(100 / strongest**0.5, rel=1e-3)
    assert float(weight[2].norm() / weight[0].norm()) == pytest.approx(100, rel=1e-3)


def test_fewer_notes_than_dimensions_give_finite_numbers() -> None:
    hidden = states(notes=3)
    projection = whitening_projection(hidden, SIZE)
    with torch.no_grad():
        projected = projection(hidden).double().numpy()
    assert np.isfinite(projected).all()
    # Three points span a plane: two directions are whole, whatever the rest holds is far below them.
    np.testing.assert_allclose(np.cov(projected[:, :2], rowvar=False), np.eye(2), atol=1e-3)
    assert np.abs(projected[:, 2:]).max() < 0.01
