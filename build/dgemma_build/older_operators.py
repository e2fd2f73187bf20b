"""Writes out operators that parsers of TensorRT before 10.15 do not know, in ones that they do. Knows no model.

RMSNormalization over the last axis, its sums in float32, and RotaryEmbedding of whole heads [B, heads, L, dim] by
tables [B, L, dim / 2]: what this project's graphs have of the two.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper


def write_out(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with RMSNormalization and RotaryEmbedding in older operators; weights in files stay there."""
    result = onnx.ModelProto()
    result.CopyFrom(model)
    types = {each.name: each.data_type for each in model.graph.initializer}
    constants = _Constants()
    nodes = [new for node in model.graph.node for new in _replaced(node, types, constants)]
    del result.graph.node[:]
    result.graph.node.extend(nodes)
    result.graph.initializer.extend(constants.made.values())
    return result


class _Constants:
    def __init__(self) -> None:
        self.made: dict[str, TensorProto] = {}

    def of(self, value: Any, dtype: type) -> str:
        array: npt.NDArray[Any] = np.asarray(value, dtype)
        name = f"older/{array.dtype}/{array.tobytes().hex()}"
        self.made.setdefault(name, numpy_helper.from_array(array, name))
        return name


def _replaced(node: NodeProto, types: dict[str, int], constants: _Constants) -> Iterator[NodeProto]:
    if node.op_type == "RMSNormalization":
        yield from _rms_norm(node, types, constants)
    elif node.op_type == "RotaryEmbedding":
        yield from _rotary(node, constants)
    else:
        yield node


def _attributes(node: NodeProto, **expected: Any) -> dict[str, Any]:
    """The node's attributes; AssertionError for ones that are not handled here."""
    found = {each.name: helper.get_attribute_value(each) for each in node.attribute}
    assert all(found.get(name, value) == value for name, value in expected.items()), found
    return found


def _maker(node: NodeProto) -> Callable[..., NodeProto]:
    """Makes nodes named after `node`; the output named "" is that node's own."""

    def make(kind: str, inputs: list[str], output: str, **attributes: Any) -> NodeProto:
        named = [name if not name.startswith("~") else f"{node.name}/{name[1:]}" for name in inputs]
        outputs = [f"{node.name}/{each}" if each else node.output[0] for each in output.split(",")]
        name = f"{node.name}/{output or kind}"
        return helper.make_node(kind, named, outputs, name=name, **attributes)

    return make


def _rms_norm(node: NodeProto, types: dict[str, int], constants: _Constants) -> Iterator[NodeProto]:
    value, scale = node.input
    epsilon = _attributes(node, axis=-1, stash_type=TensorProto.FLOAT)["epsilon"]
    make, dtype = _maker(node), types[scale]
    yield make("Cast", [value], "float", to=TensorProto.FLOAT)
    yield make("Mul", ["~float", "~float"], "squares")
    yield make("ReduceMean", ["~squares", constants.of([-1], np.int64)], "mean", keepdims=1)
    yield make("Add", ["~mean", constants.of(epsilon, np.float32)], "raised")
    yield make("Sqrt", ["~raised"], "root")
    yield make("Div", ["~float", "~root"], "normed")
    yield make("Cast", ["~normed"], "rounded", to=dtype)
    yield make("Mul", ["~rounded", scale], "")


def _rotary(node: NodeProto, constants: _Constants) -> Iterator[NodeProto]:
    value, cos, sin = node.input
    _attributes(node, interleaved=0, rotary_embedding_dim=0, num_heads=0)
    make, heads = _maker(node), constants.of([1], np.int64)
    yield make("Split", [value], "first,second", axis=-1, num_outputs=2)
    for name, table in (("cos", cos), ("sin", sin)):
        yield make("Unsqueeze", [table, heads], name)
    for half, name in (("first", "cos"), ("second", "sin"), ("first", "sin"), ("second", "cos")):
        yield make("Mul", [f"~{half}", f"~{name}"], f"{half}_{name}")
    yield make("Sub", ["~first_cos", "~second_sin"], "turned_first")
    yield make("Add", ["~first_sin", "~second_cos"], "turned_second")
    yield make("Concat", ["~turned_first", "~turned_second"], "", axis=-1)
