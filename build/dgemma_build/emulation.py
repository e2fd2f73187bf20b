"""TensorRT's graphs on ONNX Runtime, for parity and quality without a GPU. Knows no model.

ONNX Runtime has no bfloat16 arithmetic on the CPU. `emulated` rewrites a graph so that every value of that type is
held in float32 and rounded to bfloat16 by the operator that makes it, which is what a GPU does that sums in float32.
Quantised weights and activations stay what they are. Products within a fused kernel may round less often on a GPU.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import onnx
import onnxruntime as ort
from onnx import NodeProto, TensorProto, helper, shape_inference

from dgemma_build.drafter.export import DrafterRequest, build_drafter
from dgemma_build.engine import BuildRequest, build_engine
from dgemma_build.engine_probe import Probe, probe_limits
from dgemma_build.progress import Progress
from dgemma_build.tensorrt import ENGINE_FILE, Profile, TensorRtBackend, binding_shapes, draft_profile, profiles
from dgemma_runtime.contract import EngineLimits, Manifest
from dgemma_runtime.drafter_manifest import DrafterManifest
from dgemma_runtime.engines.device import Array, TensorSpec
from dgemma_runtime.engines.host_device import HostDevice, HostProgram
from dgemma_runtime.engines.tensorrt import Loader, TensorRtEngine

# What these make was rounded before.
_MOVING = frozenset("Concat Expand Gather Identity Reshape ScatterElements ScatterND Slice Split Squeeze".split())
_MOVING |= {"Transpose", "Unsqueeze"}
_DTYPES: dict[int, str] = {
    TensorProto.BOOL: "bool",
    TensorProto.INT32: "int32",
    TensorProto.INT64: "int64",
    TensorProto.FLOAT: "fp32",
    TensorProto.BFLOAT16: "bf16",
    TensorProto.FLOAT8E4M3FN: "fp8",
}


def emulated(path: Path) -> onnx.ModelProto:
    """The graph at `path` in float32 with bfloat16's rounding; its weights stay in their file, its inputs and outputs
    keep their types."""
    shape_inference.infer_shapes_path(path, path.with_suffix(".types"), strict_mode=True, data_prop=True)
    typed = onnx.load(path.with_suffix(".types"), load_external_data=False).graph
    path.with_suffix(".types").unlink()
    values = {
        value.name: value.type.tensor_type.elem_type for value in (*typed.value_info, *typed.input, *typed.output)
    }
    values |= {tensor.name: tensor.data_type for tensor in typed.initializer}
    model = onnx.load(path, load_external_data=False)
    rewriter = _Rewriter({name for name, kind in values.items() if kind == TensorProto.BFLOAT16})
    given = [*(tensor.name for tensor in model.graph.initializer), *(value.name for value in model.graph.input)]
    outputs = {value.name for value in model.graph.output}
    for name in given:
        if name in rewriter.rounded:
            rewriter.cast(name, rewriter.float_of(name), TensorProto.FLOAT)
    for node in model.graph.node:
        rewriter.add(node, outputs)
    del model.graph.node[:]
    model.graph.node.extend(rewriter.nodes)
    return model


class _Rewriter:
    def __init__(self, rounded: set[str]) -> None:
        self.rounded = rounded  # values of type bfloat16
        self.nodes: list[NodeProto] = []

    def float_of(self, name: str) -> str:
        """The name of a value's float32 twin."""
        return f"{name}/float" if name in self.rounded else name

    def cast(self, name: str, to: str, kind: int) -> None:
        self.nodes.append(helper.make_node("Cast", [name], [to], to=kind))

    def add(self, node: NodeProto, graph_outputs: set[str]) -> None:
        """The node over float32 twins; what it makes in bfloat16 is rounded."""
        made = [name for name in node.output if name in self.rounded]
        if node.op_type == "Cast":
            source, target = self.float_of(node.input[0]), node.output[0]
            if made:
                self.cast(source, target, TensorProto.BFLOAT16)
                self.cast(target, self.float_of(target), TensorProto.FLOAT)
            else:
                kind = helper.get_node_attr_value(node, "to")
                self.cast(source, target, kind)
            return
        changed = NodeProto()
        changed.CopyFrom(node)
        exact = node.op_type in _MOVING
        del changed.input[:], changed.output[:]
        changed.input.extend(self.float_of(name) for name in node.input)
        changed.output.extend(
            (self.float_of(name) if exact else f"{name}/exact") if name in self.rounded else name
            for name in node.output
        )
        self.nodes.append(changed)
        for name in made:
            if not exact:
                self.cast(f"{name}/exact", name, TensorProto.BFLOAT16)
                self.cast(name, self.float_of(name), TensorProto.FLOAT)
            elif name in graph_outputs:
                self.cast(self.float_of(name), name, TensorProto.BFLOAT16)


