"""Write the weights of a graph to its data file: in order, in bounded memory, resumable. Knows no graph.

A journal beside the file has one line per finished weight with its CRC-32. A later run keeps what the journal lists
and the file still holds, and goes on behind it. Reading and converting the next piece overlaps with writing and with
hashing the last. The file bypasses the page cache where its file system allows (O_DIRECT): it is far larger than what
the cache holds, and filling the cache costs more than writing.
"""

from __future__ import annotations

import errno
import hashlib
import json
import mmap
import os
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from io import RawIOBase
from pathlib import Path

import numpy as np

from dgemma_build.onnx_writer import ALIGNMENT, Array, PlacedWeight

_CHUNK = 16 * 2**20  # bytes read back at once
_STAGE = 8 * 2**20  # bytes written at once, a multiple of ALIGNMENT

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
    with _open_direct(path) as file, journal.open("a") as notes, ThreadPoolExecutor(2) as executor:
        writer = _Writer(path, file, executor)
        for item in placed:
            name, size = item.weight.name, item.weight.nbytes
            writer.pad_to(item.offset)
            if name in finished and writer.keep(size, finished[name]):
                advance(size)
                continue
            checksum = _write(writer, item, advance)
            notes.write(json.dumps({"name": name, "crc32": checksum}) + "\n")
            notes.flush()
        os.ftruncate(file.fileno(), size_of(placed))
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


def _open_direct(path: Path) -> RawIOBase:
    """Around the page cache, or through it where the file system knows nothing else."""
    flags = os.O_RDWR | getattr(os, "O_DIRECT", 0)
    try:
        descriptor = os.open(path, flags)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        descriptor = os.open(path, os.O_RDWR)
    return os.fdopen(descriptor, "r+b", buffering=0)


class _Writer:
    """The file from its beginning on: digest of all, checksum of the present weight, one piece in flight."""

    def __init__(self, path: Path, file: RawIOBase, executor: ThreadPoolExecutor) -> None:
        self.digest = hashlib.sha256()
        self._path, self._file, self._executor = path, file, executor
        self._position = 0  # in the file, of what was hashed
        self._checksum = 0
        self._pending: list[Future[None]] = []
        self._staged = mmap.mmap(-1, _STAGE)  # page-aligned, as O_DIRECT asks
        self._filled = 0  # bytes of it

    def pad_to(self, offset: int) -> None:
        """`offset` is where the next weight begins, a multiple of ALIGNMENT."""
        self._hash(memoryview(bytes(offset - self._position)))

    def keep(self, size: int, checksum: int) -> bool:
        """Whether the next `size` bytes of the file have the checksum; then they count as written."""
        before, found = self.digest.copy(), 0
        with self._path.open("rb") as file:
            file.seek(self._position)
            for start in range(0, size, _CHUNK):
                data = file.read(min(_CHUNK, size - start))
                self.digest.update(data)
                found = zlib.crc32(data, found)
        if found == checksum:
            self._position += size
            return True
        self.digest = before
        return False

    def begin(self) -> None:
        self._checksum = 0
        self._file.seek(self._position)

    def write(self, piece: Array) -> None:
        self._settle()
        data = piece.reshape(-1).view(np.uint8).data
        self._pending = [self._executor.submit(self._hash, data), self._executor.submit(self._stage, data)]

    def end(self) -> int:
        """The checksum of what was written since `begin`. It is in the file now, with zeros up to the next multiple."""
        self._settle()
        whole = self._filled + -self._filled % ALIGNMENT
        self._staged[self._filled : whole] = bytes(whole - self._filled)
        self._flush(whole)
        return self._checksum

    def _settle(self) -> None:
        for pending in self._pending:
            pending.result()
        self._pending = []

    def _hash(self, data: memoryview) -> None:
        self.digest.update(data)
        self._checksum = zlib.crc32(data, self._checksum)
        self._position += len(data)

    def _stage(self, data: memoryview) -> None:
        while data:
            count = min(len(data), _STAGE - self._filled)
            self._staged[self._filled : self._filled + count] = data[:count]
            self._filled += count
            data = data[count:]
            if self._filled == _STAGE:
                self._flush(_STAGE)

    def _flush(self, size: int) -> None:
        with memoryview(self._staged) as staged:
            rest = staged[:size]
            while rest:  # a raw file may take less than it is given
                rest = rest[self._file.write(rest) :]
        self._filled = 0


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
