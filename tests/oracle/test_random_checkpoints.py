"""The generated checkpoints are what transformers saves, depend on their seed alone, and generate something."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from tokenizers import Tokenizer
from transformers import DiffusionGemmaConfig, DiffusionGemmaForBlockDiffusion

from dgemma_build.checkpoint import Checkpoint
from dgemma_build.oracle import Model, trace_generation
from dgemma_build.random_checkpoint import build_plain_tokenizer, config_dict, write_checkpoint, write_safetensors
from dgemma_build.random_shapes import SHAPES, resized, weights
from dgemma_runtime.noise import CanvasNoise


def layout(path: Path) -> dict[str, tuple[list[int], str]]:
    """Name -> (shape, type) of a safetensors file."""
    with safe_open(path, "np") as file:
        return {name: (file.get_slice(name).get_shape(), file.get_slice(name).get_dtype()) for name in file.keys()}  # noqa: SIM118


@pytest.mark.parametrize("name", ["odd_a", "odd_b"])
def test_files_hold_what_transformers_saves(name: str, checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    model = DiffusionGemmaForBlockDiffusion.from_pretrained(checkpoint(name))  # in the type of the file
    model.save_pretrained(tmp_path)

    assert layout(checkpoint(name) / "model.safetensors") == layout(tmp_path / "model.safetensors")
    ours, theirs = (json.loads((path / "generation_config.json").read_text()) for path in (checkpoint(name), tmp_path))
    assert ours == theirs


@pytest.mark.parametrize("name", ["odd_a", "odd_b"])
def test_no_norm_weight_or_scalar_is_one(name: str, oracle: Callable[[str], Model]) -> None:
    model = oracle(name)
    parameters = {**dict(model.model.decoder.named_parameters()), **dict(model.model.named_buffers())}
    ones = [
        key
        for key, value in parameters.items()
        if ("norm" in key or "scal" in key) and "vision" not in key and "embed_scale" not in key
        if bool((value == 1).all())
    ]

    assert ones == []
    for mine, theirs in zip(model.model.encoder.language_model.layers, model.model.decoder.layers, strict=True):
        assert mine.layer_scalar != theirs.layer_scalar


def test_the_seed_decides_the_bytes(tmp_path: Path) -> None:
    weights = [
        write_checkpoint(tmp_path / str(index), "odd_b", seed).joinpath("model.safetensors").read_bytes()
        for index, seed in enumerate((1, 1, 2))
    ]

    assert weights[0] == weights[1]
    assert weights[0] != weights[2]


def test_bfloat16_rounds_to_nearest_even(tmp_path: Path) -> None:
    values = np.random.default_rng(0).standard_normal(1000).astype(np.float32)
    write_safetensors(tmp_path / "x.safetensors", {"x": values}, "bfloat16")

    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert torch.equal(file.get_tensor("x"), torch.from_numpy(values).bfloat16())


@pytest.mark.parametrize("name", ["odd_a", "odd_b"])
def test_runs_are_not_degenerate(name: str, oracle: Callable[[str], Model]) -> None:
    model = oracle(name)
    steps, entropies = [], []
    for seed in range(3):
        prompt = np.random.default_rng(seed).integers(0, model.config.text_config.vocab_size, 11)
        run = trace_generation(
            model, prompt.tolist(), seed, CanvasNoise, max_new_tokens=3 * model.config.canvas_length, eos_token_id=None
        )
        steps += [len(canvas.steps) for canvas in run.canvases]
        entropies += [step.entropies for canvas in run.canvases for step in canvas.steps]
    limit = SHAPES[name].generation["max_denoising_steps"]

    assert min(steps) < limit, "no canvas stopped by confidence"
    assert max(steps) == limit or len(set(steps)) > 3
    spread = np.concatenate(entropies)
    assert np.quantile(spread, 0.1) < 0.01 < 0.5 < np.quantile(spread, 0.9)


# ---------------------------------------------------------------- the released dimensions, without memory for them

TOWER = {  # as large as the released one; the two switches bring tensors of their own
    "model_type": "gemma4_vision",
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "head_dim": 72,
    "use_clipped_linears": True,
    "standardize": True,
}


def oracle_layout(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name -> shape of everything that transformers' model of this config holds."""
    with torch.device("meta"):
        model = DiffusionGemmaForBlockDiffusion(DiffusionGemmaConfig.from_dict(config))
    return {name: tuple(values.shape) for name, values in model.state_dict().items()}


@pytest.mark.parametrize("layers", [1, 2, 7, 30])
def test_the_real_shape_is_the_models_own(layers: int) -> None:
    shape = resized(SHAPES["real"], layers)
    ours = {name: weight.sizes for name, weight in weights(shape).items()}
    theirs = oracle_layout(config_dict(shape))

    assert {name: theirs.get(name) for name in ours} == ours
    tied = "model.encoder.language_model."
    assert {name.replace(tied, "model.decoder.") for name in theirs} - {"lm_head.weight"} == {
        name.replace(tied, "model.decoder.") for name in ours
    }


def test_every_tensor_of_a_full_vision_tower_is_left_out_by_name(tmp_path: Path) -> None:
    shape = resized(SHAPES["odd_a"], 2)
    write_checkpoint(tmp_path, "odd_a", layers=2)
    config = {**config_dict(shape), "vision_config": TOWER}
    text = {name: weight.sizes for name, weight in weights(shape).items() if "vision" not in name}
    tied = ("lm_head.", "model.encoder.language_model.")
    tower = {name for name in oracle_layout(config) if not name.startswith(tied)} - set(text)
    # One value stands for each of the tower's tensors: what decides is the name.
    values = {name: np.zeros(text.get(name, (1,)), np.float32) for name in {*text, *tower}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    write_safetensors(tmp_path / "model.safetensors", values, "float32")

    assert len(tower) > 1000
    assert {"model.encoder.vision_tower.std_bias", "model.encoder.embed_vision.embedding_projection.weight"} < tower
    assert set(Checkpoint(tmp_path).left_out) == tower


def test_transformers_reads_the_shards(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    whole = DiffusionGemmaForBlockDiffusion.from_pretrained(checkpoint("odd_b")).state_dict()
    write_checkpoint(tmp_path, "odd_b", shard_bytes=60_000)
    loaded: Any = DiffusionGemmaForBlockDiffusion.from_pretrained(tmp_path, output_loading_info=True)

    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert not any(loaded[1].values()), "missing, unexpected or misshapen tensors"
    for name, values in loaded[0].state_dict().items():
        assert torch.equal(values, whole[name]), name


@pytest.mark.parametrize("vocab_size", [211, 307, 32_768, 262_144])
def test_every_id_decodes(vocab_size: int) -> None:
    tokenizer: Tokenizer = build_plain_tokenizer(vocab_size)

    assert tokenizer.get_vocab_size() == vocab_size
    ids = tokenizer.encode("Hi you\n<turn|>").ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == "Hi you\n<turn|>"
    assert tokenizer.decode([vocab_size - 1]).strip()
