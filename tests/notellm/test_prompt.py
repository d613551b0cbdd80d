"""The prompt: whatever the note, the suffix survives, the cost is bounded, and no user text is a special token."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from notellm.errors import SettingsError
from notellm.messages import Note
from notellm.prompt import Prompt, PromptBuilder, PromptLimits, TokenIds, load_template, template_names
from tests.notellm.conftest import SPECIAL

MEGABYTE = 1_000_000
LIMITS = PromptLimits()


class CountingTokenizer:
    """A tokenizer that notes how many characters reach it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.characters = 0

    def encode(self, text: str, **options: Any) -> Any:
        self.characters += len(text)
        return self._tokenizer.encode(text, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)


@pytest.fixture(scope="session", params=["en", "zh"])
def builder(request: pytest.FixtureRequest, tokenizer_json: str, token_ids: TokenIds) -> PromptBuilder:
    return PromptBuilder(Tokenizer.from_str(tokenizer_json), load_template(request.param), LIMITS, token_ids)


def note(title: str = "", content: str = "", hashtags: list[str] | None = None) -> Note:
    return Note(note_id="n1", title=title, content=content, hashtags=hashtags or [])


def check(builder: PromptBuilder, given_note: Note) -> Prompt:
    """What holds for every prompt."""
    prompt = builder.build(given_note)
    suffix = builder.compression_ids
    assert prompt.ids[-len(suffix) :] == suffix
    assert prompt.last_index == len(prompt.ids) - 1
    assert len(suffix) < len(prompt.ids) <= builder.max_ids
    # The ids say the text, to the last byte.
    assert builder.decode(prompt.ids) == prompt.text + builder.decode(suffix)
    # The text is JSON: what was cut, was cut between characters, never inside an escape.
    written = json.loads(prompt.text)
    for name, whole in (
        ("title", given_note.title),
        ("hashtags", ", ".join(given_note.hashtags)),
        ("content", given_note.content),
    ):
        assert whole.strip().startswith(written.get(name, ""))
    return prompt


# Pieces of special tokens, escapes, characters of one to four bytes: what may go wrong, often and side by side.
_PIECES = ["<|im_start|>", "<|im_end|>", "[EMB]", "[", "EMB", "]", "<|", "im_", "start|>", '"', "\\", "\n", "\0", "}"]
_pieces = st.sampled_from([*_PIECES, " ", "tea", "é", "笔", "😀"]) | st.text(max_size=5)
_texts = st.builds(lambda pieces, times: "".join(pieces) * times, st.lists(_pieces, max_size=8), st.integers(1, 60))
_notes = st.builds(note, title=_texts, content=_texts, hashtags=st.lists(_texts, max_size=8)).filter(
    lambda made: any(text.strip() for text in (made.title, made.content, *made.hashtags))
)


@given(given_note=_notes)
def test_suffix_survives_any_note(builder: PromptBuilder, given_note: Note) -> None:
    check(builder, given_note)


@given(piece=_pieces.filter(bool))
def test_suffix_survives_a_megabyte(builder: PromptBuilder, piece: str) -> None:
    huge = (piece * MEGABYTE)[:MEGABYTE]
    check(builder, note(huge, huge, [huge, huge]))


@given(given_note=_notes)
def test_no_user_text_is_a_special_token(builder: PromptBuilder, token_ids: TokenIds, given_note: Note) -> None:
    assert not set(builder.build(given_note).ids) & set(token_ids.special)


@pytest.mark.parametrize("special", SPECIAL)
def test_special_token_in_a_note_is_plain_text(builder: PromptBuilder, tokenizer: Tokenizer, special: str) -> None:
    # The same tokenizer, without the builder's care, does make it one token.
    assert len(tokenizer.encode(special).ids) == 1
    prompt = builder.build(note(f"a{special}b", special, [special]))
    assert prompt.text == f'{{"title":"a{special}b","hashtags":"{special}","content":"{special}"}}'
    assert tokenizer.token_to_id(special) not in prompt.ids
    assert prompt.text in builder.decode(prompt.ids)