class EmulatedBackend(TensorRtBackend):
    """The backend `tensorrt` with the emulated graph in place of an engine; `open_emulated` runs what it builds."""

    version = ort.__version__
    target = "emulation"

    def compile(self, directory: Path, profiles_of: Sequence[Profile], progress: Progress) -> int:
        onnx.save(emulated(directory / "model.onnx"), directory / ENGINE_FILE)
        (directory / "model.onnx").unlink()
        return 0


def build_emulated(checkpoint: Path, output: Path, precision: str, kv_precision: str = "bf16") -> Path:
    """An engine directory in one of TensorRT's precisions that `open_emulated` runs. Returns `output`."""
    request = BuildRequest(checkpoint, output, "tensorrt", precision, kv_precision)
    build_engine(request, backend=EmulatedBackend("tensorrt", precision, kv_precision))
    return output


def build_emulated_drafter(drafter: Path, denoiser: Path, output: Path, precision: str, kv_precision: str) -> Path:
    """Of two checkpoints: a drafter's engine directory for `open_emulated`. Returns `output`."""
    request = DrafterRequest(drafter, denoiser, output, "tensorrt", precision, kv_precision)
    build_drafter(request, backend=EmulatedBackend("tensorrt", precision, kv_precision))
    return output


def open_emulated(
    directory: Path, limits: EngineLimits, threads: int = 0, draft_model: Path | None = None
) -> TensorRtEngine:
    """The runtime's own TensorRT engine over the emulated graph, in ordinary memory."""
    device, denoiser = HostDevice(), OnnxFunction(directory, threads)

    def load_either(path: Path) -> HostProgram:
        if draft_model is None or path.parent != draft_model:
            return HostProgram(device, denoiser.tensors, denoiser)
        drafter = OnnxFunction(draft_model, threads, profiles_of=_drafter_profiles(draft_model))
        return HostProgram(device, drafter.tensors, drafter)

    return TensorRtEngine(directory, limits, device, load_either, draft_model=draft_model)


def _drafter_profiles(directory: Path) -> tuple[Profile]:
    found = DrafterManifest.load(directory, verify_hashes=False)
    return (draft_profile(found.canvas_length, found.max_batch_size, found.max_model_len),)


class EmulatedProbe(Probe):
    """The gate's probe over what `build_emulated` made."""

    def __init__(self, directory: Path, max_tokens: int = 4096, neighbours: int = 0, threads: int = 2) -> None:
        longest = Manifest.load(directory, verify_hashes=False).max_encode_tokens
        super().__init__(open_emulated(directory, probe_limits(max_tokens, neighbours, longest), threads), neighbours)


class OnnxFunction:
    """An emulated graph as the function of a `HostProgram`. `revealed` holds further values of the last run."""

    def __init__(
        self, directory: Path, threads: int, reveal: tuple[str, ...] = (), profiles_of: Sequence[Profile] = ()
    ) -> None:
        """`profiles_of` are a denoiser's where none are given."""
        path = directory / ENGINE_FILE
        model = onnx.load(path, load_external_data=False)
        graph = model.graph
        profiles_of = profiles_of or _denoiser_profiles(directory)
        self.tensors = {}
        for value in (*graph.input, *graph.output):
            shape, is_input = _shape(value), value in graph.input
            shapes = [binding_shapes(value.name, shape, profile) for profile in profiles_of if is_input]
            least, largest = (tuple(each[which] for each in shapes) for which in (0, 2))
            self.tensors[value.name] = TensorSpec(is_input, _DTYPES[_type(value)], shape, least, largest)
        self._types = {value.name: _type(value) for value in (*graph.input, *graph.output)}
        if reveal:
            graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in reveal)
            path = directory / "revealed.onnx"
            onnx.save(model, path)
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        self._session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self._reveal = reveal
        self.revealed: dict[str, Array] = {}

    def on_host(self) -> tuple[HostDevice, Loader]:
        """What a `TensorRtEngine` is made of."""
        device = HostDevice()
        return device, lambda path: HostProgram(device, self.tensors, self)

    def __call__(self, profile: int, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> None:
        binding = self._session.io_binding()
        for name, array in inputs.items():
            binding.bind_input(name, "cpu", 0, self._types[name], array.shape, array.ctypes.data)
        for name, array in outputs.items():
            binding.bind_output(name, "cpu", 0, self._types[name], array.shape, array.ctypes.data)
        for name in self._reveal:
            binding.bind_output(name, "cpu")
        self._session.run_with_iobinding(binding)
        found = binding.get_outputs()[len(outputs) :]
        self.revealed = {name: value.numpy() for name, value in zip(self._reveal, found, strict=True)}


def _denoiser_profiles(directory: Path) -> tuple[Profile, Profile]:
    found = Manifest.load(directory, verify_hashes=False)
    return profiles(found.model.canvas_length, found.max_batch_size, found.max_model_len)


def _type(value: onnx.ValueInfoProto) -> int:
    return int(value.type.tensor_type.elem_type)


def _shape(value: onnx.ValueInfoProto) -> tuple[int, ...]:
    return tuple(size.dim_value if size.HasField("dim_value") else -1 for size in value.type.tensor_type.shape.dim)
