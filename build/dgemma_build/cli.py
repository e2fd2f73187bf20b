"""The command `dgemma-build`: engine, plan, verify. Knows how to talk to a person; the work is elsewhere."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from dgemma_build.backends import PRECISIONS
from dgemma_build.bars import Bars
from dgemma_build.drafter.export import DrafterRequest, build_drafter
from dgemma_build.engine import BuildRequest, build_engine
from dgemma_build.plan.command import plan_command
from dgemma_build.tensorrt_llm import FLAGS
from dgemma_runtime.errors import ConfigurationError, DGemmaError

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help="Build engines for DiffusionGemma."
)
console = Console(stderr=True)

app.command("plan")(plan_command)

CheckpointOption = Annotated[
    Path, typer.Option("--checkpoint", "--checkpoint_dir", help="Checkpoint directory in transformers' format.")
]


@app.command()
def engine(
    checkpoint: CheckpointOption,
    output: Annotated[
        Path,
        typer.Option("--output", "--output_dir", help="Engine directory to write; replaced as a whole when complete."),
    ],
    backend: Annotated[str, typer.Option(help=f"{', '.join(PRECISIONS)}.")] = "onnxruntime",
    precision: Annotated[
        str | None,
        typer.Option(
            help="Of the large matrices: fp32, int8, int4 (onnxruntime); bf16, fp8, int4, fp32 (tensorrt and _rtx).",
            show_default="the backend's first",
        ),
    ] = None,
    kv_precision: Annotated[
        str, typer.Option(help="Of keys and values: bf16 or fp8 (not onnxruntime).", show_default="bf16; else fp32")
    ] = "",
    max_model_len: Annotated[
        int | None,
        typer.Option(
            "--max-model-len",
            "--max_seq_len",
            help="Tokens, prompt and output together.",
            show_default="the checkpoint's",
        ),
    ] = None,
    max_batch_size: Annotated[
        int | None,
        typer.Option(
            "--max-batch-size", "--max_batch_size", help="Canvases in one step.", show_default="chosen when serving"
        ),
    ] = None,
    drafter: Annotated[
        Path | None,
        typer.Option(
            help="Drafter's checkpoint directory: build its engine, for the denoiser that --checkpoint names."
        ),
    ] = None,
    plugins: Annotated[
        bool, typer.Option("--plugins", help="tensorrt on Hopper: experts and head as kernels of this project.")
    ] = False,
) -> None:
    """Turn a checkpoint into a directory that the server loads."""
    chosen = precision or PRECISIONS.get(backend, ("",))[0]
    if drafter is not None:
        if plugins:
            raise ConfigurationError("--plugins: is the denoiser's; leave it out with --drafter")
        limits = (max_model_len, max_batch_size)
        _drafter_engine(DrafterRequest(drafter, checkpoint, output, backend, chosen, kv_precision, *limits))
        return
    request = BuildRequest(checkpoint, output, backend, chosen, kv_precision, plugins, max_model_len, max_batch_size)
    started = time.monotonic()
    with Bars(console) as bars:
        manifest = build_engine(request, bars)
    size = sum(file.stat().st_size for file in output.iterdir()) / 1e6
    console.print(
        f"{output}: {manifest.backend} {manifest.backend_version} for {manifest.target}, {manifest.precision}, "
        f"{manifest.max_model_len:,} tokens of context, {size:,.1f} MB, {time.monotonic() - started:.0f} s"
    )


def _drafter_engine(request: DrafterRequest) -> None:
    with Bars(console) as bars:
        manifest = build_drafter(request, bars)
    size = sum(file.stat().st_size for file in request.output.iterdir()) / 1e6
    console.print(
        f"{request.output}: drafter for {manifest.denoiser}, {manifest.backend} {manifest.backend_version}, "
        f"{manifest.precision}, {size:,.1f} MB"
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
    """Entry point: errors we raise on purpose, and those of files, are one line on stderr and exit code 2."""
    try:
        for flag in FLAGS:
            if not flag.ours and any(word.split("=")[0] == flag.name for word in sys.argv[1:]):
                raise ConfigurationError(f"{flag.name}: there is no such option here ({flag.meaning}); leave it out")
        app()
    except (DGemmaError, OSError) as error:
        message = " ".join(str(error).split())  # libraries answer in several lines
        console.print(Text.assemble(("error:", "bold red"), f" {message}"), soft_wrap=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
