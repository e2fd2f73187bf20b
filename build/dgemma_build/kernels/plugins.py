"""The kernels as TensorRT plugins whose PTX goes into the engine. Imports no TensorRT; knows no graph of the model.

`register` takes TensorRT's modules and registers one operation a kernel in the namespace `dgemma`. TensorRT asks an
operation for the shapes of its outputs, then for a kernel and its launch as expressions of the input shapes; building
the engine needs this module and the Triton language, running it needs neither.

TensorRT passes a kernel pointers to the inputs, then 32-bit integers, then pointers to the outputs, and nothing else.
The entries of the compiled kernels are put in that order (`plugin_ptx`); a float is passed as the integer of its bits,
which is the same four bytes to a launch. (As a constant it would do as well, but changes what the compiler makes of a
kernel: head_tiles then spills.)

Outputs are not zeroed and no operation needs that: each writes all of what a later one reads. `run` launches an
operation on tensors with the shapes and grids that TensorRT is told, which is how the chain of operations is tested.
"""

from __future__ import annotations

import inspect
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dgemma_build.kernels.compile import compile_kernel
from dgemma_build.kernels.launch import DTYPE_NAMES
from dgemma_build.kernels.operations import OPERATIONS, Arithmetic, Operation, Tensor
from dgemma_build.kernels.plugin_ptx import plugin_ptx
from dgemma_build.plugin_lowering import NAMESPACE

