"""Takes TensorRT's own plugin module through a build's questions to every operation; run by `test_plugin_registry.py`.

The wheel of the lean runtime has that module, its checks and the registry, on machines without a GPU. It has no
builder: symbolic sizes are plain numbers here, and what only a builder makes is stood in for.
"""

from __future__ import annotations

import enum
import importlib
import json
import operator
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np

from dgemma_build.kernels import plugins
from dgemma_build.kernels.compile import ptxas_report
from dgemma_build.kernels.plugin_ptx import parameters


@dataclass
class Number:
    """Stands in for IDimensionExpr."""

    value: int

    def is_constant(self) -> bool:
        return True

    def get_constant_value(self) -> int:
        return self.value


class Numbers(list[Any]):
    """Stands in for DimsExprs."""

    def __init__(self, length: int) -> None:
        super().__init__([None] * length)


class Described(SimpleNamespace):
    """Stands in for DynamicPluginTensorDesc."""


class TensorFormat(enum.Enum):
    LINEAR = 0


DIMENSION_OPERATIONS: dict[str, Callable[[int, int], int]] = {
    "PROD": operator.mul,
    "SUM": operator.add,
    "FLOOR_DIV": operator.floordiv,
    "CEIL_DIV": lambda a, b: -(-a // b),
    "MIN": min,
}


class ExpressionBuilder:
    def constant(self, value: int) -> Number:
        return Number(value)

    def operation(self, kind: Any, a: Number, b: Number) -> Number:
        return Number(DIMENSION_OPERATIONS[kind.name](a.value, b.value))


class Integers(dict[int, Any]):
    """What `ISymExprs` collects."""

    nbSymExprs = 0  # noqa: N815 - TensorRT's name


def load() -> tuple[ModuleType, Any]:
    """`tensorrt` and `tensorrt.plugin`, from the lean wheel."""
    lean, trt = importlib.import_module("tensorrt_lean_bindings"), ModuleType("tensorrt")
    trt.__dict__.update({name: each for name, each in vars(lean).items() if not name.startswith("__")})
    stand_ins: dict[str, Any] = {"IDimensionExpr": Number, "DimsExprs": Numbers, "DynamicPluginTensorDesc": Described}
    stand_ins |= {
        "TensorFormat": TensorFormat,
        "ITensor": object,
        "ISymExpr": object,
        "PluginTensorDesc": SimpleNamespace,
    }
    trt.__dict__.update(stand_ins)
    sys.modules["tensorrt"] = trt
    return trt, importlib.import_module("tensorrt_lean_bindings.plugin")


Case = dict[str, Any]
TOKENS, PAIRS, EXPERTS, HIDDEN, INNER, VOCAB = 320, 2560, 128, 2816, 704, 262_144
TILES, ROWS, TABLE, PAGES = VOCAB // 128, 3, 90, 100
DYNAMIC = {TOKENS, PAIRS, ROWS, TABLE, PAGES}  # sizes that a kernel may not depend on: -1 when it is compiled


def cases() -> list[Case]:
    """Every operation at the released model's sizes and 320 tokens: types and shapes of inputs, attributes, tactic."""
    hidden, embedding = ("BF16", (TOKENS, HIDDEN)), ("BF16", (VOCAB, HIDDEN))
    row, statistics = ("FLOAT", (TOKENS,)), ("FLOAT", (TOKENS, TILES))
    order, begin = ("INT32", (PAIRS,)), ("INT32", (EXPERTS + 1,))
    share, chosen = ("FLOAT", (TOKENS, 8)), ("INT32", (TOKENS, 8))
    relative, factor, part = ("BF16", (TOKENS, VOCAB)), ("FLOAT", (TILES, TOKENS)), ("FLOAT", (6, TOKENS, HIDDEN))
    head = [hidden, embedding, row]
    found: list[Case] = []

    def case(name: str, inputs: list[tuple[str, tuple[int, ...]]], tactic: int = 0, **attributes: Any) -> None:
        found.append({"name": name, "inputs": inputs, "attributes": attributes, "tactic": tactic})

    case("head_tiles", head, cap=30.0)
    tile_argmax = ("INT32", statistics[1])
    case("head_choose", [*head, row, statistics, statistics, statistics, tile_argmax], cap=30.0)
    case("head_soft", [relative, factor, embedding])
    case("head_sum", [part], scale=HIDDEN**0.5, type_id=7)
    case("experts_sort", [chosen], experts=EXPERTS)
    for kind, group, tactic in (("BF16", 0, 1), ("FP8", 0, 2), ("INT8", 64, 3)):
        for name, outputs, inputs in (("experts_gate_up", 2 * INNER, HIDDEN), ("experts_down", HIDDEN, INNER)):
            weight = (kind, (EXPERTS, outputs, inputs // 2 if group else inputs))
            groups = ("BF16", (EXPERTS, outputs, inputs // 64))
            scale = {"BF16": weight, "FP8": ("FLOAT", (EXPERTS, outputs)), "INT8": groups}[kind]
            if name == "experts_gate_up":
                case(name, [hidden, weight, scale, order, begin], tactic, group=group, top_k=8)
            else:
                case(name, [("BF16", (PAIRS, INNER)), weight, scale, order, begin, share], tactic, group=group)
    case("experts_sum", [("BF16", (PAIRS, HIDDEN))], top_k=8)
    rules = [("INT32", (ROWS, TABLE)), *[("INT32", (ROWS,))] * 3]
    for kv_heads, dim, window, cache in ((8, 256, 1024, "BF16"), (2, 512, 0, "FP8")):
        query, page = ("BF16", (ROWS, TOKENS, 16, dim)), (cache, (PAGES, kv_heads, 64, dim))
        scales: Case = {"key_scale": 1.0, "value_scale": 1.0, "window": window}
        case("attention_parts", [query, page, page, *rules], head_dim=dim, **scales)
    parts = ("FLOAT", (8, ROWS, TOKENS, 16, 512))
    case("attention_sum", [parts, ("FLOAT", parts[1][:4]), rules[1]], type_id=7)
    return found


def ask(trt: Any, case: Case) -> dict[str, Any]:
    """What a build asks a plugin for, in its order."""
    name, tactic, builder = case["name"], case["tactic"], ExpressionBuilder()
    types = [getattr(trt.DataType, kind) for kind, _ in case["inputs"]]
    creator = trt.get_plugin_registry().get_creator(name, "1", "dgemma")
    numbers = [(key, type(value), value) for key, value in case["attributes"].items()]
    fields = [trt.PluginField(key, np.array([value]), field_type(trt, kind)) for key, kind, value in numbers]
    request = trt.QuickPluginCreationRequest.STRICT_AOT
    phase = trt.TensorRTPhase.BUILD
    made = creator.create_plugin(name, "dgemma", trt.PluginFieldCollection(fields), phase, request)
    shapes = [[Number(size) for size in shape] for _, shape in case["inputs"]]
    output_types = made.get_output_data_types(types, [len(shape) for shape in shapes])
    output_shapes = [[each.value for each in shape] for shape in made.get_output_shapes(shapes, [], builder)]
    every = [(kind, shape) for kind, (_, shape) in zip(types, case["inputs"], strict=True)]
    every += list(zip(output_types, output_shapes, strict=True))
    descriptions = [Described(desc=description(kind, shape)) for kind, shape in every]
    made.get_supported_format_combinations(descriptions, len(shapes))
    made.configure_plugin(descriptions[: len(shapes)], descriptions[len(shapes) :])
    tactics = made.get_valid_tactics()
    made.set_tactic(tactic)
    launch, integers = SimpleNamespace(), Integers()
    made.get_launch_params(shapes, descriptions, len(shapes), launch, integers, builder)
    inside = [each.desc for each in descriptions]
    entry, ptx = made.get_kernel(inside[: len(shapes)], inside[len(shapes) :])
    registers, stores, loads = ptxas_report(ptx.decode())
    return {
        "case": name,
        "outputs": [[kind.name, *shape] for kind, shape in zip(output_types, output_shapes, strict=True)],
        "tactics": sorted(tactics),
        "grid": [getattr(launch, f"grid_{axis}").expr.value for axis in "xyz"],
        "threads": launch.block_x.expr.value,
        "shared": launch.shared_mem.expr.value,
        "numbers": [integers[index].expr.value for index in range(integers.nbSymExprs)],
        "entry": entry,
        "parameters": [[kind, int(re.sub(r".*_param_", "", each))] for kind, each in parameters(ptx.decode())],
        "registers": registers,
        "spills": stores + loads,
    }


def description(kind: Any, shape: list[int]) -> SimpleNamespace:
    dims = tuple(-1 if size in DYNAMIC else size for size in shape)
    return SimpleNamespace(type=kind, dims=dims, format=TensorFormat.LINEAR, scale=1.0)


def field_type(trt: Any, kind: type) -> Any:
    return {int: trt.PluginFieldType.INT64, float: trt.PluginFieldType.FLOAT64}[kind]


def main() -> None:
    """What it finds is written to the file named on the command line: TensorRT's warnings go to stdout."""
    trt, plugin = load()
    plugins.register(trt, plugin)
    plugins.register(trt, plugin)  # a second engine in the same process
    registered = [
        (each.name, each.plugin_version)
        for each in trt.get_plugin_registry().all_creators
        if each.plugin_namespace == "dgemma"
    ]
    answers = [ask(trt, case) for case in cases()]
    Path(sys.argv[1]).write_text(json.dumps({"registered": sorted(registered), "answers": answers}))


if __name__ == "__main__":
    main()
