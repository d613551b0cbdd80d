"""What the tests of the package share: a small real tokenizer, and hypothesis without a clock."""

from __future__ import annotations

import pytest
from hypothesis import settings
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from notellm.prompt import TokenIds

# A machine that does other work as well is no reason to fail.
settings.register_profile("notellm", deadline=None)
settings.load_profile("notellm")

SPECIAL = ["<|im_start|>", "<|im_end|>", "[EMB]"]
_SENTENCES = [
    "Extract the note information in json format, compress it into one word for recommendation.",
    'The note: {"title":"Tea in Kyoto","hashtags":"kyoto, tea","content":"Quiet gardens and a bowl of matcha."}',
    'The compression word is:". The hashtags are: kyoto, tea. The category is: travel',
    "提取json格式的笔记信息，将其压缩成一个词用于推荐，并生成笔记的话题标签和类别。",
]


@pytest.fixture(scope="session")
def tokenizer_json() -> str:
    """A byte-level BPE tokenizer with special tokens, as those of the models are, but trained in a moment."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_SENTENCES * 4, trainer)
    return str(tokenizer.to_str())


@pytest.fixture(scope="session")
def tokenizer(tokenizer_json: str) -> Tokenizer:
    return Tokenizer.from_str(tokenizer_json)


@pytest.fixture(scope="session")
def token_ids(tokenizer: Tokenizer) -> TokenIds:
    start, end, emb = (tokenizer.token_to_id(text) for text in SPECIAL)
    return TokenIds(emb=emb, bos=start, eos=[end], special=[start, end, emb])
