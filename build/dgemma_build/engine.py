"""Build an engine directory: graph, weights, tokenizer files, manifest. Knows the backends by name."""

from __future__ import annotations

import errno
import json
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dgemma_build.backends import Backend, CallLimits, backend_for
from dgemma_build.checkpoint import Checkpoint
from dgemma_build.data_file import allocate, journal_of, size_of, write_weights
from dgemma_build.graph import author_graph
from dgemma_build.onnx_writer import PlacedWeight
from dgemma_build.progress import Progress, Silent
from dgemma_build.quantize import GroupFormat, quantize_rows
from dgemma_build.text_config import layer_values
from dgemma_runtime.contract import MANIFEST_FILE, Manifest, file_sha256
from dgemma_runtime.errors import CheckpointError, ConfigurationError

MODEL_FILE, DATA_FILE = "model.onnx", "model.onnx.data"
_RESUME_FILE = "resume.json"
_PROBE_BYTES = 64 * 2**20
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
    kv_precision: str = ""  # "": the backend's own
    plugins: bool = False  # see `tensorrt.recipe`
    max_model_len: int | None = None  # tokens
    max_batch_size: int | None = None  # canvases


def build_engine(request: BuildRequest, progress: Progress | None = None, backend: Backend | None = None) -> Manifest:
    """Build into a directory beside `output` and move it there; nothing half-written is ever loadable.

    A build that was interrupted while it wrote weights goes on where it stopped when it is asked for again. `backend`
    takes the place of the one that the request names.
    Raises CheckpointError or ConfigurationError, with the old `output` untouched.
    """
    progress = progress or Silent()
    checkpoint = Checkpoint(request.checkpoint)
    for name in _REQUIRED_FILES:
        if not (request.checkpoint / name).is_file():
            raise CheckpointError(f"{request.checkpoint / name}: not found; the server needs it")
    output = request.output
    foreign = output.exists() and not (output / MANIFEST_FILE).exists()
    if foreign and (not output.is_dir() or any(output.iterdir())):
        raise ConfigurationError(f"--output {output}: exists and is not an engine directory; choose another")
    longest = longest_context(request.max_model_len, request.max_batch_size, checkpoint)
    backend = backend or backend_for(request.backend, request.precision, request.kv_precision, request.plugins)
    staging = output.with_name(output.name + ".partial")
    staging.mkdir(parents=True, exist_ok=True)
    with _disk_errors(staging):
        manifest = _Build(request, checkpoint, backend, longest, staging, progress).run()
        if output.exists():
            shutil.rmtree(output)
        staging.replace(output)
    return manifest


