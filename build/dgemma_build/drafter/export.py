"""Build a drafter's engine directory: graph, weights, manifest. Knows no network's mathematics."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from dgemma_build.backends import Backend, backend_for
from dgemma_build.checkpoint import Checkpoint
from dgemma_build.data_file import allocate, journal_of, size_of, write_weights
from dgemma_build.drafter.checkpoint import DrafterCheckpoint
from dgemma_build.drafter.graph import author_drafter
from dgemma_build.engine import longest_context
from dgemma_build.progress import Progress, Silent
from dgemma_runtime.contract import MANIFEST_FILE, file_sha256
from dgemma_runtime.drafter_manifest import DrafterManifest
from dgemma_runtime.errors import ConfigurationError

MODEL_FILE, DATA_FILE = "model.onnx", "model.onnx.data"
PRECISIONS = {"onnxruntime": ("fp32",), "tensorrt": ("bf16", "fp32"), "tensorrt_rtx": ("bf16", "fp32")}


@dataclass(frozen=True)
class DrafterRequest:
    """What to build."""

    drafter: Path  # checkpoint directory
    denoiser: Path  # checkpoint directory
    output: Path
    backend: str = "onnxruntime"
    precision: str = "fp32"
    kv_precision: str = ""  # of the denoiser's keys and values; "": the backend's own
    max_model_len: int | None = None  # tokens; None: the checkpoint's
    max_batch_size: int | None = None  # canvases; None: as for a denoiser


def build_drafter(
    request: DrafterRequest, progress: Progress | None = None, backend: Backend | None = None
) -> DrafterManifest:
    """Build into a directory beside `output` and move it there; nothing half-written is ever loadable.

    `backend` takes the place of the one that the request names.
    Raises CheckpointError or ConfigurationError, with the old `output` untouched.
    """
    progress, output = progress or Silent(), request.output
    _check_options(request)
    backend = backend or backend_for(request.backend, request.precision, request.kv_precision)
    foreign = output.exists() and not (output / MANIFEST_FILE).exists()
    if foreign and (not output.is_dir() or any(output.iterdir())):
        raise ConfigurationError(f"--output {output}: exists and is not an engine directory; choose another")
    progress.stage("hashing the checkpoint")
    denoiser = Checkpoint(request.denoiser)
    digest = denoiser.sha256()
    drafter = DrafterCheckpoint(request.drafter, denoiser.config, digest)
    longest = longest_context(request.max_model_len, request.max_batch_size, denoiser)
    staging = output.with_name(output.name + ".partial")
    if staging.exists():
        shutil.rmtree(staging)
    staging.mkdir(parents=True)
    manifest = _Build(request, denoiser, drafter, digest, backend, longest, staging, progress).run()
    if output.exists():
        shutil.rmtree(output)
    staging.replace(output)
    return manifest


def _check_options(request: DrafterRequest) -> None:
    """Raises ConfigurationError for what drafters are not built in."""
    if request.backend not in PRECISIONS:
        raise ConfigurationError(
            f"--backend {request.backend}: drafters are built for {', '.join(PRECISIONS)}; choose one of these"
        )
    if request.precision not in (known := PRECISIONS[request.backend]):
        raise ConfigurationError(
            f"--precision {request.precision}: drafters are built in {' or '.join(known)} for {request.backend}"
        )
    if request.backend == "onnxruntime":
        for name in ("max_model_len", "max_batch_size"):
            if value := getattr(request, name):
                option = f"--{name.replace('_', '-')}"
                raise ConfigurationError(f"{option} {value}: onnxruntime's drafters have no such limit; leave it out")


@dataclass(frozen=True)
class _Build:
    """One run in a staging directory."""

    request: DrafterRequest
    denoiser: Checkpoint
    drafter: DrafterCheckpoint
    denoiser_sha256: str
    backend: Backend
    max_model_len: int  # tokens
    directory: Path
    progress: Progress

    def run(self) -> DrafterManifest:
        directory, progress, request = self.directory, self.progress, self.request
        self._write_graph()
        onnx_sha256 = file_sha256(directory / MODEL_FILE)
        progress.stage(f"building with {request.backend}")
        config = self.denoiser.config
        rows = self.backend.limits(config, request.max_batch_size).max_batch_size
        length = config.spec.canvas_length
        scratch = self.backend.build_drafter(directory, length, self.max_model_len, rows, progress)
        return self._finish(onnx_sha256, rows, scratch)

    def _write_graph(self) -> None:
        directory, progress, data = self.directory, self.progress, self.directory / DATA_FILE
        denoiser, lowering = self.denoiser, self.backend.lowering()
        graph = author_drafter(self.drafter.config, denoiser.config, self.drafter, denoiser, lowering)
        placed = graph.placed()
        data.touch()  # the graph's check asks for it
        graph.save(directory / MODEL_FILE, DATA_FILE, "dgemma-build", {"precision": self.request.precision})
        size = size_of(placed)
        needed = 2 * size if self.backend.build_seconds_per_gb else size  # an engine of its own beside the weights
        free = shutil.disk_usage(directory).free
        if needed > free:
            raise ConfigurationError(
                f"--output {self.request.output}: the build needs {needed / 1e9:.1f} GB and the disk has "
                f"{free / 1e9:.1f} GB free; make room or choose another"
            )
        allocate(data, size)
        progress.stage(f"writing {len(graph.weights):,} weights", size)
        write_weights(data, placed, progress.advance)
        journal_of(data).unlink(missing_ok=True)

    def _finish(self, onnx_sha256: str, rows: int, scratch_bytes: int) -> DrafterManifest:
        request, config, directory = self.request, self.drafter.config, self.directory
        manifest = DrafterManifest(
            denoiser=request.denoiser.resolve().name,
            denoiser_sha256=self.denoiser_sha256,
            drafter=request.drafter.resolve().name,
            drafter_sha256=self.drafter.sha256(),
            vocab_size=config.vocab_size,
            canvas_length=config.canvas_length,
            reads=config.reads,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_attention_heads=config.num_attention_heads,
            denoiser_hidden_size=config.denoiser_hidden_size,
            backend=request.backend,
            backend_version=self.backend.version,
            target=self.backend.target,
            precision=request.precision,
            kv_dtype=self.backend.kv_dtype,
            max_model_len=self.max_model_len if rows else 0,
            max_batch_size=rows,
            scratch_bytes=scratch_bytes,
            onnx_sha256=onnx_sha256,
            files={path.name: file_sha256(path) for path in sorted(directory.iterdir())},
        )
        manifest.save(directory)
        return manifest
