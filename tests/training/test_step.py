"""One step's losses and gradients: as of the notes read one by one, and the same in chunks of any size."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

from notellm.settings import TrainingSettings
from tests.training import formula
from tests.training.tiny_set import tiny_batches, tiny_model
from training.batches import PairBatch
from training.losses import contrastive_loss, mix_losses
from training.model import NoteLLM
from training.note_rows import NO_LABEL
from training.step import BatchLosses, Weights, backward, measure

BOTH = Weights(contrastive=True, generative=0.5)
PAIRS = 4
Gradients = dict[str, Tensor]


@pytest.fixture(scope="module")
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


def model_and_batch(folder: Path, **settings: Any) -> tuple[NoteLLM, PairBatch]:
    model, base = tiny_model(folder, **settings)
    given = {name: value for name, value in settings.items() if name in ("contrastive", "generative_weight")}
    return model, tiny_batches(base, TrainingSettings(batch_pairs=PAIRS, held_back="some", **given))[1]


def gradients(model: NoteLLM) -> Gradients:
    return {name: part.grad for name, part in model.named_parameters() if part.grad is not None}


def step(
    model: NoteLLM, batch: PairBatch, accelerator: Accelerator, chunk: int, weights: Weights = BOTH
) -> tuple[BatchLosses, Gradients]:
    model.zero_grad(set_to_none=True)
    torch.manual_seed(5)
    losses = backward(model, model, batch, weights, chunk, accelerator)
    return losses, gradients(model)


def one_by_one(model: NoteLLM, batch: PairBatch) -> tuple[Tensor, list[Tensor]]:
    """Embeddings and the loss of each answer token, of each note alone: no cache, no padding, no neighbour."""
    embeddings, told = [], []
    rows = batch.rows
    assert rows.labels is not None
    for ids, mask, place, labels in zip(rows.ids, rows.mask, rows.embed_at, rows.labels, strict=True):
        size = int(mask.sum())
        whole = torch.cat([rows.prefix, ids[:size]])
        output = model.base(input_ids=whole[None], output_hidden_states=True, use_cache=False)
        hidden = output.hidden_states[-1][0, len(rows.prefix) + int(place)]
        vector = model.projection(hidden)
        embeddings.append(vector / vector.square().sum().sqrt())
        for at in range(size):
            if labels[at] != NO_LABEL:
                logits = output.logits[0, len(rows.prefix) + at - 1]
                told.append(logits.logsumexp(0) - logits[labels[at]])
    return torch.stack(embeddings), told


def close(found: Gradients, expected: Gradients) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        scale = float(expected[name].abs().max())
        assert scale > 0, name
        torch.testing.assert_close(
            gradient, expected[name], rtol=1e-4, atol=2e-5 * scale, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("chunk", [2 * PAIRS, 3])
class TestStep:
    def test_is_that_of_the_notes_one_by_one(self, tiny_base: Path, accelerator: Accelerator, chunk: int) -> None:
        model, batch = model_and_batch(tiny_base)
        found, pulls = step(model, batch, accelerator, chunk)
        vectors, told = one_by_one(model, batch)
        partner, masked = batch.partner.tolist(), batch.not_negative.tolist()
        assert model.temperature is not None
        contrastive = formula.contrastive(vectors.tolist(), partner, masked, model.temperature.item())
        generative = sum(each.item() for each in told) / len(told)
        assert found.contrastive == pytest.approx(contrastive, rel=1e-5)
        assert found.generative == pytest.approx(generative, rel=1e-5)
        assert found.loss == pytest.approx((contrastive + 0.5 * generative) / 1.5, rel=1e-5)
        assert found.recall_at_1 == pytest.approx(formula.recall(vectors.tolist(), partner, masked))
        assert len(told) == batch.answer_tokens
        # The loss itself is the formula's (test_losses.py): what is to be shown here is the way back through the model.
        loss = contrastive_loss(vectors, batch.partner, batch.not_negative, model.temperature)
        model.zero_grad(set_to_none=True)
        mix_losses(loss, torch.stack(told).mean(), 0.5).backward()
        close(pulls, gradients(model))

    def test_of_the_generative_loss_alone(self, tiny_base: Path, accelerator: Accelerator, chunk: int) -> None:
        model, batch = model_and_batch(tiny_base, contrastive=False)
        found, pulls = step(model, batch, accelerator, chunk, Weights(contrastive=False, generative=0.5))
        _, told = one_by_one(model, batch)
        assert found.loss == found.generative == pytest.approx(sum(each.item() for each in told) / len(told), rel=1e-5)
        model.zero_grad(set_to_none=True)
        torch.stack(told).mean().backward()
        assert model.temperature is not None
        assert model.temperature.grad is None
        used = {name: gradient for name, gradient in pulls.items() if gradient.any()}
        close(used, {name: gradient for name, gradient in gradients(model).items() if gradient.any()})

    def test_of_the_contrastive_loss_alone(self, tiny_base: Path, accelerator: Accelerator, chunk: int) -> None:
        model, batch = model_and_batch(tiny_base, generative_weight=0)
        assert batch.answer_tokens == 0
        found, pulls = step(model, batch, accelerator, chunk, Weights(contrastive=True, generative=0))
        vectors, told = one_by_one(model, batch)
        assert not told
        assert found.generative == 0
        assert model.temperature is not None
        model.zero_grad(set_to_none=True)
        loss = contrastive_loss(vectors, batch.partner, batch.not_negative, model.temperature)
        assert found.loss == found.contrastive == pytest.approx(loss.item(), rel=1e-5)
        loss.backward()
        used = {name: gradient for name, gradient in pulls.items() if gradient.any()}
        close(used, {name: gradient for name, gradient in gradients(model).items() if gradient.any()})


class TestChunks:
    @pytest.mark.parametrize("settings", [{}, {"method": "full"}, {"gradient_checkpointing": True}], ids=str)
    def test_of_any_size_give_the_same(
        self, tiny_base: Path, accelerator: Accelerator, settings: dict[str, Any]
    ) -> None:
        model, batch = model_and_batch(tiny_base, **settings)
        whole, expected = step(model, batch, accelerator, 2 * PAIRS)
        for chunk in (2, 3, 7):
            losses, found = step(model, batch, accelerator, chunk)
            assert vars(losses) == pytest.approx(vars(whole), rel=1e-5)
            close(found, expected)

    @pytest.mark.parametrize("attention_dropout", [0.0, 0.3])
    @pytest.mark.parametrize(
        "settings", [{"lora_dropout": 0.4}, {}, {"lora_dropout": 0.4, "gradient_checkpointing": True}]
    )
    def test_meet_the_same_dropout_when_they_come_again(
        self,
        tiny_base: Path,
        tmp_path: Path,
        accelerator: Accelerator,
        settings: dict[str, Any],
        attention_dropout: float,
    ) -> None:
        base = Path(shutil.copytree(tiny_base, tmp_path / "base"))
        config = json.loads((base / "config.json").read_text())
        (base / "config.json").write_text(json.dumps({**config, "attention_dropout": attention_dropout}))
        model, batch = model_and_batch(base, **settings)
        losses, found = step(model, batch, accelerator, 3)
        after = torch.get_rng_state()
        # The same parts, each through the model once, in one graph.
        model.zero_grad(set_to_none=True)
        torch.manual_seed(5)
        parts = batch.rows.by_length(3)
        outputs = [model(batch.rows.part(part)) for part in parts]
        assert torch.equal(after, torch.get_rng_state())
        vectors = torch.cat([output.embeddings for output in outputs])[torch.cat(parts).argsort()]
        told = torch.stack([output.answer_loss for output in outputs]).sum() / batch.answer_tokens
        assert model.temperature is not None
        loss = mix_losses(contrastive_loss(vectors, batch.partner, batch.not_negative, model.temperature), told, 0.5)
        assert losses.loss == pytest.approx(loss.item(), rel=1e-5)
        loss.backward()
        close(found, gradients(model))

    def test_dropout_falls_elsewhere_at_another_step(self, tiny_base: Path, accelerator: Accelerator) -> None:
        model, batch = model_and_batch(tiny_base, lora_dropout=0.4)
        torch.manual_seed(5)
        first, second = (backward(model, model, batch, BOTH, 3, accelerator) for _ in range(2))
        assert first.loss != second.loss

    def test_add_to_what_is_there(self, tiny_base: Path, accelerator: Accelerator) -> None:
        model, batch = model_and_batch(tiny_base)
        once = {name: 2 * gradient for name, gradient in step(model, batch, accelerator, 3)[1].items()}
        backward(model, model, batch, BOTH, 3, accelerator)
        close(gradients(model), once)


def test_activations_computed_again_give_the_same(tiny_base: Path, accelerator: Accelerator) -> None:
    kept, expected = step(*model_and_batch(tiny_base), accelerator, 2 * PAIRS)
    losses, found = step(*model_and_batch(tiny_base, gradient_checkpointing=True), accelerator, 2 * PAIRS)
    assert vars(losses) == pytest.approx(vars(kept), rel=1e-5)
    close(found, expected)


@pytest.mark.parametrize("chunk", [3, 2 * PAIRS])
def test_a_look_learns_nothing_and_draws_nothing(tiny_base: Path, accelerator: Accelerator, chunk: int) -> None:
    model, batch = model_and_batch(tiny_base)
    expected, _ = step(model, batch, accelerator, 2 * PAIRS)
    model.zero_grad(set_to_none=True)
    before = torch.get_rng_state()
    looked = measure(model.eval(), batch, BOTH, chunk, torch.device("cpu"))
    assert vars(looked) == pytest.approx(vars(expected), rel=1e-5)
    assert not gradients(model)
    assert torch.equal(before, torch.get_rng_state())
