"""Two layers of the released dimensions, a sliding and a full one: written, opened, read and built within bounds."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from dgemma_build.checkpoint import Checkpoint, expected_shapes
from dgemma_build.engine import BuildRequest, build_engine
from dgemma_build.random_checkpoint import config_dict, write_checkpoint
from dgemma_build.random_shapes import SHAPES, resized, weights
from dgemma_runtime.errors import CheckpointError, ConfigurationError

VOCABULARY = 1024  # the released 262,144 tokens would take as long as another layer
SHARD_BYTES = 2_000_000_000
MIB = 1 << 20
CONTEXT = 262_144  # tokens
SCRATCH = 1e9  # bytes, with one canvas behind the whole context
# Values in E4M3 are turned for their product: a copy of one byte an element.
SCRATCH_FP8_CACHE = SCRATCH + CONTEXT * 2 * 512


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, int]]:
    """The checkpoint's directory, and the most memory in bytes that writing it took; 3.3 GB, removed afterwards."""
    directory = tmp_path_factory.mktemp("real")
    tracemalloc.start()
    write_checkpoint(directory, "real", 7, layers=2, vocab_size=VOCABULARY, shard_bytes=SHARD_BYTES)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    yield directory, peak
    shutil.rmtree(directory)


def test_it_is_written_shard_by_shard_in_little_memory(real: tuple[Path, int]) -> None:
    directory, peak = real
    sizes = [file.stat().st_size for file in sorted(directory.glob("model-*-of-00002.safetensors"))]
    index = json.loads((directory / "model.safetensors.index.json").read_text())

    assert len(sizes) == 2
    assert max(sizes) < SHARD_BYTES + MIB
    assert 3.2e9 < index["metadata"]["total_size"] < sum(sizes)
    assert index["metadata"]["total_parameters"] * 2 == index["metadata"]["total_size"]
    assert not list(directory.glob("*.partial"))
    assert peak < 64 * MIB


def test_names_shapes_and_config_are_the_released_ones(real: tuple[Path, int]) -> None:
    checkpoint = Checkpoint(real[0])
    spec = checkpoint.config.spec

    assert set(checkpoint.names()) == set(expected_shapes(checkpoint.config))
    assert [(layer.kind, layer.num_key_value_heads, layer.head_dim) for layer in spec.layers] == [
        ("sliding_attention", 8, 256),
        ("full_attention", 2, 512),
    ]
    assert (spec.hidden_size, spec.canvas_length, spec.sliding_window) == (2816, 256, 1024)
    assert (spec.vocab_size, spec.max_position_embeddings) == (VOCABULARY, 262_144)
    assert (checkpoint.config.num_experts, checkpoint.config.top_k_experts) == (128, 8)


def test_one_expert_is_read_without_the_others(real: tuple[Path, int]) -> None:
    checkpoint = Checkpoint(real[0])
    tracemalloc.start()
    expert = checkpoint.float32_slice("layers.1.experts.gate_up_proj", 127)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    assert expert.shape == (1408, 2816)
    assert peak < 48 * MIB  # the stack is 968 MiB
    assert abs(expert.std() * 2816**0.5 - 1) < 0.003
    assert abs(expert.mean()) < 1e-4


def test_no_two_experts_or_layers_are_equal(real: tuple[Path, int]) -> None:
    checkpoint = Checkpoint(real[0])
    first = [
        checkpoint.float32_slice(f"layers.{layer}.experts.down_proj", expert)[0, :32].tobytes()
        for layer in range(2)
        for expert in range(128)
    ]
    assert len(set(first)) == 256


def test_values_are_normal(real: tuple[Path, int]) -> None:
    values = np.sort(Checkpoint(real[0]).float32("layers.0.mlp.up_proj.weight").ravel()) * 2816**0.5
    for deviations, below in ((-3, 0.00135), (-2, 0.02275), (-1, 0.15866), (0, 0.5), (1, 0.84134), (3, 0.99865)):
        assert abs(np.searchsorted(values, deviations) / values.size - below) < 0.002


# ---------------------------------------------------------------- built for a GPU, on none


def test_it_builds_with_the_whole_context_in_little_scratch(real: tuple[Path, int], tmp_path: Path) -> None:
    """In the precision that builds fastest; the acceptance table has the others."""
    request = BuildRequest(real[0], tmp_path / "engine", "tensorrt_rtx", "fp8", "fp8", max_batch_size=1)
    manifest = build_engine(request)
    assert (manifest.max_model_len, manifest.precision, manifest.kv_dtype) == (CONTEXT, "fp8", "fp8")
    assert 0.25e9 < manifest.scratch_bytes < SCRATCH_FP8_CACHE
    weights = 1.65e9
    assert weights < (tmp_path / "engine/rank0.engine").stat().st_size < 1.1 * weights


# ---------------------------------------------------------------- the shape, without its bytes


