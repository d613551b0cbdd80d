"""What torch answers to the notes of :mod:`notellm.parity`, run plainly: the reference that a graph is held against.

Torch sees each row alone, unpadded, without a cached prefix and with transformers' own masks and cache. The graph sees
ragged batches after the cached prefix, with ours. A mistake in mask, positions, indices or cache cannot hide in both.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from notellm.parity import GREEDY_ROWS, GREEDY_TOKENS, LEADERS, ParityReference, parity_notes
from notellm.prompt import PromptBuilder
from training.model import NoteLLM

__all__ = ["reference_of"]


@torch.no_grad()
def reference_of(model: NoteLLM, prompts: PromptBuilder) -> ParityReference:
    """``model`` in float32."""
    ids = [prompts.prefix_ids + prompts.build(note).ids for note in parity_notes()]
    answers = [_last(model, row) for row in ids]
    generated = [_generate(model, row + prompts.hashtags_ids) for row in ids[:GREEDY_ROWS]]
    leaders, scores = (torch.stack(part) for part in zip(*generated, strict=True))
    return ParityReference(
        embeddings=torch.stack([embedding for embedding, _ in answers]).numpy(),
        logits=torch.stack([logits for _, logits in answers[:GREEDY_ROWS]]).numpy(),
        tokens=np.ascontiguousarray(leaders[..., 0].numpy()),
        leaders=leaders.numpy(),
        scores=scores.numpy(),
    )


def _last(model: NoteLLM, ids: Sequence[int]) -> tuple[Tensor, Tensor]:
    output = model.base(input_ids=torch.tensor([ids]), output_hidden_states=True, use_cache=False, logits_to_keep=1)
    # The last of the hidden states has been through the final norm: it is what the output table reads.
    return model.embed(output.hidden_states[-1][0, -1]), output.logits[0, -1]


def _generate(model: NoteLLM, ids: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The best ids at each of the greedy steps, ``[16, 8]``, and their logits."""
    output = model.base(input_ids=torch.tensor([ids]), use_cache=True, logits_to_keep=1)
    best = [output.logits[0, -1].topk(LEADERS)]
    while len(best) < GREEDY_TOKENS:
        output = model.base(
            input_ids=best[-1].indices[None, :1], past_key_values=output.past_key_values, use_cache=True
        )
        best.append(output.logits[0, -1].topk(LEADERS))
    return torch.stack([step.indices for step in best]), torch.stack([step.values for step in best])
