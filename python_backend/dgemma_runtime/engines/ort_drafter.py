"""The onnxruntime engine's drafter: its arrays over the denoiser's rows, and its calls. Knows no library.

Its graph reads the caches of the rows that canvases run in, and writes its own keys and values behind their contexts,
where the next denoising step writes before it reads. Rows that are asked for and stand side by side are one call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from dgemma_runtime.contract import DraftResult, DraftRow
from dgemma_runtime.drafter_manifest import DrafterManifest
from dgemma_runtime.engines.ort_rows import Array, Arrays, Workspace

Binding = Any  # the library's
Bind = Callable[[Mapping[str, Array], Mapping[str, Array]], Binding]
Run = Callable[[Binding], None]


class _Bound:
    """A workspace's arrays that only the drafter has, and its calls' bindings."""

    def __init__(self, rows: int, length: int) -> None:
        self.last_ids = np.zeros(rows, np.int32)
        self.results: Arrays = {
            "token_ids": np.zeros((rows, length), np.int32),
            "confidences": np.zeros((rows, length), np.float32),
        }
        self.bindings: dict[tuple[int, int], Binding] = {}  # by first row and number of rows


class OrtDrafter:
    """Proposes canvases for rows whose contexts are laid out; `bind` and `run` are those of its session."""

    def __init__(self, manifest: DrafterManifest, bind: Bind, run: Run) -> None:
        self.manifest = manifest
        self._bind, self._run = bind, run
        self._bound: WeakKeyDictionary[Workspace, _Bound] = WeakKeyDictionary()

    def draft(self, rows: Sequence[DraftRow], where: Mapping[int, Workspace]) -> DraftResult:
        """`where` tells each slot's workspace."""
        shape = (len(rows), self.manifest.canvas_length)
        ids, confidences = np.empty(shape, np.int32), np.empty(shape, np.float32)
        for workspace in dict.fromkeys(where[row.slot] for row in rows):
            bound = self._bound.get(workspace)
            if bound is None:
                bound = self._bound[workspace] = _Bound(len(workspace.content), self.manifest.canvas_length)
            members = [index for index, row in enumerate(rows) if where[row.slot] is workspace]
            places = [workspace.index(rows[index].slot) for index in members]
            bound.last_ids[places] = [rows[index].last_id for index in members]
            for first, count in _runs(sorted(places)):
                self._run(self._binding(workspace, bound, first, count))
            ids[members] = bound.results["token_ids"][places]
            confidences[members] = bound.results["confidences"][places]
        return DraftResult(ids, confidences)

    def _binding(self, workspace: Workspace, bound: _Bound, first: int, count: int) -> Binding:
        key = (first, count)
        if key not in bound.bindings:
            chosen = slice(first, first + count)
            caches = {
                f"{name}_{index}": array[chosen]
                for index, layer in enumerate(self.manifest.reads)
                for name, array in zip(("key_cache", "value_cache"), workspace.caches[layer], strict=True)
            }
            inputs = {name: workspace.per_row[name][chosen] for name in ("position", "sliding_length")}
            inputs |= {"last_ids": bound.last_ids[chosen]} | caches
            outputs = {name: array[chosen] for name, array in bound.results.items()}
            bound.bindings[key] = self._bind(inputs, outputs | {f"{name}_out": array for name, array in caches.items()})
        return bound.bindings[key]


def _runs(places: Sequence[int]) -> Iterator[tuple[int, int]]:
    """First row and number of rows of each run of neighbours."""
    for run in np.split(np.array(places), np.flatnonzero(np.diff(places) > 1) + 1):
        yield int(run[0]), len(run)
