"""The fused graph equals torch, gives what the traced one gives, and is honest about what it cannot do."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from export.checkpoint import Checkpoint, load_checkpoint
from export.errors import ExportError
from export.fused_graph import FUSED, write_fused_onnx
from notellm.bundle import MODEL, TOKENIZER, Bundle, open_bundle
from notellm.encoder import EncodedNote, NoteEncoder
from notellm.graph_session import GraphSession
from notellm.messages import Note
from notellm.sequences import SequenceRunner
from tests.conftest import missing
from tests.export.tiny import Tiny

PREFIX = [5, 6, 7, 8]
RAGGED = [[9, 10, 11, 12, 13], [14], [15, 16, 17], [18, 19, 20, 21, 22, 23, 24, 25, 26]]
ROWS = st.lists(st.lists(st.integers(2, 399), min_size=1, max_size=20), min_size=1, max_size=6)
NOTES = [
    Note(note_id="n0", title="Two days in Kyoto", content="Rent a bike.", hashtags=["kyoto"]),
    Note(note_id="n1", content="short"),
    Note(note_id="n2", title="旧书店", content="在城南的小巷里找到一家开了四十年的旧书店。" * 5, hashtags=["书店"]),
    Note(note_id="n3", title="long", content="every staircase feels like an insult. " * 40),
    Note(note_id="n4"),
]


@dataclass(frozen=True)
class Fused:
    """A tiny checkpoint, its fused graph in a bundle, and what its traced graph says of NOTES."""

    checkpoint: Checkpoint
    bundle: Bundle
    session: GraphSession
    traced: list[EncodedNote]

    @property
    def runner(self) -> SequenceRunner:
        return SequenceRunner(self.session, PREFIX, self.bundle.manifest.capabilities)

    @torch.no_grad()
    def torch(self, ids: Sequence[int]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """Embedding and logits at the last of ``ids``: one row, no padding, no cache."""
        model = self.checkpoint.model
        hidden = model.base.base_model(input_ids=torch.tensor([ids])).last_hidden_state[0, -1]
        return model.embed(hidden).numpy(), model.base.get_output_embeddings()(hidden).numpy()


@pytest.fixture(scope="session", autouse=True)
def builder() -> None:
    if importlib.util.find_spec("onnxruntime_genai") is None:
        missing("onnxruntime-genai is not installed; pip install --constraint constraints.txt onnxruntime-genai")


@pytest.fixture(scope="session")
def fused(either: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Fused:
    checkpoint, traced = load_checkpoint(str(either.checkpoint)), open_bundle(either.bundle)
    folder = tmp_path_factory.mktemp("fused")
    written = write_fused_onnx(checkpoint, folder / MODEL)
    assert {file.name for file in folder.iterdir()} == {MODEL, f"{MODEL}.data"}
    shutil.copy(traced.tokenizer_path, folder / TOKENIZER)
    manifest = msgspec.structs.replace(
        traced.manifest, capabilities=written.capabilities, kv_dtype=written.kv_dtype, files={}
    )
    bundle = Bundle(folder, manifest)
    expected = NoteEncoder.load(traced.path, "cpu", threads=1).encode(NOTES)
    return Fused(checkpoint, bundle, GraphSession(bundle, "cpu", threads=1), expected)


def test_it_equals_torch_on_a_ragged_batch(fused: Fused) -> None:
    embeddings, sequences = fused.runner.prefill(RAGGED)
    for row, embedding, logits in zip(RAGGED, embeddings, sequences.logits, strict=True):
        expected = fused.torch(PREFIX + row)
        np.testing.assert_allclose(embedding, expected[0], atol=1e-5)
        np.testing.assert_allclose(logits, expected[1], atol=1e-3)


def test_it_writes_what_torch_would_write(fused: Fused) -> None:
    sequences = fused.runner.prefill(RAGGED)[1]
    so_far = [PREFIX + row for row in RAGGED]
    for _ in range(16):
        tokens = np.argmax(sequences.logits, axis=1)
        for ids, token, logits in zip(so_far, tokens, sequences.logits, strict=True):
            expected = fused.torch(ids)[1]
            np.testing.assert_allclose(logits, expected, atol=1e-3)
            assert expected[token] > expected.max() - 1e-3
            ids.append(int(token))
        sequences = fused.runner.extend(sequences, tokens[:, None])


@settings(deadline=None, max_examples=20)
@given(rows=ROWS, guidance=st.lists(st.integers(2, 399), min_size=1, max_size=5), data=st.data())
def test_rows_go_on_in_any_company_as_if_they_had_been_alone(
    fused: Fused, rows: list[list[int]], guidance: list[int], data: st.DataObject
) -> None:
    chosen = data.draw(st.lists(st.integers(0, len(rows) - 1), min_size=1, max_size=6))
    selected = fused.runner.guide(fused.runner.prefill(rows)[1].select(chosen), guidance)
    for place, row in enumerate(chosen):
        # A single row takes all of the guidance at once.
        alone = fused.runner.guide(fused.runner.prefill([rows[row]])[1], guidance)
        np.testing.assert_allclose(selected.logits[place], alone.logits[0], atol=1e-4)
        np.testing.assert_allclose(fused.torch(PREFIX + rows[row] + guidance)[1], alone.logits[0], atol=1e-3)


@settings(deadline=None, max_examples=10)
@given(order=st.permutations(range(len(NOTES))), token_budget=st.integers(1, 1500), embed_only=st.booleans())
def test_a_note_has_the_result_of_the_traced_graph_in_any_batch_and_order(
    fused: Fused, order: list[int], token_budget: int, embed_only: bool
) -> None:
    encoder = NoteEncoder(fused.bundle, fused.session, token_budget=token_budget, max_rows=4)
    encoded = encoder.encode([NOTES[index] for index in order], embed_only=embed_only)
    for note, expected in zip(encoded, [fused.traced[index] for index in order], strict=True):
        np.testing.assert_allclose(note.embedding, expected.embedding, atol=1e-4)
        assert note.tags is None if embed_only else note.tags == expected.tags


def test_it_is_fused(fused: Fused) -> None:
    graph = onnx.load(str(fused.bundle.model_path), load_external_data=False).graph
    assert sum(node.op_type == "GroupQueryAttention" for node in graph.node) == fused.bundle.manifest.layers
    assert [value.name for value in graph.input] == fused.bundle.manifest.inputs
    assert [value.name for value in graph.output] == fused.bundle.manifest.outputs


def test_what_its_capabilities_deny_it_cannot_do(fused: Fused) -> None:
    """Were this to pass one day, the prefix could be cached."""
    assert not fused.bundle.manifest.capabilities.multi_token_past
    prefilled = fused.runner.prefill(RAGGED)[1]
    everything = msgspec.structs.replace(fused.bundle.manifest.capabilities, multi_token_past=True)
    with pytest.raises(Exception, match="batch_size must be 1"):
        SequenceRunner(fused.session, PREFIX, everything).guide(prefilled, [30, 31])


def test_in_halves_it_is_near_torch_and_answers_in_float32(fused: Fused, tmp_path: Path) -> None:
    """As made for CUDA, but run on the CPU's kernels; what CUDA's give is not proven here."""
    written = write_fused_onnx(fused.checkpoint, tmp_path / MODEL, precision="fp16", device="cuda")
    assert written.kv_dtype == "float16"
    manifest = msgspec.structs.replace(fused.bundle.manifest, kv_dtype="float16")
    session = GraphSession(Bundle(tmp_path, manifest), "cpu", threads=1)
    embeddings, sequences = SequenceRunner(session, PREFIX, written.capabilities).prefill(RAGGED)
    assert embeddings.dtype == sequences.logits.dtype == np.float32
    assert {value.numpy().dtype for value in sequences.cache.values} == {np.dtype(np.float16)}
    expected = np.stack([fused.torch(PREFIX + row)[0] for row in RAGGED])
    assert (embeddings * expected).sum(axis=1).min() > 0.9999


# What cannot be built


@pytest.fixture(scope="module")
def checkpoint(tied: Tiny) -> Checkpoint:
    return load_checkpoint(str(tied.checkpoint))


def test_a_precision_that_a_device_cannot_fuse_is_refused_with_those_that_can_be(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    with pytest.raises(ExportError, match="fp32 for cuda is not to be had; allowed are fp32 for cpu, fp16 for cuda"):
        write_fused_onnx(checkpoint, tmp_path / MODEL, precision="fp32", device="cuda")
    assert not list(tmp_path.iterdir())


def test_a_graph_in_which_attention_is_not_fused_is_refused(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(FUSED, "fp32", ("cuda",))
    with pytest.raises(ExportError, match="0 of 2 layers have a fused attention"):
        write_fused_onnx(checkpoint, tmp_path / MODEL, precision="fp32", device="cuda")
    assert not list(tmp_path.iterdir())


def test_what_the_builder_says_last_is_the_error(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho reading >&2\necho 'ValueError: a strange config' >&2\nexit 1\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(ExportError, match="onnxruntime-genai failed: ValueError: a strange config"):
        write_fused_onnx(checkpoint, out / MODEL)
    assert not list(out.iterdir())


def test_without_the_builder_the_error_says_so(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ExportError, match="onnxruntime-genai is not installed"):
        write_fused_onnx(checkpoint, tmp_path / MODEL)
