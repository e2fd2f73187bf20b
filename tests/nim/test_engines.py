"""Engines of a cache: built once, whoever asks; the demo's by the real exporter."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file, save_file

from dgemma_build.checkpoint import Checkpoint as Exported
from dgemma_nim.commands import Programs
from dgemma_nim.configuration import resolve
from dgemma_nim.engines import BuildFailed, ensure_engine
from dgemma_nim.log import Log
from dgemma_nim.models import Checkpoint, engine_directory
from dgemma_nim.planning import needs
from dgemma_nim.prepare import Prepared, prepare
from dgemma_nim.profiles import CPU, Profile
from dgemma_runtime.contract import Manifest
from dgemma_runtime.engines.scripted import scripted_drafter_manifest
from dgemma_runtime.errors import ConfigurationError, ManifestError

PROFILE = Profile("onnxruntime", "int8", CPU, 4096)
NO_BUILD = Programs((), (), (sys.executable, "-c", "raise SystemExit(7)"))
# Stands in for the exporter: counts its runs, takes a moment, leaves an engine that is whole.
BUILDER = """
import shutil, sys, time
from pathlib import Path
words = sys.argv[1:]
output = Path(words[words.index("--output") + 1])
with output.with_name("runs").open("a") as file:
    file.write("run\\n")
time.sleep(1)
shutil.copytree(Path(words[0]), output)
"""


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real engine of the demo checkpoint over 4,096 tokens, in a cache of its own."""
    demo = Path(__file__).resolve().parents[2] / "build" / "checkpoints" / "demo"
    output = tmp_path_factory.mktemp("engines") / PROFILE.tag
    return ensure_engine(Checkpoint(demo, 262144), PROFILE, output, Programs.installed().build, {}, Log())


def test_an_engine_is_built_as_its_profile_says(engine: Path) -> None:
    manifest = Manifest.load(engine)
    assert (manifest.backend, manifest.precision, manifest.max_model_len) == ("onnxruntime", "int8", 4096)


def test_a_checkpoint_has_the_hash_that_engines_name(engine: Path, demo: Path, tmp_path: Path) -> None:
    assert Checkpoint(demo, 262144).sha256() == Manifest.load(engine).checkpoint_sha256
    for name in ("config.json", "generation_config.json"):
        (tmp_path / name).write_bytes((demo / name).read_bytes())
    weights = load_file(demo / "model.safetensors")
    shards = {name: f"model-{index % 2}.safetensors" for index, name in enumerate(weights)}
    for shard in set(shards.values()):
        save_file({name: weights[name] for name, where in shards.items() if where == shard}, tmp_path / shard)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    (tmp_path / "consolidated.safetensors").touch()
    assert Checkpoint(tmp_path, 262144).sha256() == Exported(tmp_path).sha256()
    (tmp_path / "model-0.safetensors").unlink()
    with pytest.raises(ConfigurationError, match=r"model-0\.safetensors: not found"):
        Checkpoint(tmp_path, 262144).sha256()


def test_it_is_not_built_again(engine: Path, demo: Path) -> None:
    before = (engine / "config.json").stat().st_mtime_ns
    said = StringIO()
    ensure_engine(Checkpoint(demo, 262144), PROFILE, engine, ("/nowhere",), {}, Log("text", said))
    assert (engine / "config.json").stat().st_mtime_ns == before
    assert said.getvalue() == ""


def test_two_that_share_a_volume_build_once(engine: Path, demo: Path, tmp_path: Path) -> None:
    code = """
import sys
from pathlib import Path
from dgemma_nim.engines import ensure_engine
from dgemma_nim.log import Log
from dgemma_nim.models import Checkpoint
from dgemma_nim.profiles import Profile
builder, template, demo, output = sys.argv[1:]
program = (sys.executable, "-c", builder, template)
profile = Profile("onnxruntime", "int8", "cpu", 4096)
ensure_engine(Checkpoint(Path(demo), 262144), profile, Path(output), program, {}, Log())
"""
    output = tmp_path / "volume" / "engine"
    words = [sys.executable, "-c", code, BUILDER, str(engine), str(demo), str(output)]
    first = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
    while not output.with_name("runs").exists():
        time.sleep(0.02)
        assert first.poll() is None
    second = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
    said = [process.communicate(timeout=120)[1] for process in (first, second)]
    assert (first.returncode, second.returncode) == (0, 0), said
    assert output.with_name("runs").read_text() == "run\n"
    assert "waiting for it" in said[1]
    assert Manifest.load(output).precision == "int8"


def test_a_build_that_fails_says_so(demo: Path, tmp_path: Path) -> None:
    program = (sys.executable, "-c", "import sys; sys.exit(7)")
    with pytest.raises(BuildFailed, match="status 7"):
        ensure_engine(Checkpoint(demo, 262144), PROFILE, tmp_path / "engine", program, {}, Log())


def test_a_cache_that_cannot_be_written_names_the_remedy(demo: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigurationError, match="fsGroup"):
        ensure_engine(Checkpoint(demo, 262144), PROFILE, tmp_path / "file" / "engine", ("/nowhere",), {}, Log())


