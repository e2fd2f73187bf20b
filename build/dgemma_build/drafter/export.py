"""Build a drafter's engine directory: graph, weights, manifest. Knows no network's mathematics."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from dgemma_build.checkpoint import Checkpoint
from dgemma_build.data_file import allocate, journal_of, size_of, write_weights
from dgemma_build.drafter.checkpoint import DrafterCheckpoint
from dgemma_build.drafter.graph import author_drafter
from dgemma_build.progress import Progress, Silent
from dgemma_runtime.contract import MANIFEST_FILE, file_sha256
from dgemma_runtime.drafter_manifest import DrafterManifest
from dgemma_runtime.errors import ConfigurationError

MODEL_FILE, DATA_FILE = "model.onnx", "model.onnx.data"
BACKEND, PRECISION = "onnxruntime", "fp32"


@dataclass(frozen=True)
class DrafterRequest:
    """What to build."""

    drafter: Path  # checkpoint directory
    denoiser: Path  # checkpoint directory
    output: Path
    backend: str = BACKEND
    precision: str = PRECISION


def build_drafter(request: DrafterRequest, progress: Progress | None = None) -> DrafterManifest:
    """Build into a directory beside `output` and move it there; nothing half-written is ever loadable.

    Raises CheckpointError or ConfigurationError, with the old `output` untouched.
    """
    progress, output = progress or Silent(), request.output
    for option, given, known in (
        ("--backend", request.backend, BACKEND),
        ("--precision", request.precision, PRECISION),
    ):
        if given != known:
            raise ConfigurationError(f"{option} {given}: drafters are built for {BACKEND} in {PRECISION}; leave it out")
    foreign = output.exists() and not (output / MANIFEST_FILE).exists()
    if foreign and (not output.is_dir() or any(output.iterdir())):
        raise ConfigurationError(f"--output {output}: exists and is not an engine directory; choose another")
    progress.stage("hashing the checkpoint")
    denoiser = Checkpoint(request.denoiser)
    digest = denoiser.sha256()
    drafter = DrafterCheckpoint(request.drafter, denoiser.config, digest)
    staging = output.with_name(output.name + ".partial")
    if staging.exists():
        shutil.rmtree(staging)
    staging.mkdir(parents=True)
    manifest = _build(request, denoiser, drafter, digest, staging, progress)
    if output.exists():
        shutil.rmtree(output)
    staging.replace(output)
    return manifest


def _build(
    request: DrafterRequest,
    denoiser: Checkpoint,
    drafter: DrafterCheckpoint,
    denoiser_sha256: str,
    directory: Path,
    progress: Progress,
) -> DrafterManifest:
    config, data = drafter.config, directory / DATA_FILE
    graph = author_drafter(config, denoiser.config, drafter, denoiser)
    placed = graph.placed()
    data.touch()  # the graph's check asks for it
    graph.save(directory / MODEL_FILE, DATA_FILE, "dgemma-build", {"precision": request.precision})
    size = size_of(placed)
    free = shutil.disk_usage(directory).free
    if size > free:
        raise ConfigurationError(
            f"--output {request.output}: the weights need {size / 1e9:.1f} GB and the disk has {free / 1e9:.1f} GB "
            "free; make room or choose another"
        )
    allocate(data, size)
    progress.stage(f"writing {len(graph.weights):,} weights", size)
    digest = write_weights(data, placed, progress.advance)
    journal_of(data).unlink(missing_ok=True)
    onnx_sha256 = file_sha256(directory / MODEL_FILE)
    manifest = DrafterManifest(
        denoiser=request.denoiser.resolve().name,
        denoiser_sha256=denoiser_sha256,
        drafter=request.drafter.resolve().name,
        drafter_sha256=drafter.sha256(),
        vocab_size=config.vocab_size,
        canvas_length=config.canvas_length,
        reads=config.reads,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_attention_heads=config.num_attention_heads,
        denoiser_hidden_size=config.denoiser_hidden_size,
        backend=request.backend,
        backend_version=version(BACKEND),
        target="cpu",
        precision=request.precision,
        onnx_sha256=onnx_sha256,
        files={MODEL_FILE: onnx_sha256, DATA_FILE: digest},
    )
    manifest.save(directory)
    return manifest
