"""The TensorRT-LLM backend against a recorded network, and its experts against the dense ones. No GPU, no TensorRT.

A stand-in for both libraries holds the build to what MixtureOfExperts 1.2.1 checks and records all that it is told.

    python tests/build/test_tensorrt_llm.py

remakes the record, after a change of the graph that is meant.
"""

from __future__ import annotations

import json
import math
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import pytest
from onnx import TensorProto
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from dgemma_build.checkpoint import Checkpoint
from dgemma_build.cli import app
from dgemma_build.data_file import allocate, size_of, write_weights
from dgemma_build.graph import author_graph
from dgemma_build.moe import MOE_LOWERINGS, MoeWeights, dense
from dgemma_build.onnx_writer import GraphWriter
from dgemma_build.products import Plain
from dgemma_build.progress import Silent
from dgemma_build.random_checkpoint import write_checkpoint
from dgemma_build.tensorrt_llm import FLAGS, open_backend
from dgemma_build.tensorrt_llm_experts import GEGLU, mixture_of_experts
from dgemma_runtime.errors import ConfigurationError

GOLDEN = Path(__file__).parent / "data" / "tensorrt_llm_network.json"
BATCH, CONTEXT = 3, 2000  # of the recorded build: canvases, tokens

# What MixtureOfExperts 1.2.1 reads: fields that must be there, and those its creator lists for a parser.
REQUIRED = (
    "remove_input_padding number_of_experts experts_per_token expert_hidden_size expert_inter_size "
    "groupwise_quant_algo group_size activation_type type_id weight_type_id quant_mode tp_size tp_rank ep_size ep_rank "
    "use_lora use_final_scales"
).split()
LISTED = [*REQUIRED, "use_bias", "side_stream_id", "lora_type_id", "max_low_rank"]


@dataclass
class Recorder:
    """Everything that a build told the library, as JSON would have it."""

    told: dict[str, Any] = field(default_factory=dict)
    parses: bool = True
    builds: bool = True
    creators: tuple[tuple[str, str, str], ...] = (("MixtureOfExperts", "1", "tensorrt_llm"),)

    def modules(self, version: str = "1.2.1", geglu: int = 6) -> dict[str, ModuleType]:
        """What `import` is to find."""

        def module(name: str, **members: Any) -> ModuleType:
            made = ModuleType(name)
            made.__dict__.update(members)
            return made

        flag = SimpleNamespace(STRONGLY_TYPED=1)
        logger = type("ILogger", (), {"ERROR": 1, "INTERNAL_ERROR": 0})
        registry = SimpleNamespace(get_plugin_creator=lambda *key: SimpleNamespace() if key in self.creators else None)
        return {
            "tensorrt": module(
                "tensorrt",
                __version__="10.14.1",
                NetworkDefinitionCreationFlag=flag,
                ILogger=logger,
                IProgressMonitor=type("IProgressMonitor", (), {}),
                IStreamWriter=type("IStreamWriter", (), {}),
                Builder=lambda log: FakeBuilder(self),
                OnnxParser=lambda network, log: FakeParser(self, network),
                get_plugin_registry=lambda: registry,
            ),
            "tensorrt_llm": module("tensorrt_llm", __version__=version),
            "tensorrt_llm.layers": module("tensorrt_llm.layers"),
            "tensorrt_llm.layers.moe": module("tensorrt_llm.layers.moe", activation_str_to_int_map={"geglu": geglu}),
            "tensorrt_llm._utils": module("tensorrt_llm._utils", get_sm_version=lambda: 90),
        }


class FakeNetwork:
    def __init__(self) -> None:
        self.inputs: list[SimpleNamespace] = []

    @property
    def num_inputs(self) -> int:
        return len(self.inputs)

    def get_input(self, index: int) -> SimpleNamespace:
        return self.inputs[index]


