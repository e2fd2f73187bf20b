"""A compiled kernel's PTX with its parameters as TensorRT passes them. Knows no kernel.

Triton's entry has the kernel's arguments in their order and, at the end, pointers to two scratch areas that are empty
unless a kernel asks for them. TensorRT passes inputs, numbers and outputs and no more; a launch with fewer parameters
than the entry declares reads what is behind them. The body reads parameters by name, so it is enough to put the
declarations into TensorRT's order and to leave out those that the body never reads.
"""

from __future__ import annotations

import re
from typing import Any

from dgemma_build.kernels.launch import Kernel
from dgemma_build.kernels.operations import Operation

_ENTRY = re.compile(r"(?P<head>\.visible \.entry (?P<name>\w+)\(\n)(?P<parameters>[^)]*)(?P<tail>\n\))")


def parameters(ptx: str) -> list[tuple[str, str]]:
    """(type, name) of each parameter of the one entry in `ptx`, in order: u64, u32 or f32, and the compiler's name."""
    found = _ENTRY.search(ptx)
    assert found, ptx[:400]
    lines = found["parameters"].replace(",", "").splitlines()
    return [(line.split()[1].removeprefix("."), line.split()[-1]) for line in lines]


def plugin_ptx(compiled: Any, kernel: Kernel, operation: Operation) -> str:
    """The PTX whose entry takes inputs, numbers, outputs."""
    ptx = str(compiled.asm["ptx"])
    found = _ENTRY.search(ptx)
    assert found, ptx[:400]
    lines = [line.rstrip(",") for line in found["parameters"].splitlines()]
    names = list(kernel.signature)
    hidden = [line.split()[-1] for line in lines[len(names) :]]
    body = ptx[found.end() :]
    read = [name for name in hidden if re.search(rf"\b{name}\b", body)]
    assert not read, f"{kernel.name} reads scratch that no plugin has: {read}"
    numbers = [name for name, type_ in kernel.signature.items() if not type_.startswith("*")]
    pointers = [[f"{name}_ptr" for name in side] for side in (operation.inputs, operation.outputs)]
    order = [*pointers[0], *numbers, *pointers[1]]
    assert sorted(order) == sorted(names), (order, names)
    declared = dict(zip(names, lines, strict=False))
    ordered = ",\n".join(declared[name] for name in order)
    return ptx[: found.start("parameters")] + ordered + ptx[found.end("parameters") :]
