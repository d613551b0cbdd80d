"""A training from its first line to its last: data, base, whitening, steps, checkpoint."""

from __future__ import annotations

import os
import time
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from peft import PeftModel
from tokenizers import Tokenizer
from torch import nn
from transformers import get_scheduler

from notellm.prompt import PromptBuilder, PromptLimits, load_template
from notellm.settings import TrainingSettings
from training.adaptation import adapt, trainable_groups
from training.base_model import Base, load_base
from training.batches import PairBatches
from training.checkpoint_folder import (
    FORMAT_VERSION,
    Description,
    PromptChoice,
    begin_from,
    checkpoint_id,
    read_description,
    write_checkpoint,
)
from training.chunk_size import choose_chunk
from training.errors import TrainingError
from training.loss_plot import plot_losses
from training.memory import memory_errors
from training.method import choose_base, choose_method
from training.note_rows import RowBuilder, pad_rows
from training.run_folder import RunFolder, RunRecord
from training.step import Weights, backward, measure
from training.training_data import DataFiles, PairedNotes, TrainingData, read_training_data
from training.training_state import load_state, newest_state, save_state
from training.watch import Watch
from training.whitening import whitening_projection

__all__ = ["Outcome", "TrainingPlan", "train"]

_PACKAGES = ("torch", "transformers", "peft", "accelerate")


@dataclass(frozen=True)
class TrainingPlan:
    """``begin``: a checkpoint's folder to go on from, of the same method, base and rank; None begins at the base.
    One that was trained whole brings its base along.

    ``redraw_partners`` is a control: pairs get other partners at every step, so that nothing can be learnt.
    """

    base: str
    files: DataFiles
    out: Path
    categories: list[str]
    settings: TrainingSettings
    begin: Path | None = None
    force: bool = False
    redraw_partners: bool = False


@dataclass(frozen=True)
class Outcome:
    """``done`` is False where the training was asked to stop; ``metrics`` is the last training step's line."""

    run: Path
    done: bool
    metrics: dict[str, Any]


def train(plan: TrainingPlan, watch: Watch) -> Outcome:
    """Train, or go on where an earlier start was killed.

    Under ``torchrun`` every process calls this; the first one writes. Raises :class:`TrainingError`,
    :class:`training.errors.TrainingDataError` or :class:`training.errors.BaseModelError`.
    """
    plan = replace(plan, settings=choose_method(plan.settings, plan.base, plan.begin))
    with memory_errors(plan.settings), RunFolder(plan.out) as folder:
        return _Training(plan, watch, folder).run()