class FakeParser:
    """Reads the graph and holds every plugin node to what the plugin checks."""

    def __init__(self, recorder: Recorder, network: FakeNetwork) -> None:
        self.recorder, self.network, self.num_errors = recorder, network, 1

    def get_error(self, index: int) -> SimpleNamespace:
        return SimpleNamespace(desc=lambda: "no importer for Nonsense")

    def parse_from_file(self, path: str) -> bool:
        if not self.recorder.parses:
            return False
        graph = onnx.load(path, load_external_data=False).graph
        told = self.recorder.told
        self.network.inputs = [SimpleNamespace(name=each.name, shape=dims(each)) for each in graph.input]
        told["inputs"] = {each.name: [type_name(each), *dims(each)] for each in graph.input}
        told["outputs"] = {each.name: [type_name(each), *dims(each)] for each in graph.output}
        told["layers"] = dict(sorted(Counter(node.op_type for node in graph.node).items()))
        weights = {each.name: each for each in graph.initializer}
        makers = {name: node.op_type for node in graph.node for name in node.output}
        told["plugins"] = [plugin(node, weights, makers) for node in graph.node if node.domain]
        return True


def plugin(node: onnx.NodeProto, weights: dict[str, onnx.TensorProto], makers: dict[str, str]) -> dict[str, Any]:
    """A plugin's fields and inputs; AssertionError where TensorRT-LLM would refuse them."""
    attributes = {each.name: onnx.helper.get_attribute_value(each) for each in node.attribute}
    key = (node.op_type, attributes.pop("plugin_version").decode(), attributes.pop("plugin_namespace").decode())
    assert key == ("MixtureOfExperts", "1", "tensorrt_llm")
    assert all(type(value) is int for value in attributes.values()), "every field is INT32"
    assert set(REQUIRED) <= set(attributes) <= set(LISTED), "a parser passes only what the creator lists"
    _, first, second, chosen, share = node.input
    experts, hidden = attributes["number_of_experts"], attributes["expert_hidden_size"]
    inner, type_id = attributes["expert_inter_size"], attributes["weight_type_id"]
    assert list(weights[first].dims) == [experts, 2 * inner, hidden]
    assert list(weights[second].dims) == [experts, hidden, inner]
    stored = {0: TensorProto.FLOAT, 1: TensorProto.FLOAT16, 7: TensorProto.BFLOAT16}[type_id]
    assert weights[first].data_type == weights[second].data_type == stored
    assert makers[chosen] == makers[share] == "Cast", "int32 and float32, whatever the graph has"
    return {"fields": attributes, "weights": {name: list(weights[name].dims) for name in (first, second)}}


def dims(value: onnx.ValueInfoProto) -> list[int]:
    return [each.dim_value if each.HasField("dim_value") else -1 for each in value.type.tensor_type.shape.dim]


def type_name(value: onnx.ValueInfoProto) -> str:
    return str(TensorProto.DataType.Name(value.type.tensor_type.elem_type))


class FakeBuilder:
    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder

    def create_network(self, flags: int) -> FakeNetwork:
        self.recorder.told["network_flags"] = flags
        return FakeNetwork()

    def create_builder_config(self) -> FakeSettings:
        return FakeSettings(self.recorder)

    def create_optimization_profile(self) -> FakeProfile:
        return FakeProfile()

    def build_serialized_network_to_stream(self, network: FakeNetwork, settings: FakeSettings, writer: Any) -> bool:
        return bool(self.recorder.builds and writer.write(b"plan") == 4)


class FakeProfile:
    def __init__(self) -> None:
        self.shapes: dict[str, list[list[int]]] = {}

    def set_shape(self, name: str, *shapes: tuple[int, ...]) -> None:
        least, best, most = shapes
        assert all(a <= b <= c for a, b, c in zip(least, best, most, strict=True)), name
        self.shapes[name] = [list(shape) for shape in shapes]


class FakeSettings:
    """Only profiles and a monitor may be set: a setting that is not recorded is an AttributeError."""

    __slots__ = ("_recorder", "progress_monitor")

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder

    def add_optimization_profile(self, profile: FakeProfile) -> None:
        self._recorder.told.setdefault("profiles", []).append(profile.shapes)


def install(monkeypatch: pytest.MonkeyPatch, modules: dict[str, ModuleType]) -> None:
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)


def record(checkpoint: Path, directory: Path, recorder: Recorder | None = None) -> dict[str, Any]:
    """What a build of `checkpoint` tells the library."""
    recorder = recorder or Recorder()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(MOE_LOWERINGS, "tensorrt_llm", mixture_of_experts)
        install(patch, recorder.modules())
        backend, opened = open_backend("bf16"), Checkpoint(checkpoint)
        graph = author_graph(opened.config, opened, backend.lowering())
        (directory / "model.onnx.data").touch()
        graph.save(directory / "model.onnx", "model.onnx.data", "test", {})
        limits = backend.limits(opened.config, BATCH)
        backend.build(directory, opened.config, CONTEXT, limits, Silent())
    return recorder.told


