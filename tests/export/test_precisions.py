"""fp16, int8 and int4: within their bounds, no larger than they should be, and honest about what was not proven."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np
import onnx_ir as ir
import pytest
import torch
from numpy.typing import NDArray

from export import build
from export.checkpoint import load_checkpoint
from export.errors import ParityError
from export.graph import additive_mask, to_half
from export.quantization import RECIPES, Blocks, Recipe, quantize_blocks, quantize_graph
from notellm.bundle import (
    MANIFEST,
    PARITY,
    Bundle,
    Manifest,
    ParityReport,
    Precision,
    bundle_id,
    describe_files,
    open_bundle,
    record_parity,
)
from notellm.encoder import NoteEncoder
from notellm.errors import BundleError, ProviderMissing
from notellm.graph_session import GraphSession, Provider
from notellm.messages import Note
from notellm.parity import BOUNDS, prove_bundle, read_reference
from tests.export.families import HIDDEN
from tests.export.tiny import Tiny, plan, run_export

Made = Callable[[str], Path]


def export_as(checkpoint: Path, out: Path, precision: Precision, provider: Literal["cpu", "cuda"] = "cpu") -> Manifest:
    return run_export(replace(plan(checkpoint, out), precision=precision, provider=provider))


def row(report: ParityReport, check: str) -> float:
    (value,) = [row.value for row in report.rows if row.check == check]
    return value


@pytest.mark.usefixtures("trace_once")
@pytest.mark.parametrize("model_type", ["qwen2", "gemma3_text", "phi3"])
@pytest.mark.parametrize(("precision", "bound"), [("fp16", 0.9999), ("int8", 0.999), ("int4", 0.97)])
def test_a_precision_keeps_its_bound(
    family: Made, tmp_path: Path, model_type: str, precision: Precision, bound: float
) -> None:
    manifest = export_as(family(model_type), tmp_path / "bundle", precision)
    report = manifest.parity
    assert (report.passed, report.provider, manifest.precision) == (True, "cpu", precision)
    assert manifest.kv_dtype == ("float16" if precision == "fp16" else "float32")
    for batch in ("ragged batch of 8", "batch of 1"):
        (judged,) = [row for row in report.rows if row.check == f"lowest cosine, {batch}"]
        assert judged.at_least
        assert bound == judged.bound <= judged.value <= 1.000001
    assert 0.5 < row(report, "share of greedy tokens that agree, 8 x 16") <= 1
    assert (str(RECIPES[precision]) if precision in RECIPES else "") == manifest.recipe
    # The proof again, from the files alone.
    assert prove_bundle(tmp_path / "bundle", "cpu") == report
    assert_floats_out(tmp_path / "bundle")


def assert_floats_out(bundle: Path) -> None:
    """Callers get float32 whatever the graph computes in."""
    encoder = NoteEncoder.load(bundle, "cpu")
    (encoded,) = encoder.encode([Note(note_id="n", content="two days in Kyoto")])
    assert encoded.embedding.dtype == np.float32
    assert np.linalg.norm(encoded.embedding) == pytest.approx(1, abs=1e-5)
    assert encoded.tags is not None


@pytest.mark.usefixtures("trace_once")
def test_a_tied_table_is_stored_once_at_a_byte_a_weight(family: Made, tmp_path: Path) -> None:
    checkpoint = load_checkpoint(str(family("qwen2")))
    rows = checkpoint.model.base.get_input_embeddings().num_embeddings
    weights = sum(
        parameter.numel()
        for name, parameter in checkpoint.model.base.named_parameters()
        if parameter.ndim == 2 and "embed" not in name
    )
    manifest = export_as(family("qwen2"), tmp_path / "bundle", "int8")
    # One byte, and four for the scale of 32: a second table would be a third more.
    expected = (weights + rows * HIDDEN) * (1 + 4 / 32)
    assert expected < manifest.files["model.onnx.data"].bytes + 4096 < expected * 1.1


@pytest.mark.usefixtures("trace_once")
def test_wrong_scales_fail_the_proof(family: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def swapped(weight: torch.Tensor, bits: Literal[4, 8], block: int) -> Blocks:
        blocks = quantize_blocks(weight, bits, block)
        return replace(blocks, scales=np.ascontiguousarray(blocks.scales[:, ::-1]))

    monkeypatch.setattr("export.quantization.quantize_blocks", swapped)
    with pytest.raises(ParityError, match=r"parity failed \(lowest cosine"):
        export_as(family("qwen2"), tmp_path / "bundle", "int8")
    assert list(tmp_path.iterdir()) == []


# The arithmetic


@pytest.mark.parametrize(("bits", "worst"), [(8, 0.5), (4, 1.0)])
@pytest.mark.parametrize("columns", [64, 80])
def test_a_weight_is_off_by_half_a_step_at_most(bits: Literal[4, 8], worst: float, columns: int) -> None:
    """One step at 4 bits: its zero point is rounded as well, which may cut the block's largest number."""
    weight = torch.from_numpy(np.random.default_rng(1).normal(size=(16, columns)).astype(np.float32))
    weight[3] = 0
    blocks = quantize_blocks(weight, bits, 32)
    codes = blocks.codes.astype(np.float32) - 128
    if blocks.zeros is not None:
        codes = nibbles(blocks.codes) - nibbles(blocks.zeros)[:, : blocks.codes.shape[1], None]
    back = codes * blocks.scales[..., None]
    off = np.abs(back.reshape(16, -1)[:, :columns] - weight.numpy())
    steps = np.repeat(blocks.scales, 32, axis=1)[:, :columns]
    assert (off <= steps * (worst + 1e-4)).all()
    assert (off[3] == 0).all()


