"""Kernels against what stands in for them without plugins: the same parts of the ONNX graph, in onnxruntime."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import onnxruntime
import torch
from onnx import TensorProto

from dgemma_build.checkpoint import TextConfig
from dgemma_build.data_file import allocate, size_of, write_weights
from dgemma_build.head import add_head
from dgemma_build.kernels.experts import grouped_experts
from dgemma_build.kernels.head import fused_head
from dgemma_build.kernels.packing import WeightFormat, pack_experts
from dgemma_build.moe import MoeWeights, dense
from dgemma_build.onnx_writer import GraphWriter
from dgemma_build.products import Plain

Arrays = dict[str, npt.NDArray[Any]]


def run(graph: GraphWriter, folder: Path, inputs: Arrays) -> Arrays:
    """The graph's outputs by name."""
    placed = graph.placed()
    allocate(folder / "model.data", size_of(placed))
    graph.save(folder / "model.onnx", "model.data", "test", {})
    write_weights(folder / "model.data", placed, lambda done: None)
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, inputs), strict=True))


def test_the_head_is_the_graph_s_head(tmp_path: Path, generator: torch.Generator) -> None:
    rows, length, vocab, width = 3, 5, 150, 32
    normed = torch.randn(rows, length, width, generator=generator)
    embedding = torch.randn(vocab, width, generator=generator)
    temperature = torch.tensor([0.4, 0.8, 1.3])
    uniforms = torch.rand(rows, length, generator=generator)

    graph = GraphWriter()
    graph.input("normed", TensorProto.FLOAT, ["R", "L", width])
    graph.input("temperature", TensorProto.FLOAT, ["R"])
    graph.input("uniforms", TensorProto.FLOAT, ["R", "L"])
    spec = SimpleNamespace(vocab_size=vocab, hidden_size=width)
    config = cast(TextConfig, SimpleNamespace(spec=spec, final_logit_softcapping=30.0))
    add_head(graph, "normed", graph.array("embedding", embedding.numpy()), config, TensorProto.FLOAT)
    inputs = {"normed": normed.numpy(), "temperature": temperature.numpy(), "uniforms": uniforms.numpy()}
    expected = run(graph, tmp_path, inputs)

    per_position = temperature.repeat_interleave(length)
    result = fused_head(normed.flatten(0, 1), embedding, per_position, uniforms.flatten(), 30.0)
    np.testing.assert_array_equal(result.argmax.numpy(), expected["argmax_ids"].ravel())
    np.testing.assert_array_equal(result.sampled.numpy(), expected["sampled_ids"].ravel())
    np.testing.assert_allclose(result.entropy.numpy(), expected["entropies"].ravel(), rtol=0, atol=2e-5)
    soft = expected["next_soft_embedding"].reshape(rows * length, width)
    np.testing.assert_allclose(result.soft_embedding.numpy(), soft, rtol=0, atol=1e-4)


def test_the_experts_are_the_graph_s_experts(tmp_path: Path, generator: torch.Generator) -> None:
    tokens, experts, top_k, width, inner = 9, 4, 2, 32, 24
    x = torch.randn(tokens, width, generator=generator)
    share, chosen = torch.rand(tokens, experts, generator=generator).topk(top_k)
    gate_up = torch.randn(experts, 2 * inner, width, generator=generator) / width**0.5
    down = torch.randn(experts, width, inner, generator=generator) / inner**0.5

    graph = GraphWriter()
    graph.input("x", TensorProto.FLOAT, ["N", width])
    graph.input("chosen", TensorProto.INT64, ["N", top_k])
    graph.input("share", TensorProto.FLOAT, ["N", top_k])

    def right(matrices: torch.Tensor) -> Callable[[int], npt.NDArray[np.float32]]:
        return lambda expert: np.ascontiguousarray(matrices[expert].T.numpy())

    sizes = {"num_experts": experts, "top_k": top_k, "hidden_size": width, "intermediate_size": inner}
    multiply = partial(Plain(TensorProto.FLOAT, turned=False).multiply, graph)
    weights = MoeWeights(multiply, right(gate_up), right(down), dtype=np.dtype(np.float32), **sizes)
    name = dense(graph, weights, "layer", "x", "chosen", "share")
    graph.graph_output(name, TensorProto.FLOAT, ["N", width])
    inputs = {"x": x.numpy(), "chosen": chosen.numpy(), "share": share.numpy()}
    expected = run(graph, tmp_path, inputs)[name]

    result = grouped_experts(x, chosen.int(), share, pack_experts(gate_up, down, WeightFormat("plain")))
    np.testing.assert_allclose(result.numpy(), expected, rtol=0, atol=2e-6)
