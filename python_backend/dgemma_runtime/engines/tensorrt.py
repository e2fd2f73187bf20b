"""The engine on TensorRT and TensorRT for RTX: which canvases run together, and in which memory. Knows no CUDA.

Keys and values live in page pools on the device. A canvas's context is laid out once, at its first step, in a row of a
workspace; from then on a step is one replayed graph that takes ids, uniforms and temperatures in and gives argmax,
sample and entropies out, for all canvases of the workspace. Soft embeddings stay on the device. A canvas that has
ended is encoded in its row beside the others' next step, and its keys and values stay there for the next canvas.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np

from dgemma_runtime.contract import (
    SLIDING,
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
    cache_dtypes,
)
from dgemma_runtime.drafter_manifest import DrafterManifest
from dgemma_runtime.engines.bindings import ENGINE_FILE as ENGINE_FILE
from dgemma_runtime.engines.bindings import Bindings, read_bindings
from dgemma_runtime.engines.call_memory import FreshMemory, slots_for, smallest_slots
from dgemma_runtime.engines.device import Device, OutOfMemory, Program
from dgemma_runtime.engines.encoder import Encoder
from dgemma_runtime.engines.kv_memory import KEYS, VALUES, KvMemory
from dgemma_runtime.engines.number_formats import from_float32, to_float32
from dgemma_runtime.engines.trt_drafter import TensorRtDrafter, open_drafter
from dgemma_runtime.engines.workspace import Occupant, Shared, Workspace
from dgemma_runtime.errors import ConfigurationError, EngineMemoryError, ManifestError

BACKENDS = ("tensorrt", "tensorrt_rtx", "tensorrt_llm")
_PRECISIONS, _KV_DTYPES = ("fp32", "bf16", "fp16", "fp8", "int4"), ("fp32", "bf16", "fp16", "fp8")
_WASTE = 4  # a canvas may stand among so many times as many slots as it needs, to share a call
_SPARE_SLOTS = 4096  # by which rounding up makes a row longer than its context, at most

Loader = Callable[[Path], Program]
_T = TypeVar("_T")


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


@dataclass(frozen=True)
class _Batch:
    """What one workspace does in a call."""

    workspace: Workspace
    members: list[int]  # places of `rows` in the call
    rows: list[DenoiseRow]
    commits: list[CommitRow]


class TensorRtEngine:
    """Engine over `rank0.engine` of an engine directory; see `dgemma_runtime.contract.Engine`.

    The device is the engine's own from here on. `load` makes the program from the engine file, which is complete and
    unaltered when it is called. `graphs` is whether steps are captured and replayed. `draft_model` is the engine
    directory of a drafter, which `load` makes a program of as well.
    """

    def __init__(
        self,
        directory: Path,
        limits: EngineLimits,
        device: Device,
        load: Loader,
        graphs: bool = True,
        draft_model: Path | None = None,
    ) -> None:
        self.limits = limits
        self._drafter: TensorRtDrafter | None = None
        with ExitStack() as held:
            held.callback(device.close)
            check_manifest(directory, Manifest.load(directory, verify_hashes=False))
            self.manifest = Manifest.load(directory)
            self.spec = self.manifest.model
            try:
                self._open(held, device, directory / ENGINE_FILE, load, graphs)
                if draft_model is not None:
                    self._drafter = open_drafter(held, draft_model, self.manifest, device, load, self._bindings)
                self._check_room(device)
            except OutOfMemory as error:
                raise ConfigurationError(str(error)) from None
            self._held = held.pop_all()
        self.drafter: DrafterManifest | None = self._drafter.manifest if self._drafter else None
        self._begun: set[int] = set()  # slots that a draft has laid the context out for
        self._device = device
        self._workspaces: list[Workspace] = []
        self._where: dict[int, Workspace] = {}  # slot -> its workspace
        self._parked: dict[int, Occupant] = {}  # by slot: canvases for which there was no memory

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

    def _check_room(self, device: Device) -> None:
        need, free = _most_cache_bytes(self._memory, self._bindings), device.available_bytes()
        if need > free:
            raise OutOfMemory(need, f"the contexts of {self.limits.max_batch_size} canvases", free)

    # ------------------------------------------------------------ calls

    def encode(self, rows: Sequence[EncodeRow]) -> None:
        for row in rows:
            assert 1 <= len(row.token_ids) <= self.limits.max_encode_tokens
            self._with_room(partial(self._encoder.encode, row))

    def draft(self, rows: Sequence[DraftRow]) -> DraftResult:
        assert self._drafter is not None, "the engine was opened without a drafter"
        try:
            self._with_room(lambda: self._place_all([(row.position, row.slot, row.pages) for row in rows]))
            result = self._drafter.draft(rows, self._where)
        except BaseException:  # the first step lays them out again
            for row in rows:
                self.release(row.slot)
            raise
        self._begun = {row.slot for row in rows}
        return result

    def denoise(self, rows: Sequence[DenoiseRow], commits: Sequence[CommitRow] = ()) -> DenoiseResult:
        slots = [row.slot for row in rows] + [row.slot for row in commits]
        assert len(set(slots)) == len(slots)
        shape = (len(rows), self.spec.canvas_length)
        argmax, sampled = np.empty(shape, np.int32), np.empty(shape, np.int32)
        entropies = np.empty(shape, np.float32)
        new = [row.slot for row in rows if row.first_step]
        begun, self._begun = self._begun, set()
        new += [commit.slot for commit in commits if not self._has_canvas(commit) and commit.slot not in self._parked]
        try:
            batches = self._with_room(lambda: self._prepare(rows, commits, begun))
        except EngineMemoryError:
            for slot in new:
                self.release(slot)
            raise
        places = [batch.workspace.run(batch.rows, batch.commits) for batch in batches]
        self._device.synchronize()
        for batch, chosen in zip(batches, places, strict=True):
            results = batch.workspace.results
            argmax[batch.members] = results["argmax_ids"][chosen]
            sampled[batch.members] = results["sampled_ids"][chosen]
            entropies[batch.members] = results["entropies"][chosen]
        return DenoiseResult(argmax, sampled, entropies)

    def release(self, slot: int) -> None:
        self._begun.discard(slot)
        self._parked.pop(slot, None)
        self._leave(slot)

    def close(self) -> None:
        while self._workspaces:
            self._workspaces.pop().close()
        self._where.clear()
        self._held.close()

    # ------------------------------------------------------------ memory

    def _with_room(self, work: Callable[[], _T]) -> _T:
        """Once more with all canvases packed tightly where memory ends. Raises EngineMemoryError where it still does;
        no canvas is lost then, and `work` can be done once slots are released.
        """
        try:
            return work()
        except OutOfMemory:
            self._drop_empty()
        try:
            self._pack_tightly()
            return work()
        except OutOfMemory as error:
            raise EngineMemoryError(str(error)) from error

    def _prepare(self, rows: Sequence[DenoiseRow], commits: Sequence[CommitRow], begun: set[int]) -> list[_Batch]:
        """All that takes memory, so that what follows cannot fail for want of it. May be done again.

        The contexts of `begun` slots are laid out for their first step.
        """
        starting = [row for row in rows if row.first_step and row.slot not in begun]
        going_on = [row.slot for row in rows if not row.first_step or row.slot in begun]
        going_on += [commit.slot for commit in commits]
        for slot in going_on:
            if slot in self._parked:
                self._bring_back(slot)
        missing = [(row.position, row.slot, row.pages) for row in starting]
        missing += [(commit.position, commit.slot, commit.pages) for commit in commits if not self._has_canvas(commit)]
        self._place_all(missing)
        batches = []
        slots = [row.slot for row in rows] + [commit.slot for commit in commits]
        for workspace in {id(self._where[slot]): self._where[slot] for slot in slots}.values():
            members = [index for index, row in enumerate(rows) if self._where[row.slot] is workspace]
            ended = [commit for commit in commits if self._where[commit.slot] is workspace]
            batches.append(_Batch(workspace, members, [rows[index] for index in members], ended))
            workspace.prepare(len(members), len(ended))
        return batches

    def _has_canvas(self, row: CommitRow) -> bool:
        workspace = self._where.get(row.slot)
        return workspace is not None and workspace.has_canvas(row.slot, row.position)

    def _leave(self, slot: int) -> None:
        workspace = self._where.pop(slot, None)
        if workspace is not None:
            workspace.leave(slot)

    def _place_all(self, canvases: Sequence[tuple[int, int, SequencePages]]) -> None:
        """Of each: tokens of context, slot, pages."""
        for position, slot, pages in sorted(canvases, key=lambda one: -one[0]):  # shorter contexts join longer ones
            self._place(slot, position, pages)

    def _place(self, slot: int, position: int, pages: SequencePages) -> None:
        self._leave(slot)
        workspace = self._fitting(slot, position) or self._new(position)
        workspace.place(slot, position, pages)
        self._where[slot] = workspace
        self._parked.pop(slot, None)

    def _fitting(self, slot: int, need: int) -> Workspace | None:
        """Where canvases are, rather than none; then the largest, so that all gather there; then where it was."""
        longest = max(_WASTE * need, smallest_slots(self._bindings))
        fitting = [
            workspace
            for workspace in self._workspaces
            if need <= workspace.slots <= longest and workspace.occupied < workspace.capacity
        ]
        fitting.sort(key=lambda one: (one.occupied == 0, -one.slots, -one.capacity, not one.remembers(slot)))
        return fitting[0] if fitting else None

    def _new(self, need: int) -> Workspace:
        """With room for more canvases where memory allows, else for this one. Sequences that share pages may be more
        than pages would fill.
        """
        self._drop_empty()
        slots, most = slots_for(need, self._bindings), self.limits.max_batch_size
        alike = sum(workspace.occupied for workspace in self._workspaces if workspace.slots == slots)
        filled = self.limits.full_pages * self.limits.page_size // slots
        capacity = min(most, max(filled, 1 << alike.bit_length()))
        try:
            return self._add(capacity, slots)
        except OutOfMemory:
            return self._add(1, slots)

    def _add(self, capacity: int, slots: int) -> Workspace:
        self._workspaces.append(Workspace(self._shared, capacity, slots))
        return self._workspaces[-1]

    def _drop_empty(self) -> None:
        for workspace in [workspace for workspace in self._workspaces if not workspace.occupied]:
            self._workspaces.remove(workspace)
            workspace.close()

    def _pack_tightly(self) -> None:
        """Lay every canvas out again in no more memory than they need; the pages have all but the soft embeddings.
        Raises OutOfMemory with those parked that found no room.
        """
        canvases = {one.slot: one for workspace in self._workspaces for one in workspace.occupants()}
        self._parked = canvases | self._parked
        while self._workspaces:
            self._workspaces.pop().close()
        self._where.clear()
        for slots in sorted({slots_for(one.position, self._bindings) for one in self._parked.values()}):
            members = [one for one in self._parked.values() if slots_for(one.position, self._bindings) == slots]
            self._add(len(members), slots)
            for one in members:
                self._bring_back(one.slot)

    def _bring_back(self, slot: int) -> None:
        """Lay a parked canvas out again, as it was."""
        one = self._parked[slot]
        self._place(slot, one.position, one.pages)
        self._parked[slot] = one  # until its soft embedding is there
        self._where[slot].write_soft(slot, one.soft)
        del self._parked[slot]

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
