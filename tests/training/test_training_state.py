"""A state holds what a training goes on from, whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from training.errors import TrainingError
from training.training_state import load_state, newest_state, save_state


class Training:
    """Two layers of which one is frozen, and all that goes with them."""

    def __init__(self, seed: int, width: int = 4) -> None:
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(3, width), nn.Linear(width, 2))
        self.model[0].requires_grad_(False)
        self.optimizer = AdamW([part for part in self.model.parameters() if part.requires_grad], lr=0.1)
        self.scheduler = LambdaLR(self.optimizer, lambda step: 1 / (1 + step))

    def step(self) -> float:
        loss = self.model(torch.arange(15.0).reshape(5, 3) / 10).square().sum()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.scheduler.step()
        return loss.item()

    def save(self, folder: Path, step: int, keep: int = 2) -> None:
        save_state(folder, step, self.model, self.optimizer, self.scheduler, keep=keep)

    def load(self, folder: Path) -> None:
        load_state(folder, self.model, self.optimizer, self.scheduler)


def test_goes_on_as_if_nothing_had_happened(tmp_path: Path) -> None:
    first = Training(1)
    for _ in range(3):
        first.step()
    first.save(tmp_path, 3)
    expected = [first.step() for _ in range(4)]
    again = Training(2)
    # What is frozen comes with the base, and is not in the state.
    again.model[0].load_state_dict(first.model[0].state_dict())
    again.step()
    again.load(tmp_path / "step-00000003")
    assert [again.step() for _ in range(4)] == expected
    assert all(torch.equal(a, b) for a, b in zip(first.model.parameters(), again.model.parameters(), strict=True))


def test_the_newest_is_found_and_old_ones_go(tmp_path: Path) -> None:
    assert newest_state(tmp_path / "none") is None
    training = Training(1)
    for step in (1, 20, 300):
        training.save(tmp_path, step)
    assert newest_state(tmp_path) == (300, tmp_path / "step-00000300")
    assert sorted(os.listdir(tmp_path)) == ["step-00000020", "step-00000300"]  # noqa: PTH208


def test_half_a_state_is_none(tmp_path: Path) -> None:
    training = Training(1)
    training.save(tmp_path, 5)
    half = tmp_path / ".step-00000010"
    half.mkdir()
    (half / "parameters.safetensors").write_bytes(b"half")
    assert newest_state(tmp_path) == (5, tmp_path / "step-00000005")
    training.save(tmp_path, 10)
    assert not half.exists()
    Training(2).load(tmp_path / "step-00000010")


def test_a_state_that_is_there_already_is_replaced(tmp_path: Path) -> None:
    Training(1).save(tmp_path, 5)
    second = Training(2)
    second.save(tmp_path, 5)
    third = Training(3)
    third.load(tmp_path / "step-00000005")
    assert torch.equal(third.model[1].weight, second.model[1].weight)


class TestRefused:
    def test_where_it_is_of_another_model(self, tmp_path: Path) -> None:
        Training(1).save(tmp_path, 5)
        whole = Training(1)
        whole.model[0].requires_grad_(True)
        with pytest.raises(TrainingError, match=r"step-00000005: is of another model; start anew with --force"):
            whole.load(tmp_path / "step-00000005")

    def test_where_its_tensors_have_another_shape(self, tmp_path: Path) -> None:
        Training(1).save(tmp_path, 5)
        with pytest.raises(
            TrainingError, match=r"step-00000005: cannot be read: .*remove it, or start anew with --force"
        ):
            Training(1, width=6).load(tmp_path / "step-00000005")

    @pytest.mark.parametrize("name", ["parameters.safetensors", "progress.pt"])
    @pytest.mark.parametrize("damage", ["gone", "empty", "cut", "other"])
    def test_where_a_file_is_damaged(self, tmp_path: Path, name: str, damage: str) -> None:
        Training(1).save(tmp_path, 5)
        file = tmp_path / "step-00000005" / name
        if damage == "gone":
            file.unlink()
        else:
            content = file.read_bytes()
            file.write_bytes(
                {"empty": b"", "cut": content[: len(content) // 2], "other": b"not what it was" * 9}[damage]
            )
        with pytest.raises(
            TrainingError, match=r"step-00000005: cannot be read: .*remove it, or start anew with --force"
        ):
            Training(1).load(tmp_path / "step-00000005")