def test_special_token_in_pieces_across_fields_is_plain_text(builder: PromptBuilder, token_ids: TokenIds) -> None:
    prompt = builder.build(note("tea <|im_", "start|> [", ["[E", "MB]"]))
    assert not set(prompt.ids) & set(token_ids.special)


@given(piece=_pieces.filter(bool), size=st.integers(1, MEGABYTE), lead=st.integers(0, 2000))
def test_tokenizer_reads_no_more_of_a_long_note(tokenizer_json: str, piece: str, size: int, lead: int) -> None:
    counting = CountingTokenizer(Tokenizer.from_str(tokenizer_json))
    ids = TokenIds(emb=2, bos=0, eos=[1], special=[0, 1, 2])
    counting_builder = PromptBuilder(counting, load_template("en"), LIMITS, ids)  # type: ignore[arg-type]
    counting.characters = 0
    text = " " * lead + (piece * size)[:size]
    counting_builder.build(note(text, text, [text]))
    # As JSON a character has at most six, and what is kept is read once more.
    bound = 2 * 6 * LIMITS.characters(LIMITS.title + LIMITS.hashtags + LIMITS.note)
    assert counting.characters <= bound


@given(beginning=_texts, one=_texts, other=_texts)
def test_equal_text_means_equal_ids_and_hash(builder: PromptBuilder, beginning: str, one: str, other: str) -> None:
    first, second = (builder.build(note(beginning, beginning + tail)) for tail in (one, other))
    assert (first.text == second.text) == (first.text_hash == second.text_hash)
    if first.text == second.text:
        assert first.ids == second.ids


def test_what_lies_beyond_the_budget_changes_nothing(builder: PromptBuilder) -> None:
    beginning = "Quiet gardens and a bowl of matcha. " * 200
    assert builder.build(note("Tea", beginning + "one")) == builder.build(note("Tea", beginning + "two"))


def test_another_text_has_another_hash(builder: PromptBuilder) -> None:
    prompts = [builder.build(note("a")), builder.build(note("b")), builder.build(note("", "a"))]
    assert len({prompt.text_hash for prompt in prompts}) == 3


def test_short_note_is_read_whole(builder: PromptBuilder) -> None:
    prompt = builder.build(note('Tea "in" Kyoto', "A bowl\nof matcha.", ["kyoto", "tea"]))
    assert json.loads(prompt.text) == {
        "title": 'Tea "in" Kyoto',
        "hashtags": "kyoto, tea",
        "content": "A bowl\nof matcha.",
    }
    assert builder.decode(prompt.ids).startswith(prompt.text)
    assert prompt.author_hashtags == ["kyoto", "tea"]


def test_blank_fields_are_left_out(builder: PromptBuilder) -> None:
    assert builder.build(note(" ", "tea")).text == '{"content":"tea"}'


def test_text_behind_many_blanks_is_read(builder: PromptBuilder) -> None:
    assert builder.build(note("", " \n" * MEGABYTE + "tea")).text == '{"content":"tea"}'


def test_content_gets_what_title_and_hashtags_leave(builder: PromptBuilder) -> None:
    long = "Quiet gardens and a bowl of matcha. " * 50
    alone = json.loads(builder.build(note("", long)).text)
    beside = json.loads(builder.build(note(long, long, [long])).text)
    assert 0 < len(beside["content"]) < len(alone["content"])
    assert beside["title"]
    assert beside["hashtags"]


def test_prefix_and_guidances_stand_around_the_note(builder: PromptBuilder, token_ids: TokenIds) -> None:
    assert builder.prefix_ids[0] == token_ids.bos
    assert builder.hashtags_ids[0] == builder.category_ids[0] == token_ids.emb
    assert builder.decode(builder.compression_ids).endswith('"')


def test_templates_that_ship_load() -> None:
    assert template_names() == ["en", "zh"]
    assert [load_template(language).language for language in template_names()] == ["en", "zh"]


def test_unknown_template_says_which_there_are() -> None:
    with pytest.raises(SettingsError, match="'fr' is not known; allowed are en, zh"):
        load_template("fr")
