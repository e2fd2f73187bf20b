"""The TensorRT engine's drafter: its program over the rows of workspaces, and its calls. Knows no CUDA and no request.

It only reads the caches in which contexts are laid out for canvases, so a call may cover rows that asked for nothing:
from the first row that did to the last one of a workspace it is one call. Drafts are made once a canvas and are not
captured.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dgemma_runtime.contract import FULL, DraftResult, DraftRow, Manifest, cache_dtypes, sliding_slots
from dgemma_runtime.drafter_manifest import DrafterManifest, check_drafter
from dgemma_runtime.engines.bindings import CACHES, DENOISE, ENGINE_FILE, Bindings, check_tensors
from dgemma_runtime.engines.call_memory import Transfer
from dgemma_runtime.engines.device import ALIGNMENT, Device, Program, Tensor, TensorSpec
from dgemma_runtime.engines.workspace import Workspace

_INPUTS = {"last_ids": ("int32", "B"), "position": ("int64", "B"), "sliding_length": ("int64", "B")}
_RESULTS = {"token_ids": ("int32", "BL"), "confidences": ("fp32", "BL")}
_OF_ROWS = ("position", "sliding_length")  # that the workspace has
_REMEDY = (
    "build the drafter again with `dgemma-build engine --drafter` and the denoiser's --kv-precision, --max-model-len "
    "and --max-batch-size"
)


def open_drafter(
    held: ExitStack,
    directory: Path,
    denoiser: Manifest,
    device: Device,
    load: Callable[[Path], Program],
    bindings: Bindings,
) -> TensorRtDrafter:
    """Raises ManifestError or ConfigurationError where its engine is none for this denoiser's."""
    manifest = DrafterManifest.load(directory)
    check_drafter(directory, manifest, denoiser)
    path = directory / ENGINE_FILE
    program = load(path)
    held.callback(program.close)
    check_tensors(path, _specs(bindings, manifest.reads), program.tensors, _REMEDY)
    drafter = TensorRtDrafter(manifest, device, program, bindings)
    held.callback(drafter.close)
    return drafter


def _specs(bindings: Bindings, reads: Sequence[int]) -> dict[str, TensorSpec]:
    """Every input and output that the runtime needs of a drafter."""
    rows, length, spec = bindings.max_batch_size, bindings.spec.canvas_length, bindings.spec
    specs = {name: TensorSpec(True, dtype, (-1,), ((1,),), ((rows,),)) for name, (dtype, _) in _INPUTS.items()}
    specs |= {name: TensorSpec(False, dtype, (-1, length)) for name, (dtype, _) in _RESULTS.items()}
    for index, read in enumerate(reads):
        layer, held = spec.layers[read], sliding_slots(spec)
        few, many = (bindings.slot_group, bindings.largest_slots) if layer.kind == FULL else (held, held)
        shape = bindings.cache_shape(layer, -1, -1 if layer.kind == FULL else held)
        least, most = bindings.cache_shape(layer, 1, few), bindings.cache_shape(layer, rows, many)
        for (cache, _), dtype in zip(CACHES, cache_dtypes(bindings.kv_dtype, layer), strict=True):
            specs[f"{cache}_{index}"] = TensorSpec(True, dtype, shape, (least,), (most,))
    return specs


class TensorRtDrafter:
    """Proposes canvases for rows whose contexts are laid out. Raises OutOfMemory, holding nothing."""

    def __init__(self, manifest: DrafterManifest, device: Device, program: Program, bindings: Bindings) -> None:
        self.manifest = manifest
        self._device, self._bindings = device, bindings
        rows, length = bindings.max_batch_size, manifest.canvas_length
        with ExitStack() as held:
            self._inputs = Transfer(device, _INPUTS, rows, 0, length)
            held.callback(self._inputs.close)
            self._results = Transfer(device, _RESULTS, rows, 0, length)
            held.callback(self._results.close)
            self._context = program.context(DENOISE)
            held.callback(self._context.close)
            self._held = held.pop_all()

    def draft(self, rows: Sequence[DraftRow], where: Mapping[int, Workspace]) -> DraftResult:
        """`where` tells each slot's workspace."""
        shape = (len(rows), self.manifest.canvas_length)
        ids, confidences = np.empty(shape, np.int32), np.empty(shape, np.float32)
        for workspace in {id(where[row.slot]): where[row.slot] for row in rows}.values():
            members = [index for index, row in enumerate(rows) if where[row.slot] is workspace]
            places = np.array([workspace.index(rows[index].slot) for index in members])
            step = self._row_step(workspace)
            first = int(places.min()) // step * step
            self._run(
                workspace, first, int(places.max()) + 1 - first, places, [rows[index].last_id for index in members]
            )
            results = self._results.arrays
            ids[members], confidences[members] = (results[name][places - first] for name in _RESULTS)
        return DraftResult(ids, confidences)

    def _run(
        self, workspace: Workspace, first: int, count: int, places: npt.NDArray[np.int64], last_ids: list[int]
    ) -> None:
        """Rows from `first` on; waits for the results."""
        inputs = self._inputs.arrays
        for name in _OF_ROWS:
            inputs[name][:count] = workspace.small.inputs.arrays[name][first : first + count]
        inputs["last_ids"][:count] = 0
        inputs["last_ids"][places - first] = last_ids
        length = self.manifest.canvas_length
        tensors = self._inputs.tensors(count, 0, length) | self._results.tensors(count, 0, length)
        self._context.bind(tensors | self._caches(workspace, first, count))
        self._inputs.upload()
        self._context.enqueue()
        self._results.download()
        self._device.synchronize()

    def _caches(self, workspace: Workspace, first: int, count: int) -> dict[str, Tensor]:
        tensors, layers = {}, self._bindings.spec.layers
        numbers = {layer: index for index, layer in enumerate(self.manifest.reads)}
        for block in workspace.blocks:
            offset = first * block.group.kv_heads * block.pitch
            for place, (layer, which) in enumerate(block.group.tensors):
                if layer in numbers:
                    shape = self._bindings.cache_shape(layers[layer], count, block.slots)
                    tensors[f"{CACHES[which][0]}_{numbers[layer]}"] = Tensor(block.tensor(place) + offset, shape)
        return tensors

    def _row_step(self, workspace: Workspace) -> int:
        """A call begins at a multiple of so many rows, where every cache is aligned."""
        sizes = [block.group.kv_heads * block.pitch for block in workspace.blocks]
        return max(ALIGNMENT // math.gcd(ALIGNMENT, size) for size in sizes)

    def close(self) -> None:
        self._held.close()
