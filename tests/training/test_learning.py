"""A training learns what there is to learn, and cannot learn what is not there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from notellm.categories import default_categories
from notellm.settings import TrainingSettings
from training.smoke import RECALL, SMOKE_SETTINGS, write_smoke_data
from training.train import TrainingPlan, train
from training.watch import Watch

CHANCE = 1 / 31
# A random base knows nothing: all of it is trained, and for longer than a real one.
TINY = {**SMOKE_SETTINGS, "steps": 120, "method": "full", "learning_rate": 2e-3, "save_every": 100}


class Recalls(Watch):
    """recall@1 within the batch, which is the whole set, step by step."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def metrics(self, line: dict[str, Any]) -> None:
        self.seen.append(line["recall_at_1"])


def recalls(base: str, folder: Path, settings: dict[str, Any], *, redraw_partners: bool = False) -> list[float]:
    watch = Recalls()
    plan = TrainingPlan(
        base=base,
        files=write_smoke_data(folder / "data"),
        out=folder / "run",
        categories=default_categories(),
        settings=TrainingSettings(**settings),
        redraw_partners=redraw_partners,
    )
    train(plan, watch)
    return watch.seen


def test_learns_its_pairs_by_heart(tiny_base: Path, tmp_path: Path) -> None:
    seen = recalls(str(tiny_base), tmp_path, TINY)
    assert seen[0] < 5 * CHANCE
    assert min(seen[-3:]) > RECALL


def test_learns_nothing_where_partners_change_at_every_step(tiny_base: Path, tmp_path: Path) -> None:
    seen = recalls(str(tiny_base), tmp_path, TINY, redraw_partners=True)
    assert max(seen[-10:]) < 0.4
    assert sum(seen[-10:]) / 10 < 5 * CHANCE


@pytest.mark.long
def test_smollm2_learns_them_in_as_few_steps_as_the_command_takes(tmp_path: Path) -> None:
    learnt = recalls("smollm2", tmp_path / "pairs", dict(SMOKE_SETTINGS))
    control = recalls("smollm2", tmp_path / "control", dict(SMOKE_SETTINGS), redraw_partners=True)
    assert learnt[0] < 5 * CHANCE
    assert learnt[-1] > RECALL
    assert control[-1] < 5 * CHANCE
