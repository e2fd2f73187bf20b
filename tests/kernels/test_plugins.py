"""The graph's plugin nodes, run kernel by kernel in the interpreter, against the graph without plugins.

Values pass between the nodes as an engine passes them: outputs begin as garbage, shapes and grids are those that
TensorRT is told.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from dgemma_build import head, moe, plugin_lowering
from dgemma_build.checkpoint import TextConfig
from dgemma_build.data_file import allocate, size_of, write_weights
from dgemma_build.kernels import plugins
from dgemma_build.kernels.attention import KeyValuePages, paged_attention
from dgemma_build.kernels.experts import grouped_experts
from dgemma_build.kernels.head import fused_head
from dgemma_build.kernels.launch import Kernel
from dgemma_build.kernels.operations import OPERATIONS, TACTICS
from dgemma_build.kernels.packing import WeightFormat, dequantised, pack_experts
from dgemma_build.moe import MoeWeights
from dgemma_build.onnx_writer import GraphWriter
from dgemma_build.plugin_lowering import ExpertFormat, Pages, experts
from dgemma_build.products import Plain
from dgemma_runtime.errors import ConfigurationError

Arrays = dict[str, npt.NDArray[Any]]
VOCAB, WIDTH = 150, 32
EXPERTS, TOP_K, HIDDEN, INNER = 4, 2, 128, 64
ATTRIBUTES = {"plugin_namespace": "dgemma", "plugin_version": "1", "aot": 1}


def garbage(*size: Any, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """What an engine's memory may hold."""
    made = torch.empty(*size, dtype=dtype, device=device)
    return made.fill_(float("nan") if dtype.is_floating_point else 1_000_000_007)


def from_numpy(array: npt.NDArray[Any]) -> torch.Tensor:
    """Packed int4 is INT8 in the graph and unsigned bytes to the kernels; torch knows no numpy type of fp8."""
    if array.dtype.name == "float8_e4m3fn":
        return torch.from_numpy(array.view(np.uint8).copy()).view(torch.float8_e4m3fn)
    return torch.from_numpy(np.array(array.view(np.uint8) if array.dtype == np.int8 else array))


def operator(name: str, tactic: int = 0) -> type[OpRun]:
    """The operation as an operator of onnx's evaluator."""

    def _run(self: OpRun, *inputs: npt.NDArray[Any], **attributes: Any) -> tuple[npt.NDArray[Any], ...]:
        assert {key: attributes.pop(key) for key in ATTRIBUTES} == ATTRIBUTES
        assert set(attributes) == set(OPERATIONS[name].attributes)
        chosen = tactic if OPERATIONS[name].tactics else 0
        made = plugins.run(name, [from_numpy(each) for each in inputs], attributes, chosen, garbage)
        return tuple(each.numpy() for each in made)

    schema = onnx.defs.OpSchema(name, "dgemma", 1)
    return type(name, (OpRun,), {"op_domain": "dgemma", "op_schema": schema, "_run": _run})


def save(graph: GraphWriter, folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    placed = graph.placed()
    allocate(folder / "model.data", size_of(placed))
    graph.save(folder / "model.onnx", "model.data", "test", {})
    write_weights(folder / "model.data", placed, lambda done: None)
    return folder / "model.onnx"


def with_plugins(path: Path, inputs: Arrays, tactic: int = 0) -> Arrays:
    evaluator = ReferenceEvaluator(str(path), new_ops=[operator(name, tactic) for name in OPERATIONS])
    results: Any = evaluator.run(None, inputs)
    return dict(zip(evaluator.output_names, results, strict=True))


def without_plugins(path: Path, inputs: Arrays) -> Arrays:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, inputs), strict=True))


# ---------------------------------------------------------------- head