# TensorRT's names of types; packed int4 is INT8 there, because its networks know UINT8 only at their borders.
TYPES = {"FLOAT": "fp32", "HALF": "fp16", "BF16": "bf16", "INT32": "i32", "FP8": "fp8e4nv", "INT8": "u8"}
_AUTOTUNE_TYPES = {"FLOAT": "FP32", "HALF": "FP16"}
_TORCH_TYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()} | {"i32": torch.int32, "u8": torch.uint8}
INTEGERS = Arithmetic(cdiv=lambda a, b: -(-a // b), least=min)


def register(trt: Any, plugin: Any) -> None:
    """Register every operation, once in a process; `trt` is the module `tensorrt`, `plugin` is `tensorrt.plugin`.

    TensorRT for RTX 1.7 has neither: its wheel lacks the plugin module's other half, its networks plugin layers.
    """
    there = getattr(plugin.op, NAMESPACE, None)
    for operation in OPERATIONS.values():
        if not hasattr(there, operation.name):
            _Registration(operation, trt, plugin).register()


@dataclass(frozen=True)
class _Registration:
    operation: Operation
    trt: Any
    plugin: Any

    def register(self) -> None:
        operation, plugin, identity = self.operation, self.plugin, f"{NAMESPACE}::{self.operation.name}"
        tuple_of: Any = tuple  # its items are not known before this runs
        described = tuple_of[(plugin.TensorDesc,) * len(operation.outputs)]
        kernel = tuple_of[str | bytes, str | bytes, plugin.KernelLaunchParams, plugin.SymExprs]
        combinations: Any = list
        outputs = {"outputs": described}
        plugin.register(identity)(self._signed(self._describe, {}, described))
        if operation.tactics:
            plugin.autotune(identity)(self._signed(self._autotune, outputs, combinations[plugin.AutoTuneCombination]))
        plugin.aot_impl(identity)(self._signed(self._compile, outputs | {"tactic": int}, kernel))

    def _signed(self, function: Callable[..., Any], more: Mapping[str, Any], returned: Any) -> Callable[..., Any]:
        """With the parameters that TensorRT wants to find: inputs, attributes and `more`, all with their types."""
        types = dict.fromkeys(self.operation.inputs, self.plugin.TensorDesc) | self.operation.attributes | {**more}
        parameters = [
            inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=type_)
            for name, type_ in types.items()
        ]

        def signed(*arguments: Any, **attributes: Any) -> Any:
            return function(dict(zip(types, arguments, strict=False)) | attributes)

        made: Any = signed
        made.__signature__ = inspect.Signature(parameters, return_annotation=returned)
        return signed

    def _tensors(self, given: Mapping[str, Any], *, known: bool) -> dict[str, Tensor]:
        """The inputs with their shapes as expressions or, where `known`, as numbers and -1."""
        found = {}
        for name in self.operation.inputs:
            shape = [int(size) for size in given[name].shape] if known else given[name].shape_expr
            found[name] = Tensor(tuple(shape), TYPES[given[name].dtype.name])
        return found

    def _attributes(self, given: Mapping[str, Any]) -> dict[str, Any]:
        return {name: type_(given[name]) for name, type_ in self.operation.attributes.items()}

    def _symbols(self) -> Arithmetic:
        plugin = self.plugin
        return Arithmetic(cdiv=lambda a, b: plugin.cdiv(a, b), least=lambda a, b: plugin.min(a, b))

    def _describe(self, given: Mapping[str, Any]) -> Any:
        made = self.operation.describe(self._tensors(given, known=False), self._attributes(given), self._symbols())
        types = {name: getattr(self.trt.DataType, theirs) for theirs, name in TYPES.items()}
        return tuple(self.plugin.from_shape_expr(tensor.shape, types[tensor.dtype]) for tensor in made)

    def _autotune(self, given: Mapping[str, Any]) -> Any:
        tensors = [*(given[name] for name in self.operation.inputs), *given["outputs"]]
        names = [_AUTOTUNE_TYPES.get(tensor.dtype.name, tensor.dtype.name) for tensor in tensors]
        return [self.plugin.AutoTuneCombination(", ".join(names), "LINEAR", list(self.operation.tactics))]

    def _compile(self, given: Mapping[str, Any]) -> Any:
        operation, plugin, attributes = self.operation, self.plugin, self._attributes(given)
        tactic = given["tactic"] or 0
        kernel = operation.kernel(self._tensors(given, known=True), attributes, tactic)
        compiled = compile_kernel(kernel)
        launch = operation.launch(self._tensors(given, known=False), attributes, tactic, self._symbols())
        parameters = plugin.KernelLaunchParams()
        for name, size in zip(("grid_x", "grid_y", "grid_z"), launch.grid, strict=False):
            setattr(parameters, name, size)
        parameters.block_x = 32 * compiled.metadata.num_warps
        parameters.shared_mem = compiled.metadata.shared
        numbers = plugin.SymIntExprs(len(launch.numbers))
        for index, value in enumerate(launch.numbers):
            numbers[index] = plugin.SymInt32(_bits(value) if isinstance(value, float) else value)
        return compiled.metadata.name, plugin_ptx(compiled, kernel, operation), parameters, numbers


def _bits(value: float) -> int:
    found: int = struct.unpack("<i", struct.pack("<f", value))[0]
    return found


def run(
    name: str,
    inputs: Sequence[torch.Tensor],
    attributes: Mapping[str, Any],
    tactic: int = 0,
    allocate: Callable[..., torch.Tensor] = torch.empty,
) -> list[torch.Tensor]:
    """Launch operation `name` as an engine would, on the inputs' device; `allocate` makes the outputs."""
    operation = OPERATIONS[name]
    attributes = {key: type_(attributes[key]) for key, type_ in operation.attributes.items()}
    described = {
        key: Tensor(tuple(tensor.shape), _name(tensor.dtype))
        for key, tensor in zip(operation.inputs, inputs, strict=True)
    }
    kernel = operation.kernel(described, attributes, tactic)
    launch = operation.launch(described, attributes, tactic, INTEGERS)
    device = inputs[0].device
    outputs = [
        allocate(each.shape, dtype=_TORCH_TYPES[each.dtype], device=device)
        for each in operation.describe(described, attributes, INTEGERS)
    ]
    pointers = dict(zip((*operation.inputs, *operation.outputs), (*inputs, *outputs), strict=True))
    numbers = iter(launch.numbers)
    arguments = [
        pointers[argument.removesuffix("_ptr")] if type_.startswith("*") else next(numbers)
        for argument, type_ in kernel.signature.items()
    ]
    kernel.launch(launch.grid, *arguments)
    return outputs


def _name(dtype: torch.dtype) -> str:
    return next(name for name, each in _TORCH_TYPES.items() if each == dtype)
