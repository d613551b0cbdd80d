"""What NoteLLM minimises (arXiv 2403.01744, sections 3.3 and 3.4): generative-contrastive and collaborative losses."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import cross_entropy

__all__ = ["answer_loss_sum", "contrastive_loss", "gather_rows", "mix_losses", "recall_at_1"]


def contrastive_loss(
    embeddings: Tensor, partner: Tensor, not_negative: Tensor, temperature: Tensor, hardness: float = 0.0
) -> Tensor:
    """Generative-contrastive learning: each note has to find its partner among all notes of the batch.

    ``L = -1/M sum_i log( exp(e^t s(i, p_i)) / sum_{j in {p_i} + negatives of i} exp(e^t s(i, j)) )``,
    equation 4 of the paper with its ``M = 2B`` notes of B pairs, so that it is symmetric: either note of a pair looks
    for the other. ``s`` is the cosine.

    ``embeddings [M, D]`` unit vectors; ``partner [M]`` the row of each note's partner; ``not_negative [M, M]`` True
    where column j is no negative of row i (the note itself, the same note again, another known positive);
    ``temperature`` the scalar t. Returns a scalar.

    ``hardness`` is the b of Robinson et al. (arXiv 2010.04592): each negative j counts ``exp(b e^t s(i, j))`` times,
    over the mean of those of i, so that near ones weigh more; 0 is the paper's loss.
    """
    logits = (embeddings @ embeddings.T) * temperature.exp()
    keep = _is_partner(partner)
    logits = logits.masked_fill(not_negative & ~keep, -torch.inf)
    if hardness:
        log_weights = hardness * logits.detach().masked_fill(keep, -torch.inf)
        number = log_weights.isfinite().sum(dim=1, keepdim=True).clamp_min(1)
        mean = log_weights.logsumexp(dim=1, keepdim=True) - number.log()
        logits = logits + (log_weights - mean).masked_fill(~log_weights.isfinite(), 0.0)
    return cross_entropy(logits, partner)


def recall_at_1(embeddings: Tensor, partner: Tensor, not_negative: Tensor) -> Tensor:
    """The share of notes whose partner is nearer than every negative; a tie is a miss. Arguments as of the loss."""
    cosine = embeddings @ embeddings.T
    keep = _is_partner(partner)
    found = cosine[keep]
    return (found > cosine.masked_fill(not_negative | keep, -torch.inf).amax(dim=1)).float().mean()


def _is_partner(partner: Tensor) -> Tensor:
    """``[M]`` -> ``[M, M]``."""
    return partner[:, None] == torch.arange(len(partner), device=partner.device)


def answer_loss_sum(logits: Tensor, answers: Tensor) -> Tensor:
    """Collaborative supervised fine-tuning: the sum of ``-log p(token | what stands before it)`` over answer tokens.

    ``logits [K, V]`` before each of the K answer tokens ``answers [K]``. Equation 6 of the paper is its mean: divide by
    the number of answer tokens of the whole batch, however many chunks and processes share it.
    """
    return cross_entropy(logits.float(), answers, reduction="sum")


def mix_losses(contrastive: Tensor, generative: Tensor, weight: float) -> Tensor:
    """Equation 7: ``(contrastive + a * generative) / (1 + a)``, ``weight`` being a (0.01 in the paper)."""
    return (contrastive + weight * generative) / (1 + weight)


def gather_rows(rows: Tensor) -> Tensor:
    """``[M, ...]`` of every process -> ``[W * M, ...]``, by rank, with gradients back to where the rows came from.

    Every process then computes the whole loss, so that a row's gradient arrives W times, summed; data parallelism
    takes the mean over processes, which makes it once again.
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return rows
    gathered: Tensor = _Gather.apply(rows)  # type: ignore[no-untyped-call]
    return gathered


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, rows: Tensor) -> Tensor:
        parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> Tensor:
        # The sum of what every process has for every row, of which a process keeps what is of its own rows.
        total = gradients[0].contiguous().clone()
        dist.all_reduce(total)
        return total.chunk(dist.get_world_size())[dist.get_rank()]
