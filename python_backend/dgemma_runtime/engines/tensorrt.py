"""The engine on TensorRT and TensorRT for RTX: which canvases run together, and in which memory. Knows no CUDA.

Keys and values live in page pools on the device. A canvas's context is laid out once, at its first step, in a row of a
workspace; from then on a step is one replayed graph that takes ids, uniforms and temperatures in and gives argmax,
sample and entropies out, for all canvases of the workspace. Soft embeddings stay on the device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from dgemma_runtime.contract import (
    SLIDING,
    CommitRow,
    DenoiseResult,
    DenoiseRow,
    EncodeRow,
    EngineLimits,
    Float32Array,
    Manifest,
    SequencePages,
    cache_dtypes,
)
from dgemma_runtime.engines.bindings import Bindings, read_bindings
from dgemma_runtime.engines.call_memory import FreshMemory, slots_for, smallest_slots
from dgemma_runtime.engines.device import Device, OutOfMemory, Program
from dgemma_runtime.engines.encoder import Encoder
from dgemma_runtime.engines.kv_memory import KEYS, VALUES, KvMemory
from dgemma_runtime.engines.number_formats import from_float32, to_float32
from dgemma_runtime.engines.workspace import Shared, Workspace
from dgemma_runtime.errors import ConfigurationError, ManifestError

BACKENDS = ("tensorrt", "tensorrt_rtx", "tensorrt_llm")
ENGINE_FILE = "rank0.engine"
_PRECISIONS, _KV_DTYPES = ("fp32", "bf16", "fp16", "fp8", "int4"), ("fp32", "bf16", "fp16", "fp8")
_WASTE = 4  # a canvas may stand among so many times as many slots as it needs, to share a call
_SPARE_SLOTS = 4096  # by which rounding up makes a row longer than its context, at most

Loader = Callable[[Path], Program]


def check_manifest(directory: Path, manifest: Manifest) -> None:
    """Raises ManifestError for what this engine does not run."""
    found = {"backend": manifest.backend, "precision": manifest.precision, "kv_dtype": manifest.kv_dtype}
    for (field, value), known in zip(found.items(), (BACKENDS, _PRECISIONS, _KV_DTYPES), strict=True):
        if value not in known:
            raise ManifestError(
                f"{directory}: the manifest's {field} is {value!r}, this engine runs {', '.join(known)}; "
                "build the engine again with `dgemma-build engine`"
            )
    if ENGINE_FILE not in manifest.files:
        raise ManifestError(
            f"{directory}: the manifest lists no {ENGINE_FILE}; build the engine again with `dgemma-build engine`"
        )


class TensorRtEngine:
    """Engine over `rank0.engine` of an engine directory; see `dgemma_runtime.contract.Engine`.

    The device is the engine's own from here on. `load` makes the program from the engine file, which is complete and
    unaltered when it is called. `graphs` is whether steps are captured and replayed.
    """

    def __init__(
        self, directory: Path, limits: EngineLimits, device: Device, load: Loader, graphs: bool = True
    ) -> None:
        self.limits = limits
        with ExitStack() as held:
            held.callback(device.close)
            check_manifest(directory, Manifest.load(directory, verify_hashes=False))
            self.manifest = Manifest.load(directory)
            self.spec = self.manifest.model
            try:
                self._open(held, device, directory / ENGINE_FILE, load, graphs)
            except OutOfMemory as error:
                raise ConfigurationError(str(error)) from None
            self._held = held.pop_all()
        self._device = device
        self._workspaces: list[Workspace] = []
        self._where: dict[int, Workspace] = {}  # canvas slot -> its workspace

    def _open(self, held: ExitStack, device: Device, path: Path, load: Loader, graphs: bool) -> None:
        program, limits = load(path), self.limits
        held.callback(program.close)
        self._bindings = read_bindings(
            path, program.tensors, self.manifest, limits.max_batch_size, limits.max_encode_tokens
        )
        self._memory = KvMemory(device, self.spec, self.manifest.kv_dtype, self.limits)
        held.callback(self._memory.close)
        fresh = FreshMemory(self._memory, self._bindings)
        held.callback(fresh.close)
        self._shared = Shared(self._memory, program, self._bindings, fresh, graphs)
        self._encoder = Encoder(self._shared)
        held.callback(self._encoder.close)
        need, free = _most_cache_bytes(self._memory, self._bindings), device.available_bytes()
        if need > free:
            raise OutOfMemory(need, f"the contexts of {limits.max_batch_size} canvases", free)

    # ------------------------------------------------------------ calls

    def encode(self, rows: Sequence[EncodeRow]) -> None:
        for row in rows:
            assert 1 <= len(row.token_ids) <= self.limits.max_encode_tokens
            try:
                self._encoder.encode(row)
            except OutOfMemory:
                self._drop_empty()
                self._pack_tightly()
                self._encoder.encode(row)

    def denoise(self, rows: Sequence[DenoiseRow], commits: Sequence[CommitRow] = ()) -> DenoiseResult:
        if commits:
            self.encode([EncodeRow(row.token_ids, row.position, row.pages) for row in commits])
        starting = [row for row in rows if row.first_step]
        for row in sorted(starting, key=lambda row: -row.position):  # shorter contexts join longer ones
            self._place(row.slot, row.position, row.pages)
        queued = []
        for workspace in {id(self._where[row.slot]): self._where[row.slot] for row in rows}.values():
            members = [index for index, row in enumerate(rows) if self._where[row.slot] is workspace]
            queued.append((workspace, members, workspace.run([rows[index] for index in members])))
        self._device.synchronize()
        shape = (len(rows), self.spec.canvas_length)
        argmax, sampled = np.empty(shape, np.int32), np.empty(shape, np.int32)
        entropies = np.empty(shape, np.float32)
        for workspace, members, places in queued:
            argmax[members] = workspace.results["argmax_ids"][places]
            sampled[members] = workspace.results["sampled_ids"][places]
            entropies[members] = workspace.results["entropies"][places]
        return DenoiseResult(argmax, sampled, entropies)

    def release(self, slot: int) -> None:
        workspace = self._where.pop(slot, None)
        if workspace is not None:
            workspace.leave(slot)

    def close(self) -> None:
        while self._workspaces:
            self._workspaces.pop().close()
        self._where.clear()
        self._held.close()

    # ------------------------------------------------------------ workspaces

    def _place(self, slot: int, position: int, pages: SequencePages) -> None:
        self.release(slot)
        workspace = self._fitting(slot, position) or self._new(position)
        workspace.place(slot, position, pages)
        self._where[slot] = workspace

    def _fitting(self, slot: int, need: int) -> Workspace | None:
        """Where canvases are, rather than none; then the largest, so that all gather there; then where it was."""
        longest = max(_WASTE * need, smallest_slots(self._bindings))
        fitting = [
            workspace
            for workspace in self._workspaces
            if need <= workspace.slots <= longest and workspace.occupied < workspace.capacity
        ]
        fitting.sort(key=lambda one: (one.occupied == 0, -one.slots, not one.remembers(slot)))
        return fitting[0] if fitting else None

    def _new(self, need: int) -> Workspace:
        """With room for more canvases where memory allows, else for this one."""
        self._drop_empty()
        slots = slots_for(need, self._bindings)
        pool_tokens = self.limits.full_pages * self.limits.page_size
        capacity = min(self.limits.max_batch_size, max(1, pool_tokens // slots))
        for rows in dict.fromkeys((capacity, 1)):
            try:
                return self._add(rows, slots)
            except OutOfMemory:
                continue
        self._pack_tightly()
        return self._add(1, slots)

    def _add(self, capacity: int, slots: int) -> Workspace:
        self._workspaces.append(Workspace(self._shared, capacity, slots))
        return self._workspaces[-1]

    def _drop_empty(self) -> None:
        for workspace in [workspace for workspace in self._workspaces if not workspace.occupied]:
            self._workspaces.remove(workspace)
            workspace.close()

    def _pack_tightly(self) -> None:
        """Lay every canvas out again in no more memory than they need; the pages have all but the soft embeddings."""
        canvases = [
            (canvas, workspace.read_soft(canvas[0]))
            for workspace in self._workspaces
            for canvas in workspace.occupants()
        ]
        while self._workspaces:
            self._workspaces.pop().close()
        for slots in sorted({slots_for(canvas[1], self._bindings) for canvas, _ in canvases}):
            members = [entry for entry in canvases if slots_for(entry[0][1], self._bindings) == slots]
            workspace = self._add(len(members), slots)
            for (slot, position, pages), soft in members:
                workspace.place(slot, position, pages)
                workspace.write_soft(slot, soft)
                self._where[slot] = workspace

    # ------------------------------------------------------------ inspection, for parity checks

    def soft_embedding(self, slot: int) -> Float32Array:
        """A copy of the soft embedding [canvas_length, hidden] that the canvas in `slot` takes into its next step."""
        bits = self._where[slot].read_soft(slot)
        return to_float32(bits, self._bindings.soft_dtype).reshape(self.spec.canvas_length, self.spec.hidden_size)

    def set_soft_embedding(self, slot: int, values: Float32Array) -> None:
        """Replace it, rounded to the engine's type."""
        assert values.shape == (self.spec.canvas_length, self.spec.hidden_size)
        self._where[slot].write_soft(slot, from_float32(values, self._bindings.soft_dtype).reshape(-1))

    def keys_values(self, layer: int, pages: SequencePages, start: int, stop: int) -> tuple[Float32Array, Float32Array]:
        """K and V of one layer for positions [start, stop) as stored, each [stop - start, kv_heads, head_dim]."""
        spec, size = self.spec.layers[layer], self.limits.page_size
        chosen = (pages.sliding if spec.kind == SLIDING else pages.full)[start // size : -(-stop // size)]
        found = []
        for which, dtype in zip((KEYS, VALUES), cache_dtypes(self.manifest.kv_dtype, spec), strict=True):
            parts = [self._memory.page_bytes(layer, which, int(page)) for page in chosen]
            whole = to_float32(np.concatenate(parts, axis=1), dtype)  # [kv_heads, tokens, head_dim]
            found.append(whole[:, start % size :][:, : stop - start].transpose(1, 0, 2))
        return found[KEYS], found[VALUES]


def _most_cache_bytes(memory: KvMemory, bindings: Bindings) -> int:
    """What canvases that hold all pages between them need for their caches at most, and the encoder beside them."""
    limits = memory.limits
    pool_tokens = limits.full_pages * limits.page_size
    rounding = max(_SPARE_SLOTS, smallest_slots(bindings))
    longest = slots_for(pool_tokens, bindings)
    full = min(pool_tokens + limits.max_batch_size * rounding, limits.max_batch_size * longest) + longest
    total = 0
    for group in memory.groups:
        sliding = limits.max_batch_size * memory.slots(group, 0)
        total += group.page_token_bytes * (sliding if group.kind == SLIDING else full)
    return total
