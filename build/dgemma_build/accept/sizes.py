"""Rows about sizes: the plan against what is built and run, and the export of a checkpoint of real dimensions."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil

from dgemma_build.accept.table import GENERATED, Result, Row, Setting
from dgemma_build.backends import backend_for
from dgemma_build.bench.peak_worker import serve_whole
from dgemma_build.checkpoint import Checkpoint
from dgemma_build.data_file import size_of
from dgemma_build.emulation import OnnxFunction
from dgemma_build.engine import BuildRequest, build_engine
from dgemma_build.graph import author_graph
from dgemma_build.plan.host import planned_host_memory
from dgemma_build.plan.options import PlanOptions
from dgemma_build.plan.runtime_memory import runtime_memory
from dgemma_build.plan.scratch import scratch_bytes
from dgemma_build.plan.weights import built_bytes
from dgemma_build.random_checkpoint import write_checkpoint
from dgemma_runtime.contract import Manifest
from dgemma_runtime.engines.tensorrt import TensorRtEngine
from dgemma_runtime.settings import RuntimeSettings, plan_limits

MEMORY_BAR, SPEED_BAR, RSS_BAR = 0.10, 0.5, 8e9
_CASES = (("fp32", 1024, 1), ("fp32", 2048, 4), ("int4", 6000, 2))  # precision, context, sequences
_GPU_CASES = (("bf16", 1024, 1), ("bf16", 2048, 4), ("fp8", 4096, 2))  # precision of keys and values, then the same
_PIECE = 16 * 2**20  # bytes


def _plan(setting: Setting) -> Result:
    """Weights as the plan counts them and as they stand in the graph; peaks of processes of their own."""
    checkpoint = Checkpoint(setting.checkpoint("demo"))
    wrong = []
    for precision in ("fp32", "int8", "int4"):
        lowering = backend_for("onnxruntime", precision).lowering()
        graph = author_graph(checkpoint.config, checkpoint, lowering)
        file = setting.engine("demo", precision) / "model.onnx.data"
        written = sum(len(piece.tobytes()) for weight in graph.weights.values() for piece in weight.pieces())
        if built_bytes(checkpoint.config, lowering) != written or size_of(graph.placed()) != file.stat().st_size:
            wrong.append(precision)
    ratios = {}
    for precision, context, batch in _CASES[:1] if setting.quick else _CASES:
        command = [sys.executable, "-m", "dgemma_build.bench.peak_worker", str(setting.engine("demo", precision))]
        peak = int(subprocess.run([*command, str(context), str(batch)], check=True, stdout=subprocess.PIPE).stdout)
        planned = planned_host_memory(checkpoint.config, precision, batch, context).peak
        ratios[f"{precision}, {batch} x {context}"] = peak / planned
    furthest = max(abs(ratio - 1) for ratio in ratios.values())
    figure = f"weights exact in {3 - len(wrong)} of 3 precisions, peak memory within {furthest:.1%}"
    return Result(figure, not wrong and furthest <= MEMORY_BAR, {"wrong": wrong, "peak_over_plan": ratios})


def _tensorrt_plan(setting: Setting) -> Result:
    """What the runtime's TensorRT engine allocates in ordinary memory, and what the builder says of its scratch."""
    config = Checkpoint(setting.checkpoint("demo")).config
    ratios = {}
    for kv, context, batch in _GPU_CASES[: 1 if setting.quick else None]:
        planned = runtime_memory(config.spec, PlanOptions("bf16", kv_precision=kv), batch, context)
        taken = _allocated(setting.emulated("demo", "bf16", kv), context, batch)
        ratios[f"{kv}, {batch} x {context}"] = taken / (planned.total - planned.opening)
    output = GENERATED / "rtx"
    request = BuildRequest(setting.checkpoint("demo"), output, "tensorrt_rtx", "bf16", max_batch_size=1)
    manifest = build_engine(request)
    shutil.rmtree(output)
    planned_scratch = scratch_bytes(config, PlanOptions("bf16"), 1, manifest.max_model_len).total
    scratch = manifest.scratch_bytes / planned_scratch
    furthest = max(abs(ratio - 1) for ratio in ratios.values())
    figure = f"allocations within {furthest:.1%}, scratch within {abs(scratch - 1):.1%}"
    details = {"allocated_over_plan": ratios, "scratch_over_plan": scratch}
    return Result(figure, max(furthest, abs(scratch - 1)) <= MEMORY_BAR, details)


def _allocated(directory: Path, context: int, batch: int) -> int:
    """Bytes of an engine that has served so many canvases at once; its weights lie elsewhere."""
    settings = RuntimeSettings(max_model_len=context, max_batch_size=batch, prefix_cache=False)
    device, load = OnnxFunction(directory, threads=2).on_host()
    engine = TensorRtEngine(directory, plan_limits(Manifest.load(directory), settings), device, load)
    serve_whole(engine, context)
    allocated = device.allocated_bytes
    engine.close()
    return allocated


def _export(setting: Setting) -> Result:
    """Two layers of the released dimensions in fp32; the disk's own speed before and after, same bytes, same folder."""
    folder = GENERATED / "real"
    shutil.rmtree(folder, ignore_errors=True)
    try:
        checkpoint = write_checkpoint(folder / "checkpoint", "real", layers=2, vocab_size=8192)
        output = folder / "engine"
        started = time.perf_counter()
        peak = _peak_of([sys.executable, "-m", "dgemma_build.cli", "engine", *_options(checkpoint, output)])
        seconds = time.perf_counter() - started
        size = (output / "model.onnx.data").stat().st_size
        shutil.rmtree(output)
        disk = _sequential_write(folder / "disk", size)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    share = size / seconds / disk
    figure = f"{size / seconds / 1e6:.0f} MB/s, {share:.2f} of the disk's {disk / 1e6:.0f}; peak {peak / 1e9:.2f} GB"
    details = {"bytes": size, "seconds": seconds, "disk_bytes_per_s": disk, "peak_rss_bytes": peak}
    return Result(figure, share >= SPEED_BAR and peak < RSS_BAR, details)


def _options(checkpoint: Path, output: Path) -> list[str]:
    return ["--checkpoint", str(checkpoint), "--output", str(output)]


def _peak_of(command: list[str]) -> int:
    """Run it; the largest resident memory that was seen, in bytes. Raises CalledProcessError."""
    peak = 0
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        watched = psutil.Process(process.pid)
        while process.poll() is None:
            try:
                peak = max(peak, watched.memory_info().rss)
            except psutil.NoSuchProcess:
                break
            time.sleep(0.05)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return peak


def _sequential_write(path: Path, size: int) -> float:
    """Bytes per second, to the disk and not just to memory."""
    piece = os.urandom(_PIECE)
    started = time.perf_counter()
    with path.open("wb") as file:
        for _ in range(size // _PIECE):
            file.write(piece)
        os.fsync(file.fileno())
    return size // _PIECE * _PIECE / (time.perf_counter() - started)


ROWS: tuple[Row, ...] = (
    Row("plan against built and running CPU engines, demo", "weights exact; peak within 10%", _plan),
    Row(
        "plan against TensorRT engine memory, demo",
        "what the engine allocates and the builder's scratch within 10%",
        _tensorrt_plan,
    ),
    Row(
        "export of a checkpoint of real dimensions, fp32",
        "at least 0.5 of the disk's sequential speed; under 8 GB of memory",
        _export,
        quick=False,
    ),
)
