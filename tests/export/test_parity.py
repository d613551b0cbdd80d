"""The proof of parity passes an honest graph, and fails every graph that is wrong on purpose."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from tokenizers import Tokenizer

from export.checkpoint import load_checkpoint
from export.parity import reference_of
from notellm.bundle import Capabilities, ParityReport, open_bundle, read_manifest
from notellm.encoder import NoteEncoder
from notellm.graph_session import GraphOutput, GraphSession, Ints, KVCache
from notellm.messages import Note
from notellm.parity import ParityReference, check_parity, read_reference
from notellm.prompt import PromptBuilder
from notellm.sequences import Graph
from tests.export.tiny import Tiny

EMBEDDINGS = {"embeddings, ragged batch of 8", "embeddings, batch of 1"}
LOGITS = {"logits, ragged batch of 8", "logits, batch of 1"}
ALONE = {"embeddings, batch of 8 against batch of 1"}
GREEDY = {"greedy tokens that differ, 8 x 16"}
EMBEDDINGS_OF_BATCHES = {"embeddings, ragged batch of 8"}
COSINES = {
    "lowest cosine, ragged batch of 8",
    "lowest cosine, batch of 1",
    "lowest cosine, centred, ragged batch of 8",
    "lowest cosine, centred, batch of 1",
}
DISTINCT = {"largest cosine of ten notes, centred"}


@dataclass(frozen=True)
class Proof:
    """What is compared: what torch answered, the graph, and what both read."""

    reference: ParityReference
    graph: GraphSession
    prompts: PromptBuilder

    def of(self, graph: Graph) -> ParityReport:
        return check_parity(
            graph,
            self.prompts,
            self.reference,
            precision="fp32",
            capabilities=Capabilities(),
            provider="cpu",
            untrained=True,
        )


@pytest.fixture(scope="module")
def proof(tied: Tiny) -> Proof:
    bundle = open_bundle(tied.bundle)
    manifest = bundle.manifest
    tokenizer = Tokenizer.from_file(str(bundle.tokenizer_path))
    prompts = PromptBuilder(tokenizer, manifest.template, manifest.prompt_limits, manifest.token_ids)
    return Proof(read_reference(tied.bundle), GraphSession(bundle, "cpu", threads=1), prompts)


class Saboteur:
    """A graph that is wrong in one way, once ``run`` is."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph

    def empty_cache(self, rows: int) -> KVCache:
        return self.graph.empty_cache(rows)

    def run(self, *args: Any, **options: Any) -> GraphOutput:
        return self.graph.run(*args, **options)


def failed(report: ParityReport) -> set[str]:
    return {row.check for row in report.rows if not row.passed}


def test_the_bundle_stores_a_report_that_passed_within_the_promised_bounds(either: Tiny) -> None:
    assert_promises_kept(read_manifest(either.bundle).parity)


def test_an_honest_graph_passes(proof: Proof) -> None:
    assert failed(proof.of(proof.graph)) == set()


def test_the_reference_in_the_bundle_is_what_torch_answers(tied: Tiny, proof: Proof) -> None:
    again = reference_of(load_checkpoint(str(tied.checkpoint)).model, proof.prompts)
    np.testing.assert_allclose(again.embeddings, proof.reference.embeddings, atol=1e-6)
    np.testing.assert_allclose(again.logits, proof.reference.logits, atol=1e-5)
    assert (again.tokens == proof.reference.tokens).all()
    assert (proof.reference.leaders[..., 0] == proof.reference.tokens).all()


def test_a_token_that_nearly_ties_with_torchs_own_agrees_and_another_does_not(proof: Proof) -> None:
    scores = proof.reference.scores.copy()
    scores[:, 0, 1] = scores[:, 0, 0] - 9e-4
    scores[:, 0, 2] = scores[:, 0, 0] - 2e-3
    reference = replace(proof.reference, scores=scores)
    leaders = reference.leaders[:, 0]
    assert [reference.agrees(0, leaders[:, place]).tolist() for place in range(3)] == [
        [True] * 8,
        [True] * 8,
        [False] * 8,
    ]
    assert not reference.agrees(0, np.full(8, -1)).any()


