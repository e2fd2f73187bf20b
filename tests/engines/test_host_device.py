"""The device in ordinary memory notices what a GPU would not say, and runs work as late as one might."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from dgemma_runtime.engines.device import OutOfMemory, Pitched, Tensor, TensorSpec
from dgemma_runtime.engines.host_device import HostDevice, HostProgram
from dgemma_runtime.engines.number_formats import from_float32, to_float32


def test_work_runs_when_it_is_waited_for() -> None:
    device = HostDevice()
    address, host, back = device.allocate(8, "tests"), device.host_bytes(8), device.host_bytes(8)
    host[:] = 1
    device.upload(address, host)
    device.download(back, address)
    host[:] = 2  # too early
    assert back.tolist() == [0] * 8
    device.synchronize()
    assert back.tolist() == [2] * 8


def test_a_pitched_copy() -> None:
    device = HostDevice()
    source, target = device.allocate(48, "tests"), device.allocate(60, "tests")
    device.view(source, 48)[:] = range(48)
    device.copy(Pitched(target + 1, 5, 6), Pitched(source + 2, 6, 4), (2, 3, 2))
    device.synchronize()
    planes = device.view(source, 48).reshape(2, 4, 6)[:, :3, 2:4]
    assert np.array_equal(device.view(target, 60).reshape(2, 6, 5)[:, :3, 1:3], planes)
    assert np.count_nonzero(device.view(target, 60)) == 12


def test_memory_out_of_bounds_is_noticed() -> None:
    device = HostDevice()
    address = device.allocate(64, "tests")
    for start, size in ((0, 65), (-1, 4), (60, 5)):
        with pytest.raises(AssertionError, match="not within a live allocation"):
            device.view(address + start, size)
    with pytest.raises(AssertionError, match="not within a live allocation"):
        device.copy(Pitched(address, 16, 2), Pitched(address + 40, 16, 2), (16, 2, 1))
    device.free(address)
    with pytest.raises(AssertionError, match="not within a live allocation"):
        device.zero(address, 1)


def test_memory_ends() -> None:
    device = HostDevice(memory_bytes=100)
    device.allocate(60, "tests")
    with pytest.raises(OutOfMemory, match="too little memory: tests need 41 bytes, 40 are free; lower kv_memory_bytes"):
        device.allocate(41, "tests")


def test_a_graph_runs_when_it_is_launched() -> None:
    device = HostDevice()
    address = device.allocate(4, "tests")
    graph = device.capture(lambda: device.zero(address, 2))
    device.view(address, 4)[:] = 7
    device.synchronize()
    assert device.view(address, 4).tolist() == [7] * 4
    graph.launch()
    device.synchronize()
    assert device.view(address, 4).tolist() == [0, 0, 7, 7]


def test_a_program_sees_its_tensors_in_place() -> None:
    device = HostDevice()
    tensors = {"x": TensorSpec(True, "int32", (-1, 2), ((1, 2),), ((2, 2),)), "y": TensorSpec(False, "int64", (-1,))}
    program = HostProgram(device, tensors, lambda profile, i, o: np.copyto(o["y"], i["x"].sum(axis=1)))
    x, y = device.allocate(16, "tests"), device.allocate(16, "tests")
    context = program.context(0)
    context.bind({"x": Tensor(x, (2, 2)), "y": Tensor(y, (2,))})
    device.view(x, 16).view(np.int32)[:] = [1, 2, 3, 4]
    context.enqueue()
    device.synchronize()
    assert device.view(y, 16).view(np.int64).tolist() == [3, 7]
    with pytest.raises(AssertionError, match=r"x: \(3, 2\)"):
        context.bind({"x": Tensor(x, (3, 2)), "y": Tensor(y, (3,))})


@pytest.mark.parametrize(
    ("dtype", "reference"), [("bf16", ml_dtypes.bfloat16), ("fp16", np.float16), ("fp8", ml_dtypes.float8_e4m3fn)]
)
def test_every_number_of_a_format(dtype: str, reference: type) -> None:
    size = np.dtype(reference).itemsize
    bits = np.arange(256**size).astype(f"uint{8 * size}").view(np.uint8)
    assert np.array_equal(to_float32(bits, dtype), bits.view(reference).astype(np.float32), equal_nan=True)


@pytest.mark.parametrize(("dtype", "reference"), [("bf16", ml_dtypes.bfloat16), ("fp16", np.float16)])
def test_rounding(dtype: str, reference: type) -> None:
    random = np.random.default_rng(0).standard_normal(10_000, np.float32) * 50
    ties = np.array([1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8, 1 + 2**-11, 1 + 3 * 2**-11, 0.0, -0.0], np.float32)
    values = np.concatenate([random, ties])
    assert np.array_equal(from_float32(values, dtype), values.astype(reference).view(np.uint8))
