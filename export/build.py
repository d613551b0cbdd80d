"""From a checkpoint to a bundle on disk: load, ask torch, trace, prove, seal, and only then rename into place."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import msgspec
import onnx
import onnxruntime
import tokenizers
import torch
import transformers
from tokenizers import Tokenizer

from export.architectures import max_positions
from export.checkpoint import Checkpoint, load_checkpoint
from export.errors import ExportError, ParityError
from export.fused_graph import write_fused_onnx
from export.graph import kv_names, save_graph, to_half, trace
from export.model_version import model_version
from export.parity import reference_of
from export.quantization import RECIPES, quantize_graph
from export.work_folder import move_into_place, work_folder
from notellm.bundle import (
    FORMAT_VERSION,
    MANIFEST,
    MODEL,
    TOKENIZER,
    Bundle,
    Capabilities,
    Manifest,
    ParityReport,
    Precision,
    TagLimits,
    bundle_id,
    describe_files,
    write_manifest,
)
from notellm.categories import default_categories
from notellm.encoder import plan_answers
from notellm.errors import BundleError, ProviderMissing
from notellm.graph_session import GraphSession
from notellm.parity import prove_session
from notellm.prompt import PromptBuilder, PromptLimits, Template, load_template
from training.checkpoint_folder import PromptChoice

__all__ = ["NEEDS", "ExportPlan", "Needs", "build_bundle", "draft_manifest"]

Step = Callable[[str], AbstractContextManager[object]]
Say = Callable[[str], None]
_PACKAGES = (torch, transformers, onnx, onnxruntime, tokenizers)


@dataclass(frozen=True)
class ExportPlan:
    """What to export, and where the bundle is meant to run.

    ``template``, ``categories`` and ``prompt_limits`` say how notes are read. What is None is as the checkpoint was
    trained, or else as ships.
    """

    source: str
    out: Path
    template: Template | None = None
    categories: list[str] | None = None
    prompt_limits: PromptLimits | None = None
    tag_limits: TagLimits = field(default_factory=TagLimits)
    precision: Precision = "fp32"
    provider: Literal["cpu", "cuda"] = "cpu"
    graph: Literal["traced", "fused"] = "traced"
    replace: bool = False

    @property
    def halves(self) -> bool:
        """Whether activations and KV cache are float16. A GPU is slow in anything wider; a CPU in anything narrower."""
        return self.precision == "fp16" or (self.precision != "fp32" and self.provider == "cuda")


@dataclass(frozen=True)
class Needs:
    """What an export takes, in bytes per byte of float32 weights.

    Measured with smollm2 (538 MB of them): a bundle of 0.54, 0.28, 0.16 and 0.13 GB, and 2.2 to 2.6 GB of memory at the
    peak, which is torch's trace of the float32 model whatever becomes of it.
    """

    disk: float
    memory: float


NEEDS: Mapping[Precision, Needs] = {
    "fp32": Needs(1.05, 5.0),
    "fp16": Needs(0.55, 5.0),
    "int8": Needs(0.30, 5.0),
    "int4": Needs(0.25, 5.0),
}


def build_bundle(plan: ExportPlan, *, step: Step, say: Say) -> Manifest:
    """Run an export. ``step`` wraps each long stage (a spinner, say), ``say`` prints a line.

    The bundle is made in a hidden folder beside ``plan.out`` and renamed at the end: nothing half-made is ever at
    ``plan.out``. Raises :class:`ExportError`, :class:`ParityError` with the report, or another
    :class:`NoteLLMError` for what the checkpoint lacks or the encoder would refuse.
    """
    _check_out(plan.out, replace=plan.replace)
    with work_folder(plan.out) as work:
        with step("loading the checkpoint"):
            checkpoint = load_checkpoint(plan.source)
        if not checkpoint.model.has_projection:
            say(
                "this base has no projection: exporting the identity, "
                "its embedding is the hidden state itself (untrained)"
            )
        _state_needs(checkpoint, plan, say)
        checkpoint.tokenizer.backend_tokenizer.save(str(work / TOKENIZER))
        draft = draft_manifest(plan, checkpoint, work)
        prompts = PromptBuilder(
            Tokenizer.from_file(str(work / TOKENIZER)), draft.template, draft.prompt_limits, draft.token_ids
        )
        # The encoder does the same when it loads a bundle: better to hear of it before minutes of tracing.
        plan_answers(draft, prompts)
        with step("asking torch for its answers"):
            reference_of(checkpoint.model, prompts).save(work)
        written = _write_graph(plan, checkpoint, draft, work / MODEL, step)
        # Torch's weights are not needed any more, and the proof needs memory of its own.
        del checkpoint
        with step("proving parity with torch"):
            manifest = _prove(plan, written, work, say)
        write_manifest(work, manifest)
        move_into_place(work, plan.out)
    return manifest


def _check_out(out: Path, *, replace: bool) -> None:
    if not out.exists():
        return
    if not replace:
        raise ExportError(f"--out {out}: already there; give --force to replace it")
    if not (out / MANIFEST).is_file():
        # What is replaced is deleted: a mistyped --out must not cost somebody a folder.
        raise ExportError(f"--out {out}: is not a bundle (it holds no {MANIFEST}); --force replaces only bundles")


def _state_needs(checkpoint: Checkpoint, plan: ExportPlan, say: Say) -> None:
    needs = NEEDS[plan.precision]
    disk = int(checkpoint.weight_bytes * needs.disk)
    if plan.graph == "fused":
        # Its builder reads the checkpoint from a folder, as float32.
        disk += checkpoint.weight_bytes
    memory = checkpoint.weight_bytes * needs.memory
    say(f"{plan.precision}: needs about {disk / 1e9:.1f} GB of disk and {memory / 1e9:.1f} GB of memory")
    free = shutil.disk_usage(plan.out.parent).free
    if free < disk:
        raise ExportError(f"--out {plan.out}: {free / 1e9:.1f} GB are free there, {disk / 1e9:.1f} GB are needed")


def _prompt_of(plan: ExportPlan, trained: PromptChoice | None) -> PromptChoice:
    usual = trained or PromptChoice(
        template=load_template("en"), limits=PromptLimits(), categories=default_categories()
    )
    return PromptChoice(
        template=plan.template or usual.template,
        limits=plan.prompt_limits or usual.limits,
        categories=plan.categories or usual.categories,
    )


def draft_manifest(plan: ExportPlan, checkpoint: Checkpoint, work: Path) -> Manifest:
    """The manifest but for what only the finished files can say."""
    prompt = _prompt_of(plan, checkpoint.description.prompt if checkpoint.description else None)
    config = checkpoint.model.base.config.get_text_config()
    names = checkpoint.architecture
    layers = int(getattr(config, names.layers))
    recipe = _recipe(plan)
    return Manifest(
        format_version=FORMAT_VERSION,
        model_version=model_version(
            checkpoint.model,
            tokenizer_json=(work / TOKENIZER).read_bytes(),
            template=prompt.template,
            prompt_limits=prompt.limits,
            tag_limits=plan.tag_limits,
            categories=prompt.categories,
            token_ids=checkpoint.token_ids,
            settings={name: getattr(config, name, None) for name in names.decisive},
            precision=plan.precision,
            recipe=recipe,
        ),
        bundle_id="",
        base_model=checkpoint.name,
        architecture=names.name,
        projection="linear" if checkpoint.model.has_projection else "identity",
        embedding_dim=checkpoint.model.embedding_dim,
        layers=layers,
        kv_heads=int(getattr(config, names.kv_heads)),
        head_dim=int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads),
        max_positions=max_positions(names, config),
        precision=plan.precision,
        template=prompt.template,
        categories=prompt.categories,
        token_ids=checkpoint.token_ids,
        prompt_limits=prompt.limits,
        tag_limits=plan.tag_limits,
        inputs=["input_ids", "attention_mask", "position_ids", "last_index", *kv_names("past_key_values", layers)],
        outputs=["note_embedding", "logits", *kv_names("present", layers)],
        capabilities=Capabilities(),
        parity=ParityReport(plan.provider, [], "unproven"),
        files={},
        made_with={package.__name__: str(package.__version__) for package in _PACKAGES},
        kv_dtype="float16" if plan.halves else "float32",
        recipe=recipe,
    )


def _recipe(plan: ExportPlan) -> str:
    if plan.precision not in RECIPES:
        return ""
    if plan.graph == "fused":
        return f"{plan.precision} of onnxruntime-genai's model builder, its defaults"
    return str(RECIPES[plan.precision])


def _write_graph(plan: ExportPlan, checkpoint: Checkpoint, draft: Manifest, path: Path, step: Step) -> Manifest:
    """Write the graph, and say in the manifest how it is driven. May leave the model's weights as halves."""
    if plan.graph == "fused":
        with step("building the fused graph"):
            fused = write_fused_onnx(checkpoint, path, precision=plan.precision, device=plan.provider)
        return msgspec.structs.replace(draft, capabilities=fused.capabilities, kv_dtype=fused.kv_dtype)
    if plan.halves:
        to_half(checkpoint.model.base)
    with step("tracing the graph (minutes for a real model)"):
        graph = trace(checkpoint.model, checkpoint.architecture)
    if plan.precision in RECIPES:
        with step(f"quantising to {plan.precision}"):
            quantize_graph(graph, RECIPES[plan.precision])
    with step("writing the graph"):
        save_graph(graph, path)
    return draft


