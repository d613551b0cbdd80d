"""Two processes compute what one does on the joined batch: losses, gradients, and whole trainings."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from notellm.settings import TrainingSettings
from tests.training.forks import run_forked, run_group
from tests.training.tiny_set import CATEGORIES, tiny_batches, tiny_model, write_files
from training.losses import contrastive_loss, gather_rows
from training.step import Weights, backward
from training.train import TrainingPlan, _accelerator, train
from training.training_data import DataFiles
from training.watch import Watch

PAIRS = 6
PARTNER = torch.arange(2 * PAIRS) ^ 1
CASES: dict[str, dict[str, Any]] = {
    "whole": {"chunk": 100},
    "chunks": {"chunk": 2},
    "uneven chunks": {"chunk": 4},
    "one loss, whole": {"chunk": 100, "contrastive": False},
    "one loss, chunks": {"chunk": 4, "contrastive": False},
    "no generation": {"chunk": 4, "generative_weight": 0.0},
}


def vectors() -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.nn.functional.normalize(torch.randn(2 * PAIRS, 5, generator=generator, dtype=torch.float64), dim=1)


def masked() -> Tensor:
    return torch.rand(2 * PAIRS, 2 * PAIRS, generator=torch.Generator().manual_seed(4)) < 0.3


def temperature() -> Tensor:
    return torch.tensor(1.5, dtype=torch.float64, requires_grad=True)


def gather_and_lose(rank: int, out: Path) -> None:
    """The contrastive loss alone: half of the rows are this process's."""
    own = vectors()[PAIRS * rank : PAIRS * (rank + 1)].requires_grad_()
    warmth = temperature()
    loss = contrastive_loss(gather_rows(own), PARTNER, masked(), warmth)
    loss.backward()  # type: ignore[no-untyped-call]
    counts = gather_rows(torch.tensor([rank, 7]))
    torch.save(
        {"loss": loss.detach(), "rows": own.grad, "temperature": warmth.grad, "counts": counts}, out / f"{rank}.pt"
    )


