"""What is wrong with a drafter is said before anything is built or served: file, field, value and remedy."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as load_torch
from safetensors.torch import save_file as save_torch
from typer.testing import CliRunner

from dgemma_build.checkpoint import Checkpoint
from dgemma_build.cli import app
from dgemma_build.drafter.checkpoint import DrafterCheckpoint
from dgemma_build.drafter.export import DrafterRequest, build_drafter
from dgemma_runtime.contract import Manifest
from dgemma_runtime.drafter_manifest import DrafterManifest
from dgemma_runtime.engines.factory import open_engine
from dgemma_runtime.engines.scripted_directory import ScriptFile, write_scripted
from dgemma_runtime.errors import CheckpointError, ConfigurationError, ManifestError
from dgemma_runtime.host_memory import AvailableMemory
from dgemma_runtime.memory_plan import check_memory, plan_host_memory
from dgemma_runtime.settings import RuntimeSettings

Change = Callable[[dict[str, Any]], object]


def setter(**values: Any) -> Change:
    return lambda document: document.update(values)


@pytest.fixture
def copy(drafter: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(drafter, tmp_path / "drafter"))


@pytest.fixture
def engine_copy(drafter_engine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(drafter_engine, tmp_path / "engine"))


def edit(directory: Path, change: Change) -> None:
    path = directory / "config.json"
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def opened(directory: Path, denoiser: Path) -> DrafterCheckpoint:
    checkpoint = Checkpoint(denoiser)
    return DrafterCheckpoint(directory, checkpoint.config, checkpoint.sha256())


# ---------------------------------------------------------------- the checkpoint


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (setter(model_type="diffusion_gemma"), "model_type is 'diffusion_gemma', expected 'dgemma_drafter'"),
        (
            setter(denoiser_sha256="0" * 64),
            r"denoiser_sha256 is 000000000000…, the denoiser's \w{12}…; give --checkpoint",
        ),
        (setter(denoiser_sha256="none"), "denoiser_sha256 is 'none', expected 64 hexadecimal digits"),
        (setter(vocab_size=212), "vocab_size is 212, expected the denoiser's, which is 211"),
        (setter(canvas_length=16), "canvas_length is 16, expected the denoiser's, which is 12"),
        (setter(denoiser_hidden_size=64), "denoiser_hidden_size is 64, expected the denoiser's, which is 56"),
        (setter(hidden_size=0), "hidden_size is 0, expected a whole number above 0"),
        (setter(hidden_size=2.5), "hidden_size is 2.5, expected a whole number above 0"),
        (setter(reads=[]), r"reads is \[\], expected a list of the denoiser's layers"),
        (setter(reads=[1, 4]), r"reads is \[1, 4\], expected layers of the denoiser, which has 4"),
        (setter(reads=[3, 1, 2]), r"reads is \[3, 1, 2\], expected different layers, in ascending order"),
        (setter(num_attention_heads=4), "num_attention_heads is 4, expected a multiple of the 3 key/value heads"),
        (setter(window=3), "window is not a field of a drafter's config; remove it"),
        (lambda document: document.pop("reads"), "reads is missing"),
        (setter(hidden_size=24), r"the shape of \S+ is \[\S+ ?\S*\], config.json asks for"),
    ],
)
def test_a_wrong_config_is_refused(copy: Path, denoiser: Path, change: Change, complaint: str) -> None:
    edit(copy, change)
    with pytest.raises(CheckpointError, match=complaint):
        opened(copy, denoiser)


def test_a_missing_directory_is_named(denoiser: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nowhere/config\.json: not found"):
        opened(tmp_path / "nowhere", denoiser)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (None, "not found; the drafter is incomplete"),
        (b"", "not a readable safetensors file"),
        (b"x" * 99, "not a read"),
    ],
)
def test_unreadable_weights_are_refused(copy: Path, denoiser: Path, content: bytes | None, complaint: str) -> None:
    path = copy / "model.safetensors"
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CheckpointError, match=complaint):
        opened(copy, denoiser)


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda tensors: tensors.pop("norm.weight"), "norm.weight is missing"),
        (lambda tensors: tensors.update(more=np.zeros(1, np.float32)), "more is unknown"),
        (lambda tensors: tensors["norm.weight"].fill(np.nan), "norm.weight holds NaN or infinite values"),
    ],
)
def test_wrong_tensors_are_refused(copy: Path, denoiser: Path, damage: Any, complaint: str) -> None:
    path = copy / "model.safetensors"
    tensors = {name: tensor.astype(np.float32) for name, tensor in load_file(path).items()}
    damage(tensors)
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=complaint):
        opened(copy, denoiser)


@pytest.mark.parametrize(
    ("dtype", "name"),
    [(torch.int8, "I8"), (torch.bool, "BOOL"), (torch.float64, "F64"), (torch.float8_e4m3fn, "F8_E4M3")],
)
def test_weights_of_another_type_are_refused(copy: Path, denoiser: Path, dtype: torch.dtype, name: str) -> None:
    path = copy / "model.safetensors"
    tensors = load_torch(path)
    tensors["norm.weight"] = tensors["norm.weight"].to(dtype)
    save_torch(tensors, path)
    with pytest.raises(CheckpointError, match=f"norm.weight is {name}, expected BF16, F16, F32; write it again"):
        opened(copy, denoiser)


# ---------------------------------------------------------------- the command


def test_the_command_builds_what_the_server_opens(
    drafter: Path, denoiser: Path, denoiser_engine: Path, tmp_path: Path
) -> None:
    output = tmp_path / "engine"
    words = ["engine", "--drafter", drafter, "--checkpoint", denoiser, "--output", output]
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    engine = open_engine(denoiser_engine, settings(output))
    assert engine.drafter == DrafterManifest.load(output)
    assert engine.drafter.denoiser_sha256 == Manifest.load(denoiser_engine).checkpoint_sha256
    engine.close()


@pytest.mark.parametrize(
    "option", [("--backend", "tensorrt"), ("--precision", "int8"), ("--max-model-len", "64"), ("--plugins",)]
)
def test_options_of_the_denoiser_are_refused(
    option: tuple[str, ...], drafter: Path, denoiser: Path, tmp_path: Path
) -> None:
    words = ["engine", "--drafter", drafter, "--checkpoint", denoiser, "--output", tmp_path / "engine", *option]
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert isinstance(result.exception, ConfigurationError)
    assert option[0] in str(result.exception)


def test_other_directories_are_not_replaced(drafter: Path, denoiser: Path, tmp_path: Path) -> None:
    (tmp_path / "note").write_text("keep")
    with pytest.raises(ConfigurationError, match="exists and is not an engine directory"):
        build_drafter(DrafterRequest(drafter, denoiser, tmp_path))
    assert (tmp_path / "note").read_text() == "keep"


# ---------------------------------------------------------------- the engine directory


def settings(draft_model: Path) -> RuntimeSettings:
    return RuntimeSettings(max_batch_size=2, threads=1, max_model_len=256, draft_model=str(draft_model))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (
            setter(denoiser_sha256="f" * 64),
            r"belongs to 'odd_a' with checkpoint_sha256 ffffffffffff…, .*built from 'odd_a' with \w",
        ),
        (setter(vocab_size=999), "the drafter's vocab_size is 999, the denoiser's 211; give --draft-model"),
        (setter(canvas_length=64), "the drafter's canvas_length is 64, the denoiser's 12"),
        (setter(denoiser_hidden_size=64), "the drafter's denoiser_hidden_size is 64, the denoiser's 56; give --draft"),
        (setter(reads=[1, 7]), "reads layer 7, the denoiser has 4"),
        (setter(backend="tensorrt"), "was built for tensorrt, the engine for onnxruntime"),
    ],
)
def test_a_drafter_of_another_denoiser_is_refused(
    engine_copy: Path, denoiser_engine: Path, change: Change, complaint: str
) -> None:
    edit(engine_copy, change)
    with pytest.raises(ConfigurationError, match=complaint):
        open_engine(denoiser_engine, settings(engine_copy))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (setter(drafter_format_version=9), "drafter_format_version is 9, this runtime reads 1"),
        (setter(hidden_size="20"), "hidden_size is '20', expected int"),
        (setter(reads=[1, "2"]), r"reads is \[1, '2'\]"),
        (setter(reads=[3, 2, 1]), r"reads is \[3, 2, 1\], expected tuple\[int, ...\], in ascending order"),
        (setter(reads=[1, 1, 2]), r"reads is \[1, 1, 2\]"),
        (setter(files={}), r"config.json: files does not list model.onnx and model.onnx.data; build it again"),
        (lambda document: document["files"].pop("model.onnx.data"), "files does not list model.onnx.data"),
        (setter(target="sm_90"), "target is 'sm_90', this engine runs cpu"),
        (setter(precision="bf16"), "precision is 'bf16', this engine runs fp32; build"),
        (setter(backend_version="99.0"), r"built with onnxruntime 99.0, installed is \S+, older; run `pip install"),
        (setter(more=1), "unexpected keyword argument 'more'"),
        (lambda document: document.pop("onnx_sha256"), "onnx_sha256 is None, expected str"),
        (lambda document: document["files"].update({"../other": "0"}), "'../other' lies outside of the drafter's"),
        (lambda document: document["files"].update({"gone": "0"}), "gone: listed in the manifest but missing"),
    ],
)
def test_a_damaged_manifest_is_refused(
    engine_copy: Path, denoiser_engine: Path, change: Change, complaint: str
) -> None:
    edit(engine_copy, change)
    with pytest.raises(ManifestError, match=complaint):
        open_engine(denoiser_engine, settings(engine_copy))


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data"])
def test_damaged_files_are_refused(engine_copy: Path, denoiser_engine: Path, name: str) -> None:
    content = bytearray((engine_copy / name).read_bytes())
    content[len(content) // 2] ^= 1
    (engine_copy / name).write_bytes(content)
    with pytest.raises(ManifestError, match=rf"{re.escape(name)}: SHA-256 is \w+…, the manifest says"):
        open_engine(denoiser_engine, settings(engine_copy))


def test_a_checkpoint_in_the_place_of_an_engine_is_refused(
    drafter: Path, denoiser_engine: Path, tmp_path: Path
) -> None:
    with pytest.raises(ManifestError, match=r"drafter_format_version is None.*dgemma-build engine --drafter"):
        open_engine(denoiser_engine, settings(drafter))
    with pytest.raises(ManifestError, match=r"config\.json: not found"):
        open_engine(denoiser_engine, settings(tmp_path / "nowhere"))


def test_an_engine_that_takes_no_drafter_says_so(drafter_engine: Path, tmp_path: Path) -> None:
    write_scripted(tmp_path, ScriptFile(default_answer=[1]), 100)
    with pytest.raises(ConfigurationError, match="scripted engines take no drafter; leave it out"):
        open_engine(tmp_path, settings(drafter_engine))


@pytest.mark.parametrize("backend", ["scripted", "tensorrt_llm"])
def test_that_is_said_before_an_engine_is_opened(denoiser_engine: Path, drafter_engine: Path, backend: str) -> None:
    manifest = replace(Manifest.load(denoiser_engine), backend=backend)
    with pytest.raises(ConfigurationError, match=f"{backend} engines take no drafter; leave it out, or take an engine"):
        check_memory(denoiser_engine, manifest, settings(drafter_engine))


@pytest.mark.parametrize("value", ["", 3])
def test_the_setting_is_a_path(value: Any) -> None:
    with pytest.raises(ConfigurationError, match="draft_model must be the path of a drafter's engine directory"):
        RuntimeSettings(draft_model=value)


def test_memory_for_the_drafter_is_planned(denoiser_engine: Path, drafter_engine: Path) -> None:
    manifest, room = Manifest.load(denoiser_engine), AvailableMemory(2**33, "a test")
    with_drafter = plan_host_memory(denoiser_engine, manifest, settings(drafter_engine), room)
    without = plan_host_memory(denoiser_engine, manifest, RuntimeSettings(max_batch_size=2, max_model_len=256), room)
    ((words, nbytes),) = set(with_drafter.uses) - set(without.uses)
    assert words == "drafter"
    assert nbytes > sum((drafter_engine / name).stat().st_size for name in DrafterManifest.load(drafter_engine).files)
    assert with_drafter.total_bytes == without.total_bytes + nbytes
