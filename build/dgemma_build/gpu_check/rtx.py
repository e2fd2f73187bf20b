"""Whether tensorrt_rtx builds and runs an engine on this card. In a process of its own, as it may end its process.

    python -m dgemma_build.gpu_check.rtx

prints one JSON object. Knows nothing of the model: the engine adds a tensor to itself.
"""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from typing import Any

import torch

SIZE = 64
LIMIT_S = 120


def try_in_own_process() -> dict[str, Any]:
    """`{"answer": ...}` with more where it was tried; the answer is one of not installed, runs, does not run."""
    if find_spec("tensorrt_rtx") is None:
        return {"answer": "not installed"}
    command = [sys.executable, "-m", "dgemma_build.gpu_check.rtx"]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        return {"answer": "does not run", "reason": f"no answer within {LIMIT_S} s"}
    lines = run.stdout.strip().splitlines()
    if run.returncode or not lines:
        said = (run.stderr.strip().splitlines() or ["nothing was said"])[-1]
        return {"answer": "does not run", "reason": f"exit status {run.returncode}: {said}"}
    found: dict[str, Any] = json.loads(lines[-1])
    return found


def try_here() -> dict[str, Any]:
    """Builds and runs the engine in this process."""
    import tensorrt_rtx as trt

    tried: dict[str, Any] = {"version": trt.__version__}
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    x = network.add_input("x", trt.float32, (SIZE,))
    doubled = network.add_elementwise(x, x, trt.ElementWiseOperation.SUM).get_output(0)
    doubled.name = "y"
    network.mark_output(doubled)
    plan = builder.build_serialized_network(network, builder.create_builder_config())
    if plan is None:
        return tried | {"answer": "does not run", "reason": "the engine was not built"}
    engine = trt.Runtime(logger).deserialize_cuda_engine(plan)
    if engine is None:
        return tried | {"answer": "does not run", "reason": "the engine was built and not deserialised"}
    context = engine.create_execution_context()
    given = torch.arange(SIZE, dtype=torch.float32, device="cuda")
    result = torch.zeros_like(given)
    context.set_tensor_address("x", given.data_ptr())
    context.set_tensor_address("y", result.data_ptr())
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    done = context.execute_async_v3(stream.cuda_stream)
    torch.cuda.synchronize()
    right = bool(done) and torch.equal(result, 2 * given)
    return tried | ({"answer": "runs"} if right else {"answer": "does not run", "reason": "the result is wrong"})


if __name__ == "__main__":
    try:
        outcome = try_here()
    except Exception as error:  # noqa: BLE001 - the answer is what went wrong, whatever that is
        outcome = {"answer": "does not run", "reason": f"{type(error).__name__}: {error}"}
    print(json.dumps(outcome))
