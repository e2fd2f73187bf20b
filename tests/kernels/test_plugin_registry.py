"""The operations in TensorRT's own plugin module and registry, and the kernels that a build would be given.

In a process of its own, because in this one Triton interprets; `plugin_probe.py` says what is real there. No kernel
runs.
"""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dgemma_build.kernels.operations import OPERATIONS

PROBE = Path(__file__).parent / "plugin_probe.py"
SHARED_LIMIT = 227 * 1024  # bytes
Answer = dict[str, Any]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("cache"))
    output = tmp_path_factory.mktemp("probe") / "found.json"
    result = subprocess.run([sys.executable, str(PROBE), str(output)], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    answers: dict[str, Any] = json.loads(output.read_text())
    return answers


@pytest.fixture(scope="module")
def answers(found: dict[str, Any]) -> list[Answer]:
    each: list[Answer] = found["answers"]
    return each


def of(answers: list[Answer], name: str) -> list[Answer]:
    return [answer for answer in answers if answer["case"] == name]


def bits(value: float) -> int:
    number: int = struct.unpack("<i", struct.pack("<f", value))[0]
    return number


def test_every_operation_is_in_the_registry(found: dict[str, Any]) -> None:
    assert found["registered"] == sorted([name, "1"] for name in OPERATIONS)


def test_every_operation_was_asked_for_its_kernel(answers: list[Answer]) -> None:
    assert {answer["case"] for answer in answers} == set(OPERATIONS)
    for answer in answers:
        assert answer["entry"] == answer["case"]
        assert answer["tactics"] == list(OPERATIONS[answer["case"]].tactics)


def test_entries_take_inputs_then_numbers_then_outputs_and_no_scratch(answers: list[Answer]) -> None:
    for answer in answers:
        operation, kinds = OPERATIONS[answer["case"]], [kind for kind, _ in answer["parameters"]]
        inputs, outputs, numbers = len(operation.inputs), len(operation.outputs), len(answer["numbers"])
        assert len(kinds) == inputs + numbers + outputs, answer
        assert kinds[:inputs] == ["u64"] * inputs
        assert set(kinds[inputs : inputs + numbers]) <= {"u32", "f32"}
        assert kinds[inputs + numbers :] == ["u64"] * outputs


# What each entry reads where, by the kernels' own argument numbers: written down here by hand.
ORDERS = {
    "head_tiles": [0, 1, 2, 8, 9, 3, 4, 5, 6, 7],
    "head_choose": [0, 1, 2, 3, 4, 5, 6, 7, 12, 13, 8, 9, 10, 11],
    "head_soft": [0, 1, 2, 4, 3],
    "head_sum": [0, 2, 3, 1],
    "experts_sort": [0, 3, 1, 2],
    "experts_gate_up": [0, 1, 2, 3, 4, 5],
    "experts_down": [0, 1, 2, 3, 4, 5, 6],
    "experts_sum": [0, 1],
    "attention_parts": [0, 1, 2, 3, 4, 5, 6, 9, 10, 11, 12, 13, 7, 8],
    "attention_sum": [0, 1, 2, 4, 5, 3],
}


def test_the_order_of_every_entry(answers: list[Answer]) -> None:
    for answer in answers:
        assert [index for _, index in answer["parameters"]] == ORDERS[answer["case"]], answer["case"]


def test_launches(answers: list[Answer]) -> None:
    launched = {answer["case"]: (answer["grid"], answer["threads"], answer["numbers"]) for answer in answers}
    assert launched["head_tiles"] == ([4096, 1, 1], 256, [320, bits(30.0)])  # 2 blocks of rows, 2048 tiles
    assert launched["head_choose"] == ([320, 1, 1], 256, [320, bits(30.0)])
    assert launched["head_soft"] == ([264, 1, 1], 256, [320])  # 2 blocks of rows, 22 of columns, 6 parts
    assert launched["head_sum"] == ([320, 3, 1], 128, [320, bits(2816**0.5)])
    assert launched["experts_sort"] == ([128, 1, 1], 128, [2560])
    assert launched["experts_sum"] == ([320, 3, 1], 128, [])
    assert launched["attention_sum"] == ([15360, 1, 1], 128, [3, 320])
    # three tilings: at most a tile an expert that is not full, and the full ones
    assert [answer["grid"] for answer in of(answers, "experts_gate_up")] == [[n, 11, 1] for n in (208, 168, 148)]
    assert [answer["grid"] for answer in of(answers, "experts_down")] == [[n, 22, 1] for n in (208, 168, 148)]
    # 320 tokens of 2 and of 8 heads a KV head in tiles of 128 and 64, three rows, four and eight parts
    assert [answer["grid"] for answer in of(answers, "attention_parts")] == [[5, 24, 4], [40, 6, 8]]
    assert of(answers, "attention_parts")[0]["numbers"] == [3, 320, 90, bits(1.0), bits(1.0)]


def test_outputs_have_their_types_and_shapes(answers: list[Answer]) -> None:
    shapes = {answer["case"]: answer["outputs"] for answer in answers}
    assert shapes["head_tiles"][0] == ["BF16", 320, 262_144]
    assert shapes["head_tiles"][1:] == [["FLOAT", 320, 2048]] * 3 + [["INT32", 320, 2048]]
    assert shapes["head_choose"] == [["INT32", 320], ["INT32", 320], ["FLOAT", 320], ["FLOAT", 2048, 320]]
    assert shapes["head_soft"] == [["FLOAT", 6, 320, 2816]]
    assert shapes["head_sum"] == [["BF16", 320, 2816]]
    assert shapes["experts_sort"] == [["INT32", 2560], ["INT32", 129]]
    assert shapes["experts_gate_up"] == [["BF16", 2560, 704]]
    assert shapes["experts_down"] == [["BF16", 2560, 2816]]
    assert shapes["experts_sum"] == [["BF16", 320, 2816]]
    assert shapes["attention_parts"] == [["FLOAT", 8, 3, 320, 16, 512], ["FLOAT", 8, 3, 320, 16]]
    assert shapes["attention_sum"] == [["BF16", 3, 320, 16, 512]]


def test_what_tensorrt_is_given_assembles_without_spills(answers: list[Answer]) -> None:
    for answer in answers:
        assert answer["spills"] == 0, answer
        assert 0 < answer["registers"] <= 255
        assert answer["shared"] <= SHARED_LIMIT
