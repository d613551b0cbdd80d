"""The second way to a bundle's graph: ONNX Runtime's own model builder, whose attention is one fused operator.

``onnxruntime_genai.models.builder`` writes the graph with ``GroupQueryAttention`` and packed weights, in seconds, and
in the precisions that the tracer cannot give. It knows neither a projection nor one position per row, so both are put
in afterwards. What the fused operator cannot do, the returned capabilities say, and the encoder obeys them.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper
from torch import nn

from export.checkpoint import Checkpoint
from export.errors import ExportError
from export.graph import kv_names
from notellm.bundle import Capabilities, Precision
from training.model import NoteLLM

__all__ = ["FUSED", "FusedGraph", "write_fused_onnx"]

Device = Literal["cpu", "cuda"]
KVType = Literal["float32", "float16"]

# What the builder makes with GroupQueryAttention; with anything else it silently takes another operator.
FUSED: dict[Precision, tuple[Device, ...]] = {
    "fp32": ("cpu",),
    "fp16": ("cuda",),
    "int8": ("cpu", "cuda"),
    "int4": ("cpu", "cuda"),
}

_CAPABILITIES = Capabilities(
    # The operator takes several tokens after a past only where the batch has one row.
    prefix_cache=False,
    multi_token_past=False,
    kv_layout="batch_heads_positions_dim",
)
_KV_TYPES: dict[int, KVType] = {TensorProto.FLOAT: "float32", TensorProto.FLOAT16: "float16"}


@dataclass(frozen=True)
class FusedGraph:
    """What the manifest must say of the graph that was written."""

    capabilities: Capabilities
    kv_dtype: KVType


def write_fused_onnx(
    checkpoint: Checkpoint, path: Path, *, precision: Precision = "fp32", device: Device = "cpu"
) -> FusedGraph:
    """Write ``path``, with its weights beside it in ``path.name + ".data"``, and say how it may be driven.

    Inputs and outputs are those of :class:`export.graph.NoteGraph` (``position_ids`` is there, but the fused operator
    counts from ``attention_mask`` and ignores it); rows are padded on the right. ``note_embedding`` and ``logits`` are
    float32 in every precision; projection and normalisation are computed in float32. ``device`` is where the graph will
    run: fp32 is for the CPU, fp16 for CUDA, int8 and int4 (weights only) for either; see :data:`FUSED`.

    Works from the model in memory, as it is (``[EMB]`` added, adapters merged), through a temporary folder beside
    ``path`` that takes about the size of the weights twice. Raises :class:`ExportError`.
    """
    if device not in FUSED[precision]:
        allowed = ", ".join(f"{name} for {' or '.join(devices)}" for name, devices in FUSED.items())
        raise ExportError(f"graph 'fused': {precision} for {device} is not to be had; allowed are {allowed}")
    if importlib.util.find_spec("onnxruntime_genai") is None:
        raise ExportError("graph 'fused': onnxruntime-genai is not installed; install it, or export with 'traced'")
    with tempfile.TemporaryDirectory(prefix=".fused-", dir=path.parent) as folder:
        built = _build(checkpoint, Path(folder), precision, device)
        proto = onnx.load(str(built), load_external_data=False)
        _check_fused(proto.graph, checkpoint.model)
        _fit_to_contract(proto.graph, checkpoint.model)
        kv_type = proto.graph.output[-1].type.tensor_type.elem_type
        _point_weights_to(proto.graph, f"{path.name}.data")
        built.with_name(f"{built.name}.data").replace(path.with_name(f"{path.name}.data"))
        onnx.save(proto, str(path))
    return FusedGraph(_CAPABILITIES, _KV_TYPES[kv_type])


def _build(checkpoint: Checkpoint, folder: Path, precision: Precision, device: Device) -> Path:
    """The builder in a process of its own: it is made to be run, prints much and keeps the weights."""
    source, out = folder / "checkpoint", folder / "graph"
    checkpoint.model.base.save_pretrained(source)
    checkpoint.tokenizer.save_pretrained(source)
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(source), "-o", str(out)]
    command += ["-p", precision, "-e", device, "-c", str(folder / "cache")]
    command += ["--extra_options", "include_hidden_states=1", "hf_token=false"]
    offline = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", env=offline, check=False)
    built = out / "model.onnx"
    if done.returncode or not built.is_file():
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise ExportError(f"graph 'fused': onnxruntime-genai failed: {(lines or ['it wrote no graph'])[-1].strip()}")
    return built


def _check_fused(graph: onnx.GraphProto, model: NoteLLM) -> None:
    layers = int(model.base.config.get_text_config().num_hidden_layers)
    fused = sum(node.op_type == "GroupQueryAttention" for node in graph.node)
    if fused != layers:
        raise ExportError(f"graph 'fused': {fused} of {layers} layers have a fused attention; export with 'traced'")


def _fit_to_contract(graph: onnx.GraphProto, model: NoteLLM) -> None:
    """From hidden states and logits of every token to the embedding and the logits at ``last_index``."""
    made_by = next(place for place, node in enumerate(graph.node) if "hidden_states" in node.output)
    for node in graph.node:
        _rename(node.input, "hidden_states", "note_hidden")
        _rename(node.output, "logits", "note_logits")
    pick = [
        helper.make_node("Unsqueeze", ["last_index", "note_axis"], ["note_place"]),
        helper.make_node("GatherND", ["hidden_states", "note_place"], ["note_hidden"], batch_dims=1),
    ]
    # In the order of use: the head that follows reads what is picked here.
    nodes = [*graph.node[: made_by + 1], *pick, *graph.node[made_by + 1 :]]
    nodes += [
        helper.make_node("Cast", ["note_logits"], ["logits"], to=TensorProto.FLOAT),
        helper.make_node("Cast", ["note_hidden"], ["note_hidden_float"], to=TensorProto.FLOAT),
        *_embed(graph, model),
    ]
    del graph.node[:]
    graph.node.extend(nodes)
    graph.initializer.append(numpy_helper.from_array(np.array([1], np.int64), "note_axis"))
    _declare(graph, model)


def _embed(graph: onnx.GraphProto, model: NoteLLM) -> list[NodeProto]:
    """:meth:`NoteLLM.embed`, in float32."""
    projected = "note_hidden_float"
    nodes = []
    if isinstance(model.projection, nn.Linear):
        weights = {f"note_projection.{name}": value for name, value in model.projection.named_parameters()}
        graph.initializer.extend(
            numpy_helper.from_array(value.detach().float().cpu().numpy(), name) for name, value in weights.items()
        )
        projected = "note_projected"
        nodes.append(helper.make_node("Gemm", ["note_hidden_float", *weights], [projected], transB=1))
    # torch.nn.functional.normalize has the same floor.
    graph.initializer.append(numpy_helper.from_array(np.array(1e-12, np.float32), "note_floor"))
    nodes += [
        helper.make_node("ReduceL2", [projected, "note_axis"], ["note_norm"], keepdims=1),
        helper.make_node("Max", ["note_norm", "note_floor"], ["note_divisor"]),
        helper.make_node("Div", [projected, "note_divisor"], ["note_embedding"]),
    ]
    return nodes


def _declare(graph: onnx.GraphProto, model: NoteLLM) -> None:
    """Inputs and outputs as the bundle's contract names them, in its order."""
    layers = int(model.base.config.get_text_config().num_hidden_layers)
    inputs = {value.name: value for value in graph.input}
    outputs = {value.name: value for value in graph.output}
    wanted = {"input_ids", "attention_mask", *kv_names("past_key_values", layers)}
    if set(inputs) != wanted or not set(outputs) >= {"logits", *kv_names("present", layers)}:
        raise ExportError("graph 'fused': the builder's inputs are not those of a plain decoder; export with 'traced'")
    integers, rows = TensorProto.INT64, "batch_size"
    inputs["position_ids"] = helper.make_tensor_value_info("position_ids", integers, [rows, "sequence_length"])
    inputs["last_index"] = helper.make_tensor_value_info("last_index", integers, [rows])
    head = outputs["logits"].type.tensor_type.shape.dim[-1].dim_value
    outputs["note_embedding"] = helper.make_tensor_value_info(
        "note_embedding", TensorProto.FLOAT, [rows, model.embedding_dim]
    )
    outputs["logits"] = helper.make_tensor_value_info("logits", TensorProto.FLOAT, [rows, head])
    order = ["input_ids", "attention_mask", "position_ids", "last_index", *kv_names("past_key_values", layers)]
    del graph.input[:]
    graph.input.extend(inputs[name] for name in order)
    del graph.output[:]
    graph.output.extend(outputs[name] for name in ["note_embedding", "logits", *kv_names("present", layers)])


def _point_weights_to(graph: onnx.GraphProto, location: str) -> None:
    for tensor in graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location


def _rename(names: list[str], old: str, new: str) -> None:
    for place, name in enumerate(names):
        if name == old:
            names[place] = new
