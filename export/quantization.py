"""Weight-only quantisation of a traced graph: int8 and int4.

Every linear layer becomes a ``MatMulNBits``: its weight is stored in blocks along the input dimension, each block with
a scale of its own; activations stay as they were. The table of tokens becomes a ``GatherBlockQuantized``; where it is
the output table too (tied), both read the one quantised copy. The projection is small and stays float32.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch import Tensor

from export.errors import ExportError
from notellm.bundle import Precision

__all__ = ["RECIPES", "Blocks", "Recipe", "quantize_blocks", "quantize_graph"]

Bits = Literal[4, 8]
_CONTRIB = "com.microsoft"
_SCOPES = "pkg.torch.onnx.name_scopes"


@dataclass(frozen=True)
class Recipe:
    """How the weights of a precision are stored: ``bits`` each, in blocks of ``block`` with a scale of their own.

    What ``eight_bits`` finds among the names of the linear layers is kept at 8 bits, as tables of tokens always are.
    """

    bits: Bits
    block: int
    eight_bits: str = ""

    def bits_of(self, module: str) -> Bits:
        return 8 if self.eight_bits and re.search(self.eight_bits, module) else self.bits

    def __str__(self) -> str:
        eight = "linear layers and tables of tokens: 8 bits, symmetric"
        if self.bits == 8:
            return f"{eight}, blocks of {self.block} along the input; round to nearest"
        return (
            f"linear layers: 4 bits with a zero point per block; those matching {self.eight_bits} and tables of "
            f"tokens: 8 bits, symmetric; blocks of {self.block} along the input; round to nearest"
        )


# Chosen by measurement: docs/export.md has the table.
RECIPES: Mapping[Precision, Recipe] = {
    "int8": Recipe(8, 32),
    "int4": Recipe(4, 32, r"(v|qkv|o|down)_proj$"),
}


@dataclass(frozen=True)
class Blocks:
    """A matrix ``[N, K]`` as ``codes [N, blocks, bytes of a block]`` and ``scales [N, blocks]``.

    ``zeros`` are the 4-bit blocks' zero points, packed as the codes are: two to a byte, the first one low.
    """

    codes: NDArray[np.uint8]
    scales: NDArray[np.floating[Any]]
    zeros: NDArray[np.uint8] | None


def quantize_blocks(weight: Tensor, bits: Bits, block: int) -> Blocks:
    """``weight [N, K]``. 8 bits: symmetric, 128 stands for zero. 4 bits: each block has a zero point of its own.

    The scales have the weight's own type, as the operators ask; the codes are made with the scales as they are rounded.
    """
    rows, columns = weight.shape
    count = -(-columns // block)
    values = torch.nn.functional.pad(weight.float(), (0, count * block - columns)).view(rows, count, block)
    if bits == 8:
        scales = _scales(values.abs().amax(dim=2) / 127, weight.dtype)
        codes = (values / scales.float()[..., None]).round().clamp(-128, 127) + 128
        return Blocks(codes.to(torch.uint8).numpy(), scales.numpy(), None)
    lowest, highest = values.amin(dim=2).clamp(max=0.0), values.amax(dim=2).clamp(min=0.0)
    scales = _scales((highest - lowest) / 15, weight.dtype)
    zeros = (-lowest / scales.float()).round().clamp(0, 15)
    codes = ((values / scales.float()[..., None]).round() + zeros[..., None]).clamp(0, 15)
    even = torch.nn.functional.pad(zeros, (0, count % 2))
    return Blocks(_in_pairs(codes), scales.numpy(), _in_pairs(even))


def _scales(wanted: Tensor, dtype: torch.dtype) -> Tensor:
    """A block of zeros may have any scale but zero."""
    rounded = wanted.to(dtype)
    return torch.where(rounded > 0, rounded, torch.ones_like(rounded))


def _in_pairs(nibbles: Tensor) -> NDArray[np.uint8]:
    low, high = nibbles[..., 0::2].to(torch.uint8), nibbles[..., 1::2].to(torch.uint8)
    return (low | (high << 4)).numpy()


class _Store:
    """Quantised weights that are in the graph already, by the name of what they replace: a tied table is there once."""

    def __init__(self, graph: ir.Graph, block: int) -> None:
        self._graph = graph
        self._block = block
        self._parts: dict[str, list[ir.Value]] = {}

    def parts(self, weight: ir.Value, bits: Bits, *, transposed: bool) -> list[ir.Value]:
        """Codes, scales and, at 4 bits, zero points of ``weight``, which is ``[N, K]``, or ``[K, N]`` if transposed."""
        name = str(weight.name)
        if name not in self._parts:
            assert weight.const_value is not None
            matrix = torch.from_numpy(np.ascontiguousarray(weight.const_value.numpy()))
            blocks = quantize_blocks(matrix.T if transposed else matrix, bits, self._block)
            arrays = {"codes": blocks.codes, "scales": blocks.scales, "zeros": blocks.zeros}
            self._parts[name] = [
                _initializer(self._graph, f"{name}.{part}", array)
                for part, array in arrays.items()
                if array is not None
            ]
        return self._parts[name]


def quantize_graph(model: ir.Model, recipe: Recipe) -> None:
    """In place. Raises :class:`ExportError` where the graph has no linear layer that could be quantised."""
    graph = model.graph
    graph.opset_imports[_CONTRIB] = 1
    store = _Store(graph, recipe.block)
    linear = 0
    for node in list(graph):
        if node.op_type == "Gather" and _is_weight(node.inputs[0]):
            _quantize_table(graph, node, store, recipe.block)
        elif node.op_type in {"MatMul", "Gemm"} and _is_weight(node.inputs[1]) and _module(node) != "model":
            _quantize_linear(graph, node, store, recipe)
            linear += 1
    if not linear:
        raise ExportError("the traced graph has no linear layer to quantise")
    for name in [name for name, value in graph.initializers.items() if not value.uses()]:
        del graph.initializers[name]


def _is_weight(value: ir.Value | None) -> bool:
    return value is not None and value.is_initializer() and value.shape is not None and len(value.shape) == 2


def _module(node: ir.Node) -> str:
    """The name of the torch module that the node comes from: ``model.base.model.layers.0.mlp.down_proj``."""
    scopes = ast.literal_eval(node.metadata_props.get(_SCOPES, "[]"))
    return str(scopes[-2]) if len(scopes) > 1 else ""


def _quantize_linear(graph: ir.Graph, node: ir.Node, store: _Store, recipe: Recipe) -> None:
    """``MatMul(x, W [K, N])``, or ``Gemm(x, W [N, K], transB=1)``, which is the output table."""
    is_table = node.op_type == "Gemm"
    weight = node.inputs[1]
    assert weight is not None
    parts = store.parts(weight, 8 if is_table else recipe.bits_of(_module(node)), transposed=not is_table)
    columns, rows = _shape(weight)[:: -1 if is_table else 1]
    attributes = {"K": columns, "N": rows, "bits": 4 if len(parts) == 3 else 8, "block_size": recipe.block}
    product = ir.node("MatMulNBits", [node.inputs[0], *parts], attributes, domain=_CONTRIB, name=node.name)
    _replace(graph, node, [product])


def _shape(weight: ir.Value) -> tuple[int, ...]:
    assert weight.const_value is not None
    return tuple(weight.const_value.shape.numpy())


def _quantize_table(graph: ir.Graph, node: ir.Node, store: _Store, block: int) -> None:
    """``Gather(W [V, H], ids)``. The codes are ``[V, blocks, block]``: the rows come in blocks and are joined again."""
    weight = node.inputs[0]
    assert weight is not None
    if _shape(weight)[1] % block:
        # The last block is filled up, and would come along.
        return
    codes, scales = store.parts(weight, 8, transposed=False)
    axis = _initializer(graph, f"{node.name}.axis", np.array([2]))
    shape = _initializer(graph, f"{node.name}.shape", np.array([0, 0, -1]))
    column = ir.node("Unsqueeze", [scales, axis], name=f"{node.name}_scales")
    attributes = {"gather_axis": 0, "quantize_axis": 2, "block_size": block, "bits": 8}
    inputs = [codes, node.inputs[1], column.outputs[0]]
    rows = ir.node("GatherBlockQuantized", inputs, attributes, domain=_CONTRIB, name=node.name)
    joined = ir.node("Reshape", [rows.outputs[0], shape], name=f"{node.name}_joined")
    _replace(graph, node, [column, rows, joined])


def _initializer(graph: ir.Graph, name: str, array: NDArray[Any]) -> ir.Value:
    tensor = ir.Tensor(array, name=name)
    value = ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value


def _replace(graph: ir.Graph, node: ir.Node, nodes: list[ir.Node]) -> None:
    ir.convenience.replace_nodes_and_values(graph, node, [node], nodes, node.outputs, nodes[-1].outputs)