def test_a_damaged_engine_is_not_served(engine: Path, demo: Path, tmp_path: Path) -> None:
    output = tmp_path / "engine"
    output.mkdir()
    (output / "config.json").write_bytes((engine / "config.json").read_bytes())
    with pytest.raises(ManifestError, match="missing"):
        ensure_engine(Checkpoint(demo, 262144), PROFILE, output, ("/nowhere",), {}, Log())


def prepared(arguments: list[str]) -> Prepared:
    return prepare(resolve(arguments, {}), {}, Programs.installed(), Log())


def test_an_engine_directory_needs_no_profile(engine: Path) -> None:
    assert prepared(["--model", str(engine)]) == Prepared(engine, "onnxruntime-int8-cpu", 4096)
    assert prepared(["--model", str(engine), "--max-model-len", "512"]).max_model_len == 512
    assert prepared(["--model", str(engine), "--profile", PROFILE.tag]).engine == engine


# ---------------------------------------------------------------- drafters


def drafter(directory: Path, engine: Path, **changes: Any) -> Path:
    """A directory with the manifest of one that belongs to that engine, but for the changes."""
    denoiser = Manifest.load(engine, verify_hashes=False)
    manifest = scripted_drafter_manifest(denoiser)
    manifest = replace(manifest, backend=denoiser.backend, kv_dtype=denoiser.kv_dtype, files={})
    directory.mkdir()
    replace(manifest, **changes).save(directory)
    return directory


OTHERS = [
    ({"denoiser": "another", "denoiser_sha256": "0" * 64}, ["another", "checkpoint_sha256", "000000000000"]),
    ({"backend": "tensorrt"}, ["tensorrt", "onnxruntime", "NIM_MODEL_PROFILE"]),
    ({"kv_dtype": "bf16"}, ["kv_dtype", "bf16", "fp32", "NIM_MODEL_PROFILE"]),
]


@pytest.mark.parametrize(("changes", "words"), OTHERS)
def test_a_drafter_of_another_engine_is_refused_before_anything_is_built(
    changes: dict[str, Any], words: list[str], engine: Path, demo: Path, cache: Path, tmp_path: Path
) -> None:
    given = str(drafter(tmp_path / "drafter", engine, **changes))
    for model in (demo, engine):
        arguments = ["--model", str(model), "--cache-path", str(cache), "--profile", PROFILE.tag]
        with pytest.raises(ConfigurationError) as error:
            prepare(resolve([*arguments, "--draft-model", given], {}), {}, NO_BUILD, Log())
        assert all(word in str(error.value) for word in ["NIM_DRAFT_MODEL_PATH", given, *words]), str(error.value)
    assert list(cache.iterdir()) == []


def test_a_drafter_of_the_engine_is_taken(engine: Path, demo: Path, cache: Path, tmp_path: Path) -> None:
    given = ["--draft-model", str(drafter(tmp_path / "drafter", engine))]
    assert prepared(["--model", str(engine), *given]).engine == engine
    arguments = ["--model", str(demo), "--cache-path", str(cache), "--profile", PROFILE.tag, *given]
    with pytest.raises(BuildFailed):
        prepare(resolve(arguments, {}), {}, NO_BUILD, Log())
    shutil.copytree(engine, engine_directory(cache, Checkpoint(demo, 262144), PROFILE.tag))
    assert prepare(resolve(arguments, {}), {}, NO_BUILD, Log()).max_model_len == 4096


def test_a_drafter_is_not_asked_for_where_nothing_is_served(demo: Path, cache: Path) -> None:
    arguments = ["--model", str(demo), "--cache-path", str(cache), "--profile", PROFILE.tag]
    with pytest.raises(ConfigurationError, match="NIM_DRAFT_MODEL_PATH is '/nowhere', which is not a directory"):
        prepare(resolve([*arguments, "--draft-model", "/nowhere"], {}), {}, NO_BUILD, Log())
    with pytest.raises(BuildFailed):
        prepare(resolve([*arguments, "--draft-model", "/nowhere", "--download-only"], {}), {}, NO_BUILD, Log())


def test_an_engine_that_is_not_of_the_profile_is_refused(engine: Path) -> None:
    with pytest.raises(ConfigurationError, match="onnxruntime-int8"):
        prepared(["--model", str(engine), "--profile", "onnxruntime-fp32-cpu-4096"])


def test_more_context_than_the_model_has_is_refused(demo: Path, cache: Path) -> None:
    with pytest.raises(ConfigurationError, match="262144"):
        prepared(["--model", str(demo), "--cache-path", str(cache), "--max-model-len", "262145"])


def test_what_profiles_take_is_what_the_plan_says(demo: Path) -> None:
    found = needs(Programs.installed().build, demo, 4096, ["h100", "rtx4090"])
    assert {gpu for gpu, _ in found} == {CPU, "h100", "rtx4090"}
    assert found["h100", "fp32"].bytes > found["h100", "fp8"].bytes > 0
    longer = needs(Programs.installed().build, demo, 65536, [])
    assert longer[CPU, "fp32"].bytes > found[CPU, "fp32"].bytes


def test_a_plan_that_fails_says_why(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="plan"):
        needs(Programs.installed().build, tmp_path, 4096, [])
