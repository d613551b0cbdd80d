"""A checkpoint that reads notes in torch says what its exported bundle says."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from export.torch_encoder import open_torch_encoder
from notellm.bundle import Bundle
from notellm.categories import default_categories
from notellm.encoder import EncodedNote, NoteEncoder
from notellm.errors import NoteLLMError
from notellm.messages import Note
from notellm.prompt import PromptLimits, load_template
from tests.export.tiny import CATEGORIES, HIDDEN, Tiny
from training.checkpoint_folder import BASE, PROJECTION, Description, PromptChoice, write_checkpoint

NOTES = [
    Note(note_id="n0", title="Two days in Kyoto", content="Rent a bike.", hashtags=["kyoto"]),
    Note(note_id="n1", content="short"),
    Note(note_id="n2", title="旧书店", content="在城南的小巷里找到一家开了四十年的旧书店。" * 5, hashtags=["书店"]),
    Note(note_id="n3", hashtags=["only", "hashtags"]),
    Note(note_id="n4", title="long", content="every staircase feels like an insult. " * 40),
    Note(note_id="n5"),
]


@pytest.fixture(scope="module")
def in_torch(either: Tiny) -> Iterator[NoteEncoder]:
    with open_torch_encoder(str(either.checkpoint)) as encoder:
        yield encoder


@pytest.fixture(scope="module")
def exported(either: Tiny) -> NoteEncoder:
    """The bundle, read with the prompt and categories of an export without options: its graph knows of neither."""
    loaded = NoteEncoder.load(either.bundle, "cpu", threads=1)
    manifest = msgspec.structs.replace(
        loaded.bundle.manifest,
        template=load_template("en"),
        categories=default_categories(),
        prompt_limits=PromptLimits(),
    )
    return NoteEncoder(Bundle(either.bundle, manifest), loaded._graph, token_budget=2048, max_rows=16)


def assert_same(found: list[EncodedNote], wanted: list[EncodedNote]) -> None:
    embeddings, others = (np.stack([note.embedding for note in notes]) for notes in (found, wanted))
    np.testing.assert_allclose(embeddings, others, atol=1e-5)
    assert [note.tags for note in found] == [note.tags for note in wanted]


def test_reads_the_same_prompts(in_torch: NoteEncoder, exported: NoteEncoder) -> None:
    assert in_torch.build_prompts(NOTES) == exported.build_prompts(NOTES)
    for name in ("categories", "template", "prompt_limits", "tag_limits", "token_ids", "embedding_dim", "projection"):
        assert getattr(in_torch.bundle.manifest, name) == getattr(exported.bundle.manifest, name)


def test_a_batch_has_the_same_embeddings_hashtags_and_categories(in_torch: NoteEncoder, exported: NoteEncoder) -> None:
    found = in_torch.encode(NOTES)
    assert_same(found, exported.encode(NOTES))
    # Equal for a reason: the model has something to say, and not the same of all notes. (The untied one ends its answer
    # before it has written a hashtag.)
    if in_torch.bundle.manifest.projection == "identity":
        assert any(note.tags and note.tags.hashtags for note in found)
    assert len({note.tags.category for note in found if note.tags}) > 1
    assert len({note.embedding.round(3).tobytes() for note in found}) == len(NOTES)


def test_each_note_alone_has_them_too(in_torch: NoteEncoder, exported: NoteEncoder) -> None:
    together = exported.encode(NOTES)
    for note, wanted in zip(NOTES, together, strict=True):
        assert_same(in_torch.encode([note]), [wanted])


def test_embeddings_alone_are_the_same(in_torch: NoteEncoder, exported: NoteEncoder) -> None:
    found = in_torch.encode(NOTES, embed_only=True)
    assert_same(found, exported.encode(NOTES, embed_only=True))
    assert {note.tags for note in found} == {None}


def test_small_batches_are_the_same(either: Tiny, exported: NoteEncoder) -> None:
    with open_torch_encoder(str(either.checkpoint), token_budget=200, max_rows=2) as encoder:
        assert max(len(batch.indices) for batch in encoder.stream(encoder.build_prompts(NOTES))) == 2
        assert_same(encoder.encode(NOTES), exported.encode(NOTES))


def test_another_projection_is_another_encoder(untied: Tiny, tmp_path: Path) -> None:
    folder = shutil.copytree(untied.checkpoint, tmp_path / "changed")
    tensors = load_file(folder / PROJECTION)
    save_file({**tensors, "weight": tensors["weight"].flip(0).contiguous()}, folder / PROJECTION)
    with open_torch_encoder(str(untied.checkpoint)) as one, open_torch_encoder(str(folder)) as other:
        assert not np.allclose(one.encode(NOTES[:1])[0].embedding, other.encode(NOTES[:1])[0].embedding, atol=1e-2)


def test_notes_are_read_as_the_checkpoint_was_trained(tied: Tiny, tmp_path: Path) -> None:
    prompt = PromptChoice(template=load_template("zh"), limits=PromptLimits(note=64, title=16), categories=CATEGORIES)
    description = Description(format_version=1, base=f"./{BASE}", embedding_dim=8, adapter=False, prompt=prompt)
    base = AutoModelForCausalLM.from_pretrained(tied.checkpoint)
    tokenizer = AutoTokenizer.from_pretrained(tied.checkpoint)
    write_checkpoint(tmp_path / "mine", description, base, nn.Linear(HIDDEN, 8, bias=False), tokenizer)
    with open_torch_encoder(str(tmp_path / "mine")) as encoder:
        manifest = encoder.bundle.manifest
        assert (manifest.template, manifest.prompt_limits) == (prompt.template, prompt.limits)
        found = encoder.encode(NOTES)
        assert {note.tags.category for note in found if note.tags} <= set(CATEGORIES)
        assert found[0].embedding.shape == (8,)


def test_a_checkpoint_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(NoteLLMError) as caught, open_torch_encoder(str(tmp_path / "absent")):
        pass
    assert "\n" not in str(caught.value)


def test_nothing_is_left_behind(tied: Tiny) -> None:
    with open_torch_encoder(str(tied.checkpoint)) as encoder:
        folder = encoder.bundle.path
        assert folder.is_dir()
    assert not folder.exists()
