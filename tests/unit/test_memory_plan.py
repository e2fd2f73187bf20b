"""The plan of a server's memory: what fits, what is said of it, and what is refused with which remedies."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dgemma_runtime.contract import FULL, SLIDING, LayerSpec
from dgemma_runtime.engines.scripted import scripted_manifest
from dgemma_runtime.errors import ConfigurationError, ManifestError
from dgemma_runtime.host_memory import AvailableMemory
from dgemma_runtime.memory_formulas import device_memory, page_pool_bytes
from dgemma_runtime.memory_plan import MemoryPlan, plan_device_memory, plan_host_memory
from dgemma_runtime.settings import RuntimeSettings, plan_limits

GIB = 2**30
LAYERS = (*[LayerSpec(SLIDING, 2, 32)] * 3, *[LayerSpec(FULL, 1, 64)] * 3)
SMALL = scripted_manifest(1024, canvas_length=64, sliding_window=96, max_model_len=262_144)
CPU = replace(
    SMALL,
    model=replace(SMALL.model, layers=LAYERS),
    backend="onnxruntime",
    num_attention_heads=4,
    layer_values=2000,
    files={"model.onnx.data": ""},
)
# The released model, with a TensorRT engine of 4 bits and one canvas of scratch memory.
RELEASED_LAYERS = (*[LayerSpec(SLIDING, 8, 256)] * 25, *[LayerSpec(FULL, 2, 512)] * 5)
GPU = replace(
    SMALL,
    model=replace(
        SMALL.model,
        layers=RELEASED_LAYERS,
        vocab_size=262_144,
        hidden_size=2816,
        canvas_length=256,
        sliding_window=1024,
    ),
    backend="tensorrt",
    precision="int4",
    kv_dtype="bf16",
    max_encode_tokens=256,
    scratch_bytes=950_000_000,
)
GPU_WEIGHTS = 15 * 10**9


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "model.onnx.data").write_bytes(bytes(1_000_000))
    return tmp_path


def of(gib: float) -> AvailableMemory:
    return AvailableMemory(round(gib * GIB), "free memory of a test")


def total(plan: MemoryPlan) -> int:
    return plan.total_bytes + plan.reserve_bytes


def test_with_memory_to_spare_everything_wanted_is_planned(directory: Path) -> None:
    plan = plan_host_memory(directory, CPU, RuntimeSettings(), of(500))
    assert plan.limits == plan_limits(CPU, RuntimeSettings())
    assert (plan.sequences, plan.tokens) == (8, 9 * 262_144)
    uses = dict(plan.uses)
    assert uses["weights"] == 1_000_000
    assert uses["keys and values in pages"] == page_pool_bytes(CPU.model, "fp32", plan.limits)


def test_pages_fill_the_memory_and_a_few_more_would_not_fit(directory: Path) -> None:
    settings = RuntimeSettings(max_batch_size=4, max_model_len=65_536)
    gib = plan_host_memory(directory, CPU, settings, of(500)).total_bytes / GIB  # all but the reserve
    plan = plan_host_memory(directory, CPU, settings, of(gib))
    assert 1024 < plan.limits.full_pages < plan_limits(CPU, settings).full_pages
    assert total(plan) <= gib * GIB
    with pytest.raises(ConfigurationError, match="or leave full_pages out"):
        plan_host_memory(directory, CPU, replace(settings, full_pages=plan.limits.full_pages + 20), of(gib))


def test_the_reserve_is_a_tenth_and_at_least_half_a_gibibyte(directory: Path) -> None:
    short = RuntimeSettings(max_model_len=1024)
    assert plan_host_memory(directory, CPU, short, of(4)).reserve_bytes == GIB // 2
    assert plan_host_memory(directory, CPU, short, of(20)).reserve_bytes == 2 * GIB


def test_kv_memory_bytes_is_the_most(directory: Path) -> None:
    settings = RuntimeSettings(kv_memory_bytes=GIB)
    plan = plan_host_memory(directory, CPU, settings, of(500))
    assert plan.limits == plan_limits(CPU, settings)
    assert plan.sequences == 2
    with pytest.raises(ConfigurationError, match=r"kv_memory_bytes is 1000 .*raise kv_memory_bytes"):
        plan_host_memory(directory, CPU, RuntimeSettings(kv_memory_bytes=1000), of(500))


REMEDY = re.compile(r"lower (\w+)(?: and (\w+))? to (\d+)")


def remedies(message: str) -> list[dict[str, Any]]:
    return [{name: int(value) for name in (first, second) if name} for first, second, value in REMEDY.findall(message)]


@pytest.mark.parametrize("gib", [0.7, 1.0, 2.0])
def test_every_remedy_alone_makes_one_sequence_fit(directory: Path, gib: float) -> None:
    with pytest.raises(ConfigurationError) as caught:
        plan_host_memory(directory, CPU, RuntimeSettings(), of(gib))
    message = str(caught.value)
    for words in ("one sequence of max_model_len (262144 tokens) does not fit", "MiB weights", "a test"):
        assert words in message
    found = remedies(message)
    assert found
    for remedy in found:
        plan = plan_host_memory(directory, CPU, RuntimeSettings(**remedy), of(gib))
        assert plan.sequences >= 1
        if "max_model_len" in remedy:
            longer = replace(RuntimeSettings(), max_model_len=remedy["max_model_len"] + 64)
            with pytest.raises(ConfigurationError, match="does not fit"):
                plan_host_memory(directory, CPU, longer, of(gib))


def test_nothing_helps_where_even_the_process_is_too_large(directory: Path) -> None:
    with pytest.raises(ConfigurationError, match="no setting alone helps"):
        plan_host_memory(directory, CPU, RuntimeSettings(), of(0.1))


def test_the_plan_in_words(directory: Path) -> None:
    plan = plan_host_memory(directory, CPU, RuntimeSettings(max_model_len=1000, max_batch_size=2), of(4))
    lines = list(plan.lines())
    assert re.fullmatch(
        r"memory, if all of it is used: [\d.]+ MiB of 4.00 GiB \(free memory of a test\), of which 512.0 MiB stay free",
        lines[0],
    )
    assert [line.split("MiB  ")[1].split(":")[0] for line in lines[1:-1]] == [
        words.split(":")[0] for words, _ in plan.uses
    ]
    assert lines[-1] == (
        "context: 64 pages of 64 tokens and 26 of the sliding layers hold 4,096 tokens; "
        "of 1,000 tokens (max_model_len), 2 of at most 2 sequences (max_batch_size) fit at once"
    )


def test_an_engine_that_does_not_say_what_it_works_with(directory: Path) -> None:
    changes: list[dict[str, Any]] = [{"num_attention_heads": 0}, {"layer_values": 0}]
    for change in changes:
        with pytest.raises(ManifestError, match=r"does not say num_attention_heads and layer_values.*build the engine"):
            plan_host_memory(directory, replace(CPU, **change), RuntimeSettings(), of(100))


def test_what_has_nothing_to_do_with_memory_is_said_first(directory: Path) -> None:
    with pytest.raises(ConfigurationError, match="max_model_len is 262145, the engine was built for"):
        plan_host_memory(directory, CPU, RuntimeSettings(max_model_len=262_145), of(0.1))


# ---------------------------------------------------------------- GPUs


def device_plan(gib: float, **settings: Any) -> MemoryPlan:
    return plan_device_memory(GPU_WEIGHTS, GPU, RuntimeSettings(**settings), of(gib))


def test_a_gpu_of_80_gb_holds_several_whole_contexts() -> None:
    plan = device_plan(79)
    assert plan.reserve_bytes == GIB // 2
    assert 2 <= plan.sequences < 8
    assert 78.9 * GIB < total(plan) <= 79 * GIB


def test_the_engine_s_own_check_at_opening_is_met() -> None:
    """Weights, scratch and all that it allocates or wants to see free."""
    plan = device_plan(40, max_batch_size=2)
    runtime = device_memory(GPU.model, "bf16", "bf16", plan.limits, 262_144)
    assert plan.total_bytes == GPU_WEIGHTS + GPU.scratch_bytes + runtime.total
    assert runtime.opening > 0


def test_a_gpu_of_24_gb_says_how_long_a_context_fits() -> None:
    with pytest.raises(ConfigurationError) as caught:
        device_plan(23, max_batch_size=1)
    (remedy,) = remedies(str(caught.value))
    assert device_plan(23, max_batch_size=1, **remedy).sequences == 1
    assert 30_000 < remedy["max_model_len"] < 262_144
