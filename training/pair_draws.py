"""Which pairs stand in a batch together, and which of its notes are no negatives of each other."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from notellm.settings import TrainingSettings
from training.pairs import PairTable

__all__ = ["PairDraws"]

Ints = NDArray[np.int64]

_REDRAWS = 4


class PairDraws:
    """Batches of N pairs, drawn by ``score ** score_power``.

    A batch rarely has the same note twice, as such a note has fewer negatives; where it is short of pairs after some
    rounds, it takes what comes.
    """

    def __init__(self, pairs: PairTable, settings: TrainingSettings, batch_pairs: int) -> None:
        self._pairs = pairs
        self._batch_pairs = batch_pairs
        self._mask = settings.mask_false_negatives
        # By the highest, or a power of a very large or small score would be no number.
        weights = (pairs.scores / pairs.scores.max()) ** settings.score_power
        self._ladder = np.cumsum(weights / weights.sum())

    def draw(self, rng: np.random.Generator) -> Ints:
        """Rows of notes, ``[2N]``; a pair's two stand side by side, so that a process of several has both."""
        chosen = self._draw_pairs(rng)
        return np.stack([self._pairs.sources[chosen], self._pairs.targets[chosen]], axis=1).reshape(-1)

    def not_negative(self, rows: Ints) -> NDArray[np.bool_]:
        """``[2N]`` -> ``[2N, 2N]``: True where j is no negative of i.

        That is the same note, the note of i's partner (the loss still counts the partner itself), or another known
        positive.
        """
        if not self._mask:
            return np.eye(len(rows), dtype=bool)
        partners = rows[np.arange(len(rows)) ^ 1]
        same = rows[:, None] == rows[None, :]
        return np.asarray(same | (partners[:, None] == rows[None, :]) | self._pairs.known(rows))

    def _draw_pairs(self, rng: np.random.Generator) -> Ints:
        """Numbers of pairs, ``[N]``."""
        chosen: list[int] = []
        seen: set[int] = set()
        for _ in range(_REDRAWS):
            numbers = rng.random(self._batch_pairs)
            found = np.searchsorted(self._ladder, numbers, side="right").clip(max=len(self._pairs) - 1)
            for pair in found.tolist():
                notes = {int(self._pairs.sources[pair]), int(self._pairs.targets[pair])}
                if len(chosen) < self._batch_pairs and not notes & seen:
                    chosen.append(pair)
                    seen |= notes
            if len(chosen) == self._batch_pairs:
                break
        else:
            # Fewer notes than a batch wants: some come again, and are masked out of each other's negatives.
            chosen += found[: self._batch_pairs - len(chosen)].tolist()
        return np.array(chosen)
