"""Peak memory of an engine: python -m dgemma_build.bench.peak_worker DIRECTORY CONTEXT BATCH, bytes on stdout.

A process of its own serves `batch` sequences up to the whole context: prefill of two at a time, a canvas each, two
steps, the commit.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from dgemma_build.bench.worker import peak_memory_bytes
from dgemma_runtime.contract import CommitRow, DenoiseRow, EncodeRow, Engine, SequencePages
from dgemma_runtime.engines.factory import open_engine
from dgemma_runtime.settings import RuntimeSettings

_CHUNK, _AT_ONCE = 512, 2  # of prefill: tokens and sequences, as the runtime's defaults have it


def main(directory: Path, context: int, batch: int) -> None:
    """Serve and tell."""
    serve_whole(
        open_engine(directory, RuntimeSettings(max_model_len=context, max_batch_size=batch, threads=2)), context
    )
    print(peak_memory_bytes())


def serve_whole(engine: Engine, context: int) -> None:
    """As many sequences of `context` tokens as the engine has slots for."""
    batch, canvas = engine.limits.max_batch_size, engine.manifest.model.canvas_length
    tables, chunk = _tables(engine, batch), min(_CHUNK, engine.limits.max_encode_tokens)
    position, ids = 0, np.arange(_CHUNK, dtype=np.int32)
    while position < context - canvas:
        length = min(chunk, context - canvas - position)
        for first in range(0, batch, _AT_ONCE):
            chosen = tables[first : first + _AT_ONCE]
            engine.encode([EncodeRow(ids[:length], position, table) for table in chosen])
        position += length
    uniforms = np.full(canvas, 0.5, np.float32)
    for first_step in (True, False):
        rows = [
            DenoiseRow(slot, ids[:canvas], uniforms, 0.8, position, table, first_step)
            for slot, table in enumerate(tables)
        ]
        engine.denoise(rows)
    engine.denoise([], [CommitRow(slot, ids[:canvas], position, table) for slot, table in enumerate(tables)])


def _tables(engine: Engine, batch: int) -> list[SequencePages]:
    """An equal share of all pages each; sliding pages are used again in turns."""
    window, count = engine.limits.sliding_pages // batch, engine.limits.full_pages // batch
    tables = []
    for row in range(batch):
        full = np.arange(row * count, (row + 1) * count, dtype=np.int32)
        sliding = row * window + np.arange(count, dtype=np.int32) % window
        tables.append(SequencePages(full, sliding))
    return tables


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
