"""A BERT-class encoder on the same pairs: all-MiniLM-L6-v2, all of its weights trained with the same contrastive loss.

The same draws of pairs by seed and step, the same false negatives masked, the same learned temperature and schedule;
its text is title, content and hashtags, cut to the same number of its own tokens.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import get_scheduler

from notellm.settings import TrainingSettings
from training.evaluation.minilm import MiniLM
from training.evaluation.note_text import note_text
from training.losses import contrastive_loss, recall_at_1
from training.pair_draws import PairDraws
from training.training_data import DataFiles, read_training_data
from training.watch import Watch

__all__ = ["TunedMiniLM", "tune_minilm"]

# Texts that go through the model at once: more are not faster on two cores, and the longest pads them all.
_TOGETHER = 64


@dataclass(frozen=True)
class TunedMiniLM:
    """``curve``: tokens read and contrastive loss after each step."""

    model: MiniLM
    curve: list[tuple[int, float]]
    seconds: float


def tune_minilm(files: DataFiles, settings: TrainingSettings, watch: Watch) -> TunedMiniLM | None:
    """None where ``watch`` wanted it to stop."""
    data = read_training_data(files).train
    minilm = MiniLM.load(tokens=settings.note_tokens)
    model = minilm.model.train()
    device = model.device
    torch.manual_seed(settings.seed)
    temperature = torch.nn.Parameter(torch.tensor(settings.temperature, device=device))
    groups = [
        {"params": list(model.parameters()), "lr": settings.learning_rate, "weight_decay": settings.weight_decay},
        {"params": [temperature], "lr": settings.projection_learning_rate, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups)
    warmup = round(settings.warmup_share * settings.steps)
    schedule = {"constant": "constant_with_warmup"}.get(settings.schedule, settings.schedule)
    scheduler = get_scheduler(schedule, optimizer, num_warmup_steps=warmup, num_training_steps=settings.steps)
    draws = PairDraws(data.pairs, settings, settings.batch_pairs)
    texts = [note_text(data.notes.note(row)) for row in range(len(data.notes))]
    curve: list[tuple[int, float]] = []
    tokens = 0
    began = time.monotonic()
    for step in range(settings.steps):
        rows = draws.draw(np.random.default_rng([settings.seed, step]))
        ids = minilm.tokenize([texts[row] for row in rows])
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            embeddings = _forward_by_length(minilm, ids).float()
        partner = torch.arange(len(rows), device=device) ^ 1
        not_negative = torch.from_numpy(draws.not_negative(rows)).to(device)
        loss = contrastive_loss(embeddings, partner, not_negative, temperature, settings.hard_negatives)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_([*model.parameters(), temperature], settings.max_gradient_norm)
        optimizer.step()
        scheduler.step()
        tokens += sum(map(len, ids))
        curve.append((tokens, loss.item()))
        watch.metrics(
            {
                "part": "train",
                "step": step + 1,
                "tokens": tokens,
                "contrastive": loss.item(),
                "generative": 0.0,
                "seconds": time.monotonic() - began,
                "recall_at_1": float(recall_at_1(embeddings.detach(), partner, not_negative)),
            }
        )
        if watch.wants_to_stop():
            return None
    model.eval()
    return TunedMiniLM(minilm, curve, time.monotonic() - began)


def _forward_by_length(minilm: MiniLM, ids: list[list[int]]) -> Tensor:
    """``[B, 384]`` in the order of ``ids``, read with those of like length: a batch of posts is half padding else."""
    order = sorted(range(len(ids)), key=lambda row: len(ids[row]))
    pieces = [order[begin : begin + _TOGETHER] for begin in range(0, len(order), _TOGETHER)]
    read = torch.cat([minilm.forward([ids[row] for row in piece]) for piece in pieces])
    return read[torch.tensor(order, device=read.device).argsort()]
