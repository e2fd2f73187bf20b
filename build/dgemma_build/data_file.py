"""Write the weights of a graph to its data file: in order, in bounded memory, resumable. Knows no graph.

A journal beside the file has one line per finished weight with its CRC-32. A later run keeps what the journal lists
and the file still holds, and goes on behind it. Reading and converting the next piece overlaps with writing the last.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from io import RawIOBase
from pathlib import Path

import numpy as np

from dgemma_build.onnx_writer import Array, PlacedWeight

_CHUNK = 16 * 2**20  # bytes read back at once

Advance = Callable[[int], None]


def journal_of(path: Path) -> Path:
    """Where the journal of a data file stands."""
    return path.with_name(path.name + ".journal")


def size_of(placed: Sequence[PlacedWeight]) -> int:
    """Bytes of the data file."""
    return placed[-1].offset + placed[-1].weight.nbytes if placed else 0


def allocate(path: Path, size: int) -> None:
    """Reserve the whole file on the disk; raises OSError (ENOSPC) before anything is written."""
    with path.open("ab") as file:
        if size:
            os.posix_fallocate(file.fileno(), 0, size)


def write_weights(path: Path, placed: Sequence[PlacedWeight], advance: Advance) -> str:
    """Fill an allocated file; returns its SHA-256. `advance` is told every byte, kept or written.

    Raises what a weight's `pieces` raise, ValueError for pieces that do not fit, OSError; then the next run goes on.
    """
    journal = journal_of(path)
    finished = _read_journal(journal)
    with path.open("r+b", buffering=0) as file, journal.open("a") as notes, ThreadPoolExecutor(1) as executor:
        writer = _Writer(file, executor)
        for item in placed:
            name, size = item.weight.name, item.weight.nbytes
            writer.pad_to(item.offset)
            if name in finished and writer.keep(size, finished[name]):
                advance(size)
                continue
            checksum = _write(writer, item, advance)
            notes.write(json.dumps({"name": name, "crc32": checksum}) + "\n")
            notes.flush()
        os.fsync(file.fileno())
        return writer.digest.hexdigest()


def _write(writer: _Writer, item: PlacedWeight, advance: Advance) -> int:
    weight, rows = item.weight, 0
    writer.begin()
    for piece in weight.pieces():
        rows += len(piece)
        if piece.dtype != weight.dtype or piece.shape[1:] != weight.shape[1:] or rows > weight.shape[0]:
            message = f"{weight.name}: a piece is {piece.dtype} {piece.shape} of {weight.dtype} {weight.shape}"
            raise ValueError(message)
        writer.write(np.ascontiguousarray(piece))
        advance(piece.nbytes)
    if rows != weight.shape[0]:
        raise ValueError(f"{weight.name}: {rows} rows came of {weight.shape[0]}")
    return writer.end()


class _Writer:
    """The file from its beginning on: digest of all, checksum of the present weight, one piece in flight."""

    def __init__(self, file: RawIOBase, executor: ThreadPoolExecutor) -> None:
        self.digest = hashlib.sha256()
        self._file, self._executor = file, executor
        self._position = 0
        self._checksum = 0
        self._pending: Future[None] | None = None

    def pad_to(self, offset: int) -> None:
        gap = b"\0" * (offset - self._position)
        _write_all(self._file, memoryview(gap))
        self.digest.update(gap)
        self._position = offset

    def keep(self, size: int, checksum: int) -> bool:
        """Whether the next `size` bytes of the file have the checksum; then they count as written."""
        before, found = self.digest.copy(), 0
        for start in range(0, size, _CHUNK):
            data = _read_all(self._file, min(_CHUNK, size - start))
            self.digest.update(data)
            found = zlib.crc32(data, found)
        if found == checksum:
            self._position += size
            return True
        self.digest = before
        self._file.seek(self._position)
        return False

    def begin(self) -> None:
        self._checksum = 0

    def write(self, piece: Array) -> None:
        self._settle()
        self._pending = self._executor.submit(self._put, piece)

    def end(self) -> int:
        """The checksum of what was written since `begin`."""
        self._settle()
        return self._checksum

    def _settle(self) -> None:
        if self._pending is not None:
            self._pending.result()
            self._pending = None

    def _put(self, piece: Array) -> None:
        data = piece.reshape(-1).view(np.uint8).data
        _write_all(self._file, data)
        self.digest.update(data)
        self._checksum = zlib.crc32(data, self._checksum)
        self._position += len(data)


def _write_all(file: RawIOBase, data: memoryview) -> None:
    """A raw file may take less than it is given."""
    while data:
        data = data[file.write(data) :]


def _read_all(file: RawIOBase, size: int) -> bytes:
    """`size` bytes, fewer at the end of the file."""
    parts = []
    while size and (part := file.read(size)):
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def _read_journal(path: Path) -> dict[str, int]:
    """Name -> checksum; a last line that was cut short counts for nothing."""
    found: dict[str, int] = {}
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            entry = json.loads(line)
            found[entry["name"]] = entry["crc32"]
        except (ValueError, KeyError, TypeError):
            continue
    return found
