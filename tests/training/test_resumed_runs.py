"""A run that was killed, wherever that was, and started again ends as if nothing had happened."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import msgspec
import pytest
import torch
from safetensors.torch import load_file

import training.train as training_module
import training.training_state as state_module
from notellm.settings import TrainingSettings
from tests.training.forks import run_forked
from tests.training.tiny_set import CATEGORIES, write_files
from training.base_model import load_notellm
from training.checkpoint_folder import is_checkpoint
from training.errors import CheckpointError, TrainingError
from training.train import Outcome, TrainingPlan, train
from training.training_data import DataFiles
from training.watch import Watch

# States after steps 3 and 6; a look at the validation part after 2, 4, 6 and 8; dropout draws at every step.
SETTINGS = TrainingSettings(
    steps=8, batch_pairs=3, chunk_notes=4, note_tokens=24, embedding_dim=8, method="lora", lora_rank=2, lora_alpha=4,
    lora_dropout=0.3, whitening_notes=16, generative_weight=0.5, held_back="some", temperature=1.5, save_every=3,
    keep_states=1, validate_every=2, learning_rate=0.01,
)  # fmt: skip
KILLED = -signal.SIGKILL


@pytest.fixture(scope="module", autouse=True)
def on_the_cpu() -> Any:
    """As the forked processes train: bits are compared."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        yield


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> DataFiles:
    return write_files(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def plan(tiny_base: Path, files: DataFiles, tmp_path_factory: pytest.TempPathFactory) -> TrainingPlan:
    return TrainingPlan(str(tiny_base), files, tmp_path_factory.mktemp("runs") / "unbroken", CATEGORIES, SETTINGS)


@pytest.fixture(scope="module")
def unbroken(plan: TrainingPlan) -> Outcome:
    return train(plan, Watch())


@pytest.fixture(scope="module")
def unfinished(plan: TrainingPlan) -> TrainingPlan:
    """Stopped after its first step."""
    begun = replace(plan, out=plan.out.with_name("unfinished"))
    assert not train(begun, StopsAfter(1)).done
    return begun


class StopsAfter(Watch):
    def __init__(self, step: int) -> None:
        self._left = step

    def wants_to_stop(self) -> bool:
        self._left -= 1
        return self._left == 0


class DiesAt(Watch):
    """As soon as the line of ``step`` was written."""

    def __init__(self, step: int) -> None:
        self._step = step

    def metrics(self, line: dict[str, Any]) -> None:
        if line["step"] == self._step:
            die()


def die(*arguments: object, **named: object) -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("still alive")


def dies_between_states(plan: TrainingPlan) -> None:
    train(plan, DiesAt(5))


def dies_before_any_state(plan: TrainingPlan) -> None:
    train(plan, DiesAt(2))


def dies_right_after_a_state(plan: TrainingPlan) -> None:
    training_module.plot_losses = die
    train(plan, Watch())


def dies_while_it_writes_a_state(plan: TrainingPlan) -> None:
    def half(progress: object, file: Path) -> NoReturn:
        if "00000006" not in str(file):
            return whole(progress, file)  # type: ignore[return-value]
        file.write_bytes(b"half of it")
        die()

    whole = torch.save
    state_module.torch.save = half
    train(plan, Watch())


def dies_while_it_writes_the_checkpoint(plan: TrainingPlan) -> None:
    training_module.write_checkpoint = die
    train(plan, Watch())


def metrics(run: Path) -> list[dict[str, Any]]:
    """All but how long it took."""
    lines = [msgspec.json.decode(line) for line in (run / "metrics.jsonl").read_bytes().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


def same_end(run: Path, unbroken: Path) -> None:
    """To the last bit."""
    assert metrics(run) == metrics(unbroken)
    tensors = sorted(path.relative_to(unbroken) for path in unbroken.rglob("*.safetensors"))
    assert tensors == sorted(path.relative_to(run) for path in run.rglob("*.safetensors"))
    for name in tensors:
        expected, found = load_file(unbroken / name), load_file(run / name)
        assert expected.keys() == found.keys()
        for key, tensor in expected.items():
            assert torch.equal(found[key], tensor), f"{name}: {key}"


def test_an_unbroken_run_leaves_a_checkpoint_and_a_line_per_step(unbroken: Outcome) -> None:
    lines = metrics(unbroken.run)
    assert unbroken.done
    assert [line["step"] for line in lines if line["part"] == "train"] == list(range(1, 9))
    assert [line["step"] for line in lines if line["part"] == "validation"] == [2, 4, 6, 8]
    assert is_checkpoint(unbroken.run)
    assert (unbroken.run / "loss.png").stat().st_size > 1000
    assert not (unbroken.run / "states").exists()
    assert len({line["loss"] for line in lines}) == len(lines)


class TestKilledRun:
    @pytest.mark.parametrize(
        ("death", "state"),
        [
            (dies_before_any_state, None),
            (dies_between_states, "step-00000003"),
            (dies_right_after_a_state, "step-00000003"),
            (dies_while_it_writes_a_state, "step-00000003"),
            (dies_while_it_writes_the_checkpoint, "step-00000006"),
        ],
    )
    def test_goes_on_as_if_nothing_had_happened(
        self, plan: TrainingPlan, unbroken: Outcome, tmp_path: Path, death: Any, state: str | None
    ) -> None:
        broken = replace(plan, out=tmp_path / "run")
        assert run_forked(death, broken) == KILLED
        assert not is_checkpoint(broken.out)
        states = sorted(path.name for path in (broken.out / "states").glob("step-*"))
        assert states == ([] if state is None else [state])
        with (broken.out / "metrics.jsonl").open("ab") as file:
            file.write(b'{"part":"train","step":')  # half a line, as a kill may leave it
        assert train(broken, Watch()).done
        same_end(broken.out, unbroken.run)

    def test_goes_on_however_often_it_is_killed(self, plan: TrainingPlan, unbroken: Outcome, tmp_path: Path) -> None:
        broken = replace(plan, out=tmp_path / "run")
        for death in (dies_between_states, dies_between_states, dies_while_it_writes_the_checkpoint):
            assert run_forked(death, broken) == KILLED
        assert train(broken, Watch()).done
        same_end(broken.out, unbroken.run)

    def test_that_trains_the_whole_base_goes_on_too(self, plan: TrainingPlan, tmp_path: Path) -> None:
        changes = {
            "method": "full",
            "steps": 4,
            "projection_start": "random",
            "weight_decay": 0.1,
            "learning_rate": 1e-3,
        }
        whole = replace(plan, out=tmp_path / "whole", settings=SETTINGS.model_copy(update=changes))
        broken = replace(whole, out=tmp_path / "broken")
        assert train(whole, Watch()).done
        assert run_forked(dies_right_after_a_state, broken) == KILLED
        assert train(broken, Watch()).done
        assert (broken.out / "base" / "config.json").exists()
        same_end(broken.out, whole.out)


class TestStoppedRun:
    def test_goes_on_as_if_nothing_had_happened(self, plan: TrainingPlan, unbroken: Outcome, tmp_path: Path) -> None:
        stopped = replace(plan, out=tmp_path / "run")
        first = train(stopped, StopsAfter(4))
        assert not first.done
        assert first.metrics["step"] == 4
        assert not is_checkpoint(stopped.out)
        # What changes only how long it takes, or what it leaves on the way, may change.
        free = SETTINGS.model_copy(update={"save_every": 100, "keep_states": 5})
        assert train(replace(stopped, settings=free), Watch()).done
        same_end(stopped.out, unbroken.run)


class TestOtherSettings:
    @pytest.mark.parametrize(
        ("name", "was", "now"),
        [("seed", "0", 1), ("learning_rate", "0.01", 0.02), ("batch_pairs", "3", 2), ("lora_dropout", "0.3", 0.0)],
    )
    def test_are_refused_by_name(self, unfinished: TrainingPlan, name: str, was: str, now: float) -> None:
        before = (unfinished.out / "run.json").read_bytes()
        changed = replace(unfinished, settings=SETTINGS.model_copy(update={name: now}))
        with pytest.raises(
            TrainingError, match=rf"was started with training\.{name} {was}, now it is {now}; .*--force"
        ):
            train(changed, Watch())
        assert (unfinished.out / "run.json").read_bytes() == before

    def test_of_what_it_reads_and_is_made_of_are_refused_too(self, unfinished: TrainingPlan, tmp_path: Path) -> None:
        other = write_files(tmp_path / "data")
        assert other.notes is not None
        other.notes.write_bytes(other.notes.read_bytes().replace(b"amber", b"azure"))
        changed = {
            "data notes": replace(unfinished, files=other),
            "data train_before": replace(unfinished, files=replace(unfinished.files, train_before=10**15)),
            "data split": replace(unfinished, files=replace(unfinished.files, split=None)),
            "--base": replace(unfinished, base="other-base"),
            "--categories": replace(unfinished, categories=["art"]),
            "--redraw-partners": replace(unfinished, redraw_partners=True),
        }
        for name, plan in changed.items():
            with pytest.raises(TrainingError, match=f"was started with {name} "):
                train(plan, Watch())


class TestFinishedRun:
    def test_is_refused_and_stays(self, plan: TrainingPlan, unbroken: Outcome) -> None:
        before = (unbroken.run / "metrics.jsonl").read_bytes()
        with pytest.raises(TrainingError, match="is done; give --force to train it anew"):
            train(plan, Watch())
        assert (unbroken.run / "metrics.jsonl").read_bytes() == before

    def test_is_trained_anew_where_that_is_wanted(self, plan: TrainingPlan, unbroken: Outcome, tmp_path: Path) -> None:
        short = replace(plan, out=tmp_path / "run", settings=SETTINGS.model_copy(update={"steps": 1}))
        train(short, Watch())
        (short.out / "left.txt").write_text("of the first")
        anew = replace(short, settings=SETTINGS.model_copy(update={"steps": 2}), force=True)
        assert train(anew, Watch()).metrics["step"] == 2
        assert not (short.out / "left.txt").exists()


def test_nothing_to_learn_from_is_refused(plan: TrainingPlan, tmp_path: Path) -> None:
    neither = SETTINGS.model_copy(update={"contrastive": False, "generative_weight": 0.0})
    with pytest.raises(
        TrainingError, match=r"training\.generative_weight: 0 is not allowed with .*contrastive = false"
    ):
        train(replace(plan, out=tmp_path / "run", settings=neither), Watch())
    assert not (tmp_path / "run").exists()


def test_another_run_may_begin_with_what_one_has_learnt(plan: TrainingPlan, unbroken: Outcome, tmp_path: Path) -> None:
    short = SETTINGS.model_copy(
        update={"steps": 1, "seed": 3, "learning_rate": 1e-30, "projection_learning_rate": 1e-30}
    )
    second = replace(plan, out=tmp_path / "second", begin=unbroken.run, settings=short)
    train(second, Watch())
    # It learns next to nothing: what was learnt before comes out as it went in.
    for name in ("adapter_model.safetensors", "projection.safetensors"):
        before, after = load_file(unbroken.run / name), load_file(second.out / name)
        assert before.keys() == after.keys()
        assert all(torch.allclose(before[key], after[key], rtol=0, atol=1e-20) for key in before)
    other_rank = short.model_copy(update={"lora_rank": 3})
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors: does not fit the base"):
        train(replace(second, out=tmp_path / "third", settings=other_rank), Watch())
    other_size = short.model_copy(update={"embedding_dim": 4})
    with pytest.raises(CheckpointError, match=r"its projection makes 8 dimensions, training\.embedding_dim is 4"):
        train(replace(second, out=tmp_path / "fourth", settings=other_size), Watch())
    with pytest.raises(TrainingError, match=r"training\.method = 'lora', and cannot go on with 'full'"):
        train(replace(second, out=tmp_path / "fifth", settings=short.model_copy(update={"method": "full"})), Watch())


def test_a_run_that_was_trained_whole_is_gone_on_from_with_its_own_base(plan: TrainingPlan, tmp_path: Path) -> None:
    whole = SETTINGS.model_copy(update={"method": "auto", "steps": 2})
    first = replace(plan, out=tmp_path / "first", settings=whole)
    train(first, Watch())
    still = whole.model_copy(update={"steps": 1, "learning_rate": 1e-30, "projection_learning_rate": 1e-30})
    second = replace(first, out=tmp_path / "second", begin=first.out, settings=still, base="not asked for")
    train(second, Watch())
    for name in ("base/model.safetensors", "projection.safetensors"):
        before, after = load_file(first.out / name), load_file(second.out / name)
        assert before.keys() == after.keys()
        assert all(torch.allclose(before[key], after[key], rtol=0, atol=1e-20) for key in before)
    assert load_notellm(str(second.out)).name == Path(plan.base).name, "not that of its folder, base"
    untrained = load_file(Path(plan.base) / "model.safetensors")
    learnt = load_file(first.out / "base/model.safetensors")
    norms = [name for name in untrained if "norm" in name]
    assert norms
    assert not any(torch.equal(untrained[name], learnt[name]) for name in norms), "all that no adapter would touch"
    adapter = still.model_copy(update={"method": "lora"})
    with pytest.raises(TrainingError, match=r"training\.method = 'full', and cannot go on with 'lora'"):
        train(replace(second, out=tmp_path / "third", settings=adapter), Watch())


def test_a_loss_that_is_no_number_ends_the_run(plan: TrainingPlan, tmp_path: Path) -> None:
    wild = SETTINGS.model_copy(
        update={"learning_rate": 1.0, "max_gradient_norm": 1e30, "steps": 2, "warmup_share": 0.0}
    )
    poisoned = replace(plan, out=tmp_path / "run", settings=wild.model_copy(update={"generative_weight": 1e300}))
    with pytest.raises(TrainingError, match=r"step 1: the loss is (nan|inf), its gradient nan; lower training"):
        train(poisoned, Watch())
    assert not is_checkpoint(poisoned.out)
    assert not any((poisoned.out / "states").glob("*")), "nothing that every later start would go on from"
