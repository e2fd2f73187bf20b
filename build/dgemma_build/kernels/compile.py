"""Compile every kernel for the released model's sizes without a GPU, and report what ptxas says. Knows no tensors.

    python -m dgemma_build.kernels.compile [--json] [--output DIR] [--only NAME]

prints registers, spills and shared memory of each kernel for Hopper (sm_90), and with --output leaves PTX, cubin and
one JSON description per kernel, which is what a plugin needs to launch it.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import triton
from rich.console import Console
from rich.table import Table
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability
from triton.compiler import ASTSource

from dgemma_build.kernels.catalogue import released_kernels
from dgemma_build.kernels.launch import Kernel

TARGET = GPUTarget("cuda", 90, 32)
SHARED_LIMIT = 227 * 1024  # bytes a program may have on Hopper
WGMMA, ASYNC_COPY, NARROW_LOAD = r"wgmma\.mma_async", r"cp\.async\.c[ag]\.shared", r"ld\.global\.b(8|16) "
ALIGNED = [["tt.divisibility", 16]]


@dataclass(frozen=True)
class Report:
    """One compiled kernel, by ptxas."""

    kernel: str  # name of the function
    variant: str  # which of its configurations
    warps: int
    stages: int
    registers: int  # a thread
    spill_stores: int  # bytes
    spill_loads: int  # bytes
    shared: int  # bytes a program
    matrix_instructions: int  # wgmma in the PTX
    async_copies: int  # cp.async in the PTX: what a product reads should come by these
    narrow_loads: int  # loads of one or two bytes in the PTX

    @property
    def fits(self) -> bool:
        """Within Hopper's shared memory and without spills."""
        return self.shared <= SHARED_LIMIT and self.spill_stores == self.spill_loads == 0


def compile_kernel(kernel: Kernel) -> Any:
    """Triton's compiled kernel: `asm["ptx"]`, `asm["cubin"]`, `metadata`."""
    function = kernel.function
    names = list(function.arg_names)
    signature = {name: kernel.signature.get(name, "constexpr") for name in names}
    constants = {(names.index(name),): value for name, value in kernel.constants.items()}
    attributes = {(names.index(name),): ALIGNED for name, type_ in kernel.signature.items() if type_.startswith("*")}
    source = ASTSource(function, signature, constants, attributes)
    options = {"num_warps": kernel.warps, "num_stages": kernel.stages}
    return triton.compile(source, target=TARGET, options=options)


def ptxas_report(ptx: str) -> tuple[int, int, int]:
    """Registers a thread, bytes of spill stores and of spill loads, of the one kernel in `ptx`."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        command = [get_ptxas(TARGET.arch).path, "-v", f"--gpu-name={sm_arch_from_capability(TARGET.arch)}"]
        command += [str(source), "-o", str(Path(folder) / "kernel.cubin")]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", text)
    registers = re.search(r"Used (\d+) registers", text)
    assert spills, text
    assert registers, text
    return int(registers[1]), int(spills[1]), int(spills[2])


def report(variant: str, kernel: Kernel, output: Path | None = None) -> Report:
    """Compile one kernel; with `output`, keep what a launch needs there."""
    compiled = compile_kernel(kernel)
    ptx = compiled.asm["ptx"]
    registers, stores, loads = ptxas_report(ptx)
    result = Report(
        kernel.name,
        variant,
        kernel.warps,
        kernel.stages,
        registers,
        stores,
        loads,
        compiled.metadata.shared,
        *(len(re.findall(pattern, ptx)) for pattern in (WGMMA, ASYNC_COPY, NARROW_LOAD)),
    )
    if output is not None:
        _keep(output, result, kernel, compiled)
    return result


def _keep(output: Path, result: Report, kernel: Kernel, compiled: Any) -> None:
    output.mkdir(parents=True, exist_ok=True)
    stem = f"{result.kernel}-{result.variant}"
    (output / f"{stem}.ptx").write_text(compiled.asm["ptx"])
    (output / f"{stem}.cubin").write_bytes(compiled.asm["cubin"])
    description = {
        "entry": compiled.metadata.name,
        "target": "sm_90a",
        "threads": 32 * kernel.warps,
        "arguments": kernel.signature,
        "constants": kernel.constants,
        "triton": triton.__version__,
        **asdict(result),
    }
    (output / f"{stem}.json").write_text(json.dumps(description, indent=2) + "\n")


def reports(kernels: Iterable[tuple[str, Kernel]], output: Path | None = None) -> Iterator[Report]:
    for variant, kernel in kernels:
        yield report(variant, kernel, output)


def table(rows: Iterable[Report]) -> Table:
    """What a person reads."""
    shown = Table(title=f"sm_90, triton {triton.__version__}", title_justify="left")
    for heading in ("kernel", "variant"):
        shown.add_column(heading)
    for heading in ("warps", "stages", "registers", "spills, B", "shared, B", "wgmma", "async"):
        shown.add_column(heading, justify="right")
    for row in rows:
        spills = row.spill_stores + row.spill_loads
        numbers = (row.warps, row.stages, row.registers, spills, row.shared, row.matrix_instructions, row.async_copies)
        shown.add_row(row.kernel, row.variant, *(f"{n:,}" for n in numbers), style="" if row.fits else "bold red")
    return shown


def main() -> None:
    """Exit code 1 if a kernel spills or needs too much shared memory."""
    parser = argparse.ArgumentParser(prog="python -m dgemma_build.kernels.compile", description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON line a kernel on stdout instead of the table")
    parser.add_argument("--output", type=Path, help="directory for PTX, cubin and description of each kernel")
    parser.add_argument("--only", default="", help="only kernels whose name contains this")
    arguments = parser.parse_args()
    chosen = [(variant, kernel) for variant, kernel in released_kernels() if arguments.only in kernel.name]
    if not chosen:
        names = sorted({kernel.name for _, kernel in released_kernels()})
        parser.error(f"--only {arguments.only}: no such kernel; there are {', '.join(names)}")
    rows = []
    for row in reports(chosen, arguments.output):
        rows.append(row)
        if arguments.json:
            print(json.dumps(asdict(row)), flush=True)
    if not arguments.json:
        Console(width=120).print(table(rows))
    sys.exit(0 if all(row.fits for row in rows) else 1)


if __name__ == "__main__":
    main()
