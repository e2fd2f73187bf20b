"""TensorRT's graph and engine against the oracle, emulated on ONNX Runtime, on odd shapes.

In float32 every step must agree as closely as on ONNX Runtime's own graph: that holds the runtime's TensorRT engine
(pages, workspaces, encoder) to the oracle too. What lower precisions cost is measured layer by layer.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from dgemma_build.emulation import EmulatedProbe, build_emulated
from dgemma_build.gate import GateReport, check_generation
from dgemma_build.layer_errors import layer_errors
from dgemma_build.oracle import Model, trace_generation
from dgemma_runtime.contract import FULL
from dgemma_runtime.noise import CanvasNoise

Named = Callable[[str], Path]
NAMES = ("odd_a", "odd_b")


@pytest.fixture(scope="module")
def built(checkpoint: Named, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str, str], Path]:
    """Emulated engine directories by checkpoint, precision and precision of keys and values, each built once."""
    folder, made = tmp_path_factory.mktemp("emulated"), dict[tuple[str, str, str], Path]()

    def build(name: str, precision: str, kv: str) -> Path:
        key = (name, precision, kv)
        if key not in made:
            made[key] = build_emulated(checkpoint(name), folder / "-".join(key), precision, kv)
        return made[key]

    return build


@pytest.mark.parametrize("name", NAMES)
def test_in_float32_every_step_agrees_with_the_oracle(
    name: str, oracle: Callable[[str], Model], built: Callable[[str, str, str], Path]
) -> None:
    model = oracle(name)
    text = model.config.text_config
    window, report = text.sliding_window, GateReport()
    probe = EmulatedProbe(built(name, "fp32", "fp32"), max_tokens=8 * window, neighbours=2, threads=1)
    for seed, length in enumerate((1, window - 1, window, window + 1, 3 * window + 2)):
        prompt = np.random.default_rng(seed).integers(0, text.vocab_size, length)
        tokens = 3 * model.config.canvas_length
        trace = trace_generation(model, prompt.tolist(), seed, CanvasNoise, max_new_tokens=tokens, eos_token_id=None)
        report.add(check_generation(trace, probe, encode_chunk=7))
    assert report.passed, report.failures[:3]
    assert report.steps > 40


BARS = {"bf16": 2e-2, "fp8": 0.1, "int4": 0.25}


@pytest.mark.parametrize("precision", BARS)
@pytest.mark.parametrize("name", NAMES)
def test_each_layer_stays_near_float32(name: str, precision: str, built: Callable[[str, str, str], Path]) -> None:
    errors = layer_errors(built(name, "fp32", "fp32"), built(name, precision, "bf16"), threads=1)
    assert max(error.median for error in errors) < BARS[precision]
    assert min(error.median for error in errors) > BARS[precision] / 20, "nothing was rounded"


def test_layer_errors_are_nothing_where_nothing_differs(built: Callable[[str, str, str], Path]) -> None:
    directory = built("odd_a", "fp32", "fp32")
    assert all(error.total < 1e-6 for error in layer_errors(directory, directory, threads=1))


def test_a_wrong_scale_shows_in_its_layer(
    checkpoint: Named, built: Callable[[str, str, str], Path], tmp_path: Path
) -> None:
    wrong = tmp_path / "wrong"
    build_emulated(checkpoint("odd_a"), wrong, "fp8")
    path = wrong / "rank0.engine"
    model = onnx.load(path, load_external_data=False)
    scale = next(item for item in model.graph.initializer if item.name == "layers.2.self_attn.qkv.scales")
    scale.raw_data = bytes(len(scale.raw_data))
    onnx.save(model, path)
    good, bad = (
        layer_errors(built("odd_a", "fp32", "fp32"), other) for other in (built("odd_a", "fp8", "bf16"), wrong)
    )
    assert [one.total == pytest.approx(other.total) for one, other in zip(good, bad, strict=True)] == [
        index != 2 for index in range(len(good))
    ]


@pytest.mark.parametrize("name", NAMES)
def test_an_fp8_cache_is_a_bf16_one_rounded_but_for_keys_of_full_layers(
    name: str, built: Callable[[str, str, str], Path]
) -> None:
    """What is stored differs by a power of two. Later layers read what earlier ones rounded; nothing may grow wild."""
    found = []
    for kv in ("bf16", "fp8"):
        probe = EmulatedProbe(built(name, "bf16", kv), max_tokens=256, threads=1)
        probe.start()
        probe.encode(np.arange(1, 12, dtype=np.int32))  # one chunk: nothing of it is read from the cache
        found.append([probe.keys_values(layer) for layer in range(len(probe.spec.layers))])
        layers = probe.spec.layers
    for layer, exact, rounded in zip(layers, *found, strict=True):
        for array, stored, is_key in zip(exact, rounded, (True, False), strict=True):
            if is_key and layer.kind == FULL:
                assert np.array_equal(array, stored)
                continue
            present = (array != 0) & (stored != 0)
            scale = 2.0 ** np.round(np.log2(np.median(np.abs(array[present]) / np.abs(stored[present]))))
            assert scale < 1
            error = np.linalg.norm(stored * scale - array) / np.linalg.norm(array)
            assert 0.005 < error < 0.04


def test_fp8_shares_what_several_matrices_read(checkpoint: Named, tmp_path: Path) -> None:
    """Attention's normed input and the experts' are rounded once each, however many products follow."""
    path = build_emulated(checkpoint("odd_a"), tmp_path / "engine", "fp8") / "rank0.engine"
    nodes = onnx.load(path, load_external_data=False).graph.node
    rounded = [node.input[0] for node in nodes if node.op_type == "QuantizeLinear"]
    assert len(rounded) == len(set(rounded))
