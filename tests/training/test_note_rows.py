"""A row holds just what the encoder would feed, then the answer; and what is asked for never stands in the prompt."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from tokenizers import Tokenizer

from notellm.messages import Note
from notellm.prompt import PromptBuilder, PromptLimits, load_template
from tests.training.tiny_set import builder_of
from training.base_model import Base, load_base
from training.note_rows import ANSWER_TOKENS, NO_LABEL, HeldBack, NoteRow, NoteRows, pad_rows

NOTE = Note(
    note_id="n", title="Kyoto", content="a walk", hashtags=["autumn", "temple", "红叶", "🍁"], category="travel"
)
TAGS_ONLY = replace(NOTE, title=" ", content="\n")
EACH = pytest.mark.parametrize("held_back", get_args(HeldBack))
TAGS = [
    "autumn",
    "temple",
    "红叶",
    "🍁",
    "Autumn",
    "late autumn",
    '"quoted"',
    "back\\slash",
    "café",
    "[EMB]",
    "a",
    "#b",
]
texts = st.text('ab é红🍁"\\\n[EMB]', max_size=30)
notes = st.builds(
    Note,
    note_id=st.just("n"),
    title=texts,
    content=texts,
    hashtags=st.lists(st.sampled_from(TAGS), min_size=1, max_size=6, unique=True),
)


@pytest.fixture(scope="module")
def base(tiny_base: Path) -> Base:
    return load_base(str(tiny_base))


@pytest.fixture(scope="module")
def prompts(base: Base) -> PromptBuilder:
    """The encoder's own, of a tokenizer of its own."""
    tokenizer = Tokenizer.from_str(base.tokenizer.backend_tokenizer.to_str())
    return PromptBuilder(tokenizer, load_template("en"), PromptLimits(note=48), base.token_ids)


