"""A NoteLLM checkpoint: a folder with what training changed, and the name of the base that it changed.

::

    notellm_checkpoint.json      Description: the base, the embedding's size, what made it
    adapter_config.json          a peft LoRA adapter on the base to which [EMB] was added
    adapter_model.safetensors    its matrices, and the trained row of [EMB] (trainable_token_indices)
    projection.safetensors       weight [D, hidden], bias [D] optional
    tokenizer.json and so on     optional; else the base's own
    base/                        after full fine-tuning, instead of the adapter: the whole base

Training writes one with :func:`write_checkpoint`; export and evaluation open it with :func:`read_description` and
:func:`apply_checkpoint`. It may come from anywhere: nothing in it is executed, and every field is checked.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgspec
import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from notellm.bundle import hash_file
from notellm.prompt import PromptLimits, Template
from training.errors import CheckpointError
from training.model import NoteLLM, add_emb_token

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

__all__ = [
    "BASE",
    "DESCRIPTION",
    "PROJECTION",
    "Description",
    "PromptChoice",
    "apply_checkpoint",
    "begin_from",
    "checkpoint_id",
    "is_checkpoint",
    "load_projection",
    "read_description",
    "write_checkpoint",
]

FORMAT_VERSION: Final = 1
DESCRIPTION: Final = "notellm_checkpoint.json"
PROJECTION: Final = "projection.safetensors"
BASE: Final = "base"
_ADAPTER_CONFIG = "adapter_config.json"
_ADAPTER = "adapter_model.safetensors"

# What of a LoRA may be chosen. Anything else must stand at peft's default, or the merge would not be what was trained.
_CHOICES = {
    "r",
    "lora_alpha",
    "lora_dropout",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "rank_pattern",
    "alpha_pattern",
    "use_rslora",
    "use_dora",
    "trainable_token_indices",
}
# What says where an adapter comes from, or how it began; it decides nothing once the adapter is trained.
_ORIGIN = {
    "base_model_name_or_path",
    "revision",
    "task_type",
    "inference_mode",
    "peft_type",
    "peft_version",
    "init_lora_weights",
    "auto_mapping",
}


class PromptChoice(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How notes were read in training: export and evaluation read them in the same way."""

    template: Template
    limits: PromptLimits
    categories: list[str]


