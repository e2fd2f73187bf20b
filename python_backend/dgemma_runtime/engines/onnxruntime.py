"""The engine on ONNX Runtime, any machine: the session, what runs in one call and in which memory. Knows no request.

Keys and values live in page pools (`ort_pages.py`). A sequence's context is laid out from its pages once, as a row of
contiguous caches that the graph reads and extends in place (`ort_rows.py`): while its prompt is encoded in a row of its
own, then in a row of a workspace, whose canvases run in one call. Each step moves ids, uniforms and results; a canvas
that has ended is encoded in its row, beside the others' steps, and its keys and values stay there for the next one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import onnxruntime as ort

from dgemma_runtime.contract import (
    CommitRow,
    DenoiseResult,
    DenoiseRow,
    DraftResult,
    DraftRow,
    EncodeRow,
    EngineLimits,
    Float32Array,
    Manifest,
    SequencePages,
)
from dgemma_runtime.drafter_manifest import DrafterManifest, check_drafter
from dgemma_runtime.engines.ort_drafter import OrtDrafter
from dgemma_runtime.engines.ort_pages import PagePools
from dgemma_runtime.engines.ort_rows import (
    KEPT_SLOTS,
    SMALLEST_SLOTS,
    Array,
    EncodeRows,
    Rows,
    Workspace,
    encode_tokens,
    slots_for,
)
from dgemma_runtime.errors import EngineError, EngineMemoryError, ManifestError

MODEL_FILE = "model.onnx"
_PRECISIONS, _DRAFTER_PRECISIONS = ("fp32", "int8", "int4"), ("fp32",)
_REBUILD = "build the engine again with `dgemma-build engine`"
_NO_MEMORY = re.compile(r"bad_alloc|bad allocation|[Ff]ailed to allocate memory|out of memory", re.IGNORECASE)

Made = TypeVar("Made")


def check_manifest(directory: Path, manifest: Manifest | DrafterManifest) -> None:
    """Raises ManifestError for what this engine does not run."""
    precisions = _PRECISIONS if isinstance(manifest, Manifest) else _DRAFTER_PRECISIONS
    found = {"backend": manifest.backend, "target": manifest.target}
    found |= {"precision": manifest.precision, "kv_dtype": manifest.kv_dtype}
    for (field, value), known in zip(found.items(), (("onnxruntime",), ("cpu",), precisions, ("fp32",)), strict=True):
        if value not in known:
            raise ManifestError(
                f"{directory}: the manifest's {field} is {value!r}, this engine runs {', '.join(known)}; {_REBUILD}"
            )
    if _release(manifest.backend_version) > _release(ort.__version__):  # newer libraries run what older ones wrote
        raise ManifestError(
            f"{directory}: the engine was built with onnxruntime {manifest.backend_version}, installed is "
            f"{ort.__version__}, older; run `pip install onnxruntime=={manifest.backend_version}`, or {_REBUILD}"
        )


def _release(version: str) -> tuple[int, ...]:
    """Major and minor."""
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])


class OnnxRuntimeEngine:
    """Engine over `model.onnx` of an engine directory; see `dgemma_runtime.contract.Engine`.

    `threads` is the number of cores that one call uses; 0 leaves the choice to the library. `draft_model` is the engine
    directory of a drafter.
    """

    def __init__(
        self, directory: Path, limits: EngineLimits, threads: int = 0, draft_model: Path | None = None
    ) -> None:
        self.manifest = Manifest.load(directory)
        check_manifest(directory, self.manifest)
        self.limits = limits
        self.spec = self.manifest.model
        self._session = _open_session(directory, self._options(threads))
        self._drafter = None if draft_model is None else self._open_drafter(draft_model, threads)
        self.drafter = self._drafter.manifest if self._drafter else None
        self._begun: set[int] = set()  # slots that a draft has laid the context out for
        self._pools = PagePools(self.spec, limits)
        self._encoders: list[EncodeRows] = []  # the one used last is the last
        self._workspaces: list[Workspace] = []
        self._where: dict[int, Workspace] = {}  # canvas slot -> its workspace

    def _options(self, threads: int) -> ort.SessionOptions:
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        options.enable_mem_pattern = False  # it would keep a plan, and memory for it, of every length of context
        return options

    def _open_drafter(self, directory: Path, threads: int) -> OrtDrafter:
        manifest = DrafterManifest.load(directory)
        check_drafter(directory, manifest, self.manifest)
        check_manifest(directory, manifest)
        options = self._options(threads)
        # Its threads would still spin, waiting for work, while the denoiser's need the cores.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        session = _open_session(directory, options)
        return OrtDrafter(manifest, partial(_bind, session), partial(_run, session))

    # ------------------------------------------------------------ encode

    def encode(self, rows: Sequence[EncodeRow]) -> None:
        with _memory():
            for row in rows:
                self._encode(row)

    def _encode(self, row: EncodeRow) -> None:
        """A row of the caller in as many calls as its context asks for; where it is cut depends on nothing else."""
        done, count = 0, len(row.token_ids)
        while done < count:
            position = row.position + done
            length = min(count - done, encode_tokens(position + count - done))
            part = EncodeRow(row.token_ids[done : done + length], position, row.pages)
            self._encoder(part).encode(self._call, self._pools, part)
            done += length

    def _encoder(self, row: EncodeRow) -> EncodeRows:
        """The row of caches that the context was encoded in, or another one."""
        need = row.position + len(row.token_ids)
        for encoder in self._encoders:
            content = encoder.content[0]
            held = self._pools.good_tokens(content, row.position, row.pages)
            if row.position == held == content.held:
                self._encoders.remove(encoder)  # to the end, or outgrown
                if need <= encoder.slots:
                    self._encoders.append(encoder)
                    return encoder
                del encoder  # gives its memory back
                break
        self._trim_encoders(1)
        limits, slots = self.limits, slots_for(need)
        made = self._allocate(lambda: EncodeRows(self.spec, limits.page_size, limits.max_encode_tokens, slots))
        self._encoders.append(made)
        return made

    def _trim_encoders(self, more: int) -> None:
        """Rows for prompts and canvases together are as many as there are slots; `more` are about to be taken."""
        occupied = sum(workspace.occupied for workspace in self._workspaces)
        while self._encoders and len(self._encoders) + occupied + more > self.limits.max_batch_size:
            self._encoders.pop(0)

    # ------------------------------------------------------------ denoise

    def denoise(self, rows: Sequence[DenoiseRow], commits: Sequence[CommitRow] = ()) -> DenoiseResult:
        with _memory():
            for row in rows:
                if row.first_step and row.slot not in self._begun:
                    self._begin(row)
            self._begun.clear()
            for commit in commits:
                self._prepare_commit(commit)
            return self._steps(rows, [commit for commit in commits if commit.slot in self._where])

    def _steps(self, rows: Sequence[DenoiseRow], commits: Sequence[CommitRow]) -> DenoiseResult:
        shape = (len(rows), self.spec.canvas_length)
        argmax, sampled = np.empty(shape, np.int32), np.empty(shape, np.int32)
        entropies = np.empty(shape, np.float32)
        used = [self._where[slot] for slot in (*(row.slot for row in rows), *(row.slot for row in commits))]
        for workspace in dict.fromkeys(used):
            members = [index for index, row in enumerate(rows) if self._where[row.slot] is workspace]
            ended = [commit for commit in commits if self._where.get(commit.slot) is workspace]
            places = workspace.run(self._call, self._pools, [rows[index] for index in members], ended)
            argmax[members] = workspace.results["argmax_ids"][places]
            sampled[members] = workspace.results["sampled_ids"][places]
            entropies[members] = workspace.results["entropies"][places]
            for commit in ended:  # where the next canvas does not fit it is laid out anew
                if commit.position + 2 * self.spec.canvas_length > workspace.slots:
                    self.release(commit.slot)
        return DenoiseResult(argmax, sampled, entropies)

    def _prepare_commit(self, commit: CommitRow) -> None:
        """What is not laid out is encoded like a prompt."""
        workspace = self._where.get(commit.slot)
        if workspace is None or not workspace.can_commit(commit):
            self.release(commit.slot)
            self._encode(EncodeRow(commit.token_ids, commit.position, commit.pages))

    def draft(self, rows: Sequence[DraftRow]) -> DraftResult:
        assert self._drafter is not None, "the engine was opened without a drafter"
        try:
            with _memory():
                for row in rows:
                    self._begin(row)
                result = self._drafter.draft(rows, self._where)
        except BaseException:  # the first step lays them out again
            for row in rows:
                self.release(row.slot)
            raise
        self._begun = {row.slot for row in rows}
        return result

    def _begin(self, row: DenoiseRow | DraftRow) -> None:
        """A canvas starts: where its slot's last one was, or in a workspace with more company."""
        need = row.position + self.spec.canvas_length
        present = self._where.get(row.slot)
        fitting = [
            workspace
            for workspace in self._workspaces
            if need <= workspace.slots <= max(2 * need, 2 * SMALLEST_SLOTS)
            and (workspace is present or not workspace.full)
        ]

        def merit(workspace: Workspace) -> tuple[bool, int, bool, int]:
            """Canvases of one workspace share a call; short contexts are moved for that, long ones are not."""
            here = workspace is present
            return here and need > KEPT_SLOTS, workspace.occupied - here, here, -workspace.slots

        chosen = max(fitting, key=merit, default=None)
        if chosen is not present:
            self.release(row.slot)
        self._drop_encoder(row)
        if chosen is None:
            limits, slots = self.limits, slots_for(need)
            chosen = self._allocate(lambda: Workspace(self.spec, limits.page_size, limits.max_batch_size, slots))
            self._workspaces.append(chosen)
        chosen.begin(self._pools, row.slot, row.position, row.pages)
        self._where[row.slot] = chosen

    def _drop_encoder(self, row: DenoiseRow | DraftRow) -> None:
        """Of a prompt whose canvases begin; a short one is kept until its place is wanted."""
        self._encoders = [
            encoder
            for encoder in self._encoders
            if encoder.slots <= KEPT_SLOTS
            or self._pools.good_tokens(encoder.content[0], row.position, row.pages) < row.position
        ]
        self._trim_encoders(1)

    def release(self, slot: int) -> None:
        self._begun.discard(slot)
        workspace = self._where.pop(slot, None)
        if workspace is None:
            return
        workspace.leave(slot)
        if not workspace.occupied and workspace.slots > KEPT_SLOTS:
            self._workspaces.remove(workspace)

    # ------------------------------------------------------------ inspection, for parity checks

    def soft_embedding(self, slot: int) -> Float32Array:
        """A copy of the soft embedding [canvas_length, hidden] that the canvas in `slot` takes into its next step."""
        workspace = self._where[slot]
        soft: Float32Array = workspace.soft(workspace.index(slot)).copy()
        return soft

    def set_soft_embedding(self, slot: int, values: Float32Array) -> None:
        """Replace it."""
        workspace = self._where[slot]
        workspace.soft(workspace.index(slot))[:] = values

    def keys_values(self, layer: int, pages: SequencePages, start: int, stop: int) -> tuple[Float32Array, Float32Array]:
        """K and V of one layer for positions [start, stop), each [stop - start, kv_heads, head_dim]."""
        return self._pools.keys_values(layer, pages, start, stop)

    # ------------------------------------------------------------ both

    def _call(self, rows: Rows, count: int, length: int, canvases: int) -> None:
        """One pass over the first `count` rows."""
        _run(self._session, self._bound(rows, count, length, canvases))

    def _bound(self, rows: Rows, count: int, length: int, canvases: int) -> ort.IOBinding:
        """Made once for each shape of a call."""
        key = (count, length, canvases)
        if key not in rows.bindings:
            rows.bindings[key] = _bind(self._session, *rows.bound(count, length, canvases))
        return rows.bindings[key]

    def _allocate(self, make: Callable[[], Made]) -> Made:
        """What `make` allocates; what is merely kept for later is given up for it."""
        try:
            return make()
        except MemoryError:
            self._encoders.clear()
            self._workspaces = [workspace for workspace in self._workspaces if workspace.occupied]
            return make()

    def close(self) -> None:
        self._workspaces.clear()
        self._where.clear()
        self._encoders.clear()
        self._drafter = None
        del self._pools, self._session


def _open_session(directory: Path, options: ort.SessionOptions) -> ort.InferenceSession:
    path = directory / MODEL_FILE
    try:
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the library raises a dozen types without a common base
        raise ManifestError(f"{path}: onnxruntime cannot load it: {error}") from error


def _bind(session: ort.InferenceSession, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> ort.IOBinding:
    binding = session.io_binding()
    for name, array in inputs.items():
        binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(array))
    for name, array in outputs.items():
        binding.bind_ortvalue_output(name, ort.OrtValue.ortvalue_from_numpy(array))
    return binding


def _run(session: ort.InferenceSession, binding: ort.IOBinding) -> None:
    try:
        session.run_with_iobinding(binding)
    except MemoryError:
        raise
    except Exception as error:  # see _open_session
        if _NO_MEMORY.search(str(error)):
            raise MemoryError(str(error)) from error
        raise EngineError(f"onnxruntime failed: {error}") from error


@contextmanager
def _memory() -> Iterator[None]:
    """Makes an allocation that failed an EngineMemoryError."""
    try:
        yield
    except MemoryError as error:
        raise EngineMemoryError(
            f"there is no memory for this call ({error}); lower max_batch_size, max_model_len or kv_memory_bytes"
        ) from error