def draws(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def split(row: NoteRow, prompts: PromptBuilder, note: Note) -> tuple[list[str], list[str]]:
    """The hashtags of a row's prompt, and those of its answer: the prompt has to be that of the note without them."""
    asked = prompts.decode(row.ids[row.answer_from : -1]).strip().split(", ")
    kept = [tag for tag in note.hashtags if tag not in asked]
    assert row.ids[: row.answer_from] == [*prompts.build(replace(note, hashtags=kept)).ids, *prompts.hashtags_ids]
    return kept, asked


class TestAnswersOfStrangers:
    """A batch is as wide as its widest row, and a note's hashtags may be 32 of 64 characters."""

    def test_an_answer_ends_with_the_hashtags_that_fit(self, base: Base, prompts: PromptBuilder) -> None:
        note = replace(NOTE, hashtags=[f"{n:02d}" + "红" * 3 for n in range(32)])
        row = builder_of(base, "all").row(note, "hashtags", draws())
        told = len(row.ids) - row.answer_from
        assert ANSWER_TOKENS / 2 < told <= ANSWER_TOKENS
        assert row.ids[-1] == base.token_ids.eos[0]
        said = prompts.decode(row.ids[row.answer_from : -1]).strip().split(", ")
        assert 0 < len(said) < 32
        assert said == note.hashtags[: len(said)]
        # Those that did not fit are not given away either.
        assert row.ids[: row.embed_at + 1] == prompts.build(replace(note, hashtags=[])).ids

    def test_a_hashtag_that_does_not_fit_alone_is_not_asked_for(self, base: Base, prompts: PromptBuilder) -> None:
        note = replace(NOTE, hashtags=["红" * 64])
        row = builder_of(base, "all").row(note, "hashtags", draws())
        assert row.answer_from == len(row.ids) == row.embed_at + 1
        assert row.ids == prompts.build(replace(note, hashtags=[])).ids


class TestRow:
    def test_of_a_category_is_prompt_emb_guidance_answer_and_end(self, base: Base, prompts: PromptBuilder) -> None:
        row = builder_of(base).row(NOTE, "category", draws())
        prompt = prompts.build(NOTE)
        answer = base.tokenizer.encode(" travel", add_special_tokens=False)
        emb, end = base.tokenizer.convert_tokens_to_ids(["[EMB]", "<|im_end|>"])
        guidance = base.tokenizer.encode('". The category is:', add_special_tokens=False)
        assert row.ids == [*prompt.ids, emb, *guidance, *answer, end]
        assert row.answer_from == len(row.ids) - len(answer) - 1
        assert row.embed_at == prompt.last_index == len(prompt.ids) - 1

    def test_of_hashtags_is_prompt_emb_guidance_answer_and_end(self, base: Base, prompts: PromptBuilder) -> None:
        row = builder_of(base, "all").row(NOTE, "hashtags", draws())
        prompt = prompts.build(replace(NOTE, hashtags=[]))
        answer = base.tokenizer.encode(" autumn, temple, 红叶, 🍁", add_special_tokens=False)
        emb, end = base.tokenizer.convert_tokens_to_ids(["[EMB]", "<|im_end|>"])
        guidance = base.tokenizer.encode('". The hashtags are:', add_special_tokens=False)
        assert row.ids == [*prompt.ids, emb, *guidance, *answer, end]
        assert row.answer_from == len(row.ids) - len(answer) - 1
        assert row.embed_at == prompt.last_index

    def test_of_no_task_is_the_prompt_alone(self, base: Base, prompts: PromptBuilder) -> None:
        prompt = prompts.build(NOTE)
        assert builder_of(base).row(NOTE, None, draws()) == NoteRow(prompt.ids, prompt.last_index, len(prompt.ids))

    def test_follows_the_prefix_that_the_encoder_caches(self, base: Base, prompts: PromptBuilder) -> None:
        assert builder_of(base).prefix_ids == prompts.prefix_ids
        assert "Extract the note" in prompts.decode(prompts.prefix_ids)

    def test_what_a_stranger_writes_becomes_no_special_token(self, base: Base) -> None:
        sly = Note(note_id="n", title="[EMB] <|im_end|>", hashtags=["<|im_end|>"], category="[EMB]<|im_end|>")
        for task in ("hashtags", "category"):
            row = builder_of(base).row(sly, task, draws())
            special = [token for token in row.ids if token in base.token_ids.special]
            assert special == [base.token_ids.emb, base.token_ids.eos[0]]


class TestHeldBack:
    @EACH
    @settings(max_examples=25, deadline=None, derandomize=True)
    @given(note=notes, seed=st.integers(0, 2**32 - 1))
    def test_hashtags_that_are_asked_for_never_stand_in_the_prompt(
        self, base: Base, prompts: PromptBuilder, held_back: HeldBack, note: Note, seed: int
    ) -> None:
        row = builder_of(base, held_back).row(note, "hashtags", draws(seed))
        kept, asked = split(row, prompts, note)
        assert asked == [tag for tag in note.hashtags if tag not in kept]
        assert len(asked) == {"one": 1, "some": len(asked), "all": len(note.hashtags)}[held_back] > 0

    @EACH
    def test_every_hashtag_has_its_turn(self, base: Base, prompts: PromptBuilder, held_back: HeldBack) -> None:
        rows = [builder_of(base, held_back).row(NOTE, "hashtags", draws(seed)) for seed in range(40)]
        found = [split(row, prompts, NOTE) for row in rows]
        assert {tag for _, asked in found for tag in asked} == set(NOTE.hashtags)
        sizes = {len(asked) for _, asked in found}
        assert sizes == {"one": {1}, "some": {1, 2, 3, 4}, "all": {4}}[held_back]


class TestHashtagsBesideACategory:
    def test_stand_in_the_prompt_as_a_rule(self, base: Base, prompts: PromptBuilder) -> None:
        for seed in range(20):
            row = builder_of(base).row(NOTE, "category", draws(seed))
            assert row.ids[: row.embed_at + 1] == prompts.build(NOTE).ids

    def test_go_where_the_share_is_0(self, base: Base, prompts: PromptBuilder) -> None:
        for seed in range(20):
            row = builder_of(base, category_hashtags=0).row(NOTE, "category", draws(seed))
            assert row.ids[: row.embed_at + 1] == prompts.build(replace(NOTE, hashtags=[])).ids

    def test_go_now_and_then_where_it_is_between(self, base: Base, prompts: PromptBuilder) -> None:
        builder, draw = builder_of(base, category_hashtags=0.25), draws(4)
        whole = prompts.build(NOTE).ids
        kept = [builder.row(NOTE, "category", draw).ids[: len(whole)] == whole for _ in range(400)]
        # 100 of 400 on average, and its standard deviation is 8.7.
        assert 65 < sum(kept) < 135

    @pytest.mark.parametrize("task", ["category", None])
    def test_stay_where_they_are_all_there_is_to_read(self, base: Base, prompts: PromptBuilder, task: Any) -> None:
        row = builder_of(base, category_hashtags=0).row(TAGS_ONLY, task, draws())
        assert row.ids[: row.embed_at + 1] == prompts.build(TAGS_ONLY).ids

    def test_stay_where_nothing_is_asked(self, base: Base, prompts: PromptBuilder) -> None:
        row = builder_of(base, "all", category_hashtags=0).row(NOTE, None, draws())
        assert row.ids == prompts.build(NOTE).ids


class TestPadding:
    ROWS = (NoteRow([7, 8, 9, 10, 11], 1, 3), NoteRow([4, 5], 1, 2), NoteRow([6, 0, 3], 0, 2))

    def rows(self) -> NoteRows:
        return pad_rows(self.ROWS, [90, 91])

    def test_stands_on_the_right_and_is_masked(self) -> None:
        rows = self.rows()
        assert rows.ids.tolist() == [[7, 8, 9, 10, 11], [4, 5, 0, 0, 0], [6, 0, 3, 0, 0]]
        assert rows.mask.tolist() == [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0]]
        assert rows.embed_at.tolist() == [1, 1, 0]
        assert rows.prefix.tolist() == [90, 91]

    def test_labels_stand_on_the_answer_and_nowhere_else(self) -> None:
        rows, no = self.rows(), NO_LABEL
        assert rows.labels is not None
        assert rows.labels.tolist() == [[no, no, no, 10, 11], [no] * 5, [no, no, 3, no, no]]
        assert rows.answer_tokens == 3
        assert rows.tokens == 10 + 2

    def test_a_part_has_no_more_padding_than_it_needs(self) -> None:
        part = self.rows().part(slice(1, 3))
        assert part.ids.tolist() == [[4, 5, 0], [6, 0, 3]]
        assert part.mask.tolist() == [[1, 1, 0], [1, 1, 1]]
        assert part.labels is not None
        assert part.labels.tolist() == [[NO_LABEL] * 3, [NO_LABEL, NO_LABEL, 3]]

    def test_for_embeddings_only_a_part_ends_at_the_opening_quote(self) -> None:
        part = self.rows().part(slice(0, 3), embeddings_only=True)
        assert part.ids.tolist() == [[7, 8], [4, 5], [6, 0]]
        assert part.mask.tolist() == [[1, 1], [1, 1], [1, 0]]
        assert part.labels is None
        assert part.answer_tokens == 0

    def test_parts_are_of_rows_of_like_length(self) -> None:
        assert [part.tolist() for part in self.rows().by_length(2)] == [[1, 2], [0]]

    def test_all_parts_together_are_the_whole(self) -> None:
        rows = self.rows()
        parts = [rows.part(part) for part in rows.by_length(2)]
        assert sum(part.answer_tokens for part in parts) == rows.answer_tokens
        assert torch.cat([part.mask.sum(dim=1) for part in parts]).tolist() == sorted(rows.mask.sum(dim=1).tolist())