def head_graph(add: Callable[..., None], embedding: torch.Tensor) -> GraphWriter:
    graph = GraphWriter()
    graph.input("normed", TensorProto.FLOAT, ["R", "L", WIDTH])
    graph.input("temperature", TensorProto.FLOAT, ["R"])
    graph.input("uniforms", TensorProto.FLOAT, ["R", "L"])
    spec = SimpleNamespace(vocab_size=VOCAB, hidden_size=WIDTH)
    config = cast(TextConfig, SimpleNamespace(spec=spec, final_logit_softcapping=30.0))
    add(graph, "normed", graph.array("embedding", embedding.numpy()), config, TensorProto.FLOAT)
    return graph


@pytest.mark.parametrize(("rows", "length"), [(3, 5), (1, 1), (2, 130)])
def test_the_head_s_plugins_are_the_graph_s_head(
    tmp_path: Path, generator: torch.Generator, rows: int, length: int
) -> None:
    embedding = torch.randn(VOCAB, WIDTH, generator=generator)
    inputs = {
        "normed": torch.randn(rows, length, WIDTH, generator=generator).numpy(),
        "temperature": (0.4 + torch.rand(rows, generator=generator)).numpy(),
        "uniforms": torch.rand(rows, length, generator=generator).numpy(),
    }
    expected = without_plugins(save(head_graph(head.add_head, embedding), tmp_path / "without"), inputs)
    result = with_plugins(save(head_graph(plugin_lowering.add_head, embedding), tmp_path / "with"), inputs)
    assert list(result) == list(expected)
    for name in ("argmax_ids", "sampled_ids"):
        assert result[name].dtype == np.int32
        np.testing.assert_array_equal(result[name], expected[name])
    np.testing.assert_allclose(result["entropies"], expected["entropies"], rtol=0, atol=2e-5)
    soft = "next_soft_embedding"
    np.testing.assert_allclose(result[soft], expected[soft], rtol=0, atol=1e-4)


