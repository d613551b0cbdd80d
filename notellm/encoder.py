"""NoteLLM in one pass: a batch of notes in, embeddings, hashtags and categories out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from notellm.batching import plan_batches
from notellm.bundle import Bundle, Manifest, open_bundle
from notellm.category_trie import CategoryTrie
from notellm.errors import BundleError
from notellm.generated_hashtags import answer_is_complete, read_hashtags
from notellm.graph_session import GraphSession, Provider
from notellm.messages import Note
from notellm.prompt import Prompt, PromptBuilder
from notellm.sequences import Graph, SequenceRunner, Sequences

__all__ = ["EncodedBatch", "EncodedNote", "NoteEncoder", "Tags", "plan_answers"]

Floats = NDArray[np.float32]

# Rows that are done leave a batch when at most this share goes on: who stays is copied, on a GPU through the host.
_FEW = 0.5


class Tags(msgspec.Struct, frozen=True):
    """What the model says about a note."""

    hashtags: list[str]
    category: str


class EncodedNote(msgspec.Struct, frozen=True):
    """``embedding`` is a unit vector ``[D]`` float32; ``tags`` is None where only the embedding was asked for."""

    embedding: Floats
    tags: Tags | None


class EncodedBatch(msgspec.Struct, frozen=True):
    """Some rows of a call: first with their embeddings ``[rows, D]`` alone, later once more with their tags."""

    indices: list[int]
    embeddings: Floats
    tags: list[Tags] | None


class NoteEncoder:
    """An exported model, loaded. One prefill per note gives the embedding; both answers go on from its KV cache.

    Thread-safe. ``batch == single``: a note's embedding depends neither on what it runs with nor on the order, to 1e-4.
    """

    def __init__(self, bundle: Bundle, graph: Graph, *, token_budget: int, max_rows: int) -> None:
        manifest = bundle.manifest
        self.bundle = bundle
        self._graph = graph
        self._token_budget = token_budget
        self._max_rows = max_rows
        self.prompts = PromptBuilder(
            Tokenizer.from_file(str(bundle.tokenizer_path)),
            manifest.template,
            manifest.prompt_limits,
            manifest.token_ids,
        )
        self._categories = plan_answers(manifest, self.prompts)
        self._stop = {*manifest.token_ids.eos, *manifest.token_ids.special}
        self._runner = SequenceRunner(graph, self.prompts.prefix_ids, manifest.capabilities)

    @classmethod
    def load(
        cls,
        path: Path | str,
        provider: Provider = "auto",
        *,
        threads: int = 0,
        token_budget: int = 2048,
        max_rows: int = 16,
    ) -> NoteEncoder:
        """Open and verify a bundle, and load its graph.

        ``threads`` 0 lets ONNX Runtime take one per core. ``token_budget`` bounds the padded tokens of one batch.
        Raises :class:`BundleError`, :class:`RuntimeMissing` or :class:`ProviderMissing`.
        """
        bundle = open_bundle(Path(path))
        return cls(bundle, GraphSession(bundle, provider, threads), token_budget=token_budget, max_rows=max_rows)

    @property
    def model_version(self) -> str:
        return self.bundle.manifest.model_version

    @property
    def embedding_dim(self) -> int:
        return self.bundle.manifest.embedding_dim

    @property
    def provider(self) -> Literal["cpu", "cuda"]:
        return self._graph.provider

    def prompt(self, note: Note) -> Prompt:
        """The exact text and ids that the model would read of ``note``."""
        return self.prompts.build(note)

    def build_prompts(self, notes: Sequence[Note]) -> list[Prompt]:
        """:meth:`prompt` of each note, in their order; what :meth:`stream` takes."""
        return [self.prompt(note) for note in notes]

    def encode(self, notes: Sequence[Note], *, embed_only: bool = False) -> list[EncodedNote]:
        """Encode ``notes``; the answer is in their order."""
        encoded: list[EncodedNote | None] = [None] * len(notes)
        for batch in self.stream(self.build_prompts(notes), embed_only=embed_only):
            tags: Sequence[Tags | None] = batch.tags or [None] * len(batch.indices)
            for index, embedding, tag in zip(batch.indices, batch.embeddings, tags, strict=True):
                encoded[index] = EncodedNote(embedding, tag)
        return [note for note in encoded if note is not None]

    def stream(self, prompts: Sequence[Prompt], *, embed_only: bool = False) -> Iterator[EncodedBatch]:
        """Encode ``prompts`` batch by batch: each batch's embeddings as soon as they are there, then its tags."""
        lengths = [len(prompt.ids) for prompt in prompts]
        for indices in plan_batches(lengths, token_budget=self._token_budget, max_rows=self._max_rows):
            batch = [prompts[index] for index in indices]
            if embed_only:
                yield EncodedBatch(indices, self._runner.embed([prompt.ids for prompt in batch]), None)
                continue
            embeddings, sequences = self._runner.prefill([prompt.ids for prompt in batch])
            yield EncodedBatch(indices, embeddings, None)
            categories = self._choose_categories(sequences)
            hashtags = self._generate_hashtags(sequences, batch)
            yield EncodedBatch(indices, embeddings, [Tags(h, c) for h, c in zip(hashtags, categories, strict=True)])

    def _choose_categories(self, prefilled: Sequences) -> list[str]:
        """Greedy under the trie; a row is done as soon as only one category is possible."""
        nodes = [self._categories] * prefilled.rows
        rows = [row for row, node in enumerate(nodes) if node.decided is None and node.categories]
        if rows:
            sequences = self._runner.guide(prefilled, self.prompts.category_ids)
        while rows:
            tokens = np.argmax(sequences.logits, axis=1)
            for place, row in enumerate(rows):
                if nodes[row].decided is None:
                    allowed = nodes[row].allowed
                    tokens[place] = allowed[int(np.argmax(sequences.logits[place, allowed]))]
                    nodes[row] = nodes[row].children[int(tokens[place])]
            going = [place for place, row in enumerate(rows) if nodes[row].decided is None]
            if not going:
                break
            places = self._worth_keeping(going, len(rows))
            rows = [rows[place] for place in places]
            sequences = self._runner.extend(sequences.select(places), tokens[places][:, None])
        return [node.decided or "" for node in nodes]

    def _generate_hashtags(self, prefilled: Sequences, batch: Sequence[Prompt]) -> list[list[str]]:
        """Greedy, until every row has ended its answer, has enough hashtags or may write no more."""
        limits = self.bundle.manifest.tag_limits
        written: list[list[int]] = [[] for _ in batch]
        done = [False] * len(batch)
        rows = list(range(len(batch)))
        sequences = self._runner.guide(prefilled, self.prompts.hashtags_ids)
        for left in reversed(range(limits.hashtag_tokens)):
            tokens = np.argmax(sequences.logits, axis=1)
            for place, row in enumerate(rows):
                if not done[row]:
                    done[row] = self._write(int(tokens[place]), written[row], batch[row])
            going = [place for place, row in enumerate(rows) if not done[row]]
            if not (going and left):
                break
            places = self._worth_keeping(going, len(rows))
            rows = [rows[place] for place in places]
            sequences = self._runner.extend(sequences.select(places), tokens[places][:, None])
        return [
            read_hashtags(self.prompts.decode(ids), prompt.author_hashtags, limits.hashtags)
            for ids, prompt in zip(written, batch, strict=True)
        ]

    def _write(self, token: int, written: list[int], prompt: Prompt) -> bool:
        """Whether the answer is complete, with ``token`` or without it, where it ends the answer."""
        if token in self._stop:
            return True
        written.append(token)
        answer = self.prompts.decode(written)
        return answer_is_complete(answer, prompt.author_hashtags, self.bundle.manifest.tag_limits.hashtags)

    @staticmethod
    def _worth_keeping(going: list[int], places: int) -> list[int]:
        """Which of ``places`` the next step runs with: those that go on, and until few do, also those that are done."""
        return going if len(going) <= _FEW * places else list(range(places))


def plan_answers(manifest: Manifest, prompts: PromptBuilder) -> CategoryTrie:
    """The trie of the categories.

    Raises :class:`BundleError` where two are alike, or where prompt and answer may be longer than the model reads.
    """
    prefix = manifest.template.answer_prefix
    answers = {category: prompts.encode_answer(prefix + category) for category in manifest.categories}
    guidance = max(len(prompts.hashtags_ids), len(prompts.category_ids))
    answer = max([manifest.tag_limits.hashtag_tokens, *map(len, answers.values())])
    longest = len(prompts.prefix_ids) + prompts.max_ids + guidance + answer
    if longest > manifest.max_positions:
        raise BundleError(
            f"prompt and answer may have {longest} tokens, the model reads {manifest.max_positions}; "
            "export it with a smaller --note-tokens"
        )
    return CategoryTrie.build(answers, manifest.token_ids.eos[0])
