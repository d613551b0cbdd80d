"""A reader of notes that knows words: what a model is to the evaluation, without one."""

from __future__ import annotations

import hashlib
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from notellm.encoder import EncodedBatch, Tags
from notellm.messages import Note
from notellm.prompt import Prompt

__all__ = ["WordReader"]

DIM = 8


class WordReader:
    """Embeddings are sums of a vector for each word; tags are looked up by title. Batches of three, the longest first.

    ``asked`` keeps each prompt that it has read, and whether only its embedding was wanted.
    """

    def __init__(self, tags: Mapping[str, Tags], *, salt: str = "") -> None:
        self.tags = tags
        self.salt = salt
        self.asked: list[tuple[Prompt, bool]] = []

    def build_prompts(self, notes: Sequence[Note]) -> list[Prompt]:
        return [self._prompt(note) for note in notes]

    def stream(self, prompts: Sequence[Prompt], *, embed_only: bool = False) -> Iterator[EncodedBatch]:
        self.asked += [(prompt, embed_only) for prompt in prompts]
        order = sorted(range(len(prompts)), key=lambda place: -len(prompts[place].text))
        for begin in range(0, len(order), 3):
            indices = order[begin : begin + 3]
            embeddings = np.stack([self.embed(prompts[place].text) for place in indices])
            yield EncodedBatch(indices, embeddings, None)
            if not embed_only:
                titles = [prompts[place].text.split("\n")[0] for place in indices]
                yield EncodedBatch(indices, embeddings, [self.tags[title] for title in titles])

    def embed(self, text: str) -> NDArray[np.float32]:
        words = re.findall(r"\w+", text.lower())
        seeds = [zlib.crc32((self.salt + word).encode()) for word in words]
        vectors = [np.random.default_rng(seed).normal(size=DIM) for seed in seeds]
        total = np.sum(vectors, axis=0) if vectors else np.ones(DIM)
        return np.asarray(total / np.linalg.norm(total), np.float32)

    @staticmethod
    def _prompt(note: Note) -> Prompt:
        text = f"{note.title}\n{' '.join(note.hashtags)}\n{note.content}"
        return Prompt(text, hashlib.sha256(text.encode()).hexdigest(), [*text.encode()], list(note.hashtags))
