"""The projection's start: the PCA-whitening of what the base itself makes of notes.

A causal LM's hidden states all point nearly the same way, so that their cosines say little. Whitening (Su et al.,
arXiv 2103.15316) takes the mean away and gives the strongest directions equal weight: as was measured, it retrieves
better than the raw states, while a random projection has to find that out first.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["whitening_projection"]

# Directions in which the notes hardly differ are noise: they are not blown up to the size of the others.
_FLOOR = 1e-4
# Where they do not differ at all, there is no largest either.
_LEAST = 1e-12


def whitening_projection(hidden: Tensor, dim: int) -> nn.Linear:
    """Hidden states ``[N, H]`` of N notes -> ``Linear(H, dim)`` with ``W = L^-1/2 U^T`` and ``b = -W mean``.

    U and L are the ``dim`` strongest eigenvectors and eigenvalues of their covariance; computed in float64.
    """
    states = hidden.double()
    mean = states.mean(dim=0)
    centred = states - mean
    covariance = centred.T @ centred / max(len(states) - 1, 1)
    values, vectors = torch.linalg.eigh(covariance)
    values, vectors = values.flip(0)[:dim], vectors.flip(1)[:, :dim]
    # eigh leaves the sign open: fixed here, so that the same notes give the same projection.
    vectors = vectors * torch.sign(vectors[vectors.abs().argmax(dim=0), torch.arange(dim)])
    weight = (vectors / values.clamp_min(max(_FLOOR * float(values[0]), _LEAST)).sqrt()).T
    projection = nn.Linear(hidden.shape[1], dim)
    with torch.no_grad():
        projection.weight.copy_(weight)
        projection.bias.copy_(-weight @ mean)
    return projection