def _prove(plan: ExportPlan, draft: Manifest, work: Path, say: Say) -> Manifest:
    """Run the files that were written, not what is in memory. Raises :class:`ParityError`."""
    files = describe_files(work)
    manifest = msgspec.structs.replace(draft, files=files, bundle_id=bundle_id(files))
    bundle = Bundle(work, manifest)
    try:
        session = GraphSession(bundle, plan.provider, threads=0)
    except ProviderMissing as error:
        say(f"warning: parity on {plan.provider} is UNPROVEN: {error}")
        say(f"where there is a GPU, prove it with: notellm check --provider {plan.provider} --bundle {plan.out}")
        return msgspec.structs.replace(manifest, parity_elsewhere=_on_cpu(bundle, say))
    report = prove_session(bundle, session)
    if not report.passed:
        raise ParityError(report)
    return msgspec.structs.replace(manifest, parity=report)


def _on_cpu(bundle: Bundle, say: Say) -> list[ParityReport]:
    """What can be said of the same graph without its provider. Wrong here is wrong everywhere."""
    try:
        session = GraphSession(bundle, "cpu", threads=0)
    except BundleError as error:
        say(f"the graph cannot be run on the CPU either: {error}")
        return []
    report = prove_session(bundle, session)
    if not report.passed:
        raise ParityError(report)
    return [report]
