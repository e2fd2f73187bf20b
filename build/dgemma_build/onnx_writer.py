"""Write an ONNX graph node by node, its weights streamed to one external data file. Knows no model.

`GraphWriter.op("MatMul", a, b)` adds a node and returns the name of its output. Weights go to the data file when
they are added, so that no more than one of them is in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

OPSET = 24
_INLINE_BYTES = 1024  # smaller constants stay in the graph, where shape inference can see them
_ALIGNMENT = 4096  # bytes; lets a runtime map the file


class GraphWriter:
    """An ONNX model in the making; a context manager that closes the data file."""

    def __init__(self, model_path: Path) -> None:
        self.model_path = model_path
        self._data_path = model_path.with_name(model_path.name + ".data")
        self._data = self._data_path.open("wb")
        self._nodes: list[onnx.NodeProto] = []
        self._initializers: dict[str, onnx.TensorProto] = {}
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []
        self._count = 0

    def __enter__(self) -> GraphWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._data.close()

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
        self._nodes.append(helper.make_node(kind, inputs, names, name=base, domain=domain, **attributes))
        return names

    def graph_output(self, name: str, dtype: int, shape: Sequence[int | str]) -> None:
        """Declare the value `name`, written by some node, a graph output."""
        self._outputs.append(helper.make_tensor_value_info(name, dtype, shape))

    def weight(self, name: str, array: npt.NDArray[Any]) -> str:
        """An initializer; large ones go to the data file at once. Returns `name`."""
        if name in self._initializers:
            raise ValueError(f"initializer {name} is there already")
        if array.nbytes <= _INLINE_BYTES:
            self._initializers[name] = numpy_helper.from_array(np.ascontiguousarray(array), name)
            return name
        self._data.write(b"\0" * (-self._data.tell() % _ALIGNMENT))
        offset = self._data.tell()
        self._data.write(np.ascontiguousarray(array).tobytes())
        tensor = TensorProto(name=name, data_type=helper.np_dtype_to_tensor_dtype(array.dtype), dims=array.shape)
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", self._data_path.name), ("offset", offset), ("length", array.nbytes)):
            tensor.external_data.add(key=key, value=str(value))
        self._initializers[name] = tensor
        return name

    def const(self, values: Any, dtype: npt.DTypeLike = np.int64) -> str:
        """A small constant, shared between equal uses."""
        array = np.asarray(values, dtype)
        name = f"const/{array.dtype}/{list(array.shape)}/{array.tobytes().hex()}"
        if name not in self._initializers:
            self._initializers[name] = numpy_helper.from_array(array, name)
        return name

    def save(self, producer: str, metadata: dict[str, str]) -> None:
        """Check the graph and write the model file."""
        graph = helper.make_graph(
            self._nodes, "diffusion_gemma", self._inputs, self._outputs, list(self._initializers.values())
        )
        domains = sorted({node.domain for node in self._nodes} | {""})
        opsets = [helper.make_opsetid(domain, OPSET if domain == "" else 1) for domain in domains]
        model = helper.make_model(graph, opset_imports=opsets, producer_name=producer, ir_version=11)
        helper.set_model_props(model, metadata)
        self._data.flush()
        onnx.save(model, self.model_path)
        onnx.checker.check_model(self.model_path, full_check=True)