def nibbles(packed: NDArray[np.uint8]) -> NDArray[np.float32]:
    return np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:-1], -1).astype(np.float32)


def test_the_recipe_keeps_what_it_says_at_eight_bits() -> None:
    recipe = RECIPES["int4"]
    kept = ["v_proj", "o_proj", "down_proj", "qkv_proj"]
    assert [recipe.bits_of(f"model.base.model.layers.0.self_attn.{name}") for name in kept] == [8] * 4
    cut = ["q_proj", "k_proj", "gate_proj", "up_proj", "gate_up_proj"]
    assert [recipe.bits_of(f"model.base.model.layers.0.mlp.{name}") for name in cut] == [4] * 5
    assert Recipe(8, 32).bits_of("anything") == 8
    assert "(v|qkv|o|down)_proj$" in str(recipe)


def test_halves_keep_the_rotary_frequencies(family: Made) -> None:
    base = load_checkpoint(str(family("qwen2"))).model.base
    exact = base.model.rotary_emb.inv_freq.clone()
    to_half(base)
    assert base.dtype == torch.float16
    assert torch.equal(base.model.rotary_emb.inv_freq, exact)


def test_the_mask_of_halves_has_no_infinity() -> None:
    mask = additive_mask(torch.tensor([[1, 1, 0, 0]]), 4, torch.float16, window=1)
    assert torch.isfinite(mask).all()
    # A kernel may multiply by log2(e) or add a score before it looks.
    assert torch.isfinite(mask * 1.45).all()
    assert (mask.max(dim=-1).values == 0).all()


# Unproven


@pytest.fixture
def without_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = build.GraphSession

    def session(bundle: Bundle, provider: Provider, threads: int) -> GraphSession:
        if provider == "cuda":
            raise ProviderMissing("there is no GPU in this test")
        return honest(bundle, provider, threads)

    monkeypatch.setattr(build, "GraphSession", session)


@pytest.mark.usefixtures("trace_once", "without_gpu")
@pytest.mark.parametrize("precision", ["fp16", "int4"])
def test_a_bundle_for_a_gpu_that_is_not_here_is_unproven_and_says_so(
    family: Made, tmp_path: Path, precision: Precision
) -> None:
    said: list[str] = []
    out = tmp_path / "bundle"
    what = replace(plan(family("qwen2"), out), precision=precision, provider="cuda")
    manifest = build.build_bundle(what, step=contextlib.nullcontext, say=said.append)
    assert manifest.parity == ParityReport("cuda", [], "unproven")
    assert not manifest.parity.passed
    assert manifest.kv_dtype == "float16"
    (on_cpu,) = manifest.parity_elsewhere
    assert (on_cpu.provider, on_cpu.passed) == ("cpu", True)
    assert any("UNPROVEN: there is no GPU in this test" in line for line in said)
    assert any(f"notellm check --provider cuda --bundle {out}" in line for line in said)
    assert open_bundle(out).manifest == manifest
    # A GPU's report, were there one, settles it, and touches no file but the manifest.
    settled = record_parity(out, msgspec.structs.replace(on_cpu, provider="cuda"))
    assert settled.parity.passed
    assert settled.parity.provider == "cuda"
    assert settled.bundle_id == open_bundle(out).manifest.bundle_id == manifest.bundle_id
    # A report from elsewhere stands beside it, once.
    again = record_parity(out, on_cpu)
    assert (again.parity, again.parity_elsewhere) == (settled.parity, [on_cpu])


@pytest.mark.usefixtures("trace_once", "without_gpu")
def test_a_graph_for_a_gpu_that_is_wrong_on_the_cpu_is_not_written(
    family: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "quantize_graph", too_coarse)
    with pytest.raises(ParityError):
        export_as(family("qwen2"), tmp_path / "bundle", "int8", "cuda")


def too_coarse(model: ir.Model, recipe: Recipe) -> None:
    """A block of 128 and no layer at 8 bits."""
    quantize_graph(model, Recipe(4, 128))


# Proving again


def test_a_bundle_from_before_there_was_a_reference_opens_and_says_so(untied: Tiny, tmp_path: Path) -> None:
    folder = shutil.copytree(untied.bundle, tmp_path / "old")
    (folder / PARITY).unlink()
    manifest = json.loads((folder / MANIFEST).read_text())
    del manifest["files"][PARITY], manifest["parity_elsewhere"], manifest["recipe"], manifest["kv_dtype"]
    manifest["bundle_id"] = bundle_id(describe_files(folder))
    (folder / MANIFEST).write_text(json.dumps(manifest))
    assert open_bundle(folder).manifest.parity.passed
    with pytest.raises(BundleError, match=r"holds no parity.npz, so parity cannot be proven here; export it again"):
        prove_bundle(folder, "cpu")


def test_a_damaged_reference_is_refused(untied: Tiny, tmp_path: Path) -> None:
    folder = shutil.copytree(untied.bundle, tmp_path / "damaged")
    whole = (folder / PARITY).read_bytes()
    for content in (b"", whole[:-9], b"not a zip"):
        (folder / PARITY).write_bytes(content)
        with pytest.raises(BundleError, match=r"parity.npz is damaged"):
            read_reference(folder)
    reference = read_reference(untied.bundle)
    replace(reference, tokens=reference.tokens[:, :3]).save(folder)
    with pytest.raises(BundleError, match=r"parity.npz is of another program's shape"):
        read_reference(folder)


def test_bounds_are_the_promised_ones() -> None:
    assert {precision: bounds.cosine for precision, bounds in BOUNDS.items()} == {
        "fp32": None,
        "fp16": 0.9999,
        "int8": 0.999,
        "int4": 0.97,
    }
