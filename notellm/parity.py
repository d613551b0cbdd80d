"""Parity: does a bundle's graph, driven as the encoder drives it, answer as torch did?

Torch is not needed for that. What torch answered on ten notes lies in the bundle (``parity.npz``), so that parity can
be proven again wherever the bundle runs: on a GPU that the machine of the export had not, say.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from notellm.bundle import (
    PARITY,
    Bundle,
    Capabilities,
    ParityReport,
    ParityRow,
    Precision,
    open_bundle,
)
from notellm.errors import BundleError
from notellm.graph_session import GraphSession, Provider
from notellm.messages import Note
from notellm.prompt import PromptBuilder
from notellm.sequences import Graph, SequenceRunner, Sequences

__all__ = [
    "BOUNDS",
    "GREEDY_ROWS",
    "GREEDY_TOKENS",
    "LEADERS",
    "TIE",
    "Bounds",
    "ParityReference",
    "check_parity",
    "parity_notes",
    "prove_bundle",
    "prove_session",
    "read_reference",
]

# The first rows of the reference are also compared in a ragged batch, in their logits and in what they generate.
GREEDY_ROWS = 8
GREEDY_TOKENS = 16
# Of each generated token, the reference keeps this many of torch's best ones.
LEADERS = 8
TIE = 1e-3
DISTINCT_BOUND = 0.99

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]

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


@dataclass(frozen=True)
class Bounds:
    """What a precision promises. ``differing`` is the number of generated tokens that may differ from torch's.

    ``centred`` is held against the cosine that is left when the mean of all notes is taken away. An untrained base's
    hidden states all lie in one narrow cone, where any cosine is near 1. Without the cone every distance from 1 is
    larger, about ten times with smollm2, and so its bounds are ten times as far from 1.
    """

    embedding: float | None = None
    logits: float | None = None
    alone: float | None = None
    differing: float | None = None
    cosine: float | None = None
    centred: float | None = None


BOUNDS: Mapping[Precision, Bounds] = {
    "fp32": Bounds(embedding=1e-5, logits=1e-3, alone=1e-4, differing=0.0),
    "fp16": Bounds(cosine=0.9999, centred=0.999),
    "int8": Bounds(cosine=0.999, centred=0.99),
    "int4": Bounds(cosine=0.97, centred=0.7),
}


@dataclass(frozen=True)
class ParityReference:
    """Torch's own answers to :func:`parity_notes`, each row read alone and unpadded, in float32.

    ``embeddings [10, D]``; of the first 8 rows ``logits [8, V]`` after the prompt and, after the guidance for hashtags,
    16 greedy ``tokens [8, 16]`` with the 8 best ids at each, ``leaders [8, 16, 8]``, and their ``scores``.
    """

    embeddings: Floats
    logits: Floats
    tokens: Ints
    leaders: Ints
    scores: Floats

    def save(self, folder: Path) -> None:
        np.savez(folder / PARITY, **{each.name: getattr(self, each.name) for each in fields(self)})

    def agrees(self, step: int, chosen: Ints) -> NDArray[np.bool_]:
        """``[8]``: would torch have written these tokens at ``step``? One that nearly ties with its own counts."""
        near = self.scores[:, step] >= self.scores[:, step, :1] - TIE
        return np.asarray(((self.leaders[:, step] == chosen[:, None]) & near).any(axis=1))


def parity_notes() -> list[Note]:
    """Ten notes, short and long, in two languages, one of them with what looks like special tokens."""
    return [Note(note_id=f"parity-{i}", title=t, content=c, hashtags=h) for i, (t, c, h) in enumerate(_TEXTS)]


def prove_bundle(path: Path, provider: Provider, *, threads: int = 0) -> ParityReport:
    """Compare the bundle at ``path``, run on ``provider``, with what torch answered when it was exported.

    ``notellm.bundle.record_parity`` writes the report into the bundle. Raises :class:`BundleError`, also for a bundle
    from before there was a reference in it, :class:`RuntimeMissing` or :class:`ProviderMissing`.
    """
    bundle = open_bundle(path)
    return prove_session(bundle, GraphSession(bundle, provider, threads))


def prove_session(bundle: Bundle, session: GraphSession) -> ParityReport:
    """As :func:`prove_bundle`, with a graph that is loaded already."""
    manifest = bundle.manifest
    tokenizer = Tokenizer.from_file(str(bundle.tokenizer_path))
    prompts = PromptBuilder(tokenizer, manifest.template, manifest.prompt_limits, manifest.token_ids)
    return check_parity(
        session,
        prompts,
        read_reference(bundle.path),
        precision=manifest.precision,
        capabilities=manifest.capabilities,
        provider=session.provider,
        untrained=manifest.projection == "identity",
    )


def read_reference(folder: Path) -> ParityReference:
    """Raises :class:`BundleError` for a bundle that holds none, or one of another shape."""
    try:
        # Opened here: numpy forgets to close a file that it cannot read.
        with (folder / PARITY).open("rb") as stream, np.load(stream, allow_pickle=False) as arrays:
            reference = ParityReference(**{each.name: arrays[each.name] for each in fields(ParityReference)})
    except FileNotFoundError:
        raise BundleError(
            f"bundle {folder}: holds no {PARITY}, so parity cannot be proven here; export it again"
        ) from None
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise BundleError(f"bundle {folder}: {PARITY} is damaged ({error}); export it again") from None
    generated = (GREEDY_ROWS, GREEDY_TOKENS)
    shapes = (reference.tokens.shape, reference.leaders.shape, reference.scores.shape, len(reference.embeddings))
    if shapes != (generated, (*generated, LEADERS), (*generated, LEADERS), len(_TEXTS)):
        raise BundleError(f"bundle {folder}: {PARITY} is of another program's shape; export it again")
    return reference


def check_parity(
    graph: Graph,
    prompts: PromptBuilder,
    reference: ParityReference,
    *,
    precision: Precision,
    capabilities: Capabilities,
    provider: str,
    untrained: bool,
) -> ParityReport:
    """Compare on a ragged batch of 8, on each note alone, and on 16 tokens that are generated after each of the 8.

    The graph reads torch's own tokens, whatever it would have written itself: after one that differs, everything would.
    """
    bounds = BOUNDS[precision]
    runner = SequenceRunner(graph, prompts.prefix_ids, capabilities)
    ids = [prompts.build(note).ids for note in parity_notes()]
    ragged, sequences = runner.prefill(ids[:GREEDY_ROWS])
    first = [runner.prefill([row]) for row in ids[:GREEDY_ROWS]]
    alone = np.concatenate(
        [*(embedding for embedding, _ in first), *(runner.embed([row]) for row in ids[GREEDY_ROWS:])]
    )
    logits = np.concatenate([one.logits for _, one in first])
    rows: list[ParityRow] = []
    for name, embeddings, scores in (
        (f"ragged batch of {GREEDY_ROWS}", ragged, sequences.logits),
        ("batch of 1", alone, logits),
    ):
        wanted = reference.embeddings[: len(embeddings)]
        rows.append(_at_most(f"embeddings, {name}", _worst(embeddings, wanted), bounds.embedding))
        rows.append(_at_most(f"logits, {name}", _worst(scores, reference.logits), bounds.logits))
        rows.append(_at_least(f"lowest cosine, {name}", _lowest_cosine(embeddings, wanted), bounds.cosine))
        if untrained:
            cone = reference.embeddings.mean(axis=0)
            lowest = _lowest_cosine(embeddings - cone, wanted - cone)
            rows.append(_at_least(f"lowest cosine, centred, {name}", lowest, bounds.centred))
    rows.append(
        _at_most("embeddings, batch of 8 against batch of 1", _worst(ragged, alone[:GREEDY_ROWS]), bounds.alone)
    )
    agreed = _generate(runner, sequences, prompts.hashtags_ids, reference)
    generated = f"{GREEDY_ROWS} x {GREEDY_TOKENS}"
    rows.append(_at_most(f"greedy tokens that differ, {generated}", float((~agreed).sum()), bounds.differing))
    rows.append(_at_least(f"share of greedy tokens that agree, {generated}", float(agreed.mean()), None))
    rows.append(_distinct(alone, centred=untrained))
    return ParityReport(provider=provider, rows=rows)


def _at_most(check: str, value: float, bound: float | None) -> ParityRow:
    # "not (value > bound)" would pass a NaN; and what is only stated must be a number as well.
    return ParityRow(check, value, bound, bool(np.isfinite(value) if bound is None else value <= bound))


def _at_least(check: str, value: float, bound: float | None) -> ParityRow:
    return ParityRow(check, value, bound, bool(np.isfinite(value) if bound is None else value >= bound), at_least=True)


def _worst(got: Floats, want: Floats) -> float:
    return float(np.abs(got - want).max())


def _lowest_cosine(got: Floats, want: Floats) -> float:
    lengths = np.linalg.norm(got, axis=1) * np.linalg.norm(want, axis=1)
    return float(((got * want).sum(axis=1) / np.maximum(lengths, 1e-12)).min())


def _generate(
    runner: SequenceRunner, prefilled: Sequences, guidance: Sequence[int], reference: ParityReference
) -> NDArray[np.bool_]:
    """``[8, 16]``: where the graph would have written what torch wrote."""
    sequences = runner.guide(prefilled, guidance)
    agreed = []
    for step in range(GREEDY_TOKENS):
        if step:
            sequences = runner.extend(sequences, reference.tokens[:, step - 1 : step])
        agreed.append(reference.agrees(step, np.argmax(sequences.logits, axis=1)))
    return np.stack(agreed, axis=1)


def _distinct(embeddings: Floats, *, centred: bool) -> ParityRow:
    """The largest cosine between any two of ten different notes: a graph that reads the wrong place has it near 1."""
    check = "largest cosine of ten notes" + (", centred" if centred else "")
    vectors = embeddings - embeddings.mean(axis=0) if centred else embeddings
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    if not norms.min() > 1e-6:
        return ParityRow(check, 1.0, DISTINCT_BOUND, False)
    unit = vectors / norms
    largest = float((unit @ unit.T - 2 * np.eye(len(unit))).max())
    return ParityRow(check, largest, DISTINCT_BOUND, largest < DISTINCT_BOUND)