def test_a_call_without_canvas_rows_launches_nothing_empty_and_has_empty_results(
    tmp_path: Path, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    embedding = torch.randn(VOCAB, WIDTH, generator=generator)
    path = save(head_graph(plugin_lowering.add_head, embedding), tmp_path)
    nothing = np.zeros((0, 7, WIDTH), np.float32)
    inputs = {"normed": nothing, "temperature": np.zeros(0, np.float32), "uniforms": np.zeros((0, 7), np.float32)}
    grids = [grid for _, grid, _ in launches(monkeypatch, lambda: with_plugins(path, inputs))]
    assert len(grids) == 4
    assert all(min(grid) > 0 for grid in grids), grids
    result = with_plugins(path, inputs)
    assert {name: each.shape for name, each in result.items()} == {
        "argmax_ids": (0, 7),
        "entropies": (0, 7),
        "sampled_ids": (0, 7),
        "next_soft_embedding": (0, 7, WIDTH),
    }


# ---------------------------------------------------------------- experts

Stacks = tuple[torch.Tensor, torch.Tensor]
FORMS = [ExpertFormat(), ExpertFormat("fp8"), ExpertFormat("int4", 32), ExpertFormat("int4", 64)]


def stacks(generator: torch.Generator) -> Stacks:
    gate_up = torch.randn(EXPERTS, 2 * INNER, HIDDEN, generator=generator) / HIDDEN**0.5
    return gate_up, torch.randn(EXPERTS, HIDDEN, INNER, generator=generator) / INNER**0.5


def experts_graph(lower: Callable[..., str], matrices: Stacks) -> GraphWriter:
    graph = GraphWriter()
    graph.input("x", TensorProto.FLOAT, ["N", HIDDEN])
    graph.input("chosen", TensorProto.INT64, ["N", TOP_K])
    graph.input("share", TensorProto.FLOAT, ["N", TOP_K])
    gate_up, down = (lambda expert, of=of: of[expert].T.numpy() for of in matrices)
    multiply = partial(Plain(TensorProto.FLOAT, turned=False).multiply, graph)
    sizes = {"num_experts": EXPERTS, "top_k": TOP_K, "hidden_size": HIDDEN, "intermediate_size": INNER}
    weights = MoeWeights(multiply, gate_up, down, dtype=np.dtype(np.float32), **sizes)
    graph.op("Identity", lower(graph, weights, "layer", "x", "chosen", "share"), to="mixed")
    graph.graph_output("mixed", TensorProto.FLOAT, ["N", HIDDEN])
    return graph


def calls(generator: torch.Generator, tokens: int) -> Arrays:
    share, chosen = torch.rand(tokens, EXPERTS, generator=generator).topk(TOP_K)
    x = torch.randn(tokens, HIDDEN, generator=generator)
    return {"x": x.numpy(), "chosen": chosen.numpy(), "share": share.numpy()}


def as_stored(path: Path, form: ExpertFormat, matrices: Stacks) -> Stacks:
    """The numbers that the weights in a graph with plugins stand for."""
    if form.kind == "plain":
        return matrices
    model = onnx.load(path)
    stored = {each.name: from_numpy(onnx.numpy_helper.to_array(each)) for each in model.graph.initializer}
    kernel_form = WeightFormat(form.kind, form.group)
    names = ("layer.experts.gate_up", "layer.experts.down")
    pairs = [(stored[f"{name}.{form.kind}"], stored[f"{name}.scales"]) for name in names]
    gate_up, down = (dequantised(values, scales, kernel_form) for values, scales in pairs)
    return gate_up, down


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize(("tokens", "tactic"), [(1, 0), (9, 1), (40, 2), (21, 3)])
def test_the_experts_plugins_are_the_graph_s_experts(
    tmp_path: Path, generator: torch.Generator, form: ExpertFormat, tokens: int, tactic: int
) -> None:
    matrices, inputs = stacks(generator), calls(generator, tokens)
    path = save(experts_graph(partial(experts, form), matrices), tmp_path / "with")
    same = as_stored(path, form, matrices)
    error = max(float((a - b).norm() / b.norm()) for a, b in zip(same, matrices, strict=True))
    assert error <= {"plain": 0, "fp8": 0.03, "int4": 0.12}[form.kind]
    expected = without_plugins(save(experts_graph(moe.dense, same), tmp_path / "without"), inputs)["mixed"]
    result = with_plugins(path, inputs, tactic)["mixed"]
    np.testing.assert_allclose(result, expected, rtol=0, atol=5e-6)


def test_int4_needs_rows_of_whole_runs() -> None:
    with pytest.raises(ConfigurationError, match="int4 weights with 96 inputs: the number must be a multiple of 64"):
        ExpertFormat("int4", 32).run(96)


# ---------------------------------------------------------------- attention


@pytest.mark.parametrize("window", [0, 21])
@pytest.mark.parametrize("cache", [torch.float32, torch.float8_e4m3fn])
def test_attention_over_pages(tmp_path: Path, generator: torch.Generator, window: int, cache: torch.dtype) -> None:
    """The nodes against the host function, which `test_attention.py` holds to the model's rules."""
    rows, tokens, heads, kv_heads, dim, page, count = 2, 11, 4, 2, 32, 64, 5
    query = torch.randn(rows, tokens, heads, dim, generator=generator)
    keys, values = (torch.randn(count, kv_heads, page, dim, generator=generator).to(cache) for _ in range(2))
    scales = (1.0, 1.0) if cache == torch.float32 else (0.5, 2.0)
    table, position, length, is_canvas = rules = [
        torch.tensor(each, dtype=torch.int32) for each in ([[3, 1], [0, 2]], [70, 5], [11, 9], [1, 0])
    ]
    pair = KeyValuePages(keys, values, *scales)
    expected = paged_attention(query, pair, table, position, length, is_canvas, window)

    graph = GraphWriter()
    graph.input("query", TensorProto.FLOAT, ["B", "L", heads, dim])
    kind = TensorProto.FLOAT if cache == torch.float32 else TensorProto.FLOAT8E4M3FN
    for name in ("keys", "values"):
        graph.input(name, kind, ["P", kv_heads, page, dim])
    graph.input("table", TensorProto.INT32, ["B", "W"])
    for name in ("position", "length", "is_canvas"):
        graph.input(name, TensorProto.INT32, ["B"])
    pages = Pages("keys", "values", "table", "position", "length", "is_canvas", *scales)
    made = plugin_lowering.paged_attention(graph, "query", pages, dim, window, TensorProto.FLOAT)
    graph.op("Identity", made, to="context")
    graph.graph_output("context", TensorProto.FLOAT, ["B", "L", heads, dim])

    def array(tensor: torch.Tensor) -> npt.NDArray[Any]:
        if tensor.dtype != torch.float8_e4m3fn:
            return tensor.numpy()
        return tensor.view(torch.uint8).numpy().view(onnx.helper.tensor_dtype_to_np_dtype(kind))

    names = ("query", "keys", "values", "table", "position", "length", "is_canvas")
    inputs = {name: array(each) for name, each in zip(names, (query, keys, values, *rules), strict=True)}
    result = with_plugins(save(graph, tmp_path), inputs)["context"]
    np.testing.assert_array_equal(result, expected.numpy())


# ---------------------------------------------------------------- launches


def launches(monkeypatch: pytest.MonkeyPatch, of: Callable[[], Any]) -> list[tuple[Any, ...]]:
    """(kernel, grid, numbers) of everything that `of` launches."""
    found = []
    launch = Kernel.launch

    def record(self: Kernel, grid: tuple[int, ...], *arguments: Any) -> None:
        numbers = [np.float32(each) for each in arguments if isinstance(each, int | float)]
        found.append((self.name, grid, numbers))
        launch(self, grid, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Kernel, "launch", record)
        of()
    return found


def test_plugins_launch_what_the_host_functions_launch(
    tmp_path: Path, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    embedding, rows = torch.randn(VOCAB, WIDTH, generator=generator), 20
    normed, ones = torch.randn(rows, WIDTH, generator=generator), torch.ones(rows)
    by_host = launches(monkeypatch, lambda: fused_head(normed, embedding, ones, ones / 2, 30.0))
    path = save(head_graph(plugin_lowering.add_head, embedding), tmp_path / "head")
    inputs = {"normed": normed[None].numpy(), "temperature": np.ones(1, np.float32)}
    inputs["uniforms"] = np.full((1, rows), 0.5, np.float32)
    assert launches(monkeypatch, lambda: with_plugins(path, inputs)) == by_host
    assert [name for name, *_ in by_host] == ["head_tiles", "head_choose", "head_soft", "head_sum"]

    matrices, call = stacks(generator), calls(generator, 33)
    x, chosen, share = (torch.from_numpy(call[name]) for name in ("x", "chosen", "share"))
    weights = pack_experts(*matrices, WeightFormat("plain"))
    by_host = launches(monkeypatch, lambda: grouped_experts(x, chosen.int(), share, weights))
    path = save(experts_graph(partial(experts, ExpertFormat()), matrices), tmp_path / "experts")
    assert launches(monkeypatch, lambda: with_plugins(path, call, TACTICS[0])) == by_host
    assert len(by_host) == 4


def test_nodes_are_as_tensorrt_s_parser_wants_them(tmp_path: Path, generator: torch.Generator) -> None:
    path = save(experts_graph(partial(experts, ExpertFormat("int4", 64)), stacks(generator)), tmp_path)
    model = onnx.load(path)  # checked when it was saved
    nodes = [node for node in model.graph.node if node.domain == "dgemma"]
    assert [node.op_type for node in nodes] == ["experts_sort", "experts_gate_up", "experts_down", "experts_sum"]
    for node in nodes:
        attributes = {each.name: onnx.helper.get_attribute_value(each) for each in node.attribute}
        assert (attributes["plugin_namespace"], attributes["plugin_version"]) == (b"dgemma", b"1")
        assert attributes["aot"] == 1
        assert [name for name in attributes if name not in ATTRIBUTES] == list(OPERATIONS[node.op_type].attributes)
        assert len(node.input) == len(OPERATIONS[node.op_type].inputs)
        assert len(node.output) == len(OPERATIONS[node.op_type].outputs)
