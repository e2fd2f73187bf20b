"""The command `dgemma-build`: engine, plan, verify. Knows how to talk to a person; the work is elsewhere."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from dgemma_build.bars import Bars
from dgemma_build.engine import BuildRequest, build_engine
from dgemma_build.plan.command import plan_command
from dgemma_runtime.errors import DGemmaError

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help="Build engines for DiffusionGemma."
)
console = Console(stderr=True)

app.command("plan")(plan_command)

CheckpointOption = Annotated[Path, typer.Option(help="Checkpoint directory in transformers' format.")]


@app.command()
def engine(
    checkpoint: CheckpointOption,
    output: Annotated[Path, typer.Option(help="Engine directory to write; replaced as a whole when complete.")],
    backend: Annotated[str, typer.Option(help="onnxruntime or tensorrt_rtx.")] = "onnxruntime",
    precision: Annotated[
        str, typer.Option(help="fp32, int8 or int4 (onnxruntime); bf16 or fp16 (tensorrt_rtx).")
    ] = "fp32",
    max_model_len: Annotated[
        int | None, typer.Option(help="Tokens, prompt and output together.", show_default="the checkpoint's")
    ] = None,
    max_batch_size: Annotated[
        int | None, typer.Option(help="Canvases in one step.", show_default="chosen when serving")
    ] = None,
) -> None:
    """Turn a checkpoint into a directory that the server loads."""
    request = BuildRequest(checkpoint, output, backend, precision, max_model_len, max_batch_size)
    started = time.monotonic()
    with Bars(console) as bars:
        manifest = build_engine(request, bars)
    size = sum(file.stat().st_size for file in output.iterdir()) / 1e6
    console.print(
        f"{output}: {manifest.backend} {manifest.backend_version} for {manifest.target}, {manifest.precision}, "
        f"{manifest.max_model_len:,} tokens of context, {size:,.1f} MB, {time.monotonic() - started:.0f} s"
    )


@app.command()
def verify(
    checkpoint: CheckpointOption,
    engine_directory: Annotated[Path, typer.Option("--engine", help="Engine directory built from that checkpoint.")],
    output: Annotated[Path | None, typer.Option(help="Where to write the report (JSON); stdout without.")] = None,
) -> None:
    """Compare an engine step by step with transformers' own model and write a parity report."""
    from dgemma_build.verify import verify_engine  # needs torch and transformers, which building does not

    report = verify_engine(checkpoint, engine_directory)
    text = json.dumps(report, indent=2)
    if output is None:
        typer.echo(text)
    else:
        output.write_text(text + "\n")
    if not report["passed"]:
        raise typer.Exit(1)


def main() -> None:
    """Entry point: errors we raise on purpose are one line on stderr and exit code 2."""
    try:
        app()
    except DGemmaError as error:
        console.print(f"[bold red]error:[/] {error}", highlight=False)
        sys.exit(2)


if __name__ == "__main__":
    main()