class _Training:
    def __init__(self, plan: TrainingPlan, watch: Watch, folder: RunFolder) -> None:
        settings = plan.settings
        self._plan, self._settings, self._watch = plan, settings, watch
        self._weights = Weights(settings.contrastive, settings.generative_weight, settings.hard_negatives)
        if not (settings.contrastive or settings.generative_weight):
            raise TrainingError("training.generative_weight: 0 is not allowed with training.contrastive = false")
        self._data = read_training_data(plan.files)
        self._accelerator = _accelerator(settings)
        self._first = bool(self._accelerator.is_main_process)
        self._folder = folder
        if self._first:
            self._folder.open(_record(plan, self._data, self._accelerator.num_processes), force=plan.force)
        self._accelerator.wait_for_everyone()
        torch.manual_seed(settings.seed)
        bf16 = self._accelerator.mixed_precision == "bf16"
        half = torch.bfloat16 if bf16 and settings.method == "lora" else torch.float32
        self._base = load_base(choose_base(settings, plan.base, plan.begin), dtype=half)
        self._prompt = PromptChoice(
            template=load_template(settings.template),
            limits=PromptLimits(note=settings.note_tokens),
            categories=plan.categories,
        )
        self._builder = _row_builder(self._base, self._prompt, settings)
        self._model, self._adapter = adapt(self._base, settings)
        if plan.begin is not None:
            assert isinstance(self._model.projection, nn.Linear)
            begin_from(plan.begin, self._adapter, self._model.projection)

    def run(self) -> Outcome:
        settings, watch = self._settings, self._watch
        train = self._data.train
        watch.say(
            f"{len(train.pairs):,} pairs ({train.pairs.skipped:,} skipped) of {len(train.notes.rows):,} notes; "
            f"{sum(p.numel() for p in self._model.parameters() if p.requires_grad):,} parameters are trained"
        )
        state = newest_state(self._folder.states)
        self._model.to(self._accelerator.device)
        fresh = state is None and self._plan.begin is None
        if fresh and settings.projection_start == "whitened" and settings.contrastive:
            watch.say("whitening the projection")
            self._whiten()
        optimizer = torch.optim.AdamW(
            trainable_groups(self._model, settings), weight_decay=settings.weight_decay, betas=(0.9, 0.999)
        )
        warmup = round(settings.warmup_share * settings.steps)
        names = {"constant": "constant_with_warmup"}
        scheduler = get_scheduler(
            names.get(settings.schedule, settings.schedule),
            optimizer,
            num_warmup_steps=warmup,
            num_training_steps=settings.steps,
        )
        start = 0
        if state is not None:
            start, folder = state
            load_state(folder, self._model, optimizer, scheduler)
            watch.say(f"going on after step {start} of {settings.steps}")
        if self._first:
            self._folder.keep_metrics_until(start)
        wrapped = self._accelerator.prepare(self._model)
        return self._steps(start, wrapped, optimizer, scheduler)

    def _steps(self, start: int, wrapped: nn.Module, optimizer: torch.optim.Optimizer, scheduler: Any) -> Outcome:
        settings, accelerator = self._settings, self._accelerator
        chunk = choose_chunk(self._base, self._model, self._builder, settings, accelerator, self._watch)
        batches = PairBatches(
            self._data.train.notes,
            self._data.train.pairs,
            self._builder,
            settings,
            categories=frozenset(self._plan.categories),
            rank=accelerator.process_index,
            processes=accelerator.num_processes,
            redraw_partners=self._plan.redraw_partners,
        )
        loader = torch.utils.data.DataLoader(
            torch.utils.data.Subset(batches, range(start, settings.steps)),
            batch_size=None,
            # On a GPU, the next batches are made while this one is computed.
            num_workers=2 if accelerator.device.type == "cuda" else 0,
            # Its own: a loader draws a number as it begins, and dropout would fall elsewhere in a resumed run.
            generator=torch.Generator(),
        )
        line = self._last_line()
        tokens, seconds = line.get("tokens", 0), line.get("seconds", 0.0)
        trained = [part for part in self._model.parameters() if part.requires_grad]
        for step, batch in enumerate(loader, start + 1):
            began = time.monotonic()
            self._model.train()
            # Dropout is a function of seed, step and process as well: a resumed run needs no state of it.
            torch.manual_seed(_seed_of(settings.seed, step, accelerator.process_index))
            losses = backward(self._model, wrapped, batch, self._weights, chunk, accelerator)
            norm = accelerator.clip_grad_norm_(trained, settings.max_gradient_norm)
            rate = scheduler.get_last_lr()[0]
            if not (np.isfinite(losses.loss) and torch.isfinite(norm)):
                # Before it reaches the weights, and with them a state that every start would go on from.
                raise TrainingError(
                    f"step {step}: the loss is {losses.loss}, its gradient {float(norm)}; lower training.learning_rate "
                    "or training.temperature"
                )
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad(set_to_none=True)
            tokens += batch.tokens
            seconds += time.monotonic() - began
            line = {
                "part": "train",
                "step": step,
                **asdict(losses),
                "temperature": 0.0 if self._model.temperature is None else self._model.temperature.item(),
                "gradient_norm": float(norm),
                "learning_rate": rate,
                "tokens": tokens,
                "seconds": round(seconds, 3),
            }
            self._tell(line)
            last = step == settings.steps
            if last or step % settings.validate_every == 0:
                self._validate(step, chunk)
            stopping = self._stopping()
            if self._first and not last and (stopping or step % settings.save_every == 0):
                save_state(self._folder.states, step, self._model, optimizer, scheduler, keep=settings.keep_states)
                plot_losses(self._folder.read_metrics(), self._folder.plot)
            if stopping and not last:
                accelerator.wait_for_everyone()
                return Outcome(self._plan.out, False, line)
        if self._first:
            self._finish(line)
        accelerator.wait_for_everyone()
        return Outcome(self._plan.out, True, line)

    def _stopping(self) -> bool:
        """Whether anybody wants to stop: all processes stop after the same step."""
        if self._accelerator.num_processes == 1:
            return self._watch.wants_to_stop()
        wanted = torch.tensor(float(self._watch.wants_to_stop()), device=self._accelerator.device)
        return bool(self._accelerator.reduce(wanted) > 0)

    def _tell(self, line: dict[str, Any]) -> None:
        if self._first:
            self._folder.add_metrics(line)
            self._watch.metrics(line)

    def _last_line(self) -> dict[str, Any]:
        if not (self._first and self._folder.metrics.exists()):
            return {}
        lines = [line for line in self._folder.read_metrics() if line["part"] == "train"]
        return lines[-1] if lines else {}

    @torch.no_grad()
    def _whiten(self) -> None:
        """From the notes of the pairs: those without any are not what the projection is for."""
        train, settings = self._data.train, self._settings
        rows = np.unique(np.concatenate([train.pairs.sources, train.pairs.targets]))
        draw = np.random.default_rng(settings.seed)
        chosen = np.sort(draw.permutation(rows)[: settings.whitening_notes]).tolist()
        built = sorted((self._builder.row(train.notes.note(row), None, draw) for row in chosen), key=_length)
        self._model.eval()
        states = []
        for start in range(0, len(built), 16):
            part = pad_rows(built[start : start + 16], self._builder.prefix_ids).to(self._accelerator.device)
            with self._accelerator.autocast():
                states.append(self._model.hidden_at_quote(part).float().cpu())
        if len(built) <= settings.embedding_dim:
            self._watch.say(
                f"warning: {len(built)} notes are few to whiten {settings.embedding_dim} dimensions; "
                'training.projection_start = "random" is another way to begin'
            )
        self._model.projection = whitening_projection(torch.cat(states), settings.embedding_dim).to(
            self._accelerator.device
        )

    def _validate(self, step: int, chunk: int) -> None:
        validation = self._data.validation
        if not (self._first and validation):
            return
        self._model.eval()
        losses = measure(
            self._model,
            _validation_batch(validation, self._builder, self._plan),
            self._weights,
            chunk,
            self._accelerator.device,
        )
        self._tell({"part": "validation", "step": step, **asdict(losses)})

    def _finish(self, line: dict[str, Any]) -> None:
        metrics = self._folder.read_metrics()
        plot_losses(metrics, self._folder.plot)
        before = None if self._plan.begin is None else read_description(self._plan.begin).training
        looks = [each for each in metrics if each["part"] == "validation"]
        description = Description(
            format_version=FORMAT_VERSION,
            base="./base" if self._adapter is None else self._plan.base,
            base_revision=getattr(self._base.model.config, "_commit_hash", None) if self._adapter is not None else None,
            embedding_dim=self._settings.embedding_dim,
            adapter=self._adapter is not None,
            prompt=self._prompt,
            made_with={name: version(name) for name in _PACKAGES},
            training={
                "base": (before or {}).get("base", self._base.name),
                "settings": self._settings.model_dump(),
                "data": self._data.sha256,
                "from": before,
                "pairs": len(self._data.train.pairs),
                "notes": len(self._data.train.notes.rows),
                "last_step": line,
                "last_validation": looks[-1] if looks else None,
            },
        )
        model: PeftModel | Any = self._adapter if self._adapter is not None else self._base.model
        tokenizer = self._base.tokenizer if self._adapter is None else None
        projection = self._model.projection
        assert isinstance(projection, nn.Linear)
        write_checkpoint(self._plan.out, description, model, projection, tokenizer)
        self._folder.remove_states()


