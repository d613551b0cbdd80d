"""One pass over a batch, whichever way it is computed, says what each note alone would have said."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from tests.export.families import FAMILIES, save_family
from tests.training.handmade_rows import PREFIX, ROWS
from tests.training.tiny_set import tiny_model
from training.model import NoteLLM
from training.note_rows import NoteRow, NoteRows, pad_rows


class Said(NamedTuple):
    embeddings: Tensor
    answer_loss: Tensor


def alone(model: NoteLLM, rows: list[NoteRow]) -> Said:
    """Each row after its prefix, with neither padding nor cache; the loss from the base's own logits."""
    embeddings, loss = [], torch.zeros(())
    for row in rows:
        ids = torch.tensor([PREFIX + row.ids])
        hidden = model.base.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state[0]
        projected = model.projection(hidden[len(PREFIX) + row.embed_at])
        embeddings.append(projected / projected.pow(2).sum().sqrt())
        log_p = model.base(input_ids=ids, use_cache=False).logits[0].log_softmax(dim=-1)
        for place in range(row.answer_from, len(row.ids)):
            loss = loss - log_p[len(PREFIX) + place - 1, row.ids[place]]
    return Said(torch.stack(embeddings), loss)


def gradients(model: NoteLLM, say: Callable[[], Any]) -> dict[str, Tensor]:
    """Of a loss in which every embedding and every answer counts."""
    model.zero_grad(set_to_none=True)
    said = say()
    pull = torch.randn(said.embeddings.shape, generator=torch.Generator().manual_seed(6))
    (100 * (said.embeddings * pull).sum() + said.answer_loss).backward()
    return {name: part.grad.clone() for name, part in model.named_parameters() if part.grad is not None}


def assert_same_gradients(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        scale = float(gradient.abs().max())
        assert scale > 0, name
        torch.testing.assert_close(found[name] / scale, gradient / scale, atol=1e-4, rtol=0)


@pytest.fixture(scope="module")
def family_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], NoteLLM]:
    def made(family: str) -> NoteLLM:
        folder = save_family(tmp_path_factory.mktemp("families") / family, family)
        base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(8)
            return NoteLLM(base, nn.Linear(base.config.hidden_size, 8)).train()

    return made


@pytest.mark.parametrize("family", FAMILIES)
def test_a_shared_prefix_and_padding_change_neither_result_nor_gradient(
    family_model: Callable[[str], NoteLLM], family: str
) -> None:
    model = family_model(family)
    batch = pad_rows(ROWS, PREFIX)
    found, wanted = model(batch), alone(model, ROWS)
    torch.testing.assert_close(found.embeddings, wanted.embeddings, atol=1e-5, rtol=0)
    torch.testing.assert_close(found.answer_loss, wanted.answer_loss, atol=1e-4, rtol=1e-5)
    assert_same_gradients(gradients(model, lambda: model(batch)), gradients(model, lambda: alone(model, ROWS)))


@pytest.mark.parametrize("method", ["lora", "full"])
def test_gradient_checkpointing_computes_every_layer_again_and_the_same(tiny_base: Path, method: str) -> None:
    batch = pad_rows(ROWS, PREFIX)
    plain, _ = tiny_model(tiny_base, method=method)
    saving, base = tiny_model(tiny_base, method=method, gradient_checkpointing=True)
    for (name, one), (_, other) in zip(plain.named_parameters(), saving.named_parameters(), strict=True):
        assert torch.equal(one, other), name
    torch.testing.assert_close(tuple(saving(batch)), tuple(plain(batch)), atol=1e-4, rtol=1e-5)

    passes = [0] * len(base.model.get_decoder().layers)
    for place, layer in enumerate(base.model.get_decoder().layers):
        layer.mlp.register_forward_pre_hook(lambda *_, place=place: passes.__setitem__(place, passes[place] + 1))
    assert_same_gradients(gradients(saving, lambda: saving(batch)), gradients(plain, lambda: plain(batch)))
    assert passes == [2] * len(passes)


def test_the_instruction_is_computed_once_and_not_once_a_note(tiny_base: Path) -> None:
    model, base = tiny_model(tiny_base)
    shapes: list[tuple[int, ...]] = []
    base.model.get_decoder().layers[0].register_forward_hook(
        lambda module, arguments, output: shapes.append(tuple(arguments[0].shape[:2]))
    )
    model(pad_rows(ROWS, PREFIX))
    assert shapes == [(1, len(PREFIX)), (len(ROWS), max(len(row.ids) for row in ROWS))]


def test_a_cpu_reads_a_large_batch_in_parts_of_like_length(tiny_base: Path) -> None:
    model, base = tiny_model(tiny_base)
    rows = [ROWS[place % len(ROWS)] for place in range(40)]
    widths: list[int] = []
    base.model.get_decoder().layers[0].register_forward_hook(
        lambda module, arguments, output: widths.append(arguments[0].shape[1])
    )
    batch = pad_rows(rows, PREFIX)
    found = model(batch)
    lengths = sorted(len(row.ids) for row in rows)
    assert widths == [len(PREFIX), lengths[15], lengths[31], lengths[39]], "all after one reading of the instruction"
    wanted = alone(model, rows)
    torch.testing.assert_close(found.embeddings, wanted.embeddings, atol=1e-5, rtol=0)
    torch.testing.assert_close(found.answer_loss, wanted.answer_loss, atol=1e-3, rtol=1e-5)
    assert_same_gradients(gradients(model, lambda: model(batch)), gradients(model, lambda: alone(model, rows)))


def test_embeddings_only_needs_no_answers_and_has_no_loss(tiny_base: Path) -> None:
    model, _ = tiny_model(tiny_base)
    batch = pad_rows(ROWS, PREFIX)
    part = batch.part(slice(0, 4), embeddings_only=True)
    assert part.labels is None
    found = model(part)
    torch.testing.assert_close(found.embeddings, model(batch).embeddings, atol=1e-5, rtol=0)
    assert float(found.answer_loss) == 0


def test_a_batch_that_is_asked_nothing_has_loss_zero(tiny_base: Path) -> None:
    model, _ = tiny_model(tiny_base)
    output = model(pad_rows([ROWS[2], ROWS[2]], PREFIX))
    assert float(output.answer_loss.detach()) == 0
    output.answer_loss.backward()


def test_the_projection_gets_the_hidden_state_at_the_quote(tiny_base: Path) -> None:
    model, _ = tiny_model(tiny_base)
    batch: NoteRows = pad_rows(ROWS, PREFIX)
    with torch.no_grad():
        torch.testing.assert_close(model.embed(model.hidden_at_quote(batch)), model(batch).embeddings)
        lengths = model(batch).embeddings.norm(dim=1)
    torch.testing.assert_close(lengths, torch.ones(len(ROWS)))
