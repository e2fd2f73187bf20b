"""Write an ONNX graph node by node, its weights listed first and streamed to one external data file afterwards.

`GraphWriter.op("MatMul", a, b)` adds a node and returns the name of its output. A weight is recorded with its shape
and a function that gives its values; nothing is read until the data file is written, piece by piece, so that a graph
without values tells every byte it will need. Knows no model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

OPSET = 24
_INLINE_BYTES = 1024  # smaller constants stay in the graph, where shape inference can see them
ALIGNMENT = 4096  # bytes: a runtime may map the file, the writer bypass the page cache

Array = npt.NDArray[Any]
Pieces = Callable[[], Iterable[Array]]


@dataclass(frozen=True)
class Weight:
    """An initializer to be: `pieces` gives its values [shape] in C order, cut anywhere along the first axis."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    pieces: Pieces
    declared: tuple[int, tuple[int, ...]] | None = None  # ONNX's type and shape where numpy has none such (INT4)

    def tensor(self) -> onnx.TensorProto:
        """Name, type and shape, without values."""
        kind, shape = self.declared or (helper.np_dtype_to_tensor_dtype(self.dtype), self.shape)
        return TensorProto(name=self.name, data_type=kind, dims=shape)

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize

    def array(self) -> Array:
        """All of it; raises ValueError where the pieces do not make up the shape."""
        whole = np.concatenate(list(self.pieces())) if self.shape else next(iter(self.pieces()))
        if whole.shape != self.shape or whole.dtype != self.dtype:
            raise ValueError(f"{self.name}: got {whole.dtype} {whole.shape}, announced {self.dtype} {self.shape}")
        return whole


@dataclass(frozen=True)
class PlacedWeight:
    """A weight and where it stands in the data file."""

    weight: Weight
    offset: int  # bytes


class GraphWriter:
    """An ONNX model in the making."""

    def __init__(self) -> None:
        self.weights: dict[str, Weight] = {}
        self.nodes: list[onnx.NodeProto] = []
        self._constants: dict[str, onnx.TensorProto] = {}
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []
        self._count = 0

    def input(self, name: str, dtype: int, shape: Sequence[int | str]) -> str:
        """A graph input; a string in `shape` is a symbolic dimension."""
        self._inputs.append(helper.make_tensor_value_info(name, dtype, shape))
        return name

    def op(self, kind: str, *inputs: str, domain: str = "", to: str | None = None, **attributes: Any) -> str:
        """Add a node with one output; returns that output's name (`to`, or a new one)."""
        return self.ops(kind, *inputs, domain=domain, to=(to,) if to else None, outputs=1, **attributes)[0]

    def ops(
        self,
        kind: str,
        *inputs: str,
        outputs: int,
        domain: str = "",
        to: tuple[str, ...] | None = None,
        **attributes: Any,
    ) -> list[str]:
        """Add a node with several outputs; returns their names."""
        if "to_" in attributes:  # Cast's attribute, as `to` names outputs here
            attributes["to"] = attributes.pop("to_")
        self._count += 1
        base = f"{kind}_{self._count}"
        names = list(to) if to else [base if outputs == 1 else f"{base}:{index}" for index in range(outputs)]
        self.nodes.append(helper.make_node(kind, inputs, names, name=base, domain=domain, **attributes))
        return names

    def graph_output(self, name: str, dtype: int, shape: Sequence[int | str]) -> None:
        """Declare the value `name`, written by some node, a graph output."""
        self._outputs.append(helper.make_tensor_value_info(name, dtype, shape))

    def weight(
        self,
        name: str,
        shape: Sequence[int],
        dtype: npt.DTypeLike,
        pieces: Pieces,
        declared: tuple[int, tuple[int, ...]] | None = None,
    ) -> str:
        """An initializer whose values are read when they are written. Returns `name`."""
        if name in self.weights:
            raise ValueError(f"initializer {name} is there already")
        self.weights[name] = Weight(name, tuple(shape), np.dtype(dtype), pieces, declared)
        return name

    def array(self, name: str, values: Array) -> str:
        """An initializer whose values are there already. Returns `name`."""
        return self.weight(name, values.shape, values.dtype, lambda: [values])

    def const(self, values: Any, dtype: npt.DTypeLike = np.int64) -> str:
        """A small constant, shared between equal uses."""
        array = np.asarray(values, dtype)
        data = array.tobytes()
        value = data.hex() if len(data) <= 32 else hashlib.sha256(data).hexdigest()
        name = f"const/{array.dtype}/{list(array.shape)}/{value}"
        if name not in self._constants:
            self._constants[name] = numpy_helper.from_array(array, name)
        return name

    def placed(self) -> list[PlacedWeight]:
        """The weights of the data file, in order."""
        found, end = [], 0
        for weight in self.weights.values():
            if weight.nbytes > _INLINE_BYTES:
                offset = end + -end % ALIGNMENT
                found.append(PlacedWeight(weight, offset))
                end = offset + weight.nbytes
        return found

    def save(self, path: Path, data_file: str, producer: str, metadata: dict[str, str]) -> None:
        """Write and check the model file; the weights' values are expected in `data_file` beside it, later."""
        initializers = dict(self._constants)
        for name, weight in self.weights.items():
            if weight.nbytes <= _INLINE_BYTES:
                initializers[name] = weight.tensor()
                initializers[name].raw_data = np.ascontiguousarray(weight.array()).tobytes()
        for item in self.placed():
            initializers[item.weight.name] = _external(item, data_file)
        graph = helper.make_graph(
            self.nodes, "diffusion_gemma", self._inputs, self._outputs, list(initializers.values())
        )
        domains = sorted({node.domain for node in self.nodes} | {""})
        opsets = [helper.make_opsetid(domain, OPSET if domain == "" else 1) for domain in domains]
        model = helper.make_model(graph, opset_imports=opsets, producer_name=producer, ir_version=11)
        helper.set_model_props(model, metadata)
        onnx.save(model, path)
        onnx.checker.check_model(path, full_check=True)


def _external(item: PlacedWeight, data_file: str) -> onnx.TensorProto:
    weight = item.weight
    tensor = weight.tensor()
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", data_file), ("offset", item.offset), ("length", weight.nbytes)):
        tensor.external_data.add(key=key, value=str(value))
    return tensor
