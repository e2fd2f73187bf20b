"""Every kernel compiles for Hopper at the released model's sizes, without a GPU: no spills, shared memory that fits.

In a process of its own, because in this one Triton interprets; it is the command that users run.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dgemma_build.kernels import compile as command_module
from dgemma_build.kernels.catalogue import released_kernels
from dgemma_build.kernels.compile import Report

SHARED_LIMIT = 227 * 1024  # bytes
NO_PRODUCT = {"head_choose", "head_sum", "experts_sort", "experts_sum", "attention_sum"}
NO_PRODUCT |= {"choose_experts", "add_norm", "end_layer", "gated_rows", "quantise_rows", "rotate_heads"}


def command(*arguments: str, cache: Path) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(cache)
    line = [sys.executable, "-m", "dgemma_build.kernels.compile", *arguments]
    return subprocess.run(line, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], Path]:
    """One report per kernel, and the directory with what was kept of them."""
    output = tmp_path_factory.mktemp("kernels")
    result = command("--json", "--output", str(output), cache=tmp_path_factory.mktemp("cache"))
    assert result.returncode == 0, result.stdout + result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()], output


def test_every_kernel_of_the_catalogue_is_compiled(compiled: tuple[list[dict[str, Any]], Path]) -> None:
    reports, _ = compiled
    named = [(report["variant"], report["kernel"]) for report in reports]
    assert named == [(variant, kernel.name) for variant, kernel in released_kernels()]
    assert len(set(named)) == len(named)


def test_nothing_spills_and_shared_memory_fits(compiled: tuple[list[dict[str, Any]], Path]) -> None:
    for report in compiled[0]:
        assert report["spill_stores"] == report["spill_loads"] == 0, report
        assert 0 <= report["shared"] <= SHARED_LIMIT, report
        assert 0 < report["registers"] <= 255, report


def test_products_run_on_the_matrix_units(compiled: tuple[list[dict[str, Any]], Path]) -> None:
    for report in compiled[0]:
        assert (report["matrix_instructions"] > 0) == (report["kernel"] not in NO_PRODUCT), report


def test_what_products_read_is_copied_asynchronously(compiled: tuple[list[dict[str, Any]], Path]) -> None:
    """Address arithmetic that hides contiguity turns copies into loads of single values, many times slower."""
    for report in compiled[0]:
        if report["kernel"] not in NO_PRODUCT:
            assert report["async_copies"] >= 8, report
            assert report["narrow_loads"] <= 8, report  # int4 has two scales a thread and matrix


def test_what_a_plugin_needs_is_kept(compiled: tuple[list[dict[str, Any]], Path]) -> None:
    reports, output = compiled
    for report in reports:
        stem = f"{report['kernel']}-{report['variant']}"
        description = json.loads((output / f"{stem}.json").read_text())
        ptx = (output / f"{stem}.ptx").read_text()
        assert f".visible .entry {description['entry']}(" in ptx
        assert ".target sm_90a" in ptx
        assert "cvt.bf16.f16" not in ptx  # one instruction a value, on a unit of a quarter of the others' rate
        assert description["threads"] == 32 * report["warps"]
        assert (output / f"{stem}.cubin").read_bytes().startswith(b"\x7fELF")


def test_the_table_is_for_people_and_a_name_selects(tmp_path: Path) -> None:
    result = command("--only", "head_sum", cache=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "registers" in result.stdout
    assert "head_sum" in result.stdout
    assert "head_tiles" not in result.stdout


def test_an_unknown_name_is_an_error(tmp_path: Path) -> None:
    result = command("--only", "tail", cache=tmp_path)
    assert result.returncode == 2
    assert "head_tiles" in result.stderr


@pytest.mark.parametrize(
    ("shared", "stores", "loads", "code"),
    [(SHARED_LIMIT, 0, 0, 0), (SHARED_LIMIT + 1, 0, 0, 1), (0, 4, 0, 1), (0, 0, 4, 1)],
)
def test_what_does_not_fit_fails_the_command(
    monkeypatch: pytest.MonkeyPatch, shared: int, stores: int, loads: int, code: int
) -> None:
    made = Report("one", "bf16", 4, 2, 100, stores, loads, shared, 8, 8, 0)
    monkeypatch.setattr(command_module, "reports", lambda kernels, output: iter([made]))
    monkeypatch.setattr(sys, "argv", ["compile"])
    with pytest.raises(SystemExit) as ended:
        command_module.main()
    assert ended.value.code == code