def test_the_graph_reads_ragged_prompts(proof: Proof) -> None:
    widths: list[tuple[int, int]] = []

    class Watcher(Saboteur):
        def run(self, *args: Any, **options: Any) -> GraphOutput:
            lengths = args[3] + 1
            widths.append((int(lengths.min()), int(lengths.max())))
            return self.graph.run(*args, **options)

    proof.of(Watcher(proof.graph))
    assert any(shortest < longest / 2 for shortest, longest in widths)


class MaskOffByOne(Saboteur):
    """Hides the first token, and shows one slot of padding."""

    def run(self, ids: Ints, mask: Ints, *args: Any, **options: Any) -> GraphOutput:
        shifted = np.zeros_like(mask)
        shifted[:, 1:] = mask[:, :-1]
        return self.graph.run(ids, shifted, *args, **options)


class PaddingLeftVisible(Saboteur):
    """Harmless to what stands before the padding; what is written after it sees the padding."""

    def run(self, ids: Ints, mask: Ints, *args: Any, **options: Any) -> GraphOutput:
        return self.graph.run(ids, np.ones_like(mask), *args, **options)


class ReadOneTokenLate(Saboteur):
    """Reads the embedding at the token that follows the opening quote; logits and cache are right."""

    emb_id = 0

    def run(self, ids: Ints, mask: Ints, positions: Ints, last: Ints, past: KVCache, **options: Any) -> GraphOutput:
        honest = self.graph.run(ids, mask, positions, last, past, **options)
        rows = np.arange(len(ids))
        longer = np.pad(ids, ((0, 0), (0, 1)))
        longer[rows, last + 1] = self.emb_id
        seen = np.pad(mask, ((0, 0), (0, 1)))
        seen[rows, past.tokens + last + 1] = 1
        at = np.concatenate([positions, positions[:, -1:] + 1], axis=1)
        late = self.graph.run(longer, seen, at, last + 1, past, embeddings_only=True)
        return replace(honest, embeddings=late.embeddings)


class ReadOneTokenEarly(Saboteur):
    def run(self, ids: Ints, mask: Ints, positions: Ints, last: Ints, past: KVCache, **options: Any) -> GraphOutput:
        honest = self.graph.run(ids, mask, positions, last, past, **options)
        early = self.graph.run(ids, mask, positions, np.maximum(last - 1, 0), past, embeddings_only=True)
        return replace(honest, embeddings=early.embeddings)


class ConstantEmbedding(Saboteur):
    def run(self, *args: Any, **options: Any) -> GraphOutput:
        output = self.graph.run(*args, **options)
        constant = np.full_like(output.embeddings, output.embeddings.shape[1] ** -0.5)
        return replace(output, embeddings=constant)


class PositionsShiftedAfterACachedPrefix(Saboteur):
    def run(self, ids: Ints, mask: Ints, positions: Ints, last: Ints, past: KVCache, **options: Any) -> GraphOutput:
        shift = 1 if past.tokens else 0
        return self.graph.run(ids, mask, positions + shift, last, past, **options)


class CacheOfTheNeighbour(Saboteur):
    """Hands back each row's cache under another row's number."""

    def run(self, *args: Any, **options: Any) -> GraphOutput:
        output = self.graph.run(*args, **options)
        if output.cache is None:
            return output
        return replace(output, cache=output.cache.select([*range(1, output.cache.rows), 0]))


class OneBatchUnlikeTheOther(Saboteur):
    """Right for a row alone, and a little off in a batch: embeddings lie a thousandth beside their place."""

    def run(self, *args: Any, **options: Any) -> GraphOutput:
        output = self.graph.run(*args, **options)
        return output if len(args[0]) == 1 else replace(output, embeddings=output.embeddings + np.float32(1e-3))


