"""A drafter at the released dimensions, with fewer tokens: its graph is the torch module's, and what the plan says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import torch

from dgemma_build.data_file import allocate, size_of, write_weights
from dgemma_build.drafter.config import check_sizes
from dgemma_build.drafter.graph import author_drafter, drafter_weights
from dgemma_build.drafter.network import Drafter
from dgemma_build.plan.drafter import plan_drafter
from dgemma_build.random_checkpoint import config_dict
from dgemma_build.random_shapes import SHAPES, resized
from dgemma_build.text_config import TextConfig, parse_config
from dgemma_runtime.contract import SLIDING

VOCABULARY, POSITION, SLOTS = 1024, 90, 384
Float32 = np.ndarray[tuple[int, ...], np.dtype[np.float32]]


def released(vocab_size: int | None = None) -> TextConfig:
    return parse_config(config_dict(resized(SHAPES["real"], vocab_size=vocab_size)), Path("config.json"))


class RandomWeights:
    """Of the drafter and the denoiser's embedding."""

    def __init__(self, model: Drafter) -> None:
        self._state = model.state_dict()
        self._embedding = model.embedding

    def float32(self, name: str) -> Float32:
        values: Float32 = self._state[name].numpy()
        return values

    def float32_slice(self, name: str, index: int | slice) -> Float32:
        assert name == "embed_tokens.weight"
        values: Float32 = self._embedding[index].numpy()
        return values


def test_the_graph_at_released_dimensions_is_the_torch_module(tmp_path: Path) -> None:
    denoiser = released(VOCABULARY)
    planned = plan_drafter(denoiser)
    config, spec = planned.config, planned.config.spec(denoiser)
    check_sizes(config, denoiser, tmp_path)
    torch.manual_seed(0)
    model = Drafter(
        config, denoiser, torch.randn(VOCABULARY, spec_hidden := denoiser.spec.hidden_size) * spec_hidden**-0.5
    )
    source = RandomWeights(model)
    graph = author_drafter(config, denoiser, source, source)
    placed = graph.placed()
    (tmp_path / "data").touch()
    graph.save(tmp_path / "model.onnx", "data", "a test", {})
    allocate(tmp_path / "data", size_of(placed))
    write_weights(tmp_path / "data", placed, lambda nbytes: None)
    assert size_of(placed) >= 4 * (planned.values + planned.embedding_values) - 2**20

    context = [
        (torch.randn(1, layer.num_key_value_heads, POSITION, layer.head_dim) * layer.head_dim**-0.25,) * 2
        for layer in spec.layers
    ]
    with torch.no_grad():
        logits = model(context, torch.tensor([POSITION]), torch.tensor([7]))[0]
    inputs = {
        "last_ids": np.array([7], np.int32),
        "position": np.array([POSITION]),
        "sliding_length": np.array([min(POSITION, spec.sliding_window - 1)]),
    }
    for index, (layer, (keys, values)) in enumerate(zip(spec.layers, context, strict=True)):
        assert layer.kind != SLIDING or spec.sliding_window > POSITION
        for name, tensor in (("key_cache", keys), ("value_cache", values)):
            cache = np.zeros((1, layer.num_key_value_heads, SLOTS, layer.head_dim), np.float32)
            cache[:, :, :POSITION] = tensor.numpy()
            inputs[f"{name}_{index}"] = cache
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    ids, confidences = session.run(["token_ids", "confidences"], inputs)
    top = logits.softmax(-1).max(-1)
    assert np.abs(confidences[0] - top.values.numpy()).max() < 1e-4
    best = logits.topk(2, -1).values
    clear = (best[:, 0] - best[:, 1]).numpy() > 1e-3
    assert np.array_equal(ids[0][clear], top.indices.numpy()[clear])


def test_the_plan_counts_every_weight_of_the_graph() -> None:
    denoiser = released()
    planned = plan_drafter(denoiser)
    total = sum(weight.nbytes for weight in drafter_weights(planned.config, denoiser))
    assert total == 4 * (planned.values + planned.embedding_values) + 4 * planned.config.canvas_length  # int64 offsets
    assert planned.embedding_values == 262_144 * 2816
