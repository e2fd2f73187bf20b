"""The engine on ONNX Runtime, any machine: KV pages, laid-out caches and the session. Knows no request.

Keys and values live in page pools. For a canvas its context is laid out once, at the first step, as one row of a
workspace, a contiguous cache per layer that is the graph's input and output at once; each step then writes the
canvas's own keys and values behind the context, in place. Rows of one workspace run in one call.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from dgemma_runtime.contract import (
    SLIDING,
    CommitRow,
    DenoiseResult,
    DenoiseRow,
    EncodeRow,
    EngineLimits,
    Manifest,
    ModelSpec,
    SequencePages,
)
from dgemma_runtime.errors import EngineError, ManifestError

MODEL_FILE = "model.onnx"
_PRECISIONS = ("fp32", "int8", "int4")
_REBUILD = "build the engine again with `dgemma-build engine`"
_SMALLEST_WORKSPACE = 128  # cache slots
_KEPT_WORKSPACE = 4096  # cache slots; larger workspaces are given back when their last canvas leaves

Array = npt.NDArray[Any]


class _Buffers:
    """The graph's arrays for up to `rows` rows of `length` tokens over `slots` cache slots, and their bindings."""

    def __init__(self, spec: ModelSpec, rows: int, length: int, slots: int, canvas: bool) -> None:
        self.slots = slots
        self.sliding_slots = min(slots, spec.sliding_window - 1 + length)
        heads = rows if canvas else 0
        self.small: dict[str, Array] = {
            "token_ids": np.zeros((rows, length), np.int32),
            "position": np.zeros(rows, np.int64),
            "sliding_length": np.zeros(rows, np.int64),
            "is_canvas": np.full(rows, canvas),
            "canvas_rows": np.arange(heads, dtype=np.int64),
            "soft_embedding": np.zeros((heads, length, spec.hidden_size), np.float32),
            "temperature": np.ones(heads, np.float32),
            "uniforms": np.zeros((heads, length), np.float32),
        }
        self.results: dict[str, Array] = {
            "argmax_ids": np.zeros((heads, length), np.int32),
            "sampled_ids": np.zeros((heads, length), np.int32),
            "entropies": np.zeros((heads, length), np.float32),
            "next_soft_embedding": self.small["soft_embedding"],  # written last, after its last read
        }
        self.caches: dict[str, Array] = {}
        for index, layer in enumerate(spec.layers):
            size = self.sliding_slots if layer.kind == SLIDING else slots
            for name in ("key_cache", "value_cache"):
                shape = (rows, layer.num_key_value_heads, size, layer.head_dim)
                self.caches[f"{name}_{index}"] = np.zeros(shape, np.float32)
        self._bindings: dict[int, ort.IOBinding] = {}

    def run(self, session: ort.InferenceSession, rows: int) -> None:
        """One call over the first `rows` rows."""
        session.run_with_iobinding(self.binding(session, rows))

    def binding(self, session: ort.InferenceSession, rows: int) -> ort.IOBinding:
        """Of the first `rows` rows to the graph's inputs and outputs."""
        if rows not in self._bindings:
            self._bindings[rows] = self._bind(session, rows)
        return self._bindings[rows]

    def _bind(self, session: ort.InferenceSession, rows: int) -> ort.IOBinding:
        binding = session.io_binding()
        for name, array in (self.small | self.caches).items():
            binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(array[:rows]))
        outputs = self.results | {f"{name}_out": array for name, array in self.caches.items()}
        for name, array in outputs.items():
            binding.bind_ortvalue_output(name, ort.OrtValue.ortvalue_from_numpy(array[:rows]))
        return binding


