"""The command `dgemma-build plan`. Knows its options and where output goes; the arithmetic is elsewhere."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console, RenderableType

from dgemma_build.backends import PRECISIONS as BUILT
from dgemma_build.plan.cards import CARDS, cards_named, given_card
from dgemma_build.plan.host import planned_host_memory
from dgemma_build.plan.options import DEFAULT_GROUP, DEFAULT_RESERVE_GB, KV_PRECISIONS, PRECISIONS, PlanOptions
from dgemma_build.plan.planner import Model, context_lengths, make_plan
from dgemma_build.plan.released import model_config
from dgemma_build.plan.report import host_json, render, render_host, to_json
from dgemma_runtime.errors import ConfigurationError

_DEFAULT_PRECISIONS = ["bf16", "fp8", "int4"]
_CPU_BATCH = 8  # the runtime's default
_WIDTH = 120  # columns, of what does not go to a terminal

Checkpoint = Annotated[
    Path | None,
    typer.Option(help="Checkpoint directory; only its config.json is read.", show_default="the released 26B-A4B"),
]
Gpu = Annotated[list[str] | None, typer.Option(help=f"{', '.join(CARDS)}; may be repeated.", show_default="all")]
MemoryGb = Annotated[float | None, typer.Option(help="A GPU of given numbers: memory, 10^9 bytes.")]
BandwidthGbs = Annotated[float | None, typer.Option(help="Its bandwidth, 10^9 bytes per second.")]
Tflops = Annotated[float | None, typer.Option(help="Its dense TFLOPS at the precision asked for.")]
Precision = Annotated[
    list[str] | None,
    typer.Option(help=f"{', '.join(PRECISIONS)}; may be repeated.", show_default=", ".join(_DEFAULT_PRECISIONS)),
]
KvPrecision = Annotated[str, typer.Option(help=f"{', '.join(KV_PRECISIONS)}.", show_default="as the activations")]
Int4GroupSize = Annotated[int, typer.Option(help="Weights that share a scale.")]
MaxBatchSize = Annotated[int | None, typer.Option(help="Canvases in one step.", show_default="as many as fit")]
MaxModelLen = Annotated[
    int | None, typer.Option(help="Tokens, prompt and output together.", show_default="the model's")
]
Plugins = Annotated[bool, typer.Option("--plugins", help="With experts and head as fused kernels: no fp32 logits.")]
ReserveGb = Annotated[float, typer.Option(help="Memory that CUDA and the library take for themselves.")]
Cpu = Annotated[
    bool,
    typer.Option("--cpu", help="Peak memory of the onnxruntime engine on a CPU instead, by use; in its precisions."),
]
Json = Annotated[bool, typer.Option("--json", help="JSON instead of tables.")]
Picture = Annotated[Path | None, typer.Option(help="Also draw the memory as SVG into this file.")]


def plan_command(
    checkpoint: Checkpoint = None,
    gpu: Gpu = None,
    memory_gb: MemoryGb = None,
    bandwidth_gbs: BandwidthGbs = None,
    tflops: Tflops = None,
    precision: Precision = None,
    kv_precision: KvPrecision = "",
    int4_group_size: Int4GroupSize = DEFAULT_GROUP,
    max_batch_size: MaxBatchSize = None,
    max_model_len: MaxModelLen = None,
    plugins: Plugins = False,
    reserve_gb: ReserveGb = DEFAULT_RESERVE_GB,
    cpu: Cpu = False,
    json_output: Json = False,
    picture: Picture = None,
) -> None:
    """Say what would fit on a GPU, and how fast a step could be, before anything is built."""
    if cpu:
        gpu_only = {"--gpu": gpu, "--memory-gb": memory_gb, "--picture": picture, "--kv-precision": kv_precision}
        _plan_cpu(checkpoint, precision, max_batch_size, max_model_len, json_output, gpu_only)
        return
    given = given_card(memory_gb, bandwidth_gbs, tflops)
    named = cards_named(gpu if gpu is not None else [] if given else list(CARDS))
    rest = (kv_precision, int4_group_size, max_batch_size, max_model_len, plugins, reserve_gb)
    recipes = [PlanOptions(name, *rest) for name in dict.fromkeys(precision or _DEFAULT_PRECISIONS)]
    model = Model(*model_config(checkpoint))
    plans = make_plan(model, recipes, [*named, *([given] if given else [])])
    _show(to_json(model, plans) if json_output else render(model, plans))
    if picture is not None:
        from dgemma_build.plan.picture import draw  # matplotlib comes with the extra `bench` only

        draw(model, plans, picture)


def _plan_cpu(
    checkpoint: Path | None,
    precisions: list[str] | None,
    batch: int | None,
    max_model_len: int | None,
    as_json: bool,
    gpu_only: dict[str, Any],
) -> None:
    for option, value in gpu_only.items():
        if value:
            raise ConfigurationError(f"{option}: says nothing of a CPU; leave it out with --cpu")
    if batch is not None and batch < 1:
        raise ConfigurationError(f"--max-batch-size {batch}: must be at least 1")
    model = Model(*model_config(checkpoint))
    lengths, batch = context_lengths(model, max_model_len), batch or _CPU_BATCH
    plans = {
        (precision, length): planned_host_memory(model.config, precision, batch, length)
        for precision in dict.fromkeys(precisions or BUILT["onnxruntime"])
        for length in lengths
    }
    _show(host_json(model, batch, plans) if as_json else render_host(model, batch, plans))


def _show(output: dict[str, Any] | RenderableType) -> None:
    """On stdout; tables as wide as the terminal, and wide enough where there is none."""
    if isinstance(output, dict):
        typer.echo(json.dumps(output, indent=2))
        return
    fixed = not sys.stdout.isatty() and "COLUMNS" not in os.environ
    Console(width=_WIDTH if fixed else None).print(output)
