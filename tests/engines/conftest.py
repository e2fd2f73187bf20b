"""A TensorRT engine over a made-up model in ordinary memory, beside the plain arrays that it must agree with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest

from dgemma_runtime.contract import (
    FULL,
    SLIDING,
    DenoiseRow,
    EncodeRow,
    EngineLimits,
    Int32Array,
    LayerSpec,
    Manifest,
    ModelSpec,
    cache_dtypes,
    file_sha256,
)
from dgemma_runtime.engines.bindings import Bindings
from dgemma_runtime.engines.device import STORAGE, Array
from dgemma_runtime.engines.emulated_tensorrt import ENGINE_BYTES
from dgemma_runtime.engines.host_device import HostDevice, HostProgram
from dgemma_runtime.engines.scripted import scripted_manifest
from dgemma_runtime.engines.scripted_program import KeysValues, answer, new_keys_values, scripted_program, visible
from dgemma_runtime.engines.tensorrt import ENGINE_FILE, TensorRtEngine
from dgemma_runtime.pages import PagePool, PageRules, PageTable

LAYERS = (LayerSpec(SLIDING, 2, 8), LayerSpec(SLIDING, 2, 8), LayerSpec(FULL, 1, 16), LayerSpec(SLIDING, 2, 8))
SPEC = ModelSpec(1000, 6, 5, 11, 4000, LAYERS)
MANIFEST = replace(
    scripted_manifest(1000), model=SPEC, backend="tensorrt", precision="bf16", kv_dtype="bf16", max_model_len=3000
)


def write_directory(directory: Path, manifest: Manifest = MANIFEST, content: bytes = ENGINE_BYTES) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / ENGINE_FILE).write_bytes(content)
    replace(manifest, files={ENGINE_FILE: file_sha256(directory / ENGINE_FILE)}).save(directory)
    return directory


@dataclass
class Sequence:
    """What the engine must know of one sequence."""

    table: PageTable
    kept: list[KeysValues]  # per layer, of all tokens
    slot: int | None = None
    soft: Array | None = None  # None: the next step is a canvas's first
    length: int = 0


@dataclass
class Harness:
    """Drives the engine and the plain model side by side; every result is compared."""

    engine: TensorRtEngine
    device: HostDevice
    program: HostProgram
    bindings: Bindings
    random: np.random.Generator = field(default_factory=lambda: np.random.default_rng(5))

    def __post_init__(self) -> None:
        limits = self.engine.limits
        self.spec = self.engine.spec
        self.rules = PageRules.of(limits, self.spec.sliding_window)
        self.full, self.sliding = PagePool(limits.full_pages), PagePool(limits.sliding_pages)

    def sequence(self, most_tokens: int) -> Sequence:
        table = PageTable(self.full, self.sliding, self.rules, self.rules.need(most_tokens))
        kept = []
        for layer in self.spec.layers:
            keys, values = cache_dtypes(self.bindings.kv_dtype, layer)
            shape = (layer.num_key_value_heads, 0, layer.head_dim)
            kept.append((np.zeros(shape, STORAGE[keys]), np.zeros(shape, STORAGE[values])))
        return Sequence(table, kept)

    def context(self, sequence: Sequence) -> list[KeysValues]:
        starts = [sequence.length - visible(self.spec, layer, sequence.length) for layer in range(len(sequence.kept))]
        return [
            (keys[:, start:], values[:, start:]) for (keys, values), start in zip(sequence.kept, starts, strict=True)
        ]

    def encode(self, sequences: list[Sequence], lengths: list[int]) -> None:
        rows = []
        for sequence, length in zip(sequences, lengths, strict=True):
            ids = self.random.integers(self.spec.vocab_size, size=length, dtype=np.int32)
            sequence.table.extend(sequence.length + length)
            rows.append(EncodeRow(ids, sequence.length, sequence.table.view))
            self._grow(sequence, ids)
        self.engine.encode(rows)
        for sequence in sequences:
            sequence.table.trim(sequence.length)

    def _grow(self, sequence: Sequence, ids: Int32Array) -> None:
        new = new_keys_values(self.bindings, self.context(sequence), ids, sequence.length)
        sequence.kept = [
            (np.concatenate((keys, more_keys), axis=1), np.concatenate((values, more_values), axis=1))
            for (keys, values), (more_keys, more_values) in zip(sequence.kept, new, strict=True)
        ]
        sequence.length += len(ids)

    def denoise(self, sequences: dict[int, Sequence]) -> None:
        """By slot."""
        length, rows, expected = self.spec.canvas_length, [], []
        for slot, sequence in sequences.items():
            ids = self.random.integers(self.spec.vocab_size, size=length, dtype=np.int32)
            uniforms, temperature = self.random.random(length, np.float32), float(self.random.random(dtype=np.float32))
            first = sequence.soft is None
            soft = np.zeros((length, self.spec.hidden_size), STORAGE[self.bindings.soft_dtype])
            if sequence.soft is not None:
                soft = sequence.soft
            position = sequence.length
            rows.append(DenoiseRow(slot, ids, uniforms, temperature, position, sequence.table.view, first))
            context = self.context(sequence)
            expected.append(answer(self.bindings, context, ids, uniforms, temperature, position, soft))
            sequence.slot, sequence.soft = slot, expected[-1].next_soft
        result = self.engine.denoise(rows)
        assert np.array_equal(result.argmax_ids, [one.argmax_ids for one in expected])
        assert np.array_equal(result.sampled_ids, [one.sampled_ids for one in expected])
        assert np.array_equal(result.entropies, [one.entropies for one in expected])

    def leave(self, sequence: Sequence) -> None:
        """The canvas is over."""
        assert sequence.slot is not None
        self.engine.release(sequence.slot)
        sequence.slot = sequence.soft = None

    def end(self, sequence: Sequence) -> None:
        if sequence.slot is not None:
            self.leave(sequence)
        sequence.table.release()

    def close(self) -> None:
        """And nothing is left."""
        if self.program.closed:
            return
        self.engine.close()
        assert self.device.live == 0
        assert self.program.contexts == 0
        assert self.program.closed


Make = Callable[..., Harness]


@pytest.fixture
def manifest() -> Manifest:
    return MANIFEST


@pytest.fixture
def write() -> Callable[..., Path]:
    """`write_directory`, for modules that cannot import this one."""
    return write_directory


@pytest.fixture
def harness_of() -> type[Harness]:
    return Harness


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    """An engine of these limits (batch, chunk, page size, full and sliding pages); checked for leaks at the end."""
    made: list[Harness] = []

    def build(
        limits: tuple[int, int, int, int, int] = (3, 24, 4, 400, 60),
        manifest: Manifest = MANIFEST,
        slot_group: int = 64,
        memory_bytes: int = 2**40,
        graphs: bool = True,
    ) -> Harness:
        directory = write_directory(tmp_path / f"engine{len(made)}", manifest)
        most = -(-manifest.max_model_len // slot_group) * slot_group
        engine_limits = EngineLimits(*limits)
        bindings = Bindings(manifest.model, manifest.kv_dtype, "bf16", slot_group, most, limits[0], limits[1])
        device = HostDevice(memory_bytes)
        programs: list[HostProgram] = []

        def load(path: Path) -> HostProgram:
            assert path == directory / ENGINE_FILE
            programs.append(scripted_program(device, bindings))
            return programs[-1]

        engine = TensorRtEngine(directory, engine_limits, device, load, graphs)
        made.append(Harness(engine, device, programs[0], bindings))
        return made[-1]

    yield build
    for harness in made:
        harness.close()
