"""The data file of a graph: in order, checked, and resumed where it was interrupted."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest

from dgemma_build.data_file import allocate, journal_of, size_of, write_weights
from dgemma_build.onnx_writer import GraphWriter, PlacedWeight

Array = npt.NDArray[Any]
SHAPES = {"a": (300, 7), "tiny": (3,), "b": (41, 5, 9), "c": (1000,)}


class Source:
    """Values by name, cut into pieces; counts what is read, and breaks off at a named weight."""

    def __init__(self, breaks_at: str = "") -> None:
        rng = np.random.default_rng(0)
        self.values: dict[str, Array] = {name: rng.random(shape, dtype=np.float32) for name, shape in SHAPES.items()}
        self.values["c"] = self.values["c"].astype(ml_dtypes.bfloat16)
        self.breaks_at, self.read = breaks_at, list[str]()

    def pieces(self, name: str) -> Iterator[Array]:
        self.read.append(name)
        half = len(self.values[name]) // 2
        yield self.values[name][:half]
        if name == self.breaks_at:
            raise KeyboardInterrupt
        yield self.values[name][half:]

    def placed(self) -> list[PlacedWeight]:
        writer = GraphWriter()
        for name, values in self.values.items():
            writer.weight(name, values.shape, values.dtype, lambda name=name: self.pieces(name))  # type: ignore[misc]
        return writer.placed()


def write(path: Path, source: Source) -> tuple[str, int]:
    """SHA-256 and the bytes that were told."""
    told: list[int] = []
    placed = source.placed()
    allocate(path, size_of(placed))
    return write_weights(path, placed, told.append), sum(told)


def test_every_weight_stands_where_the_graph_says(tmp_path: Path) -> None:
    source = Source()
    digest, told = write(tmp_path / "data", source)
    content = (tmp_path / "data").read_bytes()
    assert hashlib.sha256(content).hexdigest() == digest
    placed = source.placed()
    assert [item.weight.name for item in placed] == ["a", "b", "c"], "what is small stays in the graph"
    assert told == sum(item.weight.nbytes for item in placed)
    for item in placed:
        assert item.offset % 4096 == 0
        found = np.frombuffer(content, item.weight.dtype, int(np.prod(item.weight.shape)), item.offset)
        assert np.array_equal(found.reshape(item.weight.shape), source.values[item.weight.name])


def test_an_interrupted_run_is_gone_on_with(tmp_path: Path) -> None:
    whole, _ = write(tmp_path / "whole", Source())
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "data", Source(breaks_at="c"))
    second = Source()
    digest, told = write(tmp_path / "data", second)
    assert second.read == ["c"]
    assert digest == whole
    assert told == sum(item.weight.nbytes for item in second.placed()), "what was kept counts too"


def test_what_is_not_as_it_was_noted_is_written_again(tmp_path: Path) -> None:
    whole, _ = write(tmp_path / "whole", Source())
    path = tmp_path / "data"
    with pytest.raises(KeyboardInterrupt):
        write(path, Source(breaks_at="c"))
    content = bytearray(path.read_bytes())
    content[10] ^= 1  # in a
    path.write_bytes(content)
    journal = journal_of(path)
    journal.write_text(journal.read_text() + '{"name": "c", "crc')  # cut short
    second = Source()
    digest, _ = write(path, second)
    assert second.read == ["a", "c"]
    assert digest == whole


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (np.zeros((299, 7), np.float32), "a: 299 rows came of 300"),
        (np.zeros((301, 7), np.float32), r"a: a piece is float32 \(\d+, 7\) of float32 \(300, 7\)"),
        (np.zeros((300, 6), np.float32), r"a: a piece is float32 \(150, 6\) of float32 \(300, 7\)"),
        (np.zeros((300, 7)), r"a: a piece is float64 \(150, 7\) of float32 \(300, 7\)"),
    ],
)
def test_pieces_that_do_not_fit_are_refused(tmp_path: Path, values: Array, words: str) -> None:
    source = Source()
    placed = source.placed()
    source.values["a"] = values
    allocate(tmp_path / "data", size_of(placed))
    with pytest.raises(ValueError, match=words):
        write_weights(tmp_path / "data", placed, lambda nbytes: None)


def test_a_graph_without_large_weights_has_an_empty_file(tmp_path: Path) -> None:
    allocate(tmp_path / "data", size_of([]))
    assert write_weights(tmp_path / "data", [], lambda nbytes: None) == hashlib.sha256(b"").hexdigest()