class _Workspace(_Buffers):
    """Buffers for canvases, and which slot's canvas stands in which row; the rows in use are the first ones."""

    def __init__(self, spec: ModelSpec, rows: int, slots: int) -> None:
        super().__init__(spec, rows, spec.canvas_length, slots, canvas=True)
        self.capacity = rows
        self.occupants: list[int] = []  # canvas slot by row

    def remove(self, slot: int) -> None:
        """Drop a canvas; the last row moves into its place."""
        row, last = self.occupants.index(slot), len(self.occupants) - 1
        if row != last:
            for array in (*self.small.values(), *self.caches.values()):
                if array is not self.small["canvas_rows"]:
                    array[row] = array[last]
            self.occupants[row] = self.occupants[last]
        self.occupants.pop()


@dataclass(frozen=True)
class _Pool:
    """Page pools of one layer, [pages, kv_heads, page_size, head_dim]."""

    keys: npt.NDArray[np.float32]
    values: npt.NDArray[np.float32]


def check_manifest(directory: Path, manifest: Manifest) -> None:
    """Raises ManifestError for what this engine does not run."""
    found = {"backend": manifest.backend, "target": manifest.target}
    found |= {"precision": manifest.precision, "kv_dtype": manifest.kv_dtype}
    for (field, value), known in zip(found.items(), (("onnxruntime",), ("cpu",), _PRECISIONS, ("fp32",)), strict=True):
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

    `threads` is the number of cores that one call uses; 0 leaves the choice to the library.
    """

    def __init__(self, directory: Path, limits: EngineLimits, threads: int = 0) -> None:
        self.manifest = Manifest.load(directory)
        check_manifest(directory, self.manifest)
        self.limits = limits
        self.spec = self.manifest.model
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        try:
            self._session = ort.InferenceSession(
                str(directory / MODEL_FILE), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # the library raises a dozen types without a common base
            raise ManifestError(f"{directory / MODEL_FILE}: onnxruntime cannot load it: {error}") from error
        self._pools = [self._pool(layer.kind, layer.num_key_value_heads, layer.head_dim) for layer in self.spec.layers]
        self._workspaces: list[_Workspace] = []
        self._where: dict[int, _Workspace] = {}  # canvas slot -> its workspace
        self._encoder: _Buffers | None = None

    def _pool(self, kind: str, heads: int, dim: int) -> _Pool:
        pages = self.limits.sliding_pages if kind == SLIDING else self.limits.full_pages
        shape = (pages, heads, self.limits.page_size, dim)
        return _Pool(np.zeros(shape, np.float32), np.zeros(shape, np.float32))

    # ------------------------------------------------------------ encode

    def encode(self, rows: Sequence[EncodeRow]) -> None:
        for length in sorted({len(row.token_ids) for row in rows}):
            same = [row for row in rows if len(row.token_ids) == length]
            for start in range(0, len(same), self.limits.max_batch_size):
                self._encode(same[start : start + self.limits.max_batch_size], length)

    def _encode(self, rows: list[EncodeRow], length: int) -> None:
        """Rows of one length in one call."""
        need = max(row.position for row in rows) + length
        buffers = self._encode_buffers(len(rows), length, need)
        for index, row in enumerate(rows):
            buffers.small["token_ids"][index] = row.token_ids
            self._lay_out(buffers, index, row.position, row.pages)
        self._run(buffers, len(rows))
        for index, row in enumerate(rows):
            self._store(buffers, index, row)

    def _encode_buffers(self, rows: int, length: int, need: int) -> _Buffers:
        current = self._encoder
        if current is not None:
            shape = current.small["token_ids"].shape
            if shape == (rows, length) and need <= current.slots <= max(2 * need, _SMALLEST_WORKSPACE):
                return current
        self._encoder = _Buffers(self.spec, rows, length, _slots_for(need), canvas=False)
        return self._encoder

    def _store(self, buffers: _Buffers, index: int, row: EncodeRow) -> None:
        """Copy a row's new keys and values from its cache to its pages."""
        size, length = self.limits.page_size, len(row.token_ids)
        for number, (layer, pool) in enumerate(zip(self.spec.layers, self._pools, strict=True)):
            sliding = layer.kind == SLIDING
            pages = row.pages.sliding if sliding else row.pages.full
            offset = int(buffers.small["sliding_length"][index]) if sliding else row.position
            for name, pages_array in (("key_cache", pool.keys), ("value_cache", pool.values)):
                fresh = buffers.caches[f"{name}_{number}"][index, :, offset : offset + length]
                for first, last in _page_spans(row.position, row.position + length, size):
                    page = pages[first // size]
                    if page >= 0:  # a chunk longer than the window fills sliding pages that are gone already
                        part = fresh[:, first - row.position : last - row.position]
                        pages_array[page, :, first % size : first % size + last - first] = part

    # ------------------------------------------------------------ denoise

    def denoise(self, rows: Sequence[DenoiseRow], commits: Sequence[CommitRow] = ()) -> DenoiseResult:
        if commits:
            self.encode([EncodeRow(row.token_ids, row.position, row.pages) for row in commits])
        for row in rows:
            if row.first_step:
                self._place(row)
        shape = (len(rows), self.spec.canvas_length)
        argmax, sampled = np.empty(shape, np.int32), np.empty(shape, np.int32)
        entropies = np.empty(shape, np.float32)
        for workspace in {id(self._where[row.slot]): self._where[row.slot] for row in rows}.values():
            members = [index for index, row in enumerate(rows) if self._where[row.slot] is workspace]
            places = self._denoise(workspace, [rows[index] for index in members])
            argmax[members] = workspace.results["argmax_ids"][places]
            sampled[members] = workspace.results["sampled_ids"][places]
            entropies[members] = workspace.results["entropies"][places]
        return DenoiseResult(argmax, sampled, entropies)

    def _denoise(self, workspace: _Workspace, rows: list[DenoiseRow]) -> list[int]:
        """One call over a workspace; returns the rows' places in it."""
        places = [workspace.occupants.index(row.slot) for row in rows]
        small = workspace.small
        for place, row in zip(places, rows, strict=True):
            small["token_ids"][place] = row.canvas_ids
            small["uniforms"][place] = row.uniforms
            small["temperature"][place] = row.temperature
        idle = sorted(set(range(len(workspace.occupants))) - set(places))
        kept = small["soft_embedding"][idle]
        self._run(workspace, len(workspace.occupants))
        small["soft_embedding"][idle] = kept
        return places

    def _place(self, row: DenoiseRow) -> None:
        """Give the canvas a row of a workspace and lay its context out there."""
        self.release(row.slot)
        need = row.position + self.spec.canvas_length
        fitting = [
            workspace
            for workspace in self._workspaces
            if need <= workspace.slots <= max(2 * need, 2 * _SMALLEST_WORKSPACE)
            and len(workspace.occupants) < workspace.capacity
        ]
        # The busiest first, so that canvases share a call; then the tightest.
        fitting.sort(key=lambda workspace: (-len(workspace.occupants), workspace.slots))
        if fitting:
            workspace = fitting[0]
        else:
            workspace = _Workspace(self.spec, self.limits.max_batch_size, _slots_for(need))
            self._workspaces.append(workspace)
        place = len(workspace.occupants)
        workspace.occupants.append(row.slot)
        self._where[row.slot] = workspace
        workspace.small["soft_embedding"][place] = 0.0
        self._lay_out(workspace, place, row.position, row.pages)

    def release(self, slot: int) -> None:
        workspace = self._where.pop(slot, None)
        if workspace is None:
            return
        workspace.remove(slot)
        if not workspace.occupants and workspace.slots > _KEPT_WORKSPACE:
            self._workspaces.remove(workspace)

    # ------------------------------------------------------------ inspection, for parity checks

    def soft_embedding(self, slot: int) -> npt.NDArray[np.float32]:
        """A copy of the soft embedding [canvas_length, hidden] that the canvas in `slot` takes into its next step."""
        workspace = self._where[slot]
        soft: npt.NDArray[np.float32] = workspace.small["soft_embedding"][workspace.occupants.index(slot)].copy()
        return soft

    def set_soft_embedding(self, slot: int, values: npt.NDArray[np.float32]) -> None:
        """Replace it."""
        workspace = self._where[slot]
        workspace.small["soft_embedding"][workspace.occupants.index(slot)] = values

    def keys_values(
        self, layer: int, pages: SequencePages, start: int, stop: int
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """K and V of one layer for positions [start, stop), each [stop - start, kv_heads, head_dim]."""
        spec, size = self.spec.layers[layer], self.limits.page_size
        chosen = (pages.sliding if spec.kind == SLIDING else pages.full)[start // size :]
        pool = self._pools[layer]
        target = np.empty((2, spec.num_key_value_heads, stop - start, spec.head_dim), np.float32)
        for half, pages_array in zip(target, (pool.keys, pool.values), strict=True):
            _gather_pages(pages_array, chosen, start % size, half)
        keys, values = target.transpose(0, 2, 1, 3)
        return keys, values

    # ------------------------------------------------------------ both

    def _lay_out(self, buffers: _Buffers, index: int, position: int, pages: SequencePages) -> None:
        """Copy `position` tokens of context (of sliding layers: the window's tail) from pages into a row's caches."""
        tail = min(position, self.spec.sliding_window - 1)
        buffers.small["position"][index] = position
        buffers.small["sliding_length"][index] = tail
        size = self.limits.page_size
        for number, (layer, pool) in enumerate(zip(self.spec.layers, self._pools, strict=True)):
            sliding = layer.kind == SLIDING
            first = (position - tail) // size if sliding else 0
            last = -(-position // size)
            chosen = (pages.sliding if sliding else pages.full)[first:last]
            start = position - tail - first * size if sliding else 0
            count = tail if sliding else position
            for name, pages_array in (("key_cache", pool.keys), ("value_cache", pool.values)):
                cache = buffers.caches[f"{name}_{number}"]
                _gather_pages(pages_array, chosen, start, cache[index, :, :count])

    def _run(self, buffers: _Buffers, rows: int) -> None:
        try:
            buffers.run(self._session, rows)
        except Exception as error:  # see __init__
            raise EngineError(f"onnxruntime failed: {error}") from error

    def close(self) -> None:
        self._workspaces.clear()
        self._where.clear()
        self._encoder = None
        self._pools.clear()
        del self._session


def _slots_for(need: int) -> int:
    """Cache slots of a workspace for `need` tokens: a power of two up to 4,096, then a multiple of 4,096."""
    if need > _KEPT_WORKSPACE:
        return -(-need // _KEPT_WORKSPACE) * _KEPT_WORKSPACE
    return max(_SMALLEST_WORKSPACE, 1 << (need - 1).bit_length())


def _page_spans(start: int, stop: int, size: int) -> Iterable[tuple[int, int]]:
    """Cut positions [start, stop) at page borders."""
    while start < stop:
        end = min(stop, start - start % size + size)
        yield start, end
        start = end


def _gather_pages(pool: npt.NDArray[np.float32], pages: npt.NDArray[np.int32], start: int, target: Array) -> None:
    """Copy target.shape[1] tokens of `pages`, from token `start` of the first page on, into target [heads, n, dim]."""
    count, size = target.shape[1], pool.shape[2]
    done = 0
    while done < count:  # a bounded number of pages at a time, so that the gathered copy stays small
        first = (start + done) // size
        skip = (start + done) % size
        group = pages[first : first + 64]
        tokens = pool[group].transpose(1, 0, 2, 3).reshape(target.shape[0], -1, target.shape[2])
        part = tokens[:, skip : skip + count - done]
        target[:, done : done + part.shape[1]] = part
        done += part.shape[1]
