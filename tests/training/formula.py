"""The losses as the paper writes them, number by number: slow, obvious, and in Python's own floats."""

from __future__ import annotations

import math
from collections.abc import Sequence

__all__ = ["answer_loss", "contrastive", "not_negative", "recall"]

Vector = Sequence[float]


def dot(a: Vector, b: Vector) -> float:
    return math.fsum(x * y for x, y in zip(a, b, strict=True))


def contrastive(
    vectors: Sequence[Vector],
    partner: Sequence[int],
    masked: Sequence[Sequence[bool]],
    temperature: float,
    hardness: float = 0.0,
) -> float:
    """Equation 4: what is masked is no negative, the partner always stands below the line once.

    With ``hardness`` each negative counts exp(hardness * its logit) times, over the mean of those.
    """
    losses = []
    for i, vector in enumerate(vectors):
        scale = math.exp(temperature)
        positive = scale * dot(vector, vectors[partner[i]])
        negatives = [
            scale * dot(vector, other)
            for j, other in enumerate(vectors)
            if j != partner[i] and not masked[i][j]
        ]  # fmt: skip
        if hardness and negatives:
            weights = [math.exp(hardness * each) for each in negatives]
            mean = math.fsum(weights) / len(weights)
            negatives = [each + math.log(weight / mean) for each, weight in zip(negatives, weights, strict=True)]
        others = [positive, *negatives]
        highest = max(others)
        losses.append(highest + math.log(math.fsum(math.exp(each - highest) for each in others)) - positive)
    return math.fsum(losses) / len(losses)


def recall(vectors: Sequence[Vector], partner: Sequence[int], masked: Sequence[Sequence[bool]]) -> float:
    found = 0
    for i, vector in enumerate(vectors):
        negatives = [dot(vector, vectors[j]) for j in range(len(vectors)) if j != partner[i] and not masked[i][j]]
        found += all(dot(vector, vectors[partner[i]]) > each for each in negatives)
    return found / len(vectors)


def answer_loss(logits: Sequence[Vector], answers: Sequence[int]) -> float:
    """Equation 6 before its mean: -log p of each token, added up."""
    total = 0.0
    for row, token in zip(logits, answers, strict=True):
        highest = max(row)
        total += highest + math.log(math.fsum(math.exp(each - highest) for each in row)) - row[token]
    return total


def not_negative(notes: Sequence[int], partner: Sequence[int], pairs: set[tuple[int, int]]) -> list[list[bool]]:
    """Which notes of a batch are no negatives of which, by the three rules."""

    def masked(i: int, j: int) -> bool:
        same_note = notes[i] == notes[j]
        partner_again = notes[partner[i]] == notes[j]
        known = (notes[i], notes[j]) in pairs or (notes[j], notes[i]) in pairs
        return same_note or partner_again or known

    return [[masked(i, j) for j in range(len(notes))] for i in range(len(notes))]
