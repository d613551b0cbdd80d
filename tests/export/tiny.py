"""Two tiny Llamas with random weights: what a real checkpoint has, in seconds and with no network."""

from __future__ import annotations

import contextlib
import functools
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from export.build import ExportPlan, build_bundle
from notellm.bundle import Manifest
from notellm.prompt import load_template
from training.checkpoint_folder import PROJECTION

CATEGORIES = ["art", "art history", "art history of Japan", "travel", "旅行", "café crème", "🍁"]
PROJECTION_DIM = 16
HIDDEN = 64

_TRAINING_TEXT = [
    'Extract the note information in json format, compress it: {"title":"a","hashtags":"b","content":"c"}',
    'The note. The compression word is:". The hashtags are: kyoto, autumn. The category is: travel, art history',
    "提取笔记的信息，将其压缩成一个词用于推荐，话题标签和类别。旅行",
] * 4


@dataclass(frozen=True)
class Tiny:
    """A checkpoint, and the bundle that the real export made of it."""

    checkpoint: Path
    bundle: Path
    manifest: Manifest


def save_tokenizer(folder: Path) -> int:
    """A byte-level BPE of about 400 tokens, with the special tokens of a chat model; returns its size."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TRAINING_TEXT, trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|im_start|>", eos_token="<|im_end|>", clean_up_tokenization_spaces=False
    ).save_pretrained(folder)
    return int(tokenizer.get_vocab_size())


def save_checkpoint(folder: Path, *, tied: bool) -> Path:
    """The tied one has no projection, the untied one has. The weights are the same at every call."""
    folder.mkdir(parents=True, exist_ok=True)
    config = LlamaConfig(
        vocab_size=save_tokenizer(folder),
        hidden_size=HIDDEN,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=tied,
        bos_token_id=0,
        eos_token_id=1,
        # Ten times the usual, or all hidden states are nearly equal.
        initializer_range=0.2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(7)
        LlamaForCausalLM(config).save_pretrained(folder)
        if not tied:
            tensors = {"weight": torch.randn(PROJECTION_DIM, HIDDEN), "bias": torch.randn(PROJECTION_DIM)}
            save_file(tensors, folder / PROJECTION)
    return folder


def plan(checkpoint: Path, out: Path, *, language: str = "en", replace: bool = False) -> ExportPlan:
    return ExportPlan(
        source=str(checkpoint), out=out, template=load_template(language), categories=CATEGORIES, replace=replace
    )


def run_export(plan: ExportPlan) -> Manifest:
    return build_bundle(plan, step=contextlib.nullcontext, say=lambda line: None)


@functools.cache
def tiny(session_folder: Path, *, tied: bool) -> Tiny:
    """Exported once per session, whichever folder's tests come first."""
    folder = session_folder / ("tied" if tied else "untied")
    checkpoint = save_checkpoint(folder / "tiny-llama", tied=tied)
    manifest = run_export(plan(checkpoint, folder / "bundle", language="en" if tied else "zh"))
    return Tiny(checkpoint, folder / "bundle", manifest)