def as_text(told: dict[str, Any]) -> str:
    """JSON with a line for every input, output, layer and plugin."""
    lines = []
    for key, value in told.items():
        if isinstance(value, dict):
            inside = ",\n".join(f"  {json.dumps(name)}: {json.dumps(each)}" for name, each in value.items())
            lines.append(f" {json.dumps(key)}: {{\n{inside}\n }}")
        elif isinstance(value, list):
            inside = ",\n".join(f"  {json.dumps(each)}" for each in value)
            lines.append(f" {json.dumps(key)}: [\n{inside}\n ]")
        else:
            lines.append(f" {json.dumps(key)}: {json.dumps(value)}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def test_the_network_is_the_recorded_one(odd_checkpoint: Path, tmp_path: Path) -> None:
    told = record(odd_checkpoint, tmp_path)
    assert json.loads(as_text(told)) == json.loads(GOLDEN.read_text())
    assert [path.name for path in tmp_path.iterdir()] == ["rank0.engine"]
    assert (tmp_path / "rank0.engine").read_bytes() == b"plan"


def test_the_record_has_what_it_is_for() -> None:
    told = json.loads(GOLDEN.read_text())
    assert told["network_flags"] == 2  # strongly typed
    assert len(told["profiles"]) == 2
    assert len(told["plugins"]) == 4  # one a layer
    fields = told["plugins"][0]["fields"]
    assert (fields["activation_type"], fields["type_id"], fields["experts_per_token"]) == (GEGLU, 7, 3)
    assert told["profiles"][0]["token_ids"] == [[1, 12], [1, 12], [BATCH, 12]]
    assert told["profiles"][1]["canvas_rows"] == [[0], [0], [0]]
    assert not {"RMSNormalization", "RotaryEmbedding"} & set(told["layers"])  # 10.14 does not parse them


# ---------------------------------------------------------------- numerics


Float64 = npt.NDArray[np.float64]


def erf_gelu(x: Float64) -> Float64:
    erf: Float64 = np.vectorize(math.erf)(x / math.sqrt(2))
    return 0.5 * x * (1 + erf)


def tanh_gelu(x: Float64) -> Float64:
    tanh: Float64 = np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))
    return 0.5 * x * (1 + tanh)


def plugin_semantics(gelu: Callable[[Float64], Float64]) -> type[OpRun]:
    """MixtureOfExperts in numpy: of the first product's rows, the latter half is gated."""

    class MixtureOfExperts(OpRun):
        op_domain = "tensorrt_llm"

        def _run(self, *inputs: npt.NDArray[Any], **fields: Any) -> tuple[npt.NDArray[Any]]:
            tokens, first, second, chosen, share = inputs
            assert (chosen.dtype.name, share.dtype.name) == ("int32", "float32")
            out = np.zeros(tokens.shape)
            for row in range(len(tokens)):
                for expert, weight in zip(chosen[row], share[row], strict=True):
                    up, gate = np.split(first[expert].astype(np.float64) @ tokens[row], 2)
                    out[row] += weight * (second[expert].astype(np.float64) @ (gelu(gate) * up))
            return (out.astype(tokens.dtype),)

    return MixtureOfExperts


def experts_graph(lower: Callable[..., str], folder: Path) -> Path:
    """Experts of odd sizes over tokens [N, 20] and logits [N, 5], as a graph of their own."""
    rng = np.random.default_rng(3)
    gate_up = rng.standard_normal((5, 20, 2 * 7), np.float32) / 4
    down = rng.standard_normal((5, 7, 20), np.float32) / 2

    w = GraphWriter()
    w.input("tokens", TensorProto.FLOAT, ["N", 20])
    w.input("logits", TensorProto.FLOAT, ["N", 5])
    share, ids = w.ops("TopK", w.op("Softmax", "logits", axis=-1), w.const([3]), outputs=2, axis=-1)
    multiply = partial(Plain(TensorProto.FLOAT, turned=False).multiply, w)
    weights = MoeWeights(multiply, lambda e: gate_up[e], lambda e: down[e], 5, 3, 20, 7, np.dtype(np.float32))
    w.op("Identity", lower(w, weights, "layer", "tokens", ids, share), to="mixed")
    w.graph_output("mixed", TensorProto.FLOAT, ["N", 20])
    folder.mkdir()
    placed = w.placed()
    allocate(folder / "model.data", size_of(placed))
    w.save(folder / "model.onnx", "model.data", "test", {})
    write_weights(folder / "model.data", placed, lambda done: None)
    return folder / "model.onnx"