def test_the_released_shape_has_the_released_number_of_parameters() -> None:
    listed = weights(SHAPES["real"])
    counts: dict[str, int] = {}
    for name, weight in listed.items():
        part = next(key for key in ("expert", "attn", ".mlp.", "embed_tokens", "self_cond", "") if key in name)
        counts[part] = counts.get(part, 0) + int(np.prod(weight.sizes, dtype=np.int64))

    billions = {part: round(count / 1e9, 2) for part, count in counts.items()}
    assert billions == {"embed_tokens": 0.74, "attn": 1.11, ".mlp.": 0.54, "expert": 22.84, "self_cond": 0.02, "": 0.01}


@pytest.mark.parametrize(
    ("layers", "kinds"), [(1, "f"), (2, "sf"), (5, "ssssf"), (6, "sssssf"), (8, "sssssfsf"), (12, "sssssf" * 2)]
)
def test_any_number_of_layers_ends_with_a_full_one(layers: int, kinds: str) -> None:
    shape = resized(SHAPES["real"], layers)

    assert shape.layers == kinds
    assert config_dict(shape)["text_config"]["num_hidden_layers"] == layers


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a shape that is drawn as `real` is, but small."""
    monkeypatch.setitem(SHAPES, "small", dataclasses.replace(SHAPES["odd_a"], streams=True, dtype="bfloat16"))
    return "small"


def test_the_seed_decides_the_bytes_now_and_later(tmp_path: Path, small: str) -> None:
    bits = [
        Checkpoint(write_checkpoint(tmp_path / str(index), small, seed)).tensor("layers.0.mlp.up_proj.weight")
        for index, seed in enumerate((1, 1, 2))
    ]

    assert np.array_equal(bits[0], bits[1])
    assert not np.array_equal(bits[0], bits[2])
    assert bits[0].view(np.uint16)[0, :6].tolist() == [15652, 48561, 15733, 15915, 48649, 48653]


def test_a_layer_is_the_same_in_checkpoints_of_any_depth(tmp_path: Path, small: str) -> None:
    two, four = (
        Checkpoint(write_checkpoint(tmp_path / str(count), small, layers=count, vocab_size=150 + count))
        for count in (2, 4)
    )
    for name in two.names():
        assert np.array_equal(two.tensor(name), four.tensor(name)) == (name != "embed_tokens.weight")


# ---------------------------------------------------------------- what cannot be made


def test_shapes_that_cannot_be_made_write_nothing(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="--layers 0"):
        write_checkpoint(tmp_path / "a", "real", layers=0)
    with pytest.raises(ConfigurationError, match="vocabulary of 100 tokens"):
        write_checkpoint(tmp_path / "b", "real", vocab_size=100)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_without_room_is_told_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=3_000_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ConfigurationError, match="3,000,000,000 left"):
        write_checkpoint(tmp_path, "real", layers=2, vocab_size=VOCABULARY)
    assert not list(tmp_path.glob("model*"))


def test_what_was_cut_short_cannot_be_opened_and_leaves_no_partial_file(tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def stop(done: int, total: int) -> None:
        if done > total // 2:
            raise Stop

    write_checkpoint(tmp_path, "odd_a")
    with pytest.raises(Stop):
        write_checkpoint(tmp_path, "odd_a", shard_bytes=100_000, report=stop)
    assert list(tmp_path.glob("model-*"))
    assert not list(tmp_path.glob("*.partial"))
    with pytest.raises(CheckpointError, match="not found"):
        Checkpoint(tmp_path)


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    run = [sys.executable, "-m", "dgemma_build.random_checkpoint", *arguments]
    return subprocess.run(run, capture_output=True, text=True, timeout=60, check=False)


def test_the_command_shows_progress_on_stderr_and_the_directory_on_stdout(tmp_path: Path) -> None:
    done = command("odd_b", str(tmp_path / "new"), "--layers", "2", "--vocab-size", "600", "--seed", "3")

    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{tmp_path / 'new'}\n"
    assert "writing" in done.stderr
    assert len(Checkpoint(tmp_path / "new").config.spec.layers) == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("new", "--layers", "0"), "--layers 0: must be at least 1"),
        (("new", "--seed", "-1"), "--seed -1: must be at least 0"),
        (("new", "--vocab-size", "9"), "vocabulary of 9 tokens"),
        (("full",), "not a new or empty directory"),
        (("full/file",), "not a new or empty directory"),
        (("full/file/new",), "Not a directory"),
    ],
)
def test_the_command_names_what_it_cannot_make(tmp_path: Path, arguments: tuple[str, ...], words: str) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    refused = command("odd_a", str(tmp_path / arguments[0]), *arguments[1:])

    assert refused.returncode == 2
    assert words in refused.stderr
    assert "Traceback" not in refused.stderr
    assert not (tmp_path / "new").exists()
