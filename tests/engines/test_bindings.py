"""What an engine's inputs and outputs must be, and what is said where they are not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dgemma_runtime.contract import Manifest, sliding_slots
from dgemma_runtime.engines.bindings import Bindings, read_bindings
from dgemma_runtime.engines.device import TensorSpec
from dgemma_runtime.errors import ManifestError

ENGINE = Path("engines/mine/rank0.engine")


def read(manifest: Manifest, tensors: dict[str, TensorSpec]) -> Bindings:
    return read_bindings(ENGINE, tensors, manifest, 3, 24)


@pytest.fixture
def bindings(manifest: Manifest) -> Bindings:
    return Bindings(manifest.model, "bf16", "bf16", 64, 3008, 3, 24)


@pytest.mark.parametrize("slot_group", [1, 64])
def test_what_fits_is_read_back(manifest: Manifest, bindings: Bindings, slot_group: int) -> None:
    bindings = replace(bindings, slot_group=slot_group)
    assert read(manifest, bindings.specs()) == bindings


def test_the_shapes(manifest: Manifest, bindings: Bindings) -> None:
    specs = bindings.specs()
    assert sliding_slots(manifest.model) == 16  # of a window of 11
    sizes = (((1, 2, 16, 8),) * 2, ((3, 2, 16, 8), (1, 2, 16, 8)))
    assert specs["key_cache_0"] == TensorSpec(True, "bf16", (-1, 2, 16, 8), *sizes)
    assert specs["value_cache_2"].shape == (-1, 1, -1, 64, 16)
    assert specs["value_cache_2"].least == ((1, 1, 1, 64, 16),) * 2
    assert specs["value_cache_2"].largest == ((3, 1, 47, 64, 16), (1, 1, 47, 64, 16))
    assert specs["new_keys_2"] == TensorSpec(False, "bf16", (-1, 1, -1, 16))
    assert specs["token_ids"] == TensorSpec(True, "int32", (-1, -1), ((1, 5), (1, 1)), ((3, 5), (1, 24)))
    assert specs["soft_embedding"].least == ((0, 5, 6), (0, 1, 6))
    assert specs["soft_embedding"].largest == ((3, 5, 6), (0, 24, 6))
    assert len(specs) == 12 + 4 * 4


def test_types_with_fp8(manifest: Manifest, bindings: Bindings) -> None:
    """Layer 2 is the full one."""
    specs = replace(bindings, kv_dtype="fp8").specs()
    dtypes = {name: spec.dtype for name, spec in specs.items() if name.startswith(("key_", "value_", "new_"))}
    of_keys = ("key_cache_2", "new_keys_2")
    assert dtypes == {name: "bf16" if name in of_keys else "fp8" for name in dtypes}
    assert {name: spec.shape for name, spec in specs.items()} == {
        name: spec.shape for name, spec in bindings.specs().items()
    }
    changed = replace(manifest, kv_dtype="fp8")
    assert read(changed, specs) == replace(bindings, kv_dtype="fp8")
    for name in of_keys:
        all_fp8 = specs | {name: replace(specs[name], dtype="fp8")}
        with pytest.raises(ManifestError, match=rf"{name}: the engine has an .* of type fp8 .* needs an .* type bf16"):
            read(changed, all_fp8)


def test_larger_engines_than_asked_for_fit(manifest: Manifest, bindings: Bindings) -> None:
    larger = replace(bindings, max_batch_size=8, max_encode_tokens=512, largest_slots=4096)
    assert read(manifest, larger.specs()) == replace(bindings, largest_slots=4096)


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("entropies", None, "the engine does not have it, this runtime needs an output of type fp32 and shape"),
        ("logits", TensorSpec(False, "fp32", (-1,)), "the engine has it, this runtime does not know it"),
        ("position", {"dtype": "int32"}, "the engine has an input of type int32 and shape"),
        ("soft_embedding", {"dtype": "int8"}, "an input of type int8"),
        ("next_soft_embedding", {"dtype": "fp32"}, "an output of type fp32"),
        ("key_cache_2", {"dtype": "fp8"}, "an input of type fp8"),
        ("key_cache_0", {"shape": (-1, 2, 8, 8)}, r"shape \(-1, 2, 8, 8\), this runtime needs an input"),
        ("new_values_1", {"shape": (-1, 2, -1)}, r"shape \(-1, 2, -1\)"),
        ("new_values_1", {"is_input": True, "largest": ((3, 2, 5, 8),) * 2}, "the engine has an input"),
        ("uniforms", {"least": ((1, 5), (0, 1))}, r"profile 0 of the engine takes no less than \(1, 5\), this runtime"),
        ("uniforms", {"largest": ((3, 5),)}, "the engine has 1 profiles, this runtime needs 2"),
        ("uniforms", {"largest": ((2, 5), (0, 24))}, r"profile 0 of the engine takes up to \(2, 5\), this runtime was"),
        ("token_ids", {"largest": ((3, 5), (1, 23))}, r"profile 1 of the engine takes up to \(1, 23\)"),
        ("value_cache_2", {"largest": ((3, 1, 46, 64, 16),) * 2}, "profile 0 of the engine takes up to"),
    ],
)
def test_what_differs_is_named(manifest: Manifest, bindings: Bindings, name: str, change: Any, words: str) -> None:
    specs = bindings.specs()
    if change is None:
        del specs[name]
    else:
        specs[name] = change if isinstance(change, TensorSpec) else replace(specs[name], **change)
    with pytest.raises(ManifestError, match=rf"{ENGINE}: the engine and this runtime differ in {name}: .*{words}"):
        read(manifest, specs)


def test_an_engine_for_shorter_contexts_than_its_manifest_says(manifest: Manifest, bindings: Bindings) -> None:
    with pytest.raises(ManifestError, match="differ in key_cache_2: profile 0 of the engine takes up to"):
        read(manifest, replace(bindings, largest_slots=2048).specs())
