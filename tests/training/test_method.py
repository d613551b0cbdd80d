"""Whether an adapter is trained, or all weights, where nobody said so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from notellm.settings import TrainingSettings
from training import method
from training.base_model import SMOLLM2, count_parameters, load_base
from training.checkpoint_folder import DESCRIPTION
from training.errors import BaseModelError, TrainingError
from training.method import choose_base, choose_method

AUTO = TrainingSettings(seed=5)


def test_a_small_base_is_trained_whole() -> None:
    assert choose_method(AUTO, SMOLLM2, None) == AUTO.model_copy(update={"method": "full"})


def test_a_base_of_more_than_a_billion_gets_an_adapter(tmp_path: Path) -> None:
    config = AutoConfig.for_model(
        "llama", hidden_size=2048, intermediate_size=8192, num_hidden_layers=24, vocab_size=32_000
    )
    config.save_pretrained(tmp_path)
    assert count_parameters(str(tmp_path)) > 1_000_000_000, "and none of them was ever in memory"
    assert choose_method(AUTO, str(tmp_path), None).method == "lora"


def test_the_bound_itself_is_still_whole(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = AutoModelForCausalLM.from_pretrained(tiny_base).num_parameters()
    for bound, chosen in ((size, "full"), (size - 1, "lora")):
        monkeypatch.setattr(method, "_ALL_WEIGHTS_UP_TO", bound)
        assert choose_method(AUTO, str(tiny_base), None).method == chosen


@pytest.mark.parametrize(("adapter", "chosen"), [(True, "lora"), (False, "full")])
def test_a_run_is_gone_on_from_as_it_was_trained(adapter: bool, chosen: str, tmp_path: Path) -> None:
    described = {"format_version": 1, "base": "./base", "embedding_dim": 8, "adapter": adapter}
    (tmp_path / DESCRIPTION).write_text(json.dumps(described))
    settled = choose_method(AUTO, "no such base", tmp_path)
    assert settled.method == chosen
    assert choose_base(settled, SMOLLM2, tmp_path) == (SMOLLM2 if adapter else str(tmp_path / "base"))
    other = AUTO.model_copy(update={"method": "full" if adapter else "lora"})
    with pytest.raises(TrainingError, match=f"was trained with training.method = '{chosen}', and cannot go on with"):
        choose_base(other, SMOLLM2, tmp_path)


@pytest.mark.parametrize("chosen", ["lora", "full"])
def test_what_is_said_counts(chosen: str, tmp_path: Path) -> None:
    said = AUTO.model_copy(update={"method": chosen})
    assert choose_method(said, SMOLLM2, tmp_path) == said
    assert choose_method(said, "no such base", None) == said


def test_smollm2_has_as_many_as_its_file() -> None:
    # [EMB] is the row that loading adds.
    loaded = load_base(SMOLLM2).model
    assert count_parameters(SMOLLM2) == loaded.num_parameters() - loaded.config.hidden_size


def test_a_base_that_is_not_there_is_said_as_at_loading(tmp_path: Path) -> None:
    with pytest.raises(BaseModelError, match="there is no such directory"):
        count_parameters(str(tmp_path / "none"))
    with pytest.raises(BaseModelError, match=r"has no config\.json that names a model_type"):
        count_parameters(str(tmp_path))
