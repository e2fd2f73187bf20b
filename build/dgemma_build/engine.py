"""Build an engine directory from a checkpoint: graph, tokenizer files, manifest. Knows the backends by name."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dgemma_build.backends import backend_for
from dgemma_build.checkpoint import Checkpoint
from dgemma_build.graph import write_graph
from dgemma_runtime.contract import MANIFEST_FILE, Manifest, file_sha256
from dgemma_runtime.errors import CheckpointError, ConfigurationError

MODEL_FILE = "model.onnx"
# What the server reads besides the engine; the chat template may be absent, then only plain prompts are served.
_REQUIRED_FILES = ("tokenizer.json", "generation_config.json")
_OPTIONAL_FILES = ("tokenizer_config.json", "chat_template.jinja")


@dataclass(frozen=True)
class BuildRequest:
    """What to build; the defaults are the checkpoint's own limits."""

    checkpoint: Path
    output: Path
    backend: str = "onnxruntime"
    precision: str = "fp32"
    max_model_len: int | None = None  # tokens
    max_batch_size: int | None = None  # canvases


Progress = Callable[[str], None]


def build_engine(request: BuildRequest, progress: Progress) -> Manifest:
    """Build into a directory beside `output` and move it there; nothing half-written is ever loadable.

    Raises CheckpointError or ConfigurationError, with the old `output` untouched.
    """
    checkpoint = Checkpoint(request.checkpoint)
    for name in _REQUIRED_FILES:
        if not (request.checkpoint / name).is_file():
            raise CheckpointError(f"{request.checkpoint / name}: not found; the server needs it")
    output = request.output
    if output.exists() and not (output / MANIFEST_FILE).exists() and any(output.iterdir()):
        raise ConfigurationError(f"--output {output}: exists and is not an engine directory; choose another")
    staging = output.with_name(output.name + ".partial")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        manifest = _build(request, checkpoint, staging, progress)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    if output.exists():
        shutil.rmtree(output)
    staging.replace(output)
    return manifest


def _build(request: BuildRequest, checkpoint: Checkpoint, directory: Path, progress: Progress) -> Manifest:
    longest = _max_model_len(request, checkpoint)
    backend = backend_for(request.backend, request.precision)
    progress("hashing the checkpoint")
    digest = checkpoint.sha256()
    count, left_out = len(list(checkpoint.names())), len(checkpoint.left_out)
    progress(f"writing the graph: {count} tensors, {left_out} of the vision tower left out")
    write_graph(checkpoint, directory / MODEL_FILE, backend.lowering(checkpoint.config, longest))
    onnx_sha256 = file_sha256(directory / MODEL_FILE)
    progress(f"building with {request.backend}")
    backend.build(directory, checkpoint.config, request.max_batch_size or 0)
    for name in (*_REQUIRED_FILES, *_OPTIONAL_FILES):
        if (request.checkpoint / name).is_file():
            shutil.copyfile(request.checkpoint / name, directory / name)
    progress("hashing the engine")
    manifest = Manifest(
        model=checkpoint.config.spec,
        checkpoint=request.checkpoint.resolve().name,
        checkpoint_sha256=digest,
        backend=request.backend,
        backend_version=backend.version,
        target=backend.target,
        precision=request.precision,
        onnx_sha256=onnx_sha256,
        max_model_len=longest,
        max_batch_size=request.max_batch_size or 0,
        files={path.name: file_sha256(path) for path in sorted(directory.iterdir())},
        generation_defaults=checkpoint.generation_defaults(),
    )
    manifest.save(directory)
    return manifest


def _max_model_len(request: BuildRequest, checkpoint: Checkpoint) -> int:
    spec = checkpoint.config.spec
    longest = spec.max_position_embeddings if request.max_model_len is None else request.max_model_len
    if not spec.canvas_length < longest <= spec.max_position_embeddings:
        raise ConfigurationError(
            f"--max-model-len {longest}: must be more than one canvas ({spec.canvas_length} tokens) and at most the "
            f"checkpoint's {spec.max_position_embeddings}"
        )
    if request.max_batch_size is not None and request.max_batch_size < 1:
        raise ConfigurationError(f"--max-batch-size {request.max_batch_size}: must be at least 1")
    return longest
