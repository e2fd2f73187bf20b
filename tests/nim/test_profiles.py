"""Profiles: what they are called, which of them run where, which one is taken."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest

from dgemma_build.backends import PRECISIONS as BUILDABLE
from dgemma_build.backends import backend_for
from dgemma_build.plan.cards import CARDS
from dgemma_nim.machine import InstalledGpu, Machine, parse_gpu
from dgemma_nim.profiles import CPU, GPUS, PRECISIONS, Need, Profile, all_profiles, choose, compatibilities
from dgemma_runtime.errors import ConfigurationError

GB = 10**9
CONTEXT = 262144
LIBRARIES = frozenset({"onnxruntime", "tensorrt", "tensorrt_rtx"})
H100 = InstalledGpu(0, "NVIDIA H100 80GB HBM3", 85 * GB)
RTX = InstalledGpu(0, "NVIDIA GeForce RTX 5090", 34 * GB)
NEEDS = {(gpu, each): Need(20 * GB, "less context") for gpu in (*GPUS, CPU) for each in ("fp32", "fp8", "int4", "int8")}
NEEDS |= {(gpu, "bf16"): Need(60 * GB, "less context") for gpu in GPUS}


def machine(*gpus: InstalledGpu, memory_gb: int = 64, libraries: frozenset[str] = LIBRARIES) -> Machine:
    return Machine(gpus, memory_gb * GB, libraries)


def chosen(machine: Machine, name: str | None = None) -> str:
    return choose(name, compatibilities(all_profiles(CONTEXT), machine, NEEDS)).tag


def test_they_are_what_the_exporter_builds_for_cards_that_a_plan_knows() -> None:
    for backend, precisions in PRECISIONS.items():
        assert set(precisions) == set(BUILDABLE[backend])
    assert {gpu.card for gpu in GPUS.values()} <= set(CARDS)


@pytest.mark.parametrize("profile", all_profiles(262144), ids=lambda profile: profile.tag)
def test_keys_and_values_are_as_the_exporter_builds_them(profile: Profile, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("tensorrt", "tensorrt_rtx"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    assert backend_for(profile.backend, profile.precision).kv_dtype == profile.kv_dtype


def test_an_id_depends_on_what_a_profile_is_and_on_nothing_else() -> None:
    profile = Profile("tensorrt", "fp8", "h100", 262144)
    assert profile.tag == "tensorrt-fp8-h100-262144"
    assert profile.id == "2b6534ede34de25b166c28c54706353eda01070fe941d2fad4e3c0aeacbb4ce0"
    assert len({each.id for each in all_profiles(CONTEXT)}) == len(all_profiles(CONTEXT))


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (machine(), "onnxruntime-fp32-cpu-262144"),
        (machine(H100), "tensorrt-fp8-h100-262144"),
        (machine(RTX), "tensorrt_rtx-fp8-rtx5090-262144"),
        (machine(H100, libraries=frozenset({"onnxruntime"})), "onnxruntime-fp32-cpu-262144"),
        (machine(InstalledGpu(0, "Tesla T4", 16 * GB)), "onnxruntime-fp32-cpu-262144"),
    ],
)
def test_the_best_one_that_runs_is_taken(found: Machine, expected: str) -> None:
    assert chosen(found) == expected


def test_states_and_reasons() -> None:
    found = {each.profile.tag: each for each in compatibilities(all_profiles(CONTEXT), machine(RTX), NEEDS)}
    assert found["tensorrt_rtx-fp8-rtx5090-262144"].runnable
    low = found["tensorrt_rtx-bf16-rtx5090-262144"]
    assert (low.low_memory, low.runnable, low.remedy) == (True, False, "less context")
    assert found["tensorrt-fp8-h100-262144"].incompatible == "the GPU is NVIDIA GeForce RTX 5090"


def test_a_profile_is_named_by_id_tag_or_less_context() -> None:
    tag = "tensorrt-bf16-h100-262144"
    assert chosen(machine(H100), tag) == tag
    assert chosen(machine(H100), Profile("tensorrt", "bf16", "h100", CONTEXT).id) == tag
    assert chosen(machine(H100), "tensorrt-bf16-h100-65536") == "tensorrt-bf16-h100-65536"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("vllm-fp8-tp1", ["'vllm-fp8-tp1'", "list-model-profiles"]),
        ("tensorrt-fp8-h100-262145", ["list-model-profiles"]),
        ("tensorrt-fp8-h100-0", ["list-model-profiles"]),
        ("tensorrt-fp8-h100-262144", ["no GPU was found"]),
    ],
)
def test_a_profile_that_is_not_there_or_does_not_run_is_refused(name: str, words: list[str]) -> None:
    with pytest.raises(ConfigurationError) as error:
        chosen(machine(), name)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_where_nothing_runs_it_says_what_would_help() -> None:
    with pytest.raises(ConfigurationError, match="less context"):
        chosen(machine(memory_gb=1))


def test_lines_of_the_driver() -> None:
    assert parse_gpu("0, NVIDIA H100 80GB HBM3, 81559") == InstalledGpu(0, "NVIDIA H100 80GB HBM3", 81559 << 20)
    assert parse_gpu("0, NVIDIA GB10, [N/A]") is None
    assert parse_gpu("") is None
