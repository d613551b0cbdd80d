"""model_version: the same for the same model, another for whatever decides a row."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
from safetensors.torch import load_file, save_file

from export.build import draft_manifest
from export.checkpoint import load_checkpoint
from notellm.bundle import TagLimits
from notellm.prompt import PromptLimits, load_template
from tests.export.families import save_family
from tests.export.tiny import CATEGORIES, Tiny, plan, save_checkpoint
from training.checkpoint_folder import PROJECTION


def version_of(checkpoint: Path, work: Path, **changes: Any) -> str:
    """As an export would compute it, up to the tracing."""
    work.mkdir()
    loaded = load_checkpoint(str(checkpoint))
    loaded.tokenizer.backend_tokenizer.save(str(work / "tokenizer.json"))
    return draft_manifest(replace(plan(checkpoint, work, language="zh"), **changes), loaded, work).model_version


@pytest.fixture
def copy(untied: Tiny, tmp_path: Path) -> Path:
    """The untied checkpoint under another name, to change."""
    return shutil.copytree(untied.checkpoint, tmp_path / "copy")


def test_a_second_load_of_a_checkpoint_from_another_folder_has_the_same_version(
    untied: Tiny, copy: Path, tmp_path: Path
) -> None:
    assert version_of(copy, tmp_path / "work") == untied.manifest.model_version


def test_a_checkpoint_made_again_from_the_same_numbers_has_the_same_version(tied: Tiny, tmp_path: Path) -> None:
    again = save_checkpoint(tmp_path / "again", tied=True)
    assert version_of(again, tmp_path / "work", template=load_template("en")) == tied.manifest.model_version


def change_one_number(file: Path, name: str) -> None:
    tensors = load_file(file)
    tensors[name].view(-1)[3] += 1e-3
    save_file(tensors, file, metadata={"format": "pt"})


def change_json(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


CHANGES_OF_THE_CHECKPOINT: dict[str, Callable[[Path], None]] = {
    "a weight": lambda folder: change_one_number(folder / "model.safetensors", "model.layers.1.mlp.up_proj.weight"),
    "the output table": lambda folder: change_one_number(folder / "model.safetensors", "lm_head.weight"),
    "the projection": lambda folder: change_one_number(folder / PROJECTION, "bias"),
    "no projection": lambda folder: (folder / PROJECTION).unlink(),
    "the tokenizer": lambda folder: change_json(
        folder / "tokenizer.json", lambda tokenizer: tokenizer["model"]["merges"].pop()
    ),
    "the rotary base": lambda folder: change_json(
        folder / "config.json", lambda config: config["rope_parameters"].update(rope_theta=5000.0)
    ),
    "the norm's epsilon": lambda folder: change_json(
        folder / "config.json", lambda config: config.update(rms_norm_eps=0.01)
    ),
    "the token that ends an answer": lambda folder: change_json(
        folder / "generation_config.json", lambda config: config.update(eos_token_id=[1, 5])
    ),
}


@pytest.mark.parametrize("change", CHANGES_OF_THE_CHECKPOINT)
def test_a_change_of_the_checkpoint_is_another_version(untied: Tiny, copy: Path, tmp_path: Path, change: str) -> None:
    CHANGES_OF_THE_CHECKPOINT[change](copy)
    assert version_of(copy, tmp_path / "work") != untied.manifest.model_version


@pytest.mark.parametrize(
    "changes",
    [
        {"template": load_template("en")},
        {"template": msgspec.structs.replace(load_template("zh"), hashtags='"。标签：')},
        {"categories": [*CATEGORIES, "sport"]},
        {"categories": CATEGORIES[::-1]},
        {"prompt_limits": PromptLimits(note=64)},
        {"prompt_limits": PromptLimits(title=20)},
        {"tag_limits": TagLimits(hashtags=3)},
        {"tag_limits": TagLimits(hashtag_tokens=12)},
    ],
    ids=str,
)
def test_a_change_of_how_notes_are_read_is_another_version(
    untied: Tiny, tmp_path: Path, changes: dict[str, Any]
) -> None:
    assert version_of(untied.checkpoint, tmp_path / "work", **changes) != untied.manifest.model_version


def test_fp16_shares_the_version_of_fp32_and_what_is_below_does_not(untied: Tiny, tmp_path: Path) -> None:
    precisions = ("fp32", "fp16", "int8", "int4")
    versions = [version_of(untied.checkpoint, tmp_path / name, precision=name) for name in precisions]
    assert versions[:2] == [untied.manifest.model_version] * 2
    assert len(set(versions)) == 3


def test_where_it_runs_is_no_part_of_it_and_how_its_weights_are_stored_is(untied: Tiny, tmp_path: Path) -> None:
    here, there, otherwise = (
        version_of(untied.checkpoint, tmp_path / name, precision="int4", **changes)
        for name, changes in (("cpu", {}), ("cuda", {"provider": "cuda"}), ("fused", {"graph": "fused"}))
    )
    assert here == there != otherwise


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("gemma3_text", {"sliding_window": 32}),
        ("gemma3_text", {"final_logit_softcapping": 3.0}),
        ("gemma3_text", {"query_pre_attn_scalar": 64}),
        ("gemma3_text", {"layer_types": ["full_attention", "sliding_attention"]}),
        ("mistral", {"sliding_window": None}),
        ("qwen2", {"max_window_layers": 0}),
    ],
)
def test_what_no_tensor_shows_is_another_version(tmp_path: Path, model_type: str, changes: dict[str, Any]) -> None:
    one = save_family(tmp_path / "one", model_type)
    other = save_family(tmp_path / "other", model_type, **changes)
    assert version_of(one, tmp_path / "work1") != version_of(other, tmp_path / "work2")
