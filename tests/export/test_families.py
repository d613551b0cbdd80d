"""Six families: each equals transformers' own forward, and what the graph does not cover is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

from export import graph
from export.architectures import max_positions
from export.checkpoint import Checkpoint, load_checkpoint
from export.errors import ExportError
from export.parity import reference_of
from notellm.bundle import Capabilities, Manifest
from notellm.errors import NoteLLMError
from notellm.graph_session import GraphOutput, Ints, KVCache
from notellm.parity import ParityReference, check_parity, parity_notes
from notellm.prompt import PromptBuilder, PromptLimits, load_template
from tests.export.families import FAMILIES, WINDOW, save_family
from tests.export.tiny import plan, run_export
from training.errors import BaseModelError

EMBEDDINGS = {"embeddings, ragged batch of 8", "embeddings, batch of 1"}
LOGITS = {"logits, ragged batch of 8", "logits, batch of 1"}
GREEDY = {"greedy tokens that differ, 8 x 16"}

Made = Callable[[str], Path]


def export_family(checkpoint: Path, out: Path) -> Manifest:
    return run_export(plan(checkpoint, out))


@pytest.mark.usefixtures("trace_once")
@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_family_equals_transformers_own_forward(family: Made, tmp_path: Path, model_type: str) -> None:
    checkpoint = family(model_type)
    manifest = export_family(checkpoint, tmp_path / "bundle")
    assert manifest.parity.passed
    assert manifest.precision == "fp32"
    assert {row.check for row in manifest.parity.rows} >= EMBEDDINGS | GREEDY
    config = json.loads((checkpoint / "config.json").read_text())
    assert (manifest.layers, manifest.kv_heads) == (2, 2)
    assert config["model_type"] == model_type
    # One table of tokens where it is tied, two where it is not.
    table = config["vocab_size"] * config["hidden_size"] * 4
    layers = manifest.files["model.onnx.data"].bytes - table * (1 if config["tie_word_embeddings"] else 2)
    assert 0 < layers < 1.05 * layer_bytes(checkpoint)


def layer_bytes(checkpoint: Path) -> int:
    base = load_checkpoint(str(checkpoint)).model.base
    return sum(weight.numel() * 4 for name, weight in base.named_parameters() if "layers" in name)


def test_every_parity_note_is_longer_than_the_window(family: Made) -> None:
    """Or the test above would prove nothing of it."""
    checkpoint = load_checkpoint(str(family("gemma3_text")))
    prompts = prompts_of(checkpoint)
    assert min(len(prompts.prefix_ids + prompts.build(note).ids) for note in parity_notes()) > WINDOW + 8


def prompts_of(checkpoint: Checkpoint) -> PromptBuilder:
    """As an export without options has it."""
    tokenizer = checkpoint.tokenizer.backend_tokenizer
    return PromptBuilder(tokenizer, load_template("en"), PromptLimits(), checkpoint.token_ids)


def whole_window(attention_mask: torch.Tensor, new: int, dtype: torch.dtype, window: int | None = None) -> torch.Tensor:
    """The sliding mask is dropped."""
    return HONEST_MASK(attention_mask, new, dtype)


def window_by_slot(
    attention_mask: torch.Tensor, new: int, dtype: torch.dtype, window: int | None = None
) -> torch.Tensor:
    """The window counts slots of the cache, padding included."""
    honest = HONEST_MASK(attention_mask, new, dtype)
    if window is None:
        return honest
    keys = attention_mask.shape[1]
    distance = (torch.arange(new) + keys - new)[:, None] - torch.arange(keys)[None]
    return torch.where(distance < window, honest, graph._HIDDEN[dtype])


def window_one_short(
    attention_mask: torch.Tensor, new: int, dtype: torch.dtype, window: int | None = None
) -> torch.Tensor:
    return HONEST_MASK(attention_mask, new, dtype, None if window is None else window - 1)


HONEST_MASK = graph.additive_mask


class UntracedGraph:
    """The module that would be traced, run by torch: what is wrong on purpose needs no minutes of tracing."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.module = graph.NoteGraph(checkpoint.model, checkpoint.architecture).eval()
        self.layers = checkpoint.model.base.config.num_hidden_layers
        self.head_dim = checkpoint.model.base.config.head_dim

    def empty_cache(self, rows: int) -> KVCache:
        return KVCache([ort_value(torch.zeros(rows, 2, 0, self.head_dim))] * (2 * self.layers))

    @torch.no_grad()
    def run(self, ids: Ints, mask: Ints, positions: Ints, last: Ints, past: KVCache, **_: Any) -> GraphOutput:
        parts = [torch.from_numpy(value.numpy().copy()) for value in past.values]
        inputs = [torch.from_numpy(np.array(array)) for array in (ids, mask, positions, last)]
        embeddings, logits, present = self.module(*inputs, list(zip(parts[::2], parts[1::2], strict=True)))
        cache = KVCache([ort_value(part) for pair in present for part in pair])
        return GraphOutput(embeddings.numpy(), logits.numpy(), cache)


def ort_value(tensor: torch.Tensor) -> Any:
    return onnxruntime.OrtValue.ortvalue_from_numpy(tensor.contiguous().numpy())


@pytest.fixture(scope="module")
def gemma(family: Made) -> tuple[Checkpoint, PromptBuilder, ParityReference]:
    checkpoint = load_checkpoint(str(family("gemma3_text")))
    prompts = prompts_of(checkpoint)
    return checkpoint, prompts, reference_of(checkpoint.model, prompts)


