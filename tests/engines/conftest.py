"""A TensorRT engine over a made-up model in ordinary memory, beside the plain arrays that it must agree with."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest

from dgemma_runtime.contract import (
    FULL,
    SLIDING,
    CommitRow,
    DenoiseRow,
    EncodeRow,
    EngineLimits,
    Int32Array,
    LayerSpec,
    Manifest,
    ModelSpec,
    SequencePages,
    cache_dtypes,
    file_sha256,
)
from dgemma_runtime.engines.bindings import Bindings
from dgemma_runtime.engines.device import STORAGE, Array
from dgemma_runtime.engines.emulated_tensorrt import ENGINE_BYTES
from dgemma_runtime.engines.host_device import HostDevice, HostProgram
from dgemma_runtime.engines.number_formats import to_float32
from dgemma_runtime.engines.scripted import scripted_manifest
from dgemma_runtime.engines.scripted_program import KeysValues, answer, new_keys_values, scripted_program, visible
from dgemma_runtime.engines.tensorrt import ENGINE_FILE, TensorRtEngine
from dgemma_runtime.errors import ConfigurationError

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


class Pool:
    """Pages of one group of layers; what was given back last is taken first."""

    def __init__(self, pages: int) -> None:
        self.free = list(range(pages - 1, -1, -1))
        self.holders: Counter[int] = Counter()

    def take(self) -> int:
        return self.hold(self.free.pop())

    def hold(self, page: int) -> int:
        self.holders[page] += 1
        return page

    def drop(self, page: int) -> None:
        self.holders[page] -= 1
        if not self.holders[page]:
            self.free.append(page)


class Table:
    """The pages of one sequence."""

    def __init__(self, full: Pool, sliding: Pool, page_size: int, window: int) -> None:
        self._pools, self._page_size, self._window = (full, sliding), page_size, window
        self._pages: tuple[list[int], list[int]] = ([], [])

    @property
    def view(self) -> SequencePages:
        full, sliding = (np.array(pages, np.int32) for pages in self._pages)
        return SequencePages(full, sliding)

    def extend(self, tokens: int) -> None:
        for pool, pages in zip(self._pools, self._pages, strict=True):
            while len(pages) * self._page_size < tokens:
                pages.append(pool.take())

    def share(self, other: Table, pages: int) -> None:
        """Begin with the other's first pages."""
        for pool, own, given in zip(self._pools, self._pages, other._pages, strict=True):
            own[:] = [page if page < 0 else pool.hold(page) for page in given[:pages]]

    def trim(self, tokens: int) -> None:
        """Give back sliding pages that nothing behind so many tokens sees."""
        pages = self._pages[1]
        for index in range(min(max(0, tokens - self._window + 1) // self._page_size, len(pages))):
            if pages[index] >= 0:
                self._pools[1].drop(pages[index])
                pages[index] = -1

    def release(self) -> None:
        for pool, pages in zip(self._pools, self._pages, strict=True):
            while pages:
                page = pages.pop()
                if page >= 0:
                    pool.drop(page)


@dataclass
class Sequence:
    """What the engine must know of one sequence."""

    table: Table
    kept: list[KeysValues]  # per layer, of all tokens
    slot: int | None = None
    soft: Array | None = None  # None: the next step is a canvas's first
    length: int = 0


@dataclass
class Harness:
    """Drives the engine and the plain model side by side; results are compared. A call that fails changes nothing."""

    engine: TensorRtEngine
    device: HostDevice
    program: HostProgram
    bindings: Bindings
    random: np.random.Generator = field(default_factory=lambda: np.random.default_rng(5))

    def __post_init__(self) -> None:
        limits = self.engine.limits
        self.spec = self.engine.spec
        self.full, self.sliding = Pool(limits.full_pages), Pool(limits.sliding_pages)

    def _table(self) -> Table:
        return Table(self.full, self.sliding, self.engine.limits.page_size, self.spec.sliding_window)

    def sequence(self) -> Sequence:
        kept = []
        for layer in self.spec.layers:
            keys, values = cache_dtypes(self.bindings.kv_dtype, layer)
            shape = (layer.num_key_value_heads, 0, layer.head_dim)
            kept.append((np.zeros(shape, STORAGE[keys]), np.zeros(shape, STORAGE[values])))
        return Sequence(self._table(), kept)

    def sharing(self, other: Sequence, tokens: int) -> Sequence:
        """A sequence that begins with the other's first tokens, a multiple of the page size, in the same pages."""
        table = self._table()
        table.share(other.table, tokens // self.engine.limits.page_size)
        return Sequence(table, [(keys[:, :tokens], values[:, :tokens]) for keys, values in other.kept], length=tokens)

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
        self.engine.encode(rows)
        for sequence, row in zip(sequences, rows, strict=True):
            self._grow(sequence, row.token_ids)

    def prefilled(self, context: int) -> Sequence:
        """A sequence of so many tokens, encoded in chunks."""
        sequence, chunk = self.sequence(), self.engine.limits.max_encode_tokens
        for start in range(0, context, chunk):
            self.encode([sequence], [min(chunk, context - start)])
        return sequence

    def _grow(self, sequence: Sequence, ids: Int32Array) -> None:
        new = new_keys_values(self.bindings, self.context(sequence), ids, sequence.length)
        sequence.kept = [
            (np.concatenate((keys, more_keys), axis=1), np.concatenate((values, more_values), axis=1))
            for (keys, values), (more_keys, more_values) in zip(sequence.kept, new, strict=True)
        ]
        sequence.length += len(ids)
        sequence.table.trim(sequence.length)

    def denoise(self, sequences: Mapping[int, Sequence], commits: Mapping[int, Sequence] | None = None) -> None:
        """By slot. The canvases of `commits` are over and become context."""
        length, rows, expected = self.spec.canvas_length, [], []
        ended = self._commit_rows(commits or {})
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
        result = self.engine.denoise(rows, ended)
        shape = (len(rows), length)
        for found, name in ((getattr(result, name), name) for name in ("argmax_ids", "sampled_ids", "entropies")):
            assert np.array_equal(found, np.array([getattr(one, name) for one in expected]).reshape(shape))
        for (slot, sequence), one in zip(sequences.items(), expected, strict=True):
            sequence.slot, sequence.soft = slot, one.next_soft
        for (slot, sequence), row in zip((commits or {}).items(), ended, strict=True):
            sequence.slot, sequence.soft = slot, None
            self._grow(sequence, row.token_ids)

    def _commit_rows(self, commits: Mapping[int, Sequence]) -> list[CommitRow]:
        rows, length = [], self.spec.canvas_length
        for slot, sequence in commits.items():
            ids = self.random.integers(self.spec.vocab_size, size=length, dtype=np.int32)
            sequence.table.extend(sequence.length + length)
            rows.append(CommitRow(slot, ids, sequence.length, sequence.table.view))
        return rows

    def check_pages(self, sequence: Sequence) -> None:
        """All that a later token may see stands in the pages."""
        for layer, kept in enumerate(sequence.kept):
            start = sequence.length - visible(self.spec, layer, sequence.length)
            stored = self.engine.keys_values(layer, sequence.table.view, start, sequence.length)
            dtypes = cache_dtypes(self.bindings.kv_dtype, self.spec.layers[layer])
            for found, bits, dtype in zip(stored, kept, dtypes, strict=True):
                expected = to_float32(np.ascontiguousarray(bits[:, start:]).view(np.uint8), dtype)
                assert np.array_equal(found, expected.transpose(1, 0, 2))

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


@pytest.fixture
def least_memory(make: Make) -> Callable[[Manifest, tuple[int, ...]], int]:
    """Bytes below which an engine refuses to start."""

    def find(manifest: Manifest, limits: tuple[int, ...]) -> int:
        size = 1000
        while True:
            try:
                make(manifest=manifest, limits=limits, memory_bytes=size).close()
            except ConfigurationError as error:
                words = r"need (\d+) bytes, (\d+) are free; lower kv_memory_bytes, max_model_len or"
                numbers = re.findall(words, str(error))[0]
                size += int(numbers[0]) - int(numbers[1])
            else:
                return size

    return find