def _accelerator(settings: TrainingSettings) -> Accelerator:
    bf16 = settings.precision == "bf16" or (
        settings.precision == "auto"
        and torch.cuda.is_available()
        and torch.cuda.is_bf16_supported(including_emulation=False)
    )
    # Told to use the CPU, accelerate makes a group of torchrun's processes there too; else each would train on its own.
    shared = int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.accelerator.is_available()
    # Whichever losses are on, every trained parameter takes part: data parallelism need not look for those that do not.
    return Accelerator(cpu=shared, mixed_precision="bf16" if bf16 else "no")


def _row_builder(base: Base, prompt: PromptChoice, settings: TrainingSettings) -> RowBuilder:
    # A copy: the builder turns off what its tokenizer makes of special tokens.
    tokenizer = Tokenizer.from_str(base.tokenizer.backend_tokenizer.to_str())
    prompts = PromptBuilder(tokenizer, prompt.template, prompt.limits, base.token_ids)
    return RowBuilder(
        prompts,
        prompt.template.answer_prefix,
        base.token_ids.eos[0],
        settings.held_back,
        settings.category_hashtags,
    )


def _record(plan: TrainingPlan, data: TrainingData, processes: int) -> RunRecord:
    return RunRecord(
        base=plan.base,
        data=data.sha256 if plan.begin is None else {**data.sha256, "from": checkpoint_id(plan.begin)},
        processes=processes,
        categories=plan.categories,
        settings=plan.settings.model_dump(),
        redraw_partners=plan.redraw_partners,
    )


def _validation_batch(validation: PairedNotes, builder: RowBuilder, plan: TrainingPlan) -> Any:
    """Always the same pairs and tasks, so that two looks compare."""
    pairs = min(plan.settings.validation_pairs, len(validation.pairs))
    settings = plan.settings.model_copy(update={"batch_pairs": pairs, "seed": 0, "steps": 1})
    return PairBatches(validation.notes, validation.pairs, builder, settings, categories=frozenset(plan.categories))[0]


def _seed_of(seed: int, step: int, process: int) -> int:
    return int(np.random.SeedSequence([seed, step, process]).generate_state(1)[0])


def _length(row: Any) -> int:
    return len(row.ids)