def failed_rows(gemma: tuple[Checkpoint, PromptBuilder, ParityReference]) -> set[str]:
    checkpoint, prompts, reference = gemma
    report = check_parity(
        UntracedGraph(checkpoint),
        prompts,
        reference,
        precision="fp32",
        capabilities=Capabilities(),
        provider="cpu",
        untrained=False,
    )
    return {row.check for row in report.rows if not row.passed}


def test_an_honest_module_passes(gemma: tuple[Checkpoint, PromptBuilder, ParityReference]) -> None:
    assert failed_rows(gemma) == set()


@pytest.mark.parametrize(
    ("wrong", "must_fail"),
    [(whole_window, EMBEDDINGS | LOGITS), (window_by_slot, GREEDY), (window_one_short, EMBEDDINGS | LOGITS)],
)
def test_a_wrong_window_fails_the_proof(
    gemma: tuple[Checkpoint, PromptBuilder, ParityReference],
    monkeypatch: pytest.MonkeyPatch,
    wrong: Any,
    must_fail: set[str],
) -> None:
    monkeypatch.setattr(graph, "additive_mask", wrong)
    failed = failed_rows(gemma)
    assert failed >= must_fail
    # Counting slots does no harm before the padding, and that is where embeddings are read.
    assert wrong is not window_by_slot or failed == GREEDY


def test_a_forgotten_softcap_fails_the_proof(
    gemma: tuple[Checkpoint, PromptBuilder, ParityReference], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Uncapped(graph.NoteGraph):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            assert self.softcap == 2.0
            self.softcap = None

    monkeypatch.setattr(graph, "NoteGraph", Uncapped)
    assert failed_rows(gemma) == LOGITS


# Rotary embeddings that change with the length


LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "partial_rotary_factor": 1.0,
    "short_factor": [1.0 + 0.1 * step for step in range(16)],
    "long_factor": [4.0 + 0.5 * step for step in range(16)],
}


@pytest.fixture
def longrope(tmp_path: Path) -> Path:
    return save_family(
        tmp_path / "long",
        "phi3",
        rope_parameters=LONG,
        original_max_position_embeddings=512,
        max_position_embeddings=4096,
        sliding_window=None,
    )


def test_longrope_is_exported_for_its_short_form_and_equals_transformers(longrope: Path, tmp_path: Path) -> None:
    manifest = export_family(longrope, tmp_path / "bundle")
    assert manifest.parity.passed
    assert manifest.max_positions == 512


def test_longrope_is_refused_where_a_prompt_could_need_its_long_form(longrope: Path, tmp_path: Path) -> None:
    with pytest.raises(NoteLLMError, match=r"the model reads 512; export it with a smaller --note-tokens"):
        run_export(replace(plan(longrope, tmp_path / "bundle"), prompt_limits=PromptLimits(note=500)))


def test_tracing_leaves_the_models_rotary_embedding_as_it_was(longrope: Path) -> None:
    checkpoint = load_checkpoint(str(longrope))
    with graph._fixed_rotary(checkpoint.model.base):
        assert checkpoint.model.base.model.rotary_emb.rope_type == "default"
    assert checkpoint.model.base.model.rotary_emb.rope_type == "longrope"
    assert max_positions(checkpoint.architecture, checkpoint.model.base.config) == 512


# What is refused


@pytest.mark.parametrize(
    ("model_type", "changes", "line"),
    [
        (
            "gemma3_text",
            {"attn_logit_softcapping": 50.0},
            "Gemma 3 (text): attn_logit_softcapping is 50.0, which the graph does not cover; allowed: None",
        ),
        (
            "gemma3_text",
            {"use_bidirectional_attention": True},
            "Gemma 3 (text): use_bidirectional_attention is True, which the graph does not cover; allowed: None, False",
        ),
        (
            "phi3",
            {"layer_types": ["full_attention", "sliding_attention"]},
            "Phi-3: layer_types is ['full_attention', 'sliding_attention'], which the graph does not cover; "
            "allowed: None",
        ),
    ],
)
def test_a_feature_that_the_graph_does_not_cover_is_refused(
    family: Made, tmp_path: Path, model_type: str, changes: dict[str, Any], line: str
) -> None:
    assert refusal_after(family(model_type), tmp_path, changes) == line


@pytest.mark.parametrize(
    ("name", "value"), [("layer_types", ["full_attention", "chunked_attention"]), ("rope_type", "proportional")]
)
def test_a_kind_of_layer_or_rotary_embedding_that_is_new_is_refused(
    family: Made, tmp_path: Path, name: str, value: Any
) -> None:
    changes = {name: value} if name == "layer_types" else {"rope_parameters": {"rope_type": value, "rope_theta": 1e4}}
    line = refusal_after(family("qwen2"), tmp_path, changes)
    assert "\n" not in line
    assert "chunked_attention" in line or "proportional" in line


def test_quantised_weights_are_refused(family: Made, tmp_path: Path) -> None:
    line = refusal_after(family("qwen2"), tmp_path, {"quantization_config": {"quant_method": "gptq", "bits": 4}})
    assert line.endswith("its weights are quantised (gptq); take the ones that they came of")


def refusal_after(checkpoint: Path, tmp_path: Path, changes: dict[str, Any]) -> str:
    folder = shutil.copytree(checkpoint, tmp_path / "changed")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises((ExportError, BaseModelError)) as caught:
        load_checkpoint(str(folder))
    return str(caught.value)
