"""Reading checkpoints: names, shapes, both spellings of the config, and a clear error for every kind of damage."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from dgemma_build.checkpoint import Checkpoint, canonical_name, expected_shapes
from dgemma_runtime.errors import CheckpointError

Tensors = dict[str, np.ndarray[Any, Any]]


def change_config(directory: Path, change: Callable[[dict[str, Any]], object]) -> None:
    config = json.loads((directory / "config.json").read_text())
    change(config)
    (directory / "config.json").write_text(json.dumps(config))


def change_tensors(directory: Path, change: Callable[[Tensors], object]) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


def full_rope(config: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = config["text_config"]["rope_parameters"]["full_attention"]
    return found


def read_everything(directory: Path) -> None:
    checkpoint = Checkpoint(directory)
    for name in checkpoint.names():
        checkpoint.float32(name)


def refused(directory: Path, *words: str) -> None:
    with pytest.raises(CheckpointError) as error:
        read_everything(directory)
    for word in words:
        assert word in str(error.value)


def test_every_text_tensor_is_found_and_the_vision_tower_is_left_out_by_name(odd_checkpoint: Path) -> None:
    checkpoint = Checkpoint(odd_checkpoint)
    assert set(checkpoint.names()) == set(expected_shapes(checkpoint.config))
    assert checkpoint.left_out
    assert all(
        name.startswith(("model.encoder.vision_tower.", "model.encoder.embed_vision.")) for name in checkpoint.left_out
    )
    with safe_open(odd_checkpoint / "model.safetensors", framework="numpy") as file:
        assert len(checkpoint.left_out) + len(list(checkpoint.names())) == len(list(file.keys()))


def test_encoder_and_decoder_scalars_are_different_tensors(odd_checkpoint: Path) -> None:
    checkpoint = Checkpoint(odd_checkpoint)
    encoder, decoder = (checkpoint.float32(f"layers.0.{side}_layer_scalar") for side in ("encoder", "decoder"))
    assert not np.array_equal(encoder, decoder)


def test_shared_weights_may_be_stored_under_the_encoder(checkpoint_copy: Path) -> None:
    expected = Checkpoint(checkpoint_copy).float32("layers.0.mlp.up_proj.weight")
    moved = "model.encoder.language_model.layers.0.mlp.up_proj.weight"
    change_tensors(checkpoint_copy, lambda t: t.update({moved: t.pop("model.decoder.layers.0.mlp.up_proj.weight")}))
    assert np.array_equal(Checkpoint(checkpoint_copy).float32("layers.0.mlp.up_proj.weight"), expected)


def test_both_spellings_of_the_full_layers_are_read(checkpoint_copy: Path) -> None:
    """The fixture is written as the release is; transformers saves the same as `per_layer_config`."""
    expected = Checkpoint(checkpoint_copy).config

    def respell(config: dict[str, Any]) -> None:
        text = config["text_config"]
        override = {
            "head_dim": text.pop("global_head_dim"),
            "num_key_value_heads": text.pop("num_global_key_value_heads"),
        }
        full = [index for index, kind in enumerate(text["layer_types"]) if kind == "full_attention"]
        text["per_layer_config"] = {str(index): override for index in full}

    change_config(checkpoint_copy, respell)
    found = Checkpoint(checkpoint_copy).config
    assert found.spec == expected.spec
    assert found.spec.layers[-1].head_dim != found.spec.layers[0].head_dim
    for kind, rope in expected.rope.items():
        assert np.array_equal(found.rope[kind].inverse_frequencies, rope.inverse_frequencies)


def test_bfloat16_is_widened_exactly(checkpoint_copy: Path) -> None:
    name = "model.decoder.norm.weight"
    change_tensors(checkpoint_copy, lambda t: t.update({name: t[name].astype(ml_dtypes.bfloat16)}))
    checkpoint = Checkpoint(checkpoint_copy)
    assert checkpoint.tensor("norm.weight").dtype == ml_dtypes.bfloat16
    assert np.array_equal(checkpoint.float32("norm.weight"), checkpoint.tensor("norm.weight").astype(np.float32))


def test_float16_is_widened_exactly(checkpoint_copy: Path) -> None:
    name = "model.decoder.norm.weight"
    change_tensors(checkpoint_copy, lambda t: t.update({name: t[name].astype(np.float16)}))
    checkpoint = Checkpoint(checkpoint_copy)
    assert np.array_equal(checkpoint.float32("norm.weight"), checkpoint.tensor("norm.weight").astype(np.float32))


def test_some_experts_are_the_same_as_the_stack_sliced(odd_checkpoint: Path) -> None:
    checkpoint = Checkpoint(odd_checkpoint)
    name = "layers.0.experts.gate_up_proj"
    stack = checkpoint.float32(name)
    for index in (0, 2, -1, slice(1, 3), slice(4, 99), slice(2), slice(2, 2)):
        assert np.array_equal(checkpoint.float32_slice(name, index), stack[index])
    with pytest.raises(IndexError):
        checkpoint.float32_slice(name, 5)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
def test_no_way_of_reading_lets_a_value_pass_that_is_not_finite(
    checkpoint_copy: Path, dtype: type[np.generic], bad: float
) -> None:
    stored = "model.decoder.layers.0.experts.down_proj"

    def spoil(tensors: Tensors) -> None:
        tensors[stored] = tensors[stored].astype(dtype)
        tensors[stored][3, -1, -1] = bad

    change_tensors(checkpoint_copy, spoil)
    checkpoint = Checkpoint(checkpoint_copy)
    name = "layers.0.experts.down_proj"
    for read in (checkpoint.tensor, checkpoint.float32, lambda name: checkpoint.float32_slice(name, 3)):
        with pytest.raises(CheckpointError, match=r"down_proj.*NaN or infinite"):
            read(name)
    assert checkpoint.float32_slice(name, 2).shape == (56, 22)


@pytest.mark.parametrize(
    ("dtype", "largest"), [(np.float32, 3.4028235e38), (np.float16, 65504.0), (ml_dtypes.bfloat16, 3.3895314e38)]
)
def test_the_largest_values_are_finite(checkpoint_copy: Path, dtype: type[np.generic], largest: float) -> None:
    name = "model.decoder.norm.weight"
    change_tensors(checkpoint_copy, lambda t: t.update({name: np.full(56, largest).astype(dtype)}))
    assert float(Checkpoint(checkpoint_copy).tensor("norm.weight").astype(np.float64).min()) == pytest.approx(largest)


def test_a_weight_stored_for_encoder_and_decoder_must_be_the_same(checkpoint_copy: Path) -> None:
    decoder, encoder = "model.decoder.norm.weight", "model.encoder.language_model.norm.weight"
    change_tensors(checkpoint_copy, lambda t: t.update({encoder: t[decoder].copy()}))
    read_everything(checkpoint_copy)
    change_tensors(checkpoint_copy, lambda t: t.update({encoder: t[decoder] * 2}))
    refused(checkpoint_copy, encoder, f"differs from {decoder}")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("model.decoder.norm.weight"), ("missing", "norm.weight")),
        (lambda t: t.update({"model.decoder.extra": np.zeros(1, np.float32)}), ("unknown", "model.decoder.extra")),
        (
            lambda t: t.update({"model.decoder.norm.weight": np.zeros(3, np.float32)}),
            ("norm.weight is [3]", "asks for [56]"),
        ),
        (lambda t: t.update({"model.decoder.norm.weight": np.zeros(56, np.int32)}), ("norm.weight has dtype I32",)),
        (lambda t: t["model.decoder.norm.weight"].fill(np.nan), ("norm.weight", "NaN")),
    ],
)
def test_damaged_tensors_are_named(
    checkpoint_copy: Path, change: Callable[[Tensors], object], words: tuple[str, ...]
) -> None:
    change_tensors(checkpoint_copy, change)
    refused(checkpoint_copy, *words)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c.update(model_type="gemma4"), ("model_type", "'gemma4'", "'diffusion_gemma'")),
        (lambda c: c.update(architectures=["Gemma4ForCausalLM"]), ("architectures", "'Gemma4ForCausalLM'")),
        (lambda c: c.update(architectures="DiffusionGemma"), ("architectures",)),
        (lambda c: c["text_config"].update(model_type="gemma4_text"), ("model_type", "'gemma4_text'")),
        (lambda c: c["text_config"].update(num_experts="many"), ("num_experts", "'many'", "whole number")),
        (lambda c: c["text_config"].update(hidden_size=-56), ("hidden_size", "-56")),
        (lambda c: c["text_config"].update(global_head_dim=24.0), ("head_dim", "24.0")),
        (lambda c: c["text_config"].pop("head_dim"), ("text_config.head_dim is missing",)),
        (lambda c: c["text_config"].update(layer_types="sliding_attention"), ("layer_types", "a list")),
        (lambda c: c["text_config"].update(rope_parameters=[]), ("rope_parameters", "a dict")),
        (lambda c: c.pop("text_config"), ("text_config",)),
        (lambda c: c["text_config"].pop("num_experts"), ("text_config.num_experts is missing",)),
        (lambda c: c["text_config"].update(hidden_activation="silu"), ("hidden_activation", "'silu'")),
        (lambda c: c["text_config"].update(num_hidden_layers=9), ("layer_types", "num_hidden_layers")),
        (
            lambda c: c["text_config"].update(use_bidirectional_attention="all"),
            ("use_bidirectional_attention", "'all'"),
        ),
        (lambda c: c["text_config"]["rope_parameters"]["full_attention"].update(rope_type="yarn"), ("rope", "yarn")),
        (lambda c: c["text_config"].update(hidden_size=64), ("config.json asks for",)),
        (lambda c: c.update(canvas_length="many"), ("canvas_length is 'many'", "whole number above 0")),
        (lambda c: c.update(canvas_length=0), ("canvas_length is 0",)),
        (lambda c: c["text_config"].update(top_k_experts=99), ("top_k_experts is 99", "at most num_experts", "5")),
        (lambda c: c["text_config"].update(num_attention_heads=3), ("num_attention_heads is 3", "multiple of the 2")),
        (lambda c: c["text_config"].update(head_dim=11), ("head_dim is 11", "even number")),
        (lambda c: c["text_config"].update(rms_norm_eps="x"), ("rms_norm_eps is 'x'", "a number above 0")),
        (lambda c: c["text_config"].update(rms_norm_eps=float("nan")), ("rms_norm_eps is nan",)),
        (lambda c: c["text_config"].update(final_logit_softcapping=None), ("final_logit_softcapping is missing",)),
        (lambda c: c["text_config"].update(final_logit_softcapping=0), ("final_logit_softcapping is 0",)),
        (lambda c: c["text_config"].update(layer_types=["mamba"] * 4), ("layer_types[0] is 'mamba'",)),
        (lambda c: c["text_config"].update(per_layer_config=[1]), ("per_layer_config is [1]", "a dict")),
        (lambda c: c["text_config"].update(per_layer_config={"0": 5}), ("per_layer_config.0 is 5", "a dict")),
        (lambda c: c["text_config"].update(per_layer_config={"0": {"head_dim": 12}}), ("head_dim is [10, 12]",)),
        (lambda c: full_rope(c).pop("rope_theta"), ("rope_parameters.full_attention.rope_theta is missing",)),
        (lambda c: full_rope(c).update(rope_theta="x"), ("full_attention.rope_theta is 'x'",)),
        (lambda c: full_rope(c).update(factor=0), ("full_attention.factor is 0",)),
        (lambda c: full_rope(c).update(partial_rotary_factor=3.0), ("partial_rotary_factor is 3.0", "at most 1")),
        (lambda c: full_rope(c).update(rope_type="default"), ("partial_rotary_factor is 0.25", "'proportional'")),
    ],
)
def test_foreign_configs_are_named(
    checkpoint_copy: Path, change: Callable[[dict[str, Any]], object], words: tuple[str, ...]
) -> None:
    change_config(checkpoint_copy, change)
    refused(checkpoint_copy, *words)


def test_missing_and_unreadable_files_are_named(checkpoint_copy: Path) -> None:
    (checkpoint_copy / "model.safetensors").write_bytes(b"not safetensors at all")
    refused(checkpoint_copy, "model.safetensors", "not a readable safetensors file")
    (checkpoint_copy / "model.safetensors").unlink()
    refused(checkpoint_copy, "model.safetensors", "not found")
    (checkpoint_copy / "config.json").write_text("{")
    refused(checkpoint_copy, "config.json", "JSON")
    (checkpoint_copy / "config.json").unlink()
    refused(checkpoint_copy, "config.json", "not found")


def test_canonical_names() -> None:
    assert canonical_name("model.decoder.layers.3.layer_scalar") == "layers.3.decoder_layer_scalar"
    assert canonical_name("model.encoder.language_model.layers.3.layer_scalar") == "layers.3.encoder_layer_scalar"
    assert canonical_name("lm_head.weight") == "embed_tokens.weight"
    assert canonical_name("model.decoder.norm.weight") == "norm.weight"
    assert canonical_name("transformer.norm.weight") == "transformer.norm.weight"