class NotANumber(Saboteur):
    def run(self, *args: Any, **options: Any) -> GraphOutput:
        output = self.graph.run(*args, **options)
        return replace(output, embeddings=np.full_like(output.embeddings, np.nan))


@pytest.mark.parametrize(
    ("saboteur", "must_fail"),
    [
        (MaskOffByOne, EMBEDDINGS | LOGITS | GREEDY),
        (PaddingLeftVisible, GREEDY),
        (ReadOneTokenLate, EMBEDDINGS),
        (ReadOneTokenEarly, EMBEDDINGS),
        (ConstantEmbedding, EMBEDDINGS | DISTINCT),
        (OneBatchUnlikeTheOther, EMBEDDINGS_OF_BATCHES | ALONE),
        (PositionsShiftedAfterACachedPrefix, EMBEDDINGS | LOGITS | GREEDY),
        (CacheOfTheNeighbour, GREEDY),
        (NotANumber, EMBEDDINGS | DISTINCT | ALONE | COSINES),
    ],
)
def test_a_wrong_graph_fails_in_the_rows_that_it_spoils_and_in_no_other(
    proof: Proof, monkeypatch: pytest.MonkeyPatch, saboteur: Callable[[Graph], Graph], must_fail: set[str]
) -> None:
    monkeypatch.setattr(ReadOneTokenLate, "emb_id", proof.prompts.hashtags_ids[0])
    report = proof.of(saboteur(proof.graph))
    assert not report.passed
    assert failed(report) == must_fail


def assert_promises_kept(report: ParityReport) -> None:
    """The bounds are written here once more, so that nobody loosens them in the code alone."""
    bounds = {row.check.split(",")[0]: row.bound for row in report.rows if {row.check}.isdisjoint(ALONE)}
    promised = {
        "embeddings": 1e-5,
        "logits": 1e-3,
        "greedy tokens that differ": 0.0,
        "largest cosine of ten notes": 0.99,
    }
    assert {check: bound for check, bound in bounds.items() if bound is not None} == promised
    assert {row.check for row in report.rows} > EMBEDDINGS | LOGITS | GREEDY
    assert {row.bound for row in report.rows if row.check in ALONE} <= {1e-4}
    judged = [row for row in report.rows if row.bound is not None]
    assert [row.check for row in judged if not (row.at_least or row.value <= row.bound)] == []
    assert report.passed


@pytest.mark.real_model
def test_the_real_bundle_stores_a_report_that_passed_within_the_promised_bounds(real_bundle: Path) -> None:
    assert_promises_kept(read_manifest(real_bundle).parity)


@pytest.mark.real_model
def test_the_real_bundle_tells_ten_notes_apart(real_bundle: Path) -> None:
    texts = (
        "Two days in Kyoto by bike",
        "Sourdough that finally has ears",
        "Week three of the marathon taper",
        "城南的旧书店，老板泡茶",
        "Grain is not a mistake: ISO 3200",
        "The rescue cat came out from under the sofa",
        "Lubing keyboard switches",
        "半夜喂奶的时候喝一杯温水",
        "Hut to hut over three passes",
        "A winter coat, sewn from a blanket",
    )
    notes = [Note(note_id=f"n{number}", content=text) for number, text in enumerate(texts)]
    encoded = NoteEncoder.load(real_bundle, "cpu").encode(notes, embed_only=True)
    embeddings = np.stack([note.embedding for note in encoded])
    centred = embeddings - embeddings.mean(axis=0)
    unit = centred / np.linalg.norm(centred, axis=1, keepdims=True)
    cosines = (unit @ unit.T)[~np.eye(len(texts), dtype=bool)]
    assert cosines.max() < 0.99


def test_the_manifest_holds_no_path_of_this_machine(tied: Tiny) -> None:
    assert str(tied.checkpoint.parent) not in msgspec.json.encode(tied.manifest).decode()
