"""From a checkpoint to a bundle on disk: load, trace, prove, seal, and only then rename into place."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import onnx
import onnxruntime
import tokenizers
import torch
import transformers
from tokenizers import Tokenizer

from export.checkpoint import Checkpoint, load_checkpoint
from export.errors import ExportError, ParityError
from export.graph import kv_names, write_onnx
from export.model_version import model_version
from export.parity import check_parity
from notellm.bundle import (
    FORMAT_VERSION,
    MANIFEST,
    MODEL,
    TOKENIZER,
    Bundle,
    Capabilities,
    Manifest,
    ParityReport,
    TagLimits,
    bundle_id,
    describe_files,
)
from notellm.encoder import plan_answers
from notellm.graph_session import GraphSession
from notellm.prompt import PromptBuilder, PromptLimits, Template

__all__ = ["ExportPlan", "build_bundle"]

Step = Callable[[str], AbstractContextManager[object]]
_PACKAGES = (torch, transformers, onnx, onnxruntime, tokenizers)


@dataclass(frozen=True)
class ExportPlan:
    """What to export, and how its notes are read."""

    source: str
    out: Path
    template: Template
    categories: list[str]
    prompt_limits: PromptLimits = field(default_factory=PromptLimits)
    tag_limits: TagLimits = field(default_factory=TagLimits)
    replace: bool = False


def build_bundle(plan: ExportPlan, *, step: Step, say: Callable[[str], None]) -> Manifest:
    """Run an export. ``step`` wraps each long stage (a spinner, say), ``say`` prints a line.

    The bundle is made in a hidden folder beside ``plan.out`` and renamed at the end: nothing half-made is ever at
    ``plan.out``. Raises :class:`ExportError`, :class:`ParityError` with the report, or
    :class:`BundleError` for what the encoder would refuse.
    """
    _check_out(plan.out, replace=plan.replace)
    with step("loading the checkpoint"):
        checkpoint = load_checkpoint(plan.source)
    if not checkpoint.model.has_projection:
        say("this base has no projection: exporting the identity, its embedding is the hidden state itself (untrained)")
    _state_needs(checkpoint, plan.out, say)
    work = _work_folder(plan.out)
    try:
        checkpoint.tokenizer.backend_tokenizer.save(str(work / TOKENIZER))
        draft = _draft(plan, checkpoint, work)
        prompts = PromptBuilder(
            Tokenizer.from_file(str(work / TOKENIZER)), draft.template, draft.prompt_limits, draft.token_ids
        )
        # The encoder does the same when it loads a bundle: better to hear of it before minutes of tracing.
        plan_answers(draft, prompts)
        with step("tracing the graph (minutes for a real model)"):
            write_onnx(checkpoint.model, work / MODEL)
        with step("proving parity with torch"):
            manifest = _prove(checkpoint, draft, prompts, work)
        (work / MANIFEST).write_bytes(msgspec.json.format(msgspec.json.encode(manifest), indent=2) + b"\n")
        _move_into_place(work, plan.out)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return manifest


def _check_out(out: Path, *, replace: bool) -> None:
    if not out.exists():
        return
    if not replace:
        raise ExportError(f"--out {out}: already there; give --force to replace it")
    if not (out / MANIFEST).is_file():
        # What is replaced is deleted: a mistyped --out must not cost somebody a folder.
        raise ExportError(f"--out {out}: is not a bundle (it holds no {MANIFEST}); --force replaces only bundles")


def _state_needs(checkpoint: Checkpoint, out: Path, say: Callable[[str], None]) -> None:
    """Measured with smollm2 (540 MB of weights): 0.54 GB of disk, 2.6 GB of memory at the peak."""
    disk = int(checkpoint.weight_bytes * 1.05)
    memory = checkpoint.weight_bytes * 5
    say(f"needs about {disk / 1e9:.1f} GB of disk and {memory / 1e9:.1f} GB of memory")
    out.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(out.parent).free
    if free < disk:
        raise ExportError(f"--out {out}: {free / 1e9:.1f} GB are free there, {disk / 1e9:.1f} GB are needed")


def _work_folder(out: Path) -> Path:
    """A fresh hidden folder on the same file system, so that the last rename is atomic; an earlier one is swept up."""
    work = out.parent / f".{out.name}.partial"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    return work


def _draft(plan: ExportPlan, checkpoint: Checkpoint, work: Path) -> Manifest:
    """The manifest but for what only the finished files can say."""
    config = checkpoint.model.base.config.get_text_config()
    names = checkpoint.architecture
    layers = int(getattr(config, names.layers))
    return Manifest(
        format_version=FORMAT_VERSION,
        model_version=model_version(
            checkpoint.model,
            tokenizer_json=(work / TOKENIZER).read_bytes(),
            template=plan.template,
            prompt_limits=plan.prompt_limits,
            tag_limits=plan.tag_limits,
            categories=plan.categories,
            token_ids=checkpoint.token_ids,
            settings={name: getattr(config, name, None) for name in names.decisive},
        ),
        bundle_id="",
        base_model=checkpoint.name,
        architecture=names.name,
        projection="linear" if checkpoint.model.has_projection else "identity",
        embedding_dim=checkpoint.model.embedding_dim,
        layers=layers,
        kv_heads=int(getattr(config, names.kv_heads)),
        head_dim=int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads),
        max_positions=int(getattr(config, names.max_positions)),
        precision="fp32",
        template=plan.template,
        categories=plan.categories,
        token_ids=checkpoint.token_ids,
        prompt_limits=plan.prompt_limits,
        tag_limits=plan.tag_limits,
        inputs=["input_ids", "attention_mask", "position_ids", "last_index", *kv_names("past_key_values", layers)],
        outputs=["note_embedding", "logits", *kv_names("present", layers)],
        capabilities=Capabilities(),
        parity=ParityReport("none", []),
        files={},
        made_with={package.__name__: str(package.__version__) for package in _PACKAGES},
    )


def _prove(checkpoint: Checkpoint, draft: Manifest, prompts: PromptBuilder, work: Path) -> Manifest:
    """Run the files that were written, not what is in memory. Raises :class:`ParityError`."""
    session = GraphSession(Bundle(work, draft), "cpu", threads=0)
    report = check_parity(checkpoint.model, session, prompts, session.provider)
    if not report.passed:
        raise ParityError(report)
    files = describe_files(work)
    return msgspec.structs.replace(draft, parity=report, files=files, bundle_id=bundle_id(files))


def _move_into_place(work: Path, out: Path) -> None:
    old = out.parent / f".{out.name}.replaced"
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        out.rename(old)
    work.rename(out)
    shutil.rmtree(old, ignore_errors=True)