def test_the_plugin_s_experts_are_the_dense_ones(tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    inputs = {name: rng.standard_normal((11, n), np.float32) for name, n in (("tokens", 20), ("logits", 5))}
    session = onnxruntime.InferenceSession(experts_graph(dense, tmp_path / "dense"))
    [expected] = session.run(None, inputs)
    model = experts_graph(mixture_of_experts, tmp_path / "plugin")

    def result(gelu: Callable[[Float64], Float64]) -> npt.NDArray[np.float32]:
        evaluator = ReferenceEvaluator(str(model), new_ops=[plugin_semantics(gelu)])
        made: Any = evaluator.run(None, inputs)
        return np.asarray(made[0], np.float32)

    np.testing.assert_allclose(result(tanh_gelu), expected, rtol=0, atol=2e-6)
    np.testing.assert_allclose(result(erf_gelu), expected, rtol=0, atol=2e-3 * np.abs(expected).max())


def test_erf_and_tanh_differ_by_what_the_documentation_says() -> None:
    x = np.linspace(-8, 8, 4001)
    assert 4e-4 < np.abs(erf_gelu(x) - tanh_gelu(x)).max() < 5e-4


# ---------------------------------------------------------------- where it is not installed


def test_it_opens_where_the_last_release_is(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, Recorder().modules())
    backend = open_backend("bf16")
    assert (backend.version, backend.target, backend.kv_dtype) == ("1.2.1+tensorrt.10.14.1", "sm_90", "bf16")
    assert open_backend("bf16", "fp8").kv_dtype == "fp8"


def test_elsewhere_the_error_says_what_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_llm", None)
    with pytest.raises(ConfigurationError) as raised:
        open_backend("bf16")
    for part in ("--backend tensorrt_llm", "removed", "1.2.1", "Python 3.12", "TensorRT 10.14", "--backend tensorrt"):
        assert part in str(raised.value)


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        (Recorder().modules(version="1.3.0"), "version 1.3.0 is installed.*1.2.1 is the last"),
        (Recorder().modules(version="1.1.0"), "version 1.1.0 is installed"),
        (Recorder().modules(geglu=4), "numbers the gated GELU 4, the graph has 6"),
        (Recorder(creators=()).modules(), "no plugin MixtureOfExperts"),
    ],
)
def test_another_library_is_refused(
    monkeypatch: pytest.MonkeyPatch, modules: dict[str, ModuleType], message: str
) -> None:
    install(monkeypatch, modules)
    with pytest.raises(ConfigurationError, match=message):
        open_backend("bf16")


def test_another_precision_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="--precision fp8: tensorrt_llm is built in bf16"):
        open_backend("fp8")


@pytest.mark.parametrize(
    ("recorder", "message"),
    [(Recorder(parses=False), "no importer for Nonsense"), (Recorder(builds=False), "cannot build the graph")],
)
def test_what_the_library_refuses_is_an_error(
    odd_checkpoint: Path, tmp_path: Path, recorder: Recorder, message: str
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        record(odd_checkpoint, tmp_path, recorder)


def test_the_flags_of_trtllm_build_lead_to_options_there_are() -> None:
    [command] = [each for each in app.registered_commands if each.callback and each.callback.__name__ == "engine"]
    assert command.callback is not None
    options = {f"--{name.replace('_', '-')}" for name in command.callback.__annotations__}
    assert {flag.ours for flag in FLAGS if flag.ours} <= options
    assert len({flag.name for flag in FLAGS}) == len(FLAGS)
    assert all(flag.name.startswith("--") and flag.meaning for flag in FLAGS)


def main() -> None:
    with TemporaryDirectory() as folder:
        told = record(write_checkpoint(Path(folder) / "odd_a", "odd_a"), Path(folder))
    GOLDEN.parent.mkdir(exist_ok=True)
    GOLDEN.write_text(as_text(told))


if __name__ == "__main__":
    main()