class Description(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``notellm_checkpoint.json``.

    ``base``: ``smollm2``, a Hugging Face id, or a directory (one that begins with a dot is meant from the checkpoint's
    own folder). ``base_revision`` is the commit of a Hugging Face id. Without ``adapter``, that base is the trained
    one. ``made_with`` and ``training`` say what made it, for people: versions of packages, settings and results.
    """

    format_version: int
    base: str
    embedding_dim: int
    base_revision: str | None = None
    adapter: bool = True
    prompt: PromptChoice | None = None
    made_with: dict[str, str] = {}
    training: dict[str, Any] = {}


def is_checkpoint(folder: Path) -> bool:
    return (folder / DESCRIPTION).is_file()


def read_description(folder: Path) -> Description:
    """Raises :class:`CheckpointError` that names the field."""
    try:
        raw = (folder / DESCRIPTION).read_bytes()
    except OSError as error:
        raise CheckpointError(f"checkpoint {folder}: cannot read {DESCRIPTION}: {error.strerror}") from None
    try:
        version = msgspec.json.decode(raw, type=dict).get("format_version")
        if version != FORMAT_VERSION:
            raise CheckpointError(
                f"checkpoint {folder}: format_version is {version!r}, this program reads {FORMAT_VERSION}"
            )
        description = msgspec.json.decode(raw, type=Description)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise CheckpointError(f"checkpoint {folder}: {DESCRIPTION} is wrong: {error}") from None
    if not description.base.strip():
        raise CheckpointError(f"checkpoint {folder}: base is {description.base!r}; name the model that was trained")
    return description


def apply_checkpoint(
    folder: Path, description: Description, base: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> NoteLLM:
    """``base`` with ``[EMB]``, the merged adapter and the projection; in place, and tied if it was.

    Raises :class:`CheckpointError` for whatever is missing, or does not fit the base.
    """
    emb = add_emb_token(base, tokenizer)
    rows = base.get_input_embeddings().num_embeddings
    merged = _merge(folder, base, _adapter_config(folder, rows)) if description.adapter else base
    projection = load_projection(folder, merged.config.get_text_config().hidden_size)
    if projection is None:
        raise CheckpointError(f"checkpoint {folder}: holds no {PROJECTION}")
    if projection.out_features != description.embedding_dim:
        raise CheckpointError(
            f"checkpoint {folder}: embedding_dim is {description.embedding_dim}, "
            f"{PROJECTION} makes {projection.out_features}"
        )
    if emb >= merged.get_input_embeddings().num_embeddings:
        raise CheckpointError(f"checkpoint {folder}: merging lost the row of [EMB]")
    return NoteLLM(merged, projection)


def write_checkpoint(
    folder: Path,
    description: Description,
    model: PeftModel | PreTrainedModel,
    projection: nn.Linear,
    tokenizer: PreTrainedTokenizerFast | None = None,
) -> None:
    """Whole or not at all: a folder is a checkpoint as soon as it has its description, which comes last.

    ``model`` is the adapted base, not merged, or a base that was trained as a whole. All else in ``folder`` stays.
    """
    partial = folder / ".partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    if isinstance(model, PeftModel):
        # Not the table of tokens, which peft would add as [EMB] changed its size: the trained row is in the adapter.
        model.save_pretrained(str(partial), save_embedding_layers=False)
        # peft names the folder that the base was loaded from: a path of this machine.
        config = json.loads((partial / _ADAPTER_CONFIG).read_bytes())
        named = {**config, "base_model_name_or_path": description.base}
        (partial / _ADAPTER_CONFIG).write_text(json.dumps(named, indent=2) + "\n", "utf-8")
        # A card of peft's with nothing filled in.
        (partial / "README.md").unlink(missing_ok=True)
    else:
        model.save_pretrained(str(partial / BASE))
        assert tokenizer is not None
        tokenizer.save_pretrained(str(partial / BASE))
    tensors = {name: tensor.detach().float().contiguous() for name, tensor in projection.state_dict().items()}
    save_file(tensors, partial / PROJECTION)
    if tokenizer is not None:
        tokenizer.save_pretrained(str(partial))
    (folder / DESCRIPTION).unlink(missing_ok=True)
    for part in partial.iterdir():
        if part.is_dir():
            shutil.rmtree(folder / part.name, ignore_errors=True)
        else:
            # safetensors writes files that nobody but the writer may read; a bundle is made by another user, maybe.
            part.chmod(0o644)
        part.replace(folder / part.name)
    partial.rmdir()
    written = folder / f".{DESCRIPTION}"
    written.write_bytes(msgspec.json.format(msgspec.json.encode(description), indent=2) + b"\n")
    written.rename(folder / DESCRIPTION)


def checkpoint_id(folder: Path) -> str:
    """Of what was learnt: sha256 of the adapter, or of all weights, and of the projection.

    Raises :class:`CheckpointError`.
    """
    adapted = read_description(folder).adapter
    weights = [folder / _ADAPTER] if adapted else sorted((folder / BASE).glob("*.safetensors"))
    try:
        return " ".join(hash_file(file) for file in (*weights, folder / PROJECTION))
    except OSError as error:
        raise CheckpointError(f"checkpoint {folder}: cannot be read: {error.strerror}") from None


def begin_from(folder: Path, adapted: PeftModel | None, projection: nn.Linear) -> None:
    """Put what a checkpoint has learnt into an adapter and a projection that are to be trained further, in place.

    ``adapted`` is None where all weights were trained: those are the base. Raises :class:`CheckpointError` for another
    adapter (rank, modules, base) or another size of the embedding.
    """
    found = load_projection(folder, projection.in_features)
    if found is None or found.weight.shape != projection.weight.shape:
        size = "none" if found is None else found.out_features
        raise CheckpointError(
            f"checkpoint {folder}: its projection makes {size} dimensions, training.embedding_dim is "
            f"{projection.out_features}"
        )
    if adapted is not None:
        _fill(adapted, _tensors(folder, _ADAPTER))
    with torch.no_grad():
        projection.weight.copy_(found.weight)
        projection.bias.copy_(found.bias if found.bias is not None else torch.zeros_like(projection.bias))


def load_projection(folder: Path, hidden: int) -> nn.Linear | None:
    """``projection.safetensors`` of a folder; None where there is none. Raises :class:`CheckpointError`."""
    if not (folder / PROJECTION).is_file():
        return None
    tensors = _tensors(folder, PROJECTION)
    found = {name: list(tensor.shape) for name, tensor in tensors.items()}
    size = found.get("weight", [0])[0]
    allowed = {"weight": [size, hidden], "bias": [size]}
    if size < 1 or any(allowed.get(name) != shape for name, shape in found.items()):
        raise CheckpointError(f"{PROJECTION}: holds {json.dumps(found)}; allowed are weight [D, {hidden}] and bias [D]")
    projection = nn.Linear(hidden, size, bias="bias" in tensors)
    projection.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    return projection


def _tensors(folder: Path, name: str) -> dict[str, Tensor]:
    if not (folder / name).is_file():
        raise CheckpointError(f"checkpoint {folder}: holds no {name}")
    try:
        tensors = load_file(folder / name)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{name}: cannot be read: {error}") from None
    for key, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise CheckpointError(f"{name}: {key} holds numbers that are not finite")
    return tensors


def _adapter_config(folder: Path, rows: int) -> LoraConfig:
    """The LoRA that the folder describes, made here from the fields that may be chosen."""
    try:
        given = json.loads((folder / _ADAPTER_CONFIG).read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"checkpoint {folder}: holds no {_ADAPTER_CONFIG}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{_ADAPTER_CONFIG}: cannot be read: {error}") from None
    if not isinstance(given, dict) or given.get("peft_type") != "LORA":
        kind = given.get("peft_type") if isinstance(given, dict) else given
        raise CheckpointError(f"{_ADAPTER_CONFIG}: peft_type is {kind!r}; allowed is 'LORA'")
    usual: dict[str, object] = dataclasses.asdict(LoraConfig())
    for name, value in given.items():
        if name not in _CHOICES | _ORIGIN and value and value != usual.get(name):
            raise CheckpointError(
                f"{_ADAPTER_CONFIG}: {name} is {value!r}; this program merges LoRA with {name} {usual.get(name)!r}"
            )
    for token_id in _token_ids(given.get("trainable_token_indices")):
        if not (isinstance(token_id, int) and 0 <= token_id < rows):
            raise CheckpointError(
                f"{_ADAPTER_CONFIG}: trainable_token_indices holds {token_id!r}; the base has ids 0 to {rows - 1}"
            )
    if not isinstance(given.get("r"), int) or given["r"] < 1:
        raise CheckpointError(f"{_ADAPTER_CONFIG}: r is {given.get('r')!r}; allowed are whole numbers from 1")
    try:
        return LoraConfig(**{name: given[name] for name in _CHOICES & given.keys()})
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{_ADAPTER_CONFIG}: is no LoRA: {_first_line(error)}") from None


def _token_ids(indices: object) -> list[object]:
    if isinstance(indices, dict):
        return [token_id for ids in indices.values() for token_id in (ids if isinstance(ids, list) else [ids])]
    return list(indices) if isinstance(indices, list) else []


def _merge(folder: Path, base: PreTrainedModel, config: LoraConfig) -> PreTrainedModel:
    tensors = _tensors(folder, _ADAPTER)
    try:
        with warnings.catch_warnings():
            # peft asks transformers for something by its old name: nothing that our users could do about.
            warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
            adapted = get_peft_model(base, config)
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{_ADAPTER}: does not fit the base: {_first_line(error)}") from None
    _fill(adapted, tensors)
    merged: PreTrainedModel = adapted.merge_and_unload(safe_merge=True)
    return merged


def _fill(adapted: PeftModel, tensors: dict[str, Tensor]) -> None:
    """Raises :class:`CheckpointError` for a tensor that is missing, not of this adapter, or of another shape."""
    try:
        loaded: Any = set_peft_model_state_dict(adapted, tensors)
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{_ADAPTER}: does not fit the base: {_first_line(error)}") from None
    # What an adapter lacks would be left as peft initialises it, and merge without a word. A row of a tied table is
    # there under both names, and saved under one.
    parts = {name: part for name, part in adapted.state_dict().items() if "lora_" in name or "trainable_tokens" in name}
    there = {part.data_ptr() for name, part in parts.items() if name not in loaded.missing_keys}
    absent = [name for name, part in parts.items() if part.data_ptr() not in there]
    if wrong := [*loaded.unexpected_keys, *absent]:
        verdict = "is not of this adapter" if loaded.unexpected_keys else "is missing"
        raise CheckpointError(f"{_ADAPTER}: {wrong[0]} {verdict} ({len(wrong)} such tensors)")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
