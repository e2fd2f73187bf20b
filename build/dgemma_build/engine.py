"""Build an engine directory from a checkpoint: graph, tokenizer files, manifest. Knows the backends by name."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dgemma_build.checkpoint import Checkpoint
from dgemma_build.graph import Lowering, write_graph
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
    """Build into a temporary directory beside `output` and move it there; nothing half-written is ever loadable."""
    checkpoint = Checkpoint(request.checkpoint)
    for name in _REQUIRED_FILES:
        if not (request.checkpoint / name).is_file():
            raise CheckpointError(f"{request.checkpoint / name}: not found; the server needs it")
    spec = checkpoint.config.spec
    longest = request.max_model_len or spec.max_position_embeddings
    if not spec.canvas_length < longest <= spec.max_position_embeddings:
        raise ConfigurationError(
            f"--max-model-len {longest}: must be more than one canvas ({spec.canvas_length} tokens) and at most the "
            f"checkpoint's {spec.max_position_embeddings}"
        )
    from dgemma_build.backends import backend_for  # the optional libraries are imported by the backend that is asked for

    backend = backend_for(request.backend, request.precision)
    staging = request.output.with_name(request.output.name + ".partial")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    progress("hashing the checkpoint")
    digest = checkpoint.sha256()
    progress(f"writing the graph ({len(list(checkpoint.names()))} tensors; {len(checkpoint.left_out)} vision tensors left out)")
    write_graph(checkpoint, staging / MODEL_FILE, backend.lowering)
    onnx_sha256 = file_sha256(staging / MODEL_FILE)
    progress(f"building with {request.backend}")
    backend.build(staging, checkpoint.config, longest, request.max_batch_size or 0)
    for name in (*_REQUIRED_FILES, *_OPTIONAL_FILES):
        if (request.checkpoint / name).is_file():
            shutil.copyfile(request.checkpoint / name, staging / name)
    progress("hashing the engine")
    files = {path.name: file_sha256(path) for path in sorted(staging.iterdir())}
    manifest = Manifest(
        model=spec,
        checkpoint=request.checkpoint.resolve().name,
        checkpoint_sha256=digest,
        backend=request.backend,
        backend_version=backend.version,
        target=backend.target,
        precision=request.precision,
        onnx_sha256=onnx_sha256,
        max_model_len=longest,
        max_batch_size=request.max_batch_size or 0,
        files=files,
        generation_defaults=checkpoint.generation_defaults(),
    )
    manifest.save(staging)
    if request.output.exists():
        if not (request.output / MANIFEST_FILE).exists() and any(request.output.iterdir()):
            raise ConfigurationError(f"--output {request.output}: exists and is not an engine directory; choose another")
        shutil.rmtree(request.output)
    staging.replace(request.output)
    return manifest
