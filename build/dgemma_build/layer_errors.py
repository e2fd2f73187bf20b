"""What a precision does to each layer by itself: its output beside that of the float32 graph, from the same input.

Errors of earlier layers are kept out: they would be amplified and, where they change which experts a token chooses,
drown everything else. Works on what `emulation.build_emulated` makes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper

from dgemma_build.attention import SLOT_GROUP
from dgemma_build.graph import layer_output
from dgemma_build.tensorrt import ENGINE_FILE
from dgemma_runtime.contract import FULL, Float32Array, Manifest, ModelSpec, sliding_slots

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class LayerError:
    """Of one layer's output over a canvas and a prompt of its length: relative errors.

    A token near a tie between experts may choose others and change as a whole, which random weights make common.
    """

    median: float  # of the tokens
    tenth: float  # what one token in ten exceeds
    total: float  # of all tokens together


def layer_errors(reference: Path, other: Path, threads: int = 0) -> list[LayerError]:
    """Of every layer."""
    spec = Manifest.load(reference, verify_hashes=False).model
    expected = [_outputs(reference, spec, canvas, {}, threads) for canvas in (True, False)]
    given = [{layer_output(i): layers[i] for i in range(len(layers))} for layers in expected]
    found = [
        _outputs(other, spec, canvas, inputs, threads) for canvas, inputs in zip((True, False), given, strict=True)
    ]
    errors = []
    for index in range(len(spec.layers)):
        got, wanted = (np.concatenate([run[index] for run in runs]).astype(np.float64) for runs in (found, expected))
        by_token = np.linalg.norm(got - wanted, axis=-1) / np.linalg.norm(wanted, axis=-1)
        total = np.linalg.norm(got - wanted) / np.linalg.norm(wanted)
        errors.append(LayerError(float(np.median(by_token)), float(np.quantile(by_token, 0.9)), float(total)))
    return errors


def _outputs(
    directory: Path, spec: ModelSpec, canvas: bool, given: Mapping[str, Float32Array], threads: int
) -> list[Float32Array]:
    """Each layer's output [L, H]; what is `given` takes a layer's place before the next one reads it."""
    names = [layer_output(index) for index in range(len(spec.layers))]
    path = _revealing(directory, names, given)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    path.unlink()
    types = {value.name: value.type for value in session.get_inputs()}
    inputs = _inputs(spec, canvas) | {f"{name}/given": array[None] for name, array in given.items()}
    values = {name: _value(array, types[name]) for name, array in inputs.items() if name in types}
    wanted = [output.name for output in session.get_outputs()[-len(names) :]]
    return [value.numpy()[0] for value in session.run_with_ort_values(wanted, values)]


def _revealing(directory: Path, names: list[str], given: Mapping[str, Float32Array]) -> Path:
    """The graph with layers' outputs as further outputs, in float32, and what is given as further inputs."""
    model = onnx.load(directory / ENGINE_FILE, load_external_data=False)
    made = {name for node in model.graph.node for name in node.output}
    for name in given:
        read = f"{name}/float" if f"{name}/float" in made else name
        for node in model.graph.node:
            for place, source in enumerate(node.input):
                if source == read:
                    node.input[place] = f"{name}/given"
        model.graph.input.append(helper.make_tensor_value_info(f"{name}/given", TensorProto.FLOAT, None))
    for name in names:
        shown = f"{name}/exact" if f"{name}/exact" in made else name
        model.graph.output.append(helper.make_tensor_value_info(shown, TensorProto.FLOAT, None))
    path = directory / "layers.onnx"
    onnx.save(model, path)
    return path


def _inputs(spec: ModelSpec, canvas: bool) -> dict[str, Array]:
    """One row without context."""
    random, length = np.random.default_rng(0), spec.canvas_length
    rows = 1 if canvas else 0
    inputs: dict[str, Array] = {
        "token_ids": random.integers(0, spec.vocab_size, (1, length)).astype(np.int32),
        "position": np.zeros(1, np.int64),
        "sliding_length": np.zeros(1, np.int64),
        "is_canvas": np.full(1, canvas),
        "canvas_rows": np.arange(rows),
        "soft_embedding": np.zeros((rows, length, spec.hidden_size), np.float32),
        "temperature": np.ones(rows, np.float32),
        "uniforms": np.zeros((rows, length), np.float32),
    }
    for index, layer in enumerate(spec.layers):
        slots = (1, SLOT_GROUP) if layer.kind == FULL else (sliding_slots(spec),)
        for name in ("key_cache", "value_cache"):
            inputs[f"{name}_{index}"] = np.zeros((1, layer.num_key_value_heads, *slots, layer.head_dim), np.float32)
    return inputs


def _value(array: Array, kind: str) -> ort.OrtValue:
    """Zeros are zeros in every type."""
    if kind == "tensor(bfloat16)":
        bits = np.zeros(array.shape, np.uint16)
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, TensorProto.BFLOAT16)
    return ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))
