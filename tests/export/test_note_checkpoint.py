"""A NoteLLM checkpoint: base, adapter, row of [EMB] and projection become one bundle, equal to the merged model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from export.checkpoint import load_checkpoint
from export.parity import reference_of
from notellm.errors import NoteLLMError
from notellm.parity import read_reference
from notellm.prompt import PromptBuilder
from tests.export.tiny import HIDDEN, Tiny, plan, run_export
from training.checkpoint_folder import (
    DESCRIPTION,
    PROJECTION,
    Description,
    read_description,
    write_checkpoint,
)
from training.errors import CheckpointError
from training.model import NoteLLM, add_emb_token

# peft asks transformers for something by its old name.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

DIM = 8
ADAPTER = "adapter_model.safetensors"
CONFIG = "adapter_config.json"


def adapted(base_folder: Path) -> tuple[PeftModel, nn.Linear, Any, int]:
    """As training would leave it; every number that training changes is random."""
    base = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    emb = add_emb_token(base, tokenizer)
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], trainable_token_indices={"embed_tokens": [emb]}
    )
    model = get_peft_model(base, config)
    projection = nn.Linear(HIDDEN, DIM, bias=False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "trainable_tokens" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.2)
        projection.weight.copy_(torch.randn(DIM, HIDDEN))
    return model, projection, tokenizer, emb


def describe(base: Path) -> Description:
    return Description(
        format_version=1,
        base=str(base),
        embedding_dim=DIM,
        made_with={"peft": "any"},
        training={"epochs": 3, "seed": 7},
    )


@pytest.fixture(scope="module")
def written(tied: Tiny, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PeftModel, nn.Linear]:
    folder = tmp_path_factory.mktemp("trained") / "mine"
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model, projection, _, _ = adapted(tied.checkpoint)
    write_checkpoint(folder, describe(tied.checkpoint), model, projection)
    return folder, model, projection


@pytest.fixture
def folder(written: tuple[Path, PeftModel, nn.Linear], tmp_path: Path) -> Path:
    """To change."""
    return shutil.copytree(written[0], tmp_path / "mine")


def test_what_is_written_is_small_and_can_be_read_again(written: tuple[Path, PeftModel, nn.Linear], tied: Tiny) -> None:
    folder = written[0]
    assert read_description(folder) == describe(tied.checkpoint)
    names = {file.name for file in folder.iterdir()}
    assert {DESCRIPTION, PROJECTION, ADAPTER, CONFIG} <= names
    # The row of [EMB] and not the table that it stands in.
    assert not [name for name, tensor in load_file(folder / ADAPTER).items() if len(tensor) > HIDDEN * 2]
    assert not [entry for entry in folder.parent.iterdir() if entry.name.endswith(".partial")]


def test_the_bundle_equals_the_merged_model(
    written: tuple[Path, PeftModel, nn.Linear], tied: Tiny, tmp_path: Path
) -> None:
    folder, model, projection = written
    manifest = run_export(plan(folder, tmp_path / "bundle"))
    assert manifest.parity.passed
    assert manifest.projection == "linear"
    assert manifest.embedding_dim == DIM
    assert manifest.base_model == "tiny-llama"
    assert manifest.model_version != tied.manifest.model_version
    # Against the adapter as training holds it, merged here and by peft alone: no line of ours between.
    reference = NoteLLM(model.merge_and_unload(safe_merge=True), projection).eval()
    loaded = load_checkpoint(str(folder))
    tokenizer = loaded.tokenizer.backend_tokenizer
    prompts = PromptBuilder(tokenizer, manifest.template, manifest.prompt_limits, manifest.token_ids)
    stored = read_reference(tmp_path / "bundle")
    wanted = reference_of(reference, prompts)
    torch.testing.assert_close(torch.from_numpy(stored.embeddings), torch.from_numpy(wanted.embeddings))
    torch.testing.assert_close(torch.from_numpy(stored.logits), torch.from_numpy(wanted.logits), atol=1e-4, rtol=1e-4)
    assert (stored.tokens == wanted.tokens).all()
    merged = loaded.model.base
    assert merged.get_input_embeddings().weight.data_ptr() == merged.get_output_embeddings().weight.data_ptr()


def test_two_loads_are_equal_and_every_part_of_the_adapter_counts(folder: Path) -> None:
    states = [load_checkpoint(str(folder)).model.state_dict() for _ in range(2)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    for name in load_file(folder / ADAPTER):
        tensors = load_file(folder / ADAPTER)
        whole = (folder / ADAPTER).read_bytes()
        save_file({**tensors, name: tensors[name] + 0.5}, folder / ADAPTER, metadata={"format": "pt"})
        changed = load_checkpoint(str(folder)).model.state_dict()
        assert any(not torch.equal(states[0][key], changed[key]) for key in states[0]), name
        (folder / ADAPTER).write_bytes(whole)


def test_a_base_that_begins_with_a_dot_is_beside_the_checkpoint(folder: Path, tied: Tiny) -> None:
    shutil.copytree(tied.checkpoint, folder / "base")
    change(folder / DESCRIPTION, base="./base")
    assert load_checkpoint(str(folder)).name == "base"


def change(file: Path, **fields: Any) -> None:
    content = json.loads(file.read_text()) | fields
    file.write_text(json.dumps({name: value for name, value in content.items() if value is not ...}))


def refusal(folder: Path) -> str:
    with pytest.raises(NoteLLMError) as caught:
        load_checkpoint(str(folder))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"format_version": 2}, "format_version is 2, this program reads 1"),
        ({"format_version": ...}, "format_version is None, this program reads 1"),
        ({"base": ...}, "missing required field `base`"),
        ({"base": 3}, "Expected `str`, got `int` - at `$.base`"),
        ({"base": " "}, "base is ' '; name the model that was trained"),
        ({"base": "/nowhere"}, "model '/nowhere': there is no such directory"),
        ({"embedding_dim": "8"}, "Expected `int`, got `str` - at `$.embedding_dim`"),
        ({"embedding_dim": 9}, f"embedding_dim is 9, {PROJECTION} makes {DIM}"),
        ({"command": "rm"}, "unknown field `command`"),
    ],
    ids=str,
)
def test_a_wrong_description_is_one_line(folder: Path, fields: dict[str, Any], line: str) -> None:
    change(folder / DESCRIPTION, **fields)
    assert line in refusal(folder)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"\xff", b"[" * 100_000], ids=["empty", "cut", "list", "x", "deep"]
)
def test_a_damaged_description_is_one_line(folder: Path, content: bytes) -> None:
    (folder / DESCRIPTION).write_bytes(content)
    assert f"{DESCRIPTION} is wrong" in refusal(folder)


@pytest.mark.parametrize("name", [CONFIG, ADAPTER, PROJECTION])
def test_a_missing_piece_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    assert f"holds no {name}" in refusal(folder)


@pytest.mark.parametrize("name", [CONFIG, ADAPTER, PROJECTION])
def test_a_damaged_piece_is_named(folder: Path, name: str) -> None:
    (folder / name).write_bytes(b"\xff nothing of the kind")
    assert refusal(folder).startswith(f"{name}: cannot be read")


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'; allowed is 'LORA'"),
        ({"peft_type": ...}, "peft_type is None; allowed is 'LORA'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is ['lm_head']; this program merges LoRA with"),
        ({"bias": "all"}, "bias is 'all'; this program merges LoRA with bias 'none'"),
        ({"something_new": 1}, "something_new is 1; this program merges LoRA with something_new None"),
        (
            {"trainable_token_indices": {"embed_tokens": [99999]}},
            "trainable_token_indices holds 99999; the base has ids",
        ),
        ({"target_modules": ["no_such_layer"]}, "does not fit the base"),
        ({"r": 8}, "does not fit the base"),
        ({"r": "many"}, f"{CONFIG}: r is 'many'; allowed are whole numbers from 1"),
    ],
    ids=str,
)
def test_an_adapter_that_is_another_kind_is_one_line(folder: Path, fields: dict[str, Any], line: str) -> None:
    change(folder / CONFIG, **fields)
    assert line in refusal(folder)


def edit(folder: Path, act: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / ADAPTER)
    act(tensors)
    save_file(tensors, folder / ADAPTER, metadata={"format": "pt"})


def test_an_adapter_that_lacks_a_tensor_is_refused_and_not_filled_up(folder: Path) -> None:
    for name in load_file(folder / ADAPTER):
        whole = (folder / ADAPTER).read_bytes()
        edit(folder, lambda tensors, name=name: tensors.pop(name))  # type: ignore[misc]
        assert refusal(folder).startswith(f"{ADAPTER}: ")
        (folder / ADAPTER).write_bytes(whole)


def test_an_adapter_with_a_tensor_too_many_is_refused(folder: Path) -> None:
    edit(
        folder, lambda tensors: tensors.update({"base_model.model.model.layers.9.q_proj.lora_A.weight": torch.ones(4)})
    )
    assert refusal(folder).endswith("layers.9.q_proj.lora_A.weight is not of this adapter (1 such tensors)")


def test_numbers_that_are_not_finite_are_refused(folder: Path) -> None:
    edit(folder, lambda tensors: next(iter(tensors.values())).view(-1).fill_(float("nan")))
    assert refusal(folder).endswith("holds numbers that are not finite")


def test_writing_replaces_a_checkpoint_and_nothing_else(
    written: tuple[Path, PeftModel, nn.Linear], tied: Tiny, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    out.mkdir()
    (out / "metrics.jsonl").write_text("of the run")
    (out / "projection.safetensors").write_text("of an earlier checkpoint")
    model, projection, tokenizer, emb = adapted(tied.checkpoint)
    write_checkpoint(out, describe(tied.checkpoint), model, projection, tokenizer)
    names = {file.name for file in out.iterdir()}
    assert not [name for name in names if name.startswith(".")], "nothing half-made is left"
    assert "tokenizer.json" in names
    assert (out / "metrics.jsonl").read_text() == "of the run"
    assert load_checkpoint(str(out)).token_ids.emb == emb


def test_errors_are_drawn_in_the_tree() -> None:
    assert issubclass(CheckpointError, NoteLLMError)
