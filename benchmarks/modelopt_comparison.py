"""Compare this project's weight quantisation with nvidia-modelopt's, matrix by matrix, on a CPU. Not part of any test.

Requirements, in an environment of its own (modelopt is no dependency of this project):

    pip install nvidia-modelopt==0.47.0 torch huggingface_hub requests safetensors ml_dtypes
    PYTHONPATH=build:python_backend python benchmarks/modelopt_comparison.py --output comparison.json

Each method runs in a process of its own; its memory is how far that process has grown, matrices and tests included.
Errors are Frobenius norms over the norm of the exact result. Products are with 512 tokens whose mean square is one;
modelopt's activations are calibrated, where a method needs that, on 256 other tokens of the same distribution. The
largest matrices are left to methods that do not search, to keep the run short.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from dgemma_build.quantize import GroupFormat, dequantize, power_of_two_scale, quantize_rows, to_fp8

Float32 = npt.NDArray[np.float32]
DEMO = Path(__file__).parents[1] / "build" / "checkpoints" / "demo" / "model.safetensors"
SHAPES = ((1408, 2816), (2816, 11264))  # outputs, inputs
OURS = ("ours int4 g32", "ours int4 g64", "ours fp8")
INT4 = tuple(f"modelopt int4 {name} b{size}" for size in (32, 64) for name in ("max", "mse", "awq_lite", "awq_clip"))
SEARCHING = tuple(name for name in INT4 if " max " not in name)
METHODS = (*OURS, *INT4, "modelopt fp8", "modelopt fp8 per_channel")


def tokens(count: int, inputs: int, seed: int, outliers: bool) -> Float32:
    """[count, inputs] of mean square one; with outliers, every 64th channel is 20 times the others."""
    values = np.random.default_rng(seed).standard_normal((count, inputs), dtype=np.float32)
    if outliers:
        values[:, ::64] *= 20
    scaled: Float32 = values / np.sqrt(np.square(values).mean(axis=1, keepdims=True))
    return scaled


def matrices(method: str) -> Iterator[tuple[str, list[Float32]]]:
    """Sets of matrices [out, in] by name."""
    rng = np.random.default_rng(7)
    for shape in SHAPES[:1] if method in SEARCHING else SHAPES:
        yield f"normal {shape[0]}x{shape[1]}", [0.02 * rng.standard_normal(shape, dtype=np.float32)]
        yield f"heavy-tailed {shape[0]}x{shape[1]}", [0.02 * rng.standard_t(4, shape).astype(np.float32)]
    yield "demo checkpoint", list(demo_matrices())


def demo_matrices() -> Iterator[Float32]:
    """Every eighth of the matrices of experts, attention and MLP of the demo checkpoint."""
    from safetensors import safe_open

    with safe_open(str(DEMO), framework="numpy") as file:
        stored = sorted(file.keys())
        names = [name for name in stored if name.startswith("model.decoder.layers.") and "_proj" in name]
        stacks = [file.get_tensor(name).astype(np.float32) for name in names]
    every = [matrix for stack in stacks for matrix in (stack if stack.ndim == 3 else stack[None])]
    yield from every[::8]


def ours(method: str) -> Callable[[Float32], tuple[Float32, Callable[[Float32], Float32]]]:
    """From a matrix to what it becomes and how it is multiplied."""
    if method == "ours fp8":

        def fp8(matrix: Float32) -> tuple[Float32, Callable[[Float32], Float32]]:
            values, scales = to_fp8(matrix)
            weights = values.astype(np.float32) * scales[:, None]
            bound = power_of_two_scale(float(np.sqrt(matrix.shape[1])))  # of an RMS norm

            def multiply(x: Float32) -> Float32:
                rounded = (x / bound).astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * bound
                product: Float32 = rounded @ weights.T
                return product

            return weights, multiply

        return fp8
    form = GroupFormat(4, int(method.split("g")[-1]), bfloat16_scales=True)

    def int4(matrix: Float32) -> tuple[Float32, Callable[[Float32], Float32]]:
        weights = dequantize(quantize_rows(matrix, form), form, matrix.shape[1]).T
        return weights, lambda x: x @ weights.T

    return int4


def modelopt(method: str, outliers: bool) -> Callable[[Float32], tuple[Float32, Callable[[Float32], Float32]]]:
    """The same of modelopt, as one linear layer of torch."""
    import modelopt.torch.quantization as mtq
    import torch

    config = modelopt_config(mtq, method)

    def convert(matrix: Float32) -> tuple[Float32, Callable[[Float32], Float32]]:
        linear = torch.nn.Linear(matrix.shape[1], matrix.shape[0], bias=False)
        linear.weight.data = torch.from_numpy(matrix.copy())
        calibration = torch.from_numpy(tokens(256, matrix.shape[1], 1, outliers))
        model = torch.nn.Sequential(linear)
        with torch.no_grad():
            mtq.quantize(model, copy.deepcopy(config), lambda module: module(calibration))
            layer = model[0]
            weights = layer.weight_quantizer(layer.weight)
            scale = getattr(layer.input_quantizer, "pre_quant_scale", None)
            weights = (weights if scale is None else weights * scale).numpy()

        def multiply(x: Float32) -> Float32:
            with torch.no_grad():
                product: Float32 = model(torch.from_numpy(x)).numpy()
            return product

        return weights, multiply

    return convert


def modelopt_config(mtq: Any, method: str) -> dict[str, Any]:
    """Of one of METHODS."""
    if "int4" not in method:
        name = "FP8_PER_CHANNEL_PER_TOKEN_CFG" if "per_channel" in method else "FP8_DEFAULT_CFG"
        config: dict[str, Any] = copy.deepcopy(getattr(mtq, name))
        return config
    algorithm, size = method.split()[2], int(method.split("b")[-1])
    config = copy.deepcopy(mtq.INT4_BLOCKWISE_WEIGHT_ONLY_CFG)
    text = json.dumps(config["quant_cfg"]).replace('"-1": 128', f'"-1": {size}')
    config["quant_cfg"] = json.loads(text, object_hook=_integer_keys)
    config["algorithm"] = (
        {"method": algorithm} if algorithm != "awq_lite" else {"method": "awq_lite", "alpha_step": 0.1}
    )
    return config


def _integer_keys(values: dict[str, Any]) -> dict[Any, Any]:
    return {int(key) if key.lstrip("-").isdigit() else key: value for key, value in values.items()}


def measure(method: str) -> list[dict[str, Any]]:
    """One method over all matrices, with even activations and with outliers."""
    converters = [ours(method) if method in OURS else modelopt(method, outliers) for outliers in (False, True)]
    before, found = _peak_bytes(), []
    for name, group in matrices(method):
        for outliers, convert in zip((False, True), converters, strict=True):
            squares = {"weight": [0.0, 0.0], "product": [0.0, 0.0]}
            seconds = 0.0
            for matrix in group:
                started = time.perf_counter()
                weights, multiply = convert(matrix)
                seconds += time.perf_counter() - started
                x = tokens(512, matrix.shape[1], 2, outliers)
                for key, exact, got in (("weight", matrix, weights), ("product", x @ matrix.T, multiply(x))):
                    squares[key][0] += float(np.square(got - exact, dtype=np.float64).sum())
                    squares[key][1] += float(np.square(exact, dtype=np.float64).sum())
            errors = {f"{key}_error": float(np.sqrt(a / b)) for key, (a, b) in squares.items()}
            size = sum(matrix.nbytes for matrix in group)
            row = {"method": method, "matrices": name, "outliers": outliers, "seconds": round(seconds, 3), **errors}
            found.append(row | {"float32_bytes": size, "more_memory_bytes": _peak_bytes() - before})
    return found


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="where to write all rows as JSON")
    parser.add_argument("--method", choices=METHODS, help="one method only, rows on stdout")
    arguments = parser.parse_args()
    if arguments.method:
        print(json.dumps(measure(arguments.method)))
        return
    rows: list[dict[str, Any]] = []
    for method in METHODS:
        command = [sys.executable, __file__, "--method", method]
        result = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=os.environ, check=False)
        if result.returncode:
            print(f"{method}: did not run", file=sys.stderr)
            continue
        rows += json.loads(result.stdout.splitlines()[-1])
        for row in [row for row in rows if row["method"] == method]:
            print(
                f"{method:28} {row['matrices']:24} {'outliers' if row['outliers'] else 'even':9}"
                f"{row['weight_error']:9.4f}{row['product_error']:9.4f}{row['seconds']:9.2f} s"
                f"{row['more_memory_bytes'] / 2**20:8.0f} MiB"
            )
    if arguments.output:
        arguments.output.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
