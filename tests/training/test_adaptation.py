"""What of a base is trained, and how: what LoRA leaves alone is never touched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from notellm.settings import TrainingSettings
from tests.export.tiny import HIDDEN, save_checkpoint
from tests.training.handmade_rows import PREFIX, with_emb
from training.adaptation import adapt, trainable_groups
from training.base_model import Base, load_base
from training.errors import TrainingError
from training.model import NoteLLM
from training.note_rows import pad_rows

RANK, DIM = 4, 8


@pytest.fixture(scope="module", params=["tied", "untied"])
def folder(request: pytest.FixtureRequest, tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_base if request.param == "tied" else save_checkpoint(tmp_path_factory.mktemp("base"), tied=False)


def chosen(**settings: Any) -> TrainingSettings:
    return TrainingSettings(**{"lora_rank": RANK, "lora_alpha": 8, "embedding_dim": DIM, **settings})


def adapted(folder: Path, **settings: Any) -> tuple[NoteLLM, Base]:
    base = load_base(str(folder))
    model, adapter = adapt(base, chosen(**settings))
    assert (adapter is None) == (settings.get("method") == "full")
    return model, base


def trained(model: nn.Module) -> dict[str, int]:
    return {name: part.numel() for name, part in model.named_parameters() if part.requires_grad}


def learn(model: NoteLLM, base: Base) -> None:
    """One step of AdamW, at a rate that moves everything that can move."""
    optimizer = torch.optim.AdamW(trainable_groups(model, chosen(learning_rate=0.5)), weight_decay=0.5)
    # At first LoRA's B is zero, and A has no gradient: in the second step all have.
    for _ in range(2):
        output = model.train()(pad_rows(with_emb(base.token_ids.emb), PREFIX))
        temperature = 0.0 if model.temperature is None else model.temperature
        (output.embeddings[:, 0].sum() + output.answer_loss + temperature).backward()
        optimizer.step()
        optimizer.zero_grad()


def test_lora_trains_its_matrices_the_row_of_emb_the_projection_and_the_temperature(folder: Path) -> None:
    model, base = adapted(folder)
    found = trained(model)
    # Per layer: q and o 64 -> 64, k and v 64 -> 32, gate and up 64 -> 96, down 96 -> 64.
    lora = RANK * 2 * (128 + 128 + 96 + 96 + 160 + 160 + 160)
    assert sum(size for name, size in found.items() if "lora_" in name) == lora
    rest = {
        name.rsplit(".", 1)[-1] if "base" not in name else "row": n for name, n in found.items() if "lora_" not in name
    }
    assert rest == {"row": HIDDEN, "weight": DIM * HIDDEN, "bias": DIM, "temperature": 1}
    assert not [name for name in found if "lm_head" in name]
    assert base.token_ids.emb == len(base.tokenizer) - 1


def test_a_step_of_lora_changes_no_weight_of_the_base_but_the_row_of_emb(folder: Path) -> None:
    before = {name: part.clone() for name, part in load_base(str(folder)).model.state_dict().items()}
    model, base = adapted(folder)
    emb = base.token_ids.emb
    learn(model, base)
    after = {
        name.replace("base_layer.", "").replace("token_adapter.", ""): part
        for name, part in model.base.state_dict().items()
        if "lora_" not in name and "trainable_tokens" not in name
    }
    assert before.keys() <= after.keys()
    for name, weight in before.items():
        assert torch.equal(after[name], weight), name
    rows = model.base.get_input_embeddings()(torch.arange(emb + 1))
    table = before["model.embed_tokens.weight"]
    torch.testing.assert_close(rows[:emb], table[:emb], atol=0, rtol=0)
    assert (rows[emb] - table[emb]).abs().max() > 0.1


def test_at_the_start_an_adapted_base_says_what_the_base_says(folder: Path) -> None:
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        wanted = load_base(str(folder)).model(input_ids=ids).logits
        found = adapted(folder)[0].base(input_ids=ids).logits
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=0)


def test_full_trains_everything_and_a_step_moves_all_of_it(folder: Path) -> None:
    model, base = adapted(folder, method="full")
    assert all(part.requires_grad for part in model.parameters())
    before = {name: part.detach().clone() for name, part in model.named_parameters()}
    learn(model, base)
    for name, part in model.named_parameters():
        assert not torch.equal(part, before[name]), name
    tables = (model.base.get_input_embeddings().weight, model.base.get_output_embeddings().weight)
    assert (tables[0] is tables[1]) == model.base.config.tie_word_embeddings


@pytest.mark.parametrize("method", ["lora", "full"])
def test_each_parameter_is_in_one_group_only_matrices_decay_and_the_top_has_its_own_rate(
    tiny_base: Path, method: str
) -> None:
    model, _ = adapted(tiny_base, method=method)
    settings = chosen(learning_rate=2e-4, projection_learning_rate=5e-3)
    optimizer = torch.optim.AdamW(trainable_groups(model, settings), weight_decay=0.1)
    names = {id(part): name for name, part in model.named_parameters() if part.requires_grad}
    found: dict[str, tuple[float, float]] = {}
    for group in optimizer.param_groups:
        for part in group["params"]:
            assert names[id(part)] not in found
            found[names[id(part)]] = (group["lr"], group["weight_decay"])
    assert found == {
        name: (5e-3 if name.startswith(("projection", "temperature")) else 2e-4, 0.1 if part.ndim == 2 else 0.0)
        for name, part in model.named_parameters()
        if part.requires_grad
    }


def test_without_the_contrastive_loss_projection_and_temperature_stay(tiny_base: Path) -> None:
    found = trained(adapted(tiny_base, contrastive=False)[0])
    assert found
    assert not [name for name in found if name.startswith(("projection", "temperature"))]


def test_only_the_modules_that_are_named_get_an_adapter(tiny_base: Path) -> None:
    model, _ = adapted(tiny_base, lora_targets=" q_proj, v_proj,")
    adapted_modules = {name.split(".lora_")[0].rsplit(".", 1)[-1] for name in trained(model) if "lora_" in name}
    assert adapted_modules == {"q_proj", "v_proj"}


def test_a_module_that_the_base_does_not_have_is_named(tiny_base: Path) -> None:
    with pytest.raises(TrainingError) as caught:
        adapted(tiny_base, lora_targets="query")
    assert str(caught.value).startswith("training.lora_targets: 'query' is not allowed: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_an_embedding_larger_than_the_hidden_state_is_refused(tiny_base: Path, method: str) -> None:
    with pytest.raises(TrainingError) as caught:
        adapted(tiny_base, embedding_dim=65, method=method)
    assert str(caught.value) == (
        "training.embedding_dim: 65 is not allowed: tiny-llama has hidden size 64, "
        "an embedding has at most as many dimensions"
    )
    assert adapted(tiny_base, embedding_dim=64, method=method)[0].embedding_dim == 64


def test_temperature_begins_where_it_is_set(tiny_base: Path) -> None:
    model, _ = adapted(tiny_base, temperature=1.25)
    assert model.temperature is not None
    assert model.temperature.item() == 1.25
