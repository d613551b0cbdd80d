"""The proof of an export: the graph, driven as the encoder drives it, against torch, run plainly.

Torch sees each row alone, unpadded, without a cached prefix and with transformers' own mask. The graph sees ragged
batches after the cached prefix, with ours. So a mistake in mask, positions, indices or cache cannot hide in both.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from notellm.bundle import ParityReport, ParityRow
from notellm.messages import Note
from notellm.prompt import PromptBuilder
from notellm.sequences import Graph, SequenceRunner
from training.model import NoteLLM

__all__ = ["EMBEDDING_BOUND", "LOGITS_BOUND", "check_parity"]

EMBEDDING_BOUND = 1e-5
LOGITS_BOUND = 1e-3
GREEDY_TOKENS = 16
TIE = 1e-3
DISTINCT_BOUND = 0.99

Floats = NDArray[np.float32]

_TEXTS: tuple[tuple[str, str, list[str]], ...] = (
    ("Two days in Kyoto", "Skip the bus, rent a bike. Nanzen-ji at 7 am was ours alone 🍁", ["kyoto", "autumn"]),
    ("", "sourdough no. 14 finally has ears", []),
    ("Marathon taper", "Week three of the taper and every staircase feels like a personal insult. " * 3, ["running"]),
    ("旧书店", "在城南的小巷里找到一家开了四十年的旧书店，老板泡茶，猫睡在诗集上。", ["书店", "周末"]),
    ("ISO 3200 and proud", "grain is not a mistake", ["film", "35mm", "leica"]),
    ("Rescue cat, day 12", "She came out from under the sofa!", ["cats", "adoption", "patience"]),
    ("Keyboard lube log", "Krytox 205g0 on the stems, 105 oil on the springs.\nStabilisers last.", []),
    ("给新手妈妈", "半夜喂奶的时候，记得给自己倒一杯温水。", ["育儿"]),
    ("Hut to hut", "Four nights, three passes, one very smelly pair of socks. Bring ear plugs.", ["hiking", "alps"]),
    ('A "quoted" title', "tabs\tand \\ backslashes, [EMB] and <|im_start|> as plain text", ["edge cases"]),
)


def check_parity(model: NoteLLM, graph: Graph, prompts: PromptBuilder, provider: str) -> ParityReport:
    """Compare on a ragged batch of 8, each of its rows alone, and ten notes for distinctness."""
    notes = [Note(note_id=f"parity-{i}", title=t, content=c, hashtags=h) for i, (t, c, h) in enumerate(_TEXTS)]
    ids = [prompts.build(note).ids for note in notes]
    runner = SequenceRunner(graph, prompts.prefix_ids)
    ragged = ids[:8]
    reference = [_torch_last(model, prompts.prefix_ids + row) for row in ragged]
    want_embeddings = np.stack([embedding for embedding, _ in reference])
    want_logits = np.stack([logits for _, logits in reference])
    batch_embeddings, sequences = runner.prefill(ragged)
    rows = [
        _within("embeddings, ragged batch of 8", _worst(batch_embeddings, want_embeddings), EMBEDDING_BOUND),
        _within("logits, ragged batch of 8", _worst(sequences.logits, want_logits), LOGITS_BOUND),
    ]
    singles = [runner.prefill([row]) for row in ragged]
    single_embeddings = np.concatenate([embedding for embedding, _ in singles])
    single_logits = np.concatenate([one.logits for _, one in singles])
    rows += [
        _within("embeddings, batch of 1", _worst(single_embeddings, want_embeddings), EMBEDDING_BOUND),
        _within("logits, batch of 1", _worst(single_logits, want_logits), LOGITS_BOUND),
    ]
    written = _graph_greedy(runner, ragged, prompts.hashtags_ids)
    wrong = sum(
        _disagreements(model, prompts.prefix_ids + row + prompts.hashtags_ids, tokens)
        for row, tokens in zip(ragged, written, strict=True)
    )
    rows.append(_within(f"greedy tokens that differ, {len(ragged)} x {GREEDY_TOKENS}", float(wrong), 0.0))
    rows.append(_distinct(runner.embed(ids), centred=not model.has_projection))
    return ParityReport(provider=provider, rows=rows)


def _within(check: str, value: float, bound: float) -> ParityRow:
    # "not (value > bound)" would pass a NaN.
    return ParityRow(check, value, bound, bool(value <= bound))


def _worst(got: Floats, want: Floats) -> float:
    return float(np.abs(got - want).max())


def _distinct(embeddings: Floats, *, centred: bool) -> ParityRow:
    """The largest cosine between any two of ten different notes: a graph that reads the wrong place has it near 1.

    An untrained base's hidden states all lie in one narrow cone; what tells notes apart there is what is left after the
    mean is taken away.
    """
    check = "largest cosine of ten notes" + (", centred" if centred else "")
    vectors = embeddings - embeddings.mean(axis=0) if centred else embeddings
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    if not norms.min() > 1e-6:
        return ParityRow(check, 1.0, DISTINCT_BOUND, False)
    unit = vectors / norms
    largest = float((unit @ unit.T - 2 * np.eye(len(unit))).max())
    return ParityRow(check, largest, DISTINCT_BOUND, largest < DISTINCT_BOUND)


@torch.no_grad()
def _torch_last(model: NoteLLM, ids: Sequence[int]) -> tuple[Floats, Floats]:
    hidden = model.base.base_model(input_ids=torch.tensor([ids])).last_hidden_state[0, -1]
    logits = model.base.get_output_embeddings()(hidden)
    return model.embed(hidden).numpy(), logits.numpy()


@torch.no_grad()
def _disagreements(model: NoteLLM, ids: Sequence[int], tokens: Sequence[int]) -> int:
    """How many of ``tokens`` torch would not have written; a token that nearly ties with torch's own choice agrees.

    Torch reads the graph's own tokens, in one pass: after a tie the two may go on differently, and both be right.
    """
    whole = torch.tensor([[*ids, *tokens]])
    hidden = model.base.base_model(input_ids=whole).last_hidden_state[0, len(ids) - 1 : -1]
    logits = model.base.get_output_embeddings()(hidden)
    chosen = logits[torch.arange(len(tokens)), torch.tensor(tokens)]
    return int((logits.max(dim=-1).values - chosen > TIE).sum())


def _graph_greedy(runner: SequenceRunner, batch: Sequence[Sequence[int]], guidance: Sequence[int]) -> list[list[int]]:
    sequences = runner.guide(runner.prefill(batch)[1], guidance)
    steps: list[NDArray[np.int64]] = []
    for _ in range(GREEDY_TOKENS):
        steps.append(np.argmax(sequences.logits, axis=1))
        sequences = runner.extend(sequences, steps[-1][:, None])
    return [[int(token) for token in row] for row in np.stack(steps, axis=1)]
