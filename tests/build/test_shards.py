"""Weight files that disagree with their index, lie about themselves or lead elsewhere: each is refused by name."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dgemma_build.checkpoint import Checkpoint
from dgemma_build.random_checkpoint import write_checkpoint
from dgemma_runtime.errors import CheckpointError


def read_everything(directory: Path) -> None:
    checkpoint = Checkpoint(directory)
    for name in checkpoint.names():
        checkpoint.float32(name)


def refused(directory: Path, *words: str) -> None:
    with pytest.raises(CheckpointError) as error:
        read_everything(directory)
    for word in words:
        assert word in str(error.value)


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """The odd checkpoint once more, in four shards or so."""
    return write_checkpoint(tmp_path / "sharded", "odd_a", shard_bytes=150_000)


def change_index(directory: Path, change: Callable[[dict[str, str]], object]) -> None:
    path = directory / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


def shards_of(directory: Path) -> list[Path]:
    found = sorted(directory.glob("model-*.safetensors"))
    assert len(found) > 2
    return found


def names_in(shard: Path) -> list[str]:
    return sorted(load_file(shard))


def test_sharded_checkpoints_are_read_through_their_index(sharded: Path, odd_checkpoint: Path) -> None:
    shards, whole = Checkpoint(sharded), Checkpoint(odd_checkpoint)
    assert set(shards.names()) == set(whole.names())
    assert shards.left_out == whole.left_out
    for name in whole.names():
        assert np.array_equal(shards.tensor(name), whole.tensor(name))


def test_a_missing_shard_is_named(sharded: Path) -> None:
    shard = shards_of(sharded)[1]
    shard.unlink()
    refused(sharded, shard.name, "not found", "incomplete")


def test_a_tensor_that_its_shard_does_not_hold_is_named(sharded: Path) -> None:
    shard = shards_of(sharded)[1]
    tensors = load_file(shard)
    lost = sorted(tensors)[0]
    save_file({name: values for name, values in tensors.items() if name != lost}, shard)
    refused(sharded, "index.json", "no shard holds", lost)


def test_a_tensor_in_another_shard_than_listed_is_named(sharded: Path) -> None:
    first, second = shards_of(sharded)[:2]
    moved = names_in(first)[0]
    change_index(sharded, lambda weight_map: weight_map.update({moved: second.name}))
    refused(sharded, f"lists {moved} in {second.name}", f"it is in {first.name}")


def test_a_tensor_in_two_shards_is_named(sharded: Path) -> None:
    first, second = shards_of(sharded)[:2]
    twice = names_in(first)[0]
    save_file({**load_file(second), twice: load_file(first)[twice]}, second)
    refused(sharded, twice, f"both in {first.name} and in {second.name}")


def test_a_tensor_that_the_index_does_not_list_is_named(sharded: Path) -> None:
    unlisted = names_in(shards_of(sharded)[0])[0]
    change_index(sharded, lambda weight_map: weight_map.pop(unlisted))
    refused(sharded, "does not list", unlisted)


def test_an_index_beside_a_whole_file_is_refused(sharded: Path, odd_checkpoint: Path) -> None:
    (sharded / "model.safetensors").write_bytes((odd_checkpoint / "model.safetensors").read_bytes())
    refused(sharded, "index.json", "model.safetensors is there too")


@pytest.mark.parametrize("content", [{}, {"weight_map": []}, {"weight_map": {"x": 3}}, {"weight_map": {"x": None}}])
def test_an_index_of_another_form_is_refused(sharded: Path, content: dict[str, Any]) -> None:
    (sharded / "model.safetensors.index.json").write_text(json.dumps(content))
    refused(sharded, "index.json", "weight_map")


@pytest.mark.parametrize(
    ("shard", "words"),
    [
        ("../outside.safetensors", "outside of the checkpoint directory"),
        ("/etc/passwd", "outside of the checkpoint directory"),
        ("down/../../outside.safetensors", "outside of the checkpoint directory"),
        ("link.safetensors", "outside of the checkpoint directory"),
        ("linked/outside.safetensors", "outside of the checkpoint directory"),
        ("zero\0byte.safetensors", "names no weight file"),
        ("x" * 5000, "names no weight file"),
        ("", "not found"),
        (".", "not found"),
    ],
)
def test_an_index_cannot_lead_out_of_the_directory(sharded: Path, shard: str, words: str) -> None:
    first = shards_of(sharded)[0]
    (sharded / "down").mkdir()
    (sharded.parent / "outside.safetensors").write_bytes(first.read_bytes())
    (sharded / "link.safetensors").symlink_to("../outside.safetensors")
    (sharded / "linked").symlink_to(sharded.parent, target_is_directory=True)
    change_index(sharded, lambda weight_map: weight_map.update(dict.fromkeys(names_in(first), shard)))
    refused(sharded, words)


def test_a_whole_path_is_refused_wherever_it_leads(sharded: Path) -> None:
    first = shards_of(sharded)[0]
    change_index(sharded, lambda weight_map: weight_map.update(dict.fromkeys(names_in(first), str(first))))
    refused(sharded, "outside of the checkpoint directory")


def test_links_in_a_circle_are_refused(sharded: Path) -> None:
    first = shards_of(sharded)[0]
    first.unlink()
    first.symlink_to(first.name)
    refused(sharded, first.name)


def test_a_download_cache_links_to_its_own_files(sharded: Path) -> None:
    """As huggingface_hub lays it out: snapshots/REVISION holds links into blobs; links elsewhere stay refused."""
    cache = sharded.parent / "models--x"
    (cache / "blobs").mkdir(parents=True)
    snapshot = cache / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    for index, file in enumerate(sorted(sharded.iterdir())):
        file.rename(cache / "blobs" / str(index))
        (snapshot / file.name).symlink_to(f"../../blobs/{index}")
    read_everything(snapshot)

    shard = shards_of(snapshot)[0]
    shard.resolve().rename(cache / "elsewhere")
    shard.unlink()
    shard.symlink_to("../../elsewhere")
    refused(snapshot, "outside of the checkpoint directory")


# ---------------------------------------------------------------- headers


def rewrite_header(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])


def test_a_truncated_shard_is_named(sharded: Path) -> None:
    shard = shards_of(sharded)[-1]
    shard.write_bytes(shard.read_bytes()[:-1])
    refused(sharded, shard.name, "not a readable safetensors file")


def test_a_shard_with_something_behind_it_is_named(sharded: Path) -> None:
    shard = shards_of(sharded)[-1]
    shard.write_bytes(shard.read_bytes() + b"more")
    refused(sharded, shard.name, "not a readable safetensors file")


def test_a_shard_cut_after_it_was_opened_is_named(sharded: Path) -> None:
    checkpoint = Checkpoint(sharded)
    for shard in shards_of(sharded):
        shard.write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"ends within model\.decoder\.norm\.weight"):
        checkpoint.float32("norm.weight")
    for shard in shards_of(sharded):
        shard.unlink()
    with pytest.raises(CheckpointError, match="not readable"):
        checkpoint.float32("norm.weight")


NORM, OTHER = "model.decoder.norm.weight", "model.decoder.layers.0.input_layernorm.weight"  # 56 float32 each


@pytest.mark.parametrize(
    "lie",
    [
        pytest.param(lambda h: h[NORM].update(shape=[57]), id="more values than bytes"),
        pytest.param(lambda h: h[NORM].update(dtype="F64"), id="wider than stored"),
        pytest.param(lambda h: h[NORM].update(dtype="F33"), id="no dtype at all"),
        pytest.param(lambda h: h[NORM].update(shape=[-56]), id="negative size"),
        pytest.param(lambda h: h[NORM].update(shape=[2**62, 2**62]), id="size beyond 64 bits"),
        pytest.param(lambda h: h[NORM].update(data_offsets=h[OTHER]["data_offsets"]), id="two tensors in one place"),
        pytest.param(lambda h: h[NORM].update(data_offsets=[10**9, 10**9 + 224]), id="behind the end"),
        pytest.param(lambda h: h[NORM].pop("data_offsets"), id="no offsets"),
        pytest.param(lambda h: h.pop(NORM), id="bytes that belong to nothing"),
        pytest.param(lambda h: h.update({NORM: []}), id="another form"),
    ],
)
def test_a_header_that_lies_is_refused(checkpoint_copy: Path, lie: Callable[[dict[str, Any]], object]) -> None:
    rewrite_header(checkpoint_copy / "model.safetensors", lie)
    refused(checkpoint_copy, "model.safetensors", "not a readable safetensors file")


@pytest.mark.parametrize(
    "content",
    [b"", b"1234567", struct.pack("<Q", 2**63) + b"{}", struct.pack("<Q", 100) + b"{}", struct.pack("<Q", 2) + b"[]"],
)
def test_what_is_no_header_is_refused(checkpoint_copy: Path, content: bytes) -> None:
    (checkpoint_copy / "model.safetensors").write_bytes(content)
    refused(checkpoint_copy, "model.safetensors", "not a readable safetensors file")
