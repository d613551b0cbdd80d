"""NoteLLM as a torch module: a causal LM, one extra token, a projection.

arXiv 2403.01744, section 3: a note is compressed into the special token ``[EMB]``. As in the authors' code, the
embedding is the last hidden state at the position *before* ``[EMB]`` (the opening quote), projected and
L2-normalised; the same forward pass goes on to generate hashtags and category.
"""

from __future__ import annotations

from copy import copy
from typing import TYPE_CHECKING, Final, NamedTuple

import torch
from torch import Tensor, nn

from training.losses import answer_loss_sum
from training.note_rows import NO_LABEL, in_order_of_rows

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel, PreTrainedTokenizerFast

    from training.note_rows import NoteRows

__all__ = ["EMB_TOKEN", "NoteLLM", "NoteOutput", "add_emb_token"]

EMB_TOKEN = "[EMB]"  # noqa: S105 - a token of the vocabulary
# Rows of a batch that are read at once, those of like length together: half of a batch of short posts is padding else.
# More are not faster on a CPU; on a GPU fewer would not fill it.
_CPU_ROWS: Final = 16
_GPU_ROWS: Final = 128


class NoteOutput(NamedTuple):
    """``embeddings [B, D]`` unit vectors; ``answer_loss`` the sum over answer tokens, 0 where there are none."""

    embeddings: Tensor
    answer_loss: Tensor


class NoteLLM(nn.Module):
    """A base causal LM with the projection that turns one hidden state into an embedding.

    ``projection`` is ``nn.Linear(hidden, dim)``, or ``None`` for a base that was never trained to embed: its
    hidden state is then the embedding as it is. ``temperature`` is the contrastive loss's; only training uses it.
    """

    def __init__(
        self, base: PreTrainedModel, projection: nn.Linear | None = None, *, temperature: float | None = None
    ) -> None:
        super().__init__()
        self.base = base
        self.projection: nn.Module = projection if projection is not None else nn.Identity()
        self.temperature = None if temperature is None else nn.Parameter(torch.tensor(float(temperature)))

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

    def forward(self, rows: NoteRows) -> NoteOutput:
        """One pass: the embedding of each row, and how badly its answer was foretold."""
        most = _CPU_ROWS if rows.ids.device.type == "cpu" else _GPU_ROWS
        instruction = self._read_instruction(rows)
        if len(rows) <= most:
            return self._read(rows, instruction)
        parts = rows.by_length(most)
        # Cut before anything is read: a part's width is a number that a GPU has to be waited for.
        cut = [rows.part(part) for part in parts]
        outputs = [self._read(part, instruction) for part in cut]
        return NoteOutput(
            in_order_of_rows(parts, [output.embeddings for output in outputs]),
            torch.stack([output.answer_loss for output in outputs]).sum(),
        )

    def _read(self, rows: NoteRows, instruction: Cache | None) -> NoteOutput:
        hidden = self._hidden(rows, instruction)
        # Cosines of nearly equal vectors want all the digits, whatever precision the base computes in.
        with torch.autocast(hidden.device.type, enabled=False):
            embeddings = self.embed(_at(hidden, rows.embed_at).float())
        if rows.labels is None:
            return NoteOutput(embeddings, embeddings.new_zeros(()))
        # Logits of the answer's tokens only: of all tokens they would take more memory than the model.
        told = rows.labels[:, 1:] != NO_LABEL
        logits = self._logits(hidden[:, :-1][told])
        return NoteOutput(embeddings, answer_loss_sum(logits, rows.labels[:, 1:][told]))

    def _logits(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.base.get_output_embeddings()(hidden)
        config = self.base.config.get_text_config()
        # Granite's and Cohere's; then Gemma's, as export does it.
        logits = logits / (getattr(config, "logits_scaling", None) or 1) * (getattr(config, "logit_scale", None) or 1)
        softcap = getattr(config, "final_logit_softcapping", None)
        return logits if softcap is None else torch.tanh(logits / softcap) * softcap

    def hidden_at_quote(self, rows: NoteRows) -> Tensor:
        """``[B, hidden]`` at the opening quote: what the projection gets."""
        return _at(self._hidden(rows, self._read_instruction(rows)), rows.embed_at)

    def _read_instruction(self, rows: NoteRows) -> Cache | None:
        """The instruction's keys and values, of one row; None where activations are computed again.

        What is computed again cannot share a cache: there each row reads the instruction for itself.
        """
        if self.base.is_activation_checkpointing:
            return None
        return self.base.get_decoder()(input_ids=rows.prefix.expand(1, -1), use_cache=True).past_key_values

    def _hidden(self, rows: NoteRows, instruction: Cache | None) -> Tensor:
        """``[B, S, hidden]`` after the last layer; all rows read ``instruction``, of which each gets a copy."""
        decoder, before = self.base.get_decoder(), len(rows.prefix)
        mask = torch.cat([rows.mask.new_ones(len(rows), before), rows.mask], dim=1)
        if instruction is None:
            ids = torch.cat([rows.prefix.expand(len(rows), -1), rows.ids], dim=1)
            hidden: Tensor = decoder(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
            return hidden[:, before:]
        positions = torch.arange(rows.ids.shape[1], device=rows.ids.device) + before
        return decoder(  # type: ignore[no-any-return]
            input_ids=rows.ids,
            attention_mask=mask,
            position_ids=positions.expand(len(rows), -1),
            past_key_values=_repeat(instruction, len(rows)),
            use_cache=True,
        ).last_hidden_state


def _repeat(cache: Cache, rows: int) -> Cache:
    """``cache`` of one row for ``rows``; the one given stays as it is."""
    copied = copy(cache)
    copied.layers = [copy(layer) for layer in cache.layers]
    copied.batch_repeat_interleave(rows)
    return copied


def _at(hidden: Tensor, places: Tensor) -> Tensor:
    return hidden[torch.arange(len(hidden), device=hidden.device), places]


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
