"""Builds that end half way: nothing loadable is left, and the next one goes on where it can."""

from __future__ import annotations

import errno
import os
import shutil
from collections import namedtuple
from pathlib import Path

import pytest

from dgemma_build.checkpoint import Checkpoint
from dgemma_build.data_file import size_of
from dgemma_build.engine import BuildRequest, build_engine
from dgemma_build.graph import Lowering, author_graph, graph_weights
from dgemma_build.progress import Silent
from dgemma_runtime.contract import Float32Array, Manifest
from dgemma_runtime.errors import ConfigurationError


class Heard(Silent):
    """Keeps what was said, and counts bytes."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.bytes: dict[str, tuple[int, int]] = {}  # stage -> bytes told, bytes announced
        self._stage = ""

    def stage(self, text: str, total_bytes: int = 0) -> None:
        self._stage = text
        self.bytes[text] = (0, total_bytes)

    def advance(self, nbytes: int) -> None:
        told, total = self.bytes[self._stage]
        self.bytes[self._stage] = (told + nbytes, total)

    def say(self, text: str) -> None:
        self.said.append(text)


def interrupt_after(monkeypatch: pytest.MonkeyPatch, calls: int) -> list[str]:
    """Reading the checkpoint breaks off at the given call; returns what was read."""
    read: list[str] = []
    original = Checkpoint.float32

    def float32(self: Checkpoint, name: str) -> Float32Array:
        if len(read) == calls:
            raise KeyboardInterrupt
        read.append(name)
        return original(self, name)

    monkeypatch.setattr(Checkpoint, "float32", float32)
    return read


def test_an_interrupted_build_goes_on(
    odd_checkpoint: Path, odd_engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = BuildRequest(odd_checkpoint, tmp_path / "engine")
    with monkeypatch.context() as patch:
        interrupt_after(patch, 40)
        with pytest.raises(KeyboardInterrupt):
            build_engine(request)
    assert [path.name for path in tmp_path.iterdir()] == ["engine.partial"]
    assert not (tmp_path / "engine.partial/config.json").exists()

    heard = Heard()
    read = interrupt_after(monkeypatch, 10**6)
    manifest = build_engine(request, heard)

    assert any("going on" in text for text in heard.said)
    assert read, "the rest was read"
    assert manifest == Manifest.load(odd_engine)
    assert {path.name for path in tmp_path.iterdir()} == {"engine"}
    assert set(manifest.files) | {"config.json"} == {path.name for path in (tmp_path / "engine").iterdir()}
    again: list[str] = []
    monkeypatch.undo()
    again = interrupt_after(monkeypatch, 10**6)
    build_engine(BuildRequest(odd_checkpoint, tmp_path / "second"))
    assert len(read) < len(again), "what was written before was not read again"


def test_another_checkpoint_starts_anew(
    checkpoint_copy: Path, odd_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = BuildRequest(checkpoint_copy, tmp_path / "engine")
    with monkeypatch.context() as patch:
        interrupt_after(patch, 40)
        with pytest.raises(KeyboardInterrupt):
            build_engine(request)
    shutil.copyfile(odd_checkpoint / "config.json", checkpoint_copy / "config.json")
    with (checkpoint_copy / "config.json").open("a") as file:
        file.write("\n")  # the same model, another file
    heard = Heard()
    build_engine(request, heard)
    assert not any("going on" in text for text in heard.said)


def test_progress_tells_every_byte(odd_checkpoint: Path, tmp_path: Path) -> None:
    heard = Heard()
    build_engine(BuildRequest(odd_checkpoint, tmp_path / "engine"), heard)
    ((told, announced),) = [sizes for text, sizes in heard.bytes.items() if text.startswith("writing") and sizes[1]]
    size = (tmp_path / "engine/model.onnx.data").stat().st_size
    assert announced == size
    assert size - 4096 * 400 < told <= size, "all but what aligns"


def test_a_disk_that_is_too_small_is_told_before_anything_is_written(
    odd_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**6, 10**6 - 5000, 5000))
    with pytest.raises(ConfigurationError, match=r"the weights need 0\.0 GB and the disk has 0\.0 GB free; make room"):
        build_engine(BuildRequest(odd_checkpoint, tmp_path / "engine"))
    assert not (tmp_path / "engine").exists()


def test_a_disk_that_fills_up_leaves_nothing_loadable(
    odd_checkpoint: Path, odd_engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int, offset: int, size: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    request = BuildRequest(odd_checkpoint, tmp_path / "engine")
    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        with pytest.raises(ConfigurationError, match="the disk is full; make room"):
            build_engine(request)
    assert [path.name for path in tmp_path.iterdir()] == ["engine.partial"]
    assert not (tmp_path / "engine.partial/config.json").exists()
    assert build_engine(request) == Manifest.load(odd_engine)


@pytest.mark.parametrize("moe", ["grouped", "dense"])
def test_a_config_alone_tells_every_weight(odd_checkpoint: Path, odd_engine: Path, moe: str) -> None:
    checkpoint = Checkpoint(odd_checkpoint)
    planned = graph_weights(checkpoint.config, Lowering(moe=moe))
    written = author_graph(checkpoint.config, checkpoint, Lowering(moe=moe))
    assert [(w.name, w.shape, w.dtype) for w in planned] == [
        (w.name, w.shape, w.dtype) for w in written.weights.values()
    ]
    for weight in written.weights.values():
        assert sum(piece.nbytes for piece in weight.pieces()) == weight.nbytes, weight.name
    if moe == "grouped":
        assert size_of(written.placed()) == (odd_engine / "model.onnx.data").stat().st_size
