"""What of a base is trained: LoRA matrices and the row of ``[EMB]``, or everything; and the projection on top."""

from __future__ import annotations

import warnings

from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from notellm.settings import TrainingSettings
from training.base_model import Base
from training.errors import TrainingError
from training.model import NoteLLM

__all__ = ["adapt", "trainable_groups"]


def adapt(base: Base, settings: TrainingSettings) -> tuple[NoteLLM, PeftModel | None]:
    """The model to train, its projection still at random; and the adapter, where it is one that is trained.

    ``method`` is an adapter unless it is ``full``: what ``auto`` means, :mod:`training.method` has settled before.
    Raises :class:`TrainingError` where the base has no module that ``lora_targets`` names.
    """
    adapter = None if settings.method == "full" else _add_lora(base, settings)
    if adapter is None:
        base.model.requires_grad_(True)
    hidden = base.model.config.get_text_config().hidden_size
    if settings.embedding_dim > hidden:
        raise TrainingError(
            f"training.embedding_dim: {settings.embedding_dim} is not allowed: {base.name} has hidden size {hidden}, "
            "an embedding has at most as many dimensions"
        )
    model = NoteLLM(base.model, nn.Linear(hidden, settings.embedding_dim), temperature=settings.temperature)
    if not settings.contrastive:
        model.projection.requires_grad_(False)
        assert model.temperature is not None
        model.temperature.requires_grad_(False)
    if settings.gradient_checkpointing:
        base.model.activation_checkpointing_enable({"use_reentrant": False})
        # The first layer's input needs a gradient, or nothing behind it is computed again.
        base.model.enable_input_require_grads()
    return model, adapter


def trainable_groups(model: NoteLLM, settings: TrainingSettings) -> list[dict[str, object]]:
    """AdamW's groups: only matrices decay; projection and temperature have a learning rate of their own."""
    base = [part for part in model.base.parameters() if part.requires_grad]
    top = [part for part in model.projection.parameters() if part.requires_grad]
    temperature = [model.temperature] if model.temperature is not None and model.temperature.requires_grad else []
    groups: list[dict[str, object]] = []
    for parts, rate in ((base, settings.learning_rate), (top, settings.projection_learning_rate)):
        groups.append({"params": [part for part in parts if part.ndim > 1], "lr": rate})
        groups.append({"params": [part for part in parts if part.ndim < 2], "lr": rate, "weight_decay": 0.0})
    groups.append({"params": temperature, "lr": settings.projection_learning_rate, "weight_decay": 0.0})
    return [group for group in groups if group["params"]]


def _add_lora(base: Base, settings: TrainingSettings) -> PeftModel:
    names = settings.lora_targets
    targets = names if names == "all-linear" else [name.strip() for name in names.split(",") if name.strip()]
    table = base.model.get_input_embeddings()
    place = next(name for name, module in base.model.named_modules() if module is table)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.lora_rank,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=targets,
        trainable_token_indices={place.rsplit(".", 1)[-1]: [base.token_ids.emb]},
    )
    try:
        with warnings.catch_warnings():
            # peft asks transformers for something by its old name: nothing that our users could do about.
            warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
            warnings.filterwarnings("ignore", ".*tie_word_embeddings", UserWarning)
            adapter = get_peft_model(base.model, config)
    except ValueError as error:
        raise TrainingError(f"training.lora_targets: {names!r} is not allowed: {str(error).splitlines()[0]}") from None
    for module in adapter.modules():
        if isinstance(module, BaseTunerLayer):
            # Autocast brings input and weight together. peft would first make a copy of every input in float32.
            module.cast_input_dtype_enabled = False  # type: ignore[assignment]
    return adapter
