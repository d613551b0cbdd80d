"""What training writes is read again as the very model that was trained; whole, or not at all."""

from __future__ import annotations

import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

from notellm.settings import TrainingSettings
from tests.export.tiny import save_checkpoint
from tests.training.handmade_rows import PREFIX, with_emb
from training import checkpoint_folder
from training.adaptation import adapt
from training.base_model import Base, load_base, load_notellm
from training.checkpoint_folder import BASE, DESCRIPTION, PROJECTION, Description, is_checkpoint, write_checkpoint
from training.model import NoteLLM
from training.note_rows import pad_rows

DIM = 8
LORA_FILES = {"adapter_config.json", "adapter_model.safetensors", PROJECTION, DESCRIPTION}


class Trained(NamedTuple):
    source: Path
    base: Base
    model: NoteLLM
    adapter: PeftModel | None

    def write(self, folder: Path) -> None:
        """As a run does in the end."""
        description = Description(
            format_version=1,
            base="./base" if self.adapter is None else str(self.source),
            embedding_dim=DIM,
            adapter=self.adapter is not None,
        )
        projection = self.model.projection
        assert isinstance(projection, nn.Linear)
        if self.adapter is None:
            write_checkpoint(folder, description, self.base.model, projection, self.base.tokenizer)
        else:
            write_checkpoint(folder, description, self.adapter, projection)

    @property
    def says(self) -> tuple[Tensor, Tensor, Tensor]:
        return what_it_says(self.model, self.base.token_ids.emb)


def what_it_says(model: NoteLLM, emb: int) -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings and loss of rows in which ``[EMB]`` stands, and every logit after it."""
    model.eval()
    with torch.no_grad():
        output = model(pad_rows(with_emb(emb), PREFIX))
        logits = model.base(input_ids=torch.tensor([[5, emb, 6, 7]])).logits
    return output.embeddings, output.answer_loss, logits


@pytest.fixture(scope="module")
def train(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Trained]:
    sources = {True: tiny_base, False: save_checkpoint(tmp_path_factory.mktemp("untied") / "tiny-llama", tied=False)}

    def made(*, tied: bool = True, seed: int = 5, **settings: Any) -> Trained:
        """As a training may leave it: all that is trained has moved, and nothing else."""
        base = load_base(str(sources[tied]))
        given = {"lora_rank": 4, "lora_alpha": 8, "embedding_dim": DIM, **settings}
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(seed)
            model, adapter = adapt(base, TrainingSettings(**given))
            for part in model.parameters():
                if part.requires_grad:
                    part.add_(torch.randn_like(part) * 0.1)
        return Trained(sources[tied], base, model, adapter)

    return made


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"lora_targets": "q_proj,down_proj", "lora_dropout": 0.3},
        {"gradient_checkpointing": True},
        {"method": "full"},
        {"method": "full", "gradient_checkpointing": True},
    ],
    ids=["lora", "some modules", "lora, checkpointing", "full", "full, checkpointing"],
)
def test_the_model_that_is_read_says_what_the_trained_one_said(
    train: Callable[..., Trained], tmp_path: Path, settings: dict[str, Any], tied: bool
) -> None:
    trained = train(tied=tied, **settings)
    wanted = trained.says
    trained.write(tmp_path / "mine")
    loaded = load_notellm(str(tmp_path / "mine"))
    assert loaded.token_ids == trained.base.token_ids
    assert loaded.model.embedding_dim == DIM
    found = what_it_says(loaded.model, loaded.token_ids.emb)
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-5)
    # It is another model than the base, or nothing would have been shown.
    assert (
        load_base(str(trained.source)).model(torch.tensor([[5, 6]])).logits[0, 0] - wanted[2][0, 0]
    ).abs().max() > 0.1
    tables = [loaded.model.base.get_input_embeddings().weight, loaded.model.base.get_output_embeddings().weight]
    assert (tables[0].data_ptr() == tables[1].data_ptr()) == tied
    # Writing changed nothing of what goes on in memory.
    torch.testing.assert_close(trained.says, wanted, atol=0, rtol=0)


def test_an_adapter_is_a_few_files_that_everybody_may_read(train: Callable[..., Trained], tmp_path: Path) -> None:
    trained = train()
    trained.write(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == LORA_FILES
    assert all(stat.S_IMODE(file.stat().st_mode) & 0o044 == 0o044 for file in tmp_path.iterdir())
    whole = sum(part.numel() * 4 for part in trained.base.model.get_decoder().parameters())
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) < whole


def test_a_whole_base_lies_inside_and_may_be_moved(train: Callable[..., Trained], tmp_path: Path) -> None:
    trained = train(method="full")
    trained.write(tmp_path / "here")
    (tmp_path / "here").rename(tmp_path / "there")
    loaded = load_notellm(str(tmp_path / "there"))
    torch.testing.assert_close(what_it_says(loaded.model, loaded.token_ids.emb), trained.says, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_new_checkpoint_takes_the_place_of_another_and_all_else_stays(
    train: Callable[..., Trained], tmp_path: Path, method: str
) -> None:
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    for other in ("full", "lora"):
        train(method=other, seed=1).write(tmp_path)
    trained = train(method=method, seed=2)
    trained.write(tmp_path)
    loaded = load_notellm(str(tmp_path))
    torch.testing.assert_close(what_it_says(loaded.model, loaded.token_ids.emb), trained.says, atol=1e-4, rtol=1e-5)
    assert (tmp_path / "metrics.jsonl").read_text() == "{}\n"
    assert not (tmp_path / ".partial").exists()
    assert (tmp_path / BASE).is_dir()


class Killed(Exception):
    """Stands for the end of the process."""


def test_killed_before_all_is_written_it_leaves_the_checkpoint_that_was_there(
    train: Callable[..., Trained], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = train(seed=1)
    first.write(tmp_path)

    def killed(*_: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_folder, "save_file", killed)
        with pytest.raises(Killed):
            train(seed=2).write(tmp_path)
    loaded = load_notellm(str(tmp_path))
    torch.testing.assert_close(what_it_says(loaded.model, loaded.token_ids.emb), first.says, atol=1e-4, rtol=1e-5)
    # What the killed one left is in the way of nothing.
    train(seed=2).write(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == LORA_FILES


@pytest.mark.parametrize("moves", range(4))
def test_killed_while_files_take_their_places_it_is_no_checkpoint_and_no_mixture(
    train: Callable[..., Trained], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moves: int
) -> None:
    train(seed=1).write(tmp_path)
    left = [moves]
    replace = Path.replace

    def some(self: Path, target: Path) -> Path:
        if self.parent.name == ".partial":
            if not left[0]:
                raise Killed
            left[0] -= 1
        return replace(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", some)
        patch.setattr(Path, "rename", killed_rename)
        with pytest.raises(Killed):
            train(seed=2).write(tmp_path)
    assert not is_checkpoint(tmp_path)


def killed_rename(self: Path, target: Path) -> Path:
    raise Killed
