"""The Note Compression Prompt (arXiv 2403.01744, section 3.2), cut so that one prefill serves three answers.

::

    instruction | {"title":"...","hashtags":"...","content":"..."} | The compression word is:" | [EMB] ". The ...:
    '- prefix -' '- note, the only part that is ever cut -----------' '- compression suffix ---' '- a guidance each -'

Each part is tokenised by itself. So the prefix's KV cache is exact, no note can merge with or push out the suffix, and
the embedding is always read at the suffix's last token: the opening quote, the token before ``[EMB]``.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from importlib import resources

import msgspec
from tokenizers import Tokenizer

from notellm.errors import SettingsError
from notellm.messages import Note

__all__ = ["Prompt", "PromptBuilder", "PromptLimits", "Template", "TokenIds", "load_template", "template_names"]

# The longest beginning of a JSON string's inside that holds whole characters only, and no half of an escape.
_WHOLE_CHARACTERS = re.compile(r"(?:[^\\]|\\u[0-9a-fA-F]{4}|\\[^u])*")


class Template(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The fixed text around a note. Data, kept in the bundle: another language is another file."""

    language: str
    instruction: str
    compression: str
    hashtags: str
    category: str
    answer_prefix: str


class PromptLimits(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the prompt reads of a note, in tokens; ``content`` gets what title and hashtags leave of ``note``."""

    note: int = 128
    title: int = 48
    hashtags: int = 48
    characters_per_token: int = 8

    def characters(self, tokens: int) -> int:
        """How many characters may be handed to the tokenizer for a budget of ``tokens``, whatever the note's size."""
        return tokens * self.characters_per_token


class TokenIds(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Ids that prompt and decoder need. ``special`` holds every special id, ``eos`` those that end an answer."""

    emb: int
    bos: int | None
    eos: list[int]
    special: list[int]


class Prompt(msgspec.Struct, frozen=True):
    """One note, ready for the model: the exact text, its hash, and the ids that follow the cached prefix."""

    text: str
    text_hash: str
    ids: list[int]
    author_hashtags: list[str]

    @property
    def last_index(self) -> int:
        """Where the embedding is read: the opening quote of the compression word."""
        return len(self.ids) - 1


def template_names() -> list[str]:
    """Languages of the templates that ship."""
    folder = resources.files("notellm") / "templates"
    return sorted(entry.name.removesuffix(".json") for entry in folder.iterdir() if entry.name.endswith(".json"))


def load_template(language: str) -> Template:
    """One of the templates that ship, by language."""
    if language not in template_names():
        raise SettingsError(f"template: {language!r} is not known; allowed are {', '.join(template_names())}")
    return msgspec.json.decode(
        (resources.files("notellm") / "templates" / f"{language}.json").read_bytes(), type=Template
    )


class PromptBuilder:
    """Turns notes into :class:`Prompt`. Two notes with the same prompt text get the same ids, always."""

    def __init__(self, tokenizer: Tokenizer, template: Template, limits: PromptLimits, token_ids: TokenIds) -> None:
        # What a stranger wrote never becomes a special token: "[EMB]" in a note is five ordinary characters.
        tokenizer.encode_special_tokens = True
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self._limits = limits
        bos = [] if token_ids.bos is None else [token_ids.bos]
        self.prefix_ids = bos + self._encode(template.instruction)
        self.compression_ids = self._encode(template.compression)
        self.hashtags_ids = [token_ids.emb, *self._encode(template.hashtags)]
        self.category_ids = [token_ids.emb, *self._encode(template.category)]
        self._opening = {name: self._encode(f'{{"{name}":"') for name in ("title", "hashtags", "content")}
        self._following = {name: self._encode(f'","{name}":"') for name in ("title", "hashtags", "content")}
        self._closing = self._encode('"}')

    @property
    def max_ids(self) -> int:
        """No prompt has more ids than this."""
        keys = sum(max(len(self._opening[name]), len(ids)) for name, ids in self._following.items())
        return self._limits.note + keys + len(self._closing) + len(self.compression_ids)

    def build(self, note: Note) -> Prompt:
        """Raises nothing: every valid note has a prompt."""
        ids: list[int] = []
        text: list[str] = []
        left = self._limits.note
        parts = (
            ("title", note.title, self._limits.title),
            ("hashtags", ", ".join(note.hashtags), self._limits.hashtags),
            ("content", note.content, self._limits.note),
        )
        for name, value, budget in parts:
            piece, piece_ids = self._cut(value, min(budget, left))
            if not piece:
                continue
            text.append(f'{"," if text else "{"}"{name}":"{piece}"')
            ids += self._following[name] if ids else self._opening[name]
            ids += piece_ids
            left -= len(piece_ids)
        ids += self._closing
        whole = "".join(text) + "}"
        return Prompt(
            text=whole,
            text_hash=hashlib.sha256(whole.encode("utf-8")).hexdigest(),
            ids=ids + self.compression_ids,
            author_hashtags=list(note.hashtags),
        )

    def decode(self, ids: Sequence[int]) -> str:
        """Generated ids -> text."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))

    def encode_answer(self, text: str) -> list[int]:
        """Ids of an answer that follows a guidance."""
        return self._encode(text)

    def _encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def _cut(self, value: str, budget: int) -> tuple[str, list[int]]:
        """The longest beginning of ``value`` that fits ``budget`` tokens, as JSON text, and its ids.

        The ids are made again from the text that is kept: they depend on that text alone, so an equal text_hash means
        an equal vector.
        """
        value = value.strip()[: self._limits.characters(budget)].rstrip()
        if not value or budget <= 0:
            return "", []
        escaped = msgspec.json.encode(value).decode("utf-8")[1:-1]
        encoding = self._tokenizer.encode(escaped, add_special_tokens=False)
        if len(encoding.ids) <= budget:
            return escaped, list(encoding.ids)
        # Where one character takes several tokens, the budget may end inside it: then it goes as a whole.
        end = min(encoding.offsets[budget - 1][1], encoding.offsets[budget][0])
        whole = _WHOLE_CHARACTERS.match(escaped, 0, end)
        kept = whole.group() if whole else ""
        return kept, self._encode(kept)[:budget]
