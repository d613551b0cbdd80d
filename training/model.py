"""NoteLLM as a torch module: a causal LM, one extra token, a projection.

arXiv 2403.01744, section 3: a note is compressed into the special token ``[EMB]``. As in the authors' code, the
embedding is the last hidden state at the position *before* ``[EMB]`` (the opening quote), projected and
L2-normalised; the same forward pass goes on to generate hashtags and category.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

__all__ = ["EMB_TOKEN", "NoteLLM", "add_emb_token"]

EMB_TOKEN = "[EMB]"  # noqa: S105 - a token of the vocabulary


class NoteLLM(nn.Module):
    """A base causal LM with the projection that turns one hidden state into an embedding.

    ``projection`` is ``nn.Linear(hidden, dim)``, or ``None`` for a base that was never trained to embed: its
    hidden state is then the embedding as it is.
    """

    def __init__(self, base: PreTrainedModel, projection: nn.Linear | None = None) -> None:
        super().__init__()
        self.base = base
        self.projection: nn.Module = projection if projection is not None else nn.Identity()

    @property
    def hidden_size(self) -> int:
        return int(self.base.config.get_text_config().hidden_size)

    @property
    def embedding_dim(self) -> int:
        return self.projection.out_features if isinstance(self.projection, nn.Linear) else self.hidden_size

    @property
    def has_projection(self) -> bool:
        return isinstance(self.projection, nn.Linear)

    def embed(self, hidden: Tensor) -> Tensor:
        """Hidden states ``[..., hidden]`` at the opening quote -> unit vectors ``[..., dim]``."""
        return nn.functional.normalize(self.projection(hidden), dim=-1)


def add_emb_token(base: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> int:
    """Add ``[EMB]`` to tokenizer and model, and return its id. Does nothing where it is there already.

    The new row, in the input table and in an untied output table, starts as the mean of the table, so that an
    untrained model neither prefers nor avoids it.
    """
    vocab = tokenizer.get_vocab()
    if EMB_TOKEN in vocab:
        token_id = int(vocab[EMB_TOKEN])
        if token_id < base.get_input_embeddings().num_embeddings:
            return token_id
    else:
        tokenizer.add_special_tokens({"additional_special_tokens": [EMB_TOKEN]}, replace_extra_special_tokens=False)
        token_id = int(tokenizer.convert_tokens_to_ids(EMB_TOKEN))
    rows = base.get_input_embeddings().num_embeddings
    if token_id >= rows:
        # mean_resizing=False: transformers' own mean init draws around the mean, and the draw would change
        # model_version at every export.
        base.resize_token_embeddings(token_id + 1, mean_resizing=False)
    with torch.no_grad():
        tables = [base.get_input_embeddings().weight]
        head = base.get_output_embeddings()
        if head is not None and head.weight is not tables[0]:
            tables.append(head.weight)
        known = min(rows, token_id)
        for table in tables:
            # A tokenizer may have had tokens beyond the table: their rows are new as well.
            table[known : token_id + 1] = table[:known].mean(dim=0)
    return token_id