def step_in_a_group(rank: int, size: int, tiny_base: Path, out: Path) -> None:
    """Every case's ``backward``, on this process's share of the batch."""
    found = {}
    for name, case in CASES.items():
        given = {key: value for key, value in case.items() if key != "chunk"}
        model, base = tiny_model(tiny_base, **given)
        settings = TrainingSettings(batch_pairs=PAIRS // size, **given)
        weights = Weights(settings.contrastive, 0.5 if settings.generative_weight else 0.0)
        batch = tiny_batches(base, settings, rank=rank, processes=size)[2]
        accelerator = _accelerator(settings)
        assert accelerator.num_processes == size
        losses = backward(model, accelerator.prepare(model), batch, weights, case["chunk"], accelerator)
        pulls = {each: part.grad for each, part in model.named_parameters() if part.grad is not None}
        found[name] = {"losses": vars(losses), "gradients": pulls}
    torch.save(found, out / f"{size}-{rank}.pt")


class OneAsks(Watch):
    """The second process wants to stop after step 2; the first knows nothing of it."""

    def __init__(self, rank: int) -> None:
        self._rank, self._asked = rank, 0

    def wants_to_stop(self) -> bool:
        self._asked += 1
        return self._rank == 1 and self._asked == 2


def plan(tiny_base: Path, files: DataFiles, out: Path, processes: int) -> TrainingPlan:
    settings = TrainingSettings(
        steps=4, batch_pairs=4 // processes, chunk_notes=3 if processes == 2 else 8, note_tokens=24, embedding_dim=8,
        method="lora", lora_rank=2, lora_alpha=4, whitening_notes=16, generative_weight=0.5, save_every=10,
        validate_every=2,
    )  # fmt: skip
    return TrainingPlan(str(tiny_base), files, out, CATEGORIES, settings)


def train_in_a_group(rank: int, chosen: TrainingPlan) -> None:
    stopped = train(chosen, OneAsks(rank))
    assert not stopped.done
    assert train(chosen, Watch()).done


def train_alone(chosen: TrainingPlan) -> None:
    train(chosen, Watch())


def equal_enough(found: dict[str, Tensor], expected: dict[str, Tensor], bound: float) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        atol = bound * float(expected[name].abs().max())
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


class TestContrastiveLoss:
    def test_of_two_processes_is_the_joined_batch_s(self, tmp_path: Path) -> None:
        run_group(gather_and_lose, tmp_path)
        rows, warmth = vectors().requires_grad_(), temperature()
        expected = contrastive_loss(rows, PARTNER, masked(), warmth)
        expected.backward()  # type: ignore[no-untyped-call]
        both = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
        for each in both:
            torch.testing.assert_close(each["loss"], expected.detach())
            torch.testing.assert_close(each["temperature"], warmth.grad)
            assert each["counts"].tolist() == [0, 7, 1, 7]
        # Each row's gradient arrives from either process; the mean that data parallelism takes makes it one again.
        torch.testing.assert_close(torch.cat([each["rows"] for each in both]) / 2, rows.grad)


class TestStep:
    @pytest.fixture(scope="class")
    def results(self, tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
        """Of one process that has the joined batch, and of two that share it."""
        out = tmp_path_factory.mktemp("steps")
        assert run_forked(step_in_a_group, 0, 1, tiny_base, out) == 0
        run_group(step_in_a_group, 2, tiny_base, out)
        return [torch.load(out / name) for name in ("1-0.pt", "2-0.pt", "2-1.pt")]

    @pytest.mark.parametrize("case", CASES)
    def test_of_two_processes_is_the_joined_batch_s(self, results: list[Any], case: str) -> None:
        alone, first, second = (result[case] for result in results)
        assert any(gradient.abs().max() > 0 for gradient in alone["gradients"].values())
        for each in (first, second):
            assert each["losses"] == pytest.approx(alone["losses"], rel=1e-5)
            pulls = {name: each["gradients"].get(name, torch.zeros(())) for name in alone["gradients"]}
            equal_enough(pulls, alone["gradients"], 2e-5)


class TestTraining:
    def test_of_two_processes_that_one_of_them_stopped_is_that_of_one(self, tiny_base: Path, tmp_path: Path) -> None:
        files = write_files(tmp_path / "data")
        alone, shared = tmp_path / "alone", tmp_path / "shared"
        assert run_forked(train_alone, plan(tiny_base, files, alone, 1)) == 0
        run_group(train_in_a_group, plan(tiny_base, files, shared, 2))
        one, two = (
            [msgspec.json.decode(line) for line in (run / "metrics.jsonl").read_bytes().splitlines()]
            for run in (alone, shared)
        )
        assert [(line["part"], line["step"]) for line in one] == [
            ("train", 1), ("train", 2), ("validation", 2), ("train", 3), ("train", 4), ("validation", 4),
        ]  # fmt: skip
        for a, b in zip(one, two, strict=True):
            numbers = a.keys() - {"part", "step", "seconds"}
            assert a.keys() == b.keys()
            assert {name: b[name] for name in numbers} == pytest.approx({name: a[name] for name in numbers}, rel=2e-3)
        for name in ("adapter_model.safetensors", "projection.safetensors"):
            equal_enough(load_file(shared / name), load_file(alone / name), 1e-3)

    def test_goes_on_only_with_as_many_processes(self, tiny_base: Path, tmp_path: Path) -> None:
        files = write_files(tmp_path / "data")
        chosen = plan(tiny_base, files, tmp_path / "run", 2)
        settings = chosen.settings.model_copy(update={"batch_pairs": 2})
        run_group(stop_at_once, replace(chosen, settings=settings))
        assert run_forked(refused_for_processes, replace(chosen, settings=settings)) == 0


def stop_at_once(rank: int, chosen: TrainingPlan) -> None:
    class Now(Watch):
        def wants_to_stop(self) -> bool:
            return True

    assert not train(chosen, Now()).done


def refused_for_processes(chosen: TrainingPlan) -> None:
    with pytest.raises(Exception, match="was started with processes 2, now it is 1"):
        train(chosen, Watch())
