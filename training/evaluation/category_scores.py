"""How often the category is right, and how often it is none (the paper's "illegal", arXiv 2403.01744, section 4.4)."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
from sklearn.metrics import f1_score

from training.evaluation.bootstrap import Interval, bootstrap_means

__all__ = ["category_metrics"]


def category_metrics(
    generated: Sequence[str], author: Sequence[str], *, categories: Collection[str], seed: int
) -> dict[str, Interval]:
    """``generated[n]`` against ``author[n]``, over N notes.

    ``accuracy``; ``macro_f1``: the mean of the F1 of each category that the author's or the generated ones name (no
    interval: low and high are the value); ``illegal``: the share that is not among ``categories``. Raises
    :class:`ValueError` for lists of two lengths, or none.
    """
    if len(generated) != len(author) or not author:
        raise ValueError(f"{len(generated)} generated categories for {len(author)} notes; one each, at least one")
    right = [made == own for made, own in zip(generated, author, strict=True)]
    illegal = [made not in categories for made in generated]
    accuracy, share = bootstrap_means(np.array([right, illegal], np.float64).T, seed=seed)
    assert accuracy is not None
    assert share is not None
    macro = float(f1_score(list(author), list(generated), average="macro", zero_division=0.0))
    return {"accuracy": accuracy, "macro_f1": Interval(macro, macro, macro), "illegal": share}
