"""One optimiser step's gradients, whole or in chunks.

In chunks (GradCache: Gao et al., arXiv 2101.06983) the batch goes through the model twice. First without gradients, for
the embeddings alone, of which the contrastive loss and its gradient with respect to each embedding are computed; then
chunk by chunk with gradients, each chunk's embeddings being given theirs. The sum is the whole batch's gradient, while
memory holds one chunk's activations.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from training.batches import PairBatch
from training.losses import contrastive_loss, gather_rows, mix_losses, recall_at_1
from training.model import NoteLLM
from training.note_rows import NoteRows, in_order_of_rows

__all__ = ["BatchLosses", "backward", "measure"]


@dataclass(frozen=True)
class BatchLosses:
    """Of a whole batch, over all processes. ``generative`` is the mean over its answer tokens."""

    loss: float
    contrastive: float
    generative: float
    recall_at_1: float


@dataclass(frozen=True)
class Weights:
    """How the two losses are mixed; one of them may be off. ``hardness`` is the contrastive loss's."""

    contrastive: bool
    generative: float
    hardness: float = 0.0

    def mix(self, contrastive: Tensor, generative: Tensor) -> Tensor:
        return mix_losses(contrastive, generative, self.generative) if self.contrastive else generative


def backward(
    model: NoteLLM, wrapped: nn.Module, batch: PairBatch, weights: Weights, chunk: int, accelerator: Accelerator
) -> BatchLosses:
    """Add the batch's gradients to the parameters. ``wrapped`` is ``model``, in data parallelism around it or not.

    ``chunk`` notes go through the model at a time, each with those of like length.
    """
    rows = batch.rows.to(accelerator.device)
    parts = rows.by_length(chunk)
    if len(parts) == 1:
        output = wrapped(rows)
        contrastive, recall = _contrastive(model, batch, weights, output.embeddings)
        generative = output.answer_loss / max(batch.answer_tokens, 1)
        # Data parallelism takes the mean over processes; what each has of the answers is to be added up.
        accelerator.backward(weights.mix(contrastive, generative * accelerator.num_processes))
        return _losses(weights, contrastive, accelerator.reduce(generative.detach()), recall)
    cached, random_states = _embed(model, rows, parts)
    cached.requires_grad_()
    contrastive, recall = _contrastive(model, batch, weights, cached)
    mixed = weights.mix(contrastive, contrastive.new_zeros(()))
    gradient, *rest = (
        torch.autograd.grad(mixed, [cached, *_temperature(model)], allow_unused=True, materialize_grads=True)
        if mixed.requires_grad
        else (torch.zeros_like(cached),)
    )
    generative = contrastive.new_zeros(())
    for part, random_state in zip(parts, random_states, strict=True):
        last = part is parts[-1]
        with _random_state(random_state), nullcontext() if last else accelerator.no_sync(wrapped):
            output = wrapped(rows.part(part))
            share = output.answer_loss / max(batch.answer_tokens, 1)
            loss = (output.embeddings * gradient[part]).sum()
            loss = loss + weights.mix(contrastive.new_zeros(()), share * accelerator.num_processes)
            if last:
                # Here, as data parallelism takes the mean of what the last backward brings.
                for temperature, slope in zip(_temperature(model), rest, strict=False):
                    loss = loss + temperature * slope
            accelerator.backward(loss)
        generative = generative + share.detach()
    return _losses(weights, contrastive, accelerator.reduce(generative), recall)


@torch.no_grad()
def measure(model: NoteLLM, batch: PairBatch, weights: Weights, chunk: int, device: torch.device) -> BatchLosses:
    """The losses of a batch that one process has alone; nothing is learnt from it.

    All negatives weigh alike, whatever the training's hardness: so runs compare.
    """
    rows = batch.rows.to(device)
    parts = rows.by_length(chunk)
    outputs = [model(rows.part(part)) for part in parts]
    embeddings = in_order_of_rows(parts, [output.embeddings for output in outputs])
    assert model.temperature is not None
    partner, not_negative = batch.partner.to(device), batch.not_negative.to(device)
    contrastive = contrastive_loss(embeddings, partner, not_negative, model.temperature)
    generative = torch.stack([output.answer_loss for output in outputs]).sum() / max(batch.answer_tokens, 1)
    return _losses(weights, contrastive, generative, recall_at_1(embeddings, partner, not_negative))


def _contrastive(model: NoteLLM, batch: PairBatch, weights: Weights, embeddings: Tensor) -> tuple[Tensor, Tensor]:
    everyone = gather_rows(embeddings)
    assert model.temperature is not None
    partner, not_negative = batch.partner.to(everyone.device), batch.not_negative.to(everyone.device)
    loss = contrastive_loss(everyone, partner, not_negative, model.temperature, weights.hardness)
    return loss, recall_at_1(everyone.detach(), partner, not_negative)


def _embed(model: NoteLLM, rows: NoteRows, parts: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Embeddings of all rows, and the state of the random numbers at each part."""
    # Dropout has to fall on the same places when a part comes again, with its answers: so it must have them now.
    alone = not _drops(model)
    states, embeddings = [], []
    with torch.no_grad():
        for part in parts:
            states.append(_get_random_state(rows.ids.device))
            embeddings.append(model(rows.part(part, embeddings_only=alone)).embeddings)
    return in_order_of_rows(parts, embeddings), states


def _drops(model: NoteLLM) -> bool:
    """Attention's dropout is a number in the config, no module."""
    in_attention = getattr(model.base.config.get_text_config(), "attention_dropout", 0.0)
    return bool(in_attention) or any(isinstance(module, nn.Dropout) and module.p for module in model.modules())


def _temperature(model: NoteLLM) -> list[nn.Parameter]:
    return [model.temperature] if model.temperature is not None and model.temperature.requires_grad else []


def _get_random_state(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


@contextmanager
def _random_state(state: Tensor) -> Iterator[None]:
    """``state`` inside, and outside what it was."""
    cuda = len(state) != len(torch.get_rng_state())
    with torch.random.fork_rng(devices=[torch.cuda.current_device()] if cuda else []):
        (torch.cuda.set_rng_state if cuda else torch.set_rng_state)(state)
        yield


def _losses(weights: Weights, contrastive: Tensor, generative: Tensor, recall: Tensor) -> BatchLosses:
    contrastive, generative = contrastive.detach(), generative.detach()
    return BatchLosses(
        loss=float(weights.mix(contrastive, generative)),
        contrastive=float(contrastive),
        generative=float(generative),
        recall_at_1=float(recall),
    )