@dataclass(frozen=True)
class _Build:
    """One run in a staging directory."""

    request: BuildRequest
    checkpoint: Checkpoint
    backend: Backend
    max_model_len: int  # tokens
    directory: Path
    progress: Progress

    def run(self) -> Manifest:
        progress, directory = self.progress, self.directory
        progress.stage("hashing the checkpoint")
        digest = self.checkpoint.sha256()
        progress.stage("writing the graph")
        lowering = self.backend.lowering()
        graph = author_graph(self.checkpoint.config, self.checkpoint, lowering)
        placed = graph.placed()
        graph_file = directory / (MODEL_FILE + ".new")
        size = size_of(placed)
        (directory / DATA_FILE).touch()  # the graph's check asks for it
        graph.save(graph_file, DATA_FILE, "dgemma-build", {"precision": self.request.precision})
        self._start_or_resume(graph_file, digest)
        self._estimate(placed, lowering.groups)
        allocate(directory / DATA_FILE, size)
        count, left_out = len(graph.weights), len(self.checkpoint.left_out)
        progress.stage(f"writing {count:,} weights, {left_out} tensors of the vision tower left out", size)
        hashes = {DATA_FILE: write_weights(directory / DATA_FILE, placed, progress.advance)}
        onnx_sha256 = file_sha256(directory / MODEL_FILE)
        progress.stage(f"building with {self.request.backend}")
        config = self.checkpoint.config
        limits = self.backend.limits(config, self.request.max_batch_size)
        scratch = self.backend.build(directory, config, self.max_model_len, limits, progress)
        return self._finish(digest, onnx_sha256, hashes, limits, scratch)

    def _start_or_resume(self, graph_file: Path, digest: str) -> None:
        """Keep the data file only where the same graph is to be filled from the same checkpoint."""
        directory = self.directory
        key = {"checkpoint_sha256": digest, "onnx_sha256": file_sha256(graph_file)}
        resume = directory / _RESUME_FILE
        same = resume.is_file() and _read(resume) == key
        for path in directory.iterdir():
            if path != graph_file and not (same and path.name in (DATA_FILE, journal_of(directory / DATA_FILE).name)):
                path.unlink()
        graph_file.replace(directory / MODEL_FILE)
        resume.write_text(json.dumps(key))
        if same:
            self.progress.say("going on with the weights of an interrupted build")

    def _estimate(self, placed: Sequence[PlacedWeight], form: GroupFormat | None) -> None:
        """Say what the build will take; raises ConfigurationError when the disk has no room for it."""
        size, data = size_of(placed), self.directory / DATA_FILE
        allocated = data.stat().st_blocks * 512 if data.exists() else 0
        free = shutil.disk_usage(self.directory).free + allocated
        slowness = self.backend.build_seconds_per_gb
        needed = 2 * size if slowness else size  # an engine of its own, for a while beside the graph's weights
        if needed > free:
            beside = " and the engine beside them" if slowness else ""
            raise ConfigurationError(
                f"--output {self.request.output}: the weights{beside} need {needed / 1e9:.1f} GB and the disk has "
                f"{free / 1e9:.1f} GB free; make room or choose another"
            )
        if size < 4 * _PROBE_BYTES:
            return
        seconds = size / _write_speed(self.directory / "probe") + slowness * size / 1e9
        if form:
            packed = sum(item.weight.nbytes for item in placed if item.weight.dtype == np.uint8)
            seconds += packed * 8 / form.bits / _quantize_speed(form)
        engine = f", {size / 1e9:.1f} GB more for the engine" if slowness else ""
        self.progress.say(
            f"{size / 1e9:.1f} GB of weights to write{engine}, about {seconds:.0f} s; {free / 1e9:.0f} GB free"
        )

    def _finish(
        self, digest: str, onnx_sha256: str, hashes: dict[str, str], limits: CallLimits, scratch: int
    ) -> Manifest:
        request, directory, config = self.request, self.directory, self.checkpoint.config
        for name in (*_REQUIRED_FILES, *_OPTIONAL_FILES):
            if (request.checkpoint / name).is_file():
                shutil.copyfile(request.checkpoint / name, directory / name)
        self.progress.stage("hashing the engine")
        notes = (journal_of(directory / DATA_FILE), directory / _RESUME_FILE)  # of use until all is there
        kept = sorted(path for path in directory.iterdir() if path not in notes)
        files = {path.name: hashes.get(path.name) or file_sha256(path) for path in kept}
        manifest = Manifest(
            model=config.spec,
            checkpoint=request.checkpoint.resolve().name,
            checkpoint_sha256=digest,
            backend=request.backend,
            backend_version=self.backend.version,
            target=self.backend.target,
            precision=request.precision,
            kv_dtype=self.backend.kv_dtype,
            onnx_sha256=onnx_sha256,
            max_model_len=self.max_model_len,
            max_batch_size=limits.max_batch_size,
            max_encode_tokens=limits.max_encode_tokens,
            scratch_bytes=scratch,
            num_attention_heads=config.num_attention_heads,
            layer_values=layer_values(config),
            files=files,
            generation_defaults=self.checkpoint.generation_defaults(),
        )
        manifest.save(directory)
        for path in notes:
            path.unlink()
        return manifest


@contextmanager
def _disk_errors(staging: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise ConfigurationError(
            f"{staging}: the disk is full; make room and build again, what is written there will be used"
        ) from None


def _write_speed(path: Path) -> float:
    """Bytes per second to this disk, from one short trial."""
    data = os.urandom(2**20)
    started = time.perf_counter()
    with path.open("wb") as file:
        for _ in range(_PROBE_BYTES // len(data)):
            file.write(data)
        os.fsync(file.fileno())
    seconds = time.perf_counter() - started
    path.unlink()
    return _PROBE_BYTES / seconds


def _quantize_speed(form: GroupFormat) -> float:
    """Weights per second, from one short trial."""
    matrix = np.random.default_rng(0).standard_normal((2048, 4096), dtype=np.float32)
    started = time.perf_counter()
    quantize_rows(matrix, form)
    return matrix.size / (time.perf_counter() - started)


def _read(path: Path) -> object:
    try:
        return json.loads(path.read_text())
    except ValueError:
        return None


def longest_context(max_model_len: int | None, max_batch_size: int | None, checkpoint: Checkpoint) -> int:
    """Tokens that a build asks for; raises ConfigurationError for what the checkpoint does not have."""
    spec = checkpoint.config.spec
    longest = spec.max_position_embeddings if max_model_len is None else max_model_len
    if not spec.canvas_length < longest <= spec.max_position_embeddings:
        raise ConfigurationError(
            f"--max-model-len {longest}: must be more than one canvas ({spec.canvas_length} tokens) and at most the "
            f"checkpoint's {spec.max_position_embeddings}"
        )
    if max_batch_size is not None and max_batch_size < 1:
        raise ConfigurationError(f"--max-batch-size {max_batch_size}: must be at least 1")
    return longest
