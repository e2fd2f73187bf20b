"""One operation a kernel: its tensors, its launch, the kernel it needs, as functions of shapes. Knows no TensorRT.

Shapes are integers or whatever has +, -, * and // with an integer on the right, as TensorRT's expressions have. Tiles
are the kernels' defaults, which hold for one canvas of the released model; the experts' products have three more
tilings (`tactics`) between which TensorRT chooses by trial for each profile.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from dgemma_build.kernels.attention import AttentionConfig, AttentionSizes, attention_kernels
from dgemma_build.kernels.experts import LARGE, ExpertsConfig, ExpertSizes, experts_kernels
from dgemma_build.kernels.head import HeadConfig, head_kernels
from dgemma_build.kernels.launch import Kernel
from dgemma_build.kernels.packing import WeightFormat
from dgemma_build.plugin_lowering import TYPE_IDS

HEAD = HeadConfig()
EXPERT_TILINGS = {0: ExpertsConfig(), 1: ExpertsConfig(), 2: ExpertsConfig(tokens=64), 3: LARGE}
TACTICS = (1, 2, 3)  # TensorRT's own numbers begin at 1; 0 is what it passes where it was given no choice
_NAMES = {number: name for name, number in TYPE_IDS.items()}


@dataclass(frozen=True)
class Tensor:
    shape: tuple[Any, ...]
    dtype: str  # Triton's name


@dataclass(frozen=True)
class Launch:
    grid: tuple[Any, ...]
    numbers: tuple[Any, ...]  # the arguments that are no pointers, in the kernel's order


@dataclass(frozen=True)
class Arithmetic:
    """What shapes need beside operators."""

    cdiv: Callable[[Any, Any], Any]
    least: Callable[[Any, Any], Any]


Tensors: TypeAlias = Mapping[str, Tensor]
Attributes: TypeAlias = Mapping[str, Any]


@dataclass(frozen=True)
class Operation:
    """A kernel as a plugin. Inputs and outputs are the kernel's pointers without `_ptr`."""

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: dict[str, type]  # in the order of their names, as ONNX has them
    describe: Callable[[Tensors, Attributes, Arithmetic], tuple[Tensor, ...]]  # the outputs
    launch: Callable[[Tensors, Attributes, int, Arithmetic], Launch]  # with a tactic
    kernel: Callable[[Tensors, Attributes, int], Kernel]  # -1 for sizes that are not known
    tactics: tuple[int, ...] = ()


# ---------------------------------------------------------------- head


def _tiles(t: Tensors, math: Arithmetic) -> Any:
    return math.cdiv(t["embedding"].shape[0], HEAD.ids)


def _tiles_outputs(t: Tensors, a: Attributes, math: Arithmetic) -> tuple[Tensor, ...]:
    rows, vocab = t["hidden"].shape[0], t["embedding"].shape[0]
    statistics = (rows, _tiles(t, math))
    relative = Tensor((rows, vocab), t["embedding"].dtype)
    return relative, *[Tensor(statistics, "fp32")] * 3, Tensor(statistics, "i32")


def _tiles_launch(t: Tensors, a: Attributes, tactic: int, math: Arithmetic) -> Launch:
    rows = t["hidden"].shape[0]
    return Launch((math.cdiv(rows, HEAD.rows) * _tiles(t, math),), (rows, a["cap"]))


def _choose_outputs(t: Tensors, a: Attributes, math: Arithmetic) -> tuple[Tensor, ...]:
    rows = t["hidden"].shape[0]
    ids = Tensor((rows,), "i32")
    return ids, ids, Tensor((rows,), "fp32"), Tensor((_tiles(t, math), rows), "fp32")


def _choose_launch(t: Tensors, a: Attributes, tactic: int, math: Arithmetic) -> Launch:
    rows = t["hidden"].shape[0]
    return Launch((rows,), (rows, a["cap"]))


def _head_kernel(index: int) -> Callable[[Tensors, Attributes, int], Kernel]:
    def kernel(t: Tensors, a: Attributes, tactic: int) -> Kernel:
        vocab, hidden = t["embedding"].shape
        return head_kernels(vocab, hidden, t["embedding"].dtype, HEAD)[index]

    return kernel


def _soft_outputs(t: Tensors, a: Attributes, math: Arithmetic) -> tuple[Tensor, ...]:
    return (Tensor((HEAD.parts, t["relative"].shape[0], t["embedding"].shape[1]), "fp32"),)


def _soft_launch(t: Tensors, a: Attributes, tactic: int, math: Arithmetic) -> Launch:
    rows = t["relative"].shape[0]
    columns = math.cdiv(t["embedding"].shape[1], HEAD.columns)
    return Launch((math.cdiv(rows, HEAD.rows) * columns * HEAD.parts,), (rows,))


def _head_sum_outputs(t: Tensors, a: Attributes, math: Arithmetic) -> tuple[Tensor, ...]:
    return (Tensor(t["part"].shape[1:], _NAMES[a["type_id"]]),)


def _head_sum_launch(t: Tensors, a: Attributes, tactic: int, math: Arithmetic) -> Launch:
    _, rows, hidden = t["part"].shape
    return Launch((rows, math.cdiv(hidden, HEAD.sum_columns)), (rows, a["scale"]))


def _head_sum_kernel(t: Tensors, a: Attributes, tactic: int) -> Kernel:
    return head_kernels(1, t["part"].shape[2], _NAMES[a["type_id"]], HEAD)[3]


# ---------------------------------------------------------------- experts


def _form(t: Tensors, of: str, group: int) -> WeightFormat:
    kind = "plain" if t["weight"].dtype == t[of].dtype else "fp8" if t["weight"].dtype == "fp8e4nv" else "int4"
    return WeightFormat(kind, group)


def _sort_outputs(t: Tensors, a: Attributes, math: Arithmetic) -> tuple[Tensor, ...]:
    tokens, top_k = t["expert"].shape
    return Tensor((tokens * top_k,), "i32"), Tensor((a["experts"] + 1,), "i32")


def _sort_launch(t: Tensors, a: Attributes, tactic: int, math: Arithmetic) -> Launch:
    tokens, top_k = t["expert"].shape
    return Launch((a["experts"],), (tokens * top_k,))


def _sort_kernel(t: Tensors, a: Attributes, tactic: int) -> Kernel:
    return experts_kernels(ExpertSizes(a["experts"], 1, 64, 64), WeightFormat("plain"), "bf16", ExpertsConfig())[0]


def _pair_tiles(t: Tensors, tactic: int, math: Arithmetic) -> Any:
    """At most: every expert may have one that is not full."""
    pairs, experts = t["order"].shape[0], t["weight"].shape[0]
    return math.least(pairs, experts) + pairs // EXPERT_TILINGS[tactic].tokens


def _gate_up_outputs(t: Tensors, a: Attributes, math: Arithmetic) -> tuple[Tensor, ...]:
    return (Tensor((t["order"].shape[0], t["weight"].shape[1] // 2), t["x"].dtype),)


def _gate_up_launch(t: Tensors, a: Attributes, tactic: int, math: Arithmetic) -> Launch:
    columns = math.cdiv(t["weight"].shape[1] // 2, EXPERT_TILINGS[tactic].inner)
    return Launch((_pair_tiles(t, tactic, math), columns), ())


def _gate_up_kernel(t: Tensors, a: Attributes, tactic: int) -> Kernel:
    experts, both, _ = t["weight"].shape
    sizes = ExpertSizes(experts, a["top_k"], t["x"].shape[1], both // 2)
    return experts_kernels(sizes, _form(t, "x", a["group"]), t["x"].dtype, EXPERT_TILINGS[tactic])[1]


def _down_outputs(t: Tensors, a: Attributes, math: Arithmetic) -> tuple[Tensor, ...]:
    return (Tensor((t["order"].shape[0], t["weight"].shape[1]), t["gated"].dtype),)


def _down_launch(t: Tensors, a: Attributes, tactic: int, math: Arithmetic) -> Launch:
    columns = math.cdiv(t["weight"].shape[1], EXPERT_TILINGS[tactic].columns)
    return Launch((_pair_tiles(t, tactic, math), columns), ())


def _down_kernel(t: Tensors, a: Attributes, tactic: int) -> Kernel:
    experts, hidden, _ = t["weight"].shape
    sizes = ExpertSizes(experts, 1, hidden, t["gated"].shape[1])
    return experts_kernels(sizes, _form(t, "gated", a["group"]), t["gated"].dtype, EXPERT_TILINGS[tactic])[2]


def _experts_sum_outputs(t: Tensors, a: Attributes, math: Arithmetic) -> tuple[Tensor, ...]:
    pairs, hidden = t["product"].shape
    return (Tensor((pairs // a["top_k"], hidden), t["product"].dtype),)


def _experts_sum_launch(t: Tensors, a: Attributes, tactic: int, math: Arithmetic) -> Launch:
    pairs, hidden = t["product"].shape
    return Launch((pairs // a["top_k"], math.cdiv(hidden, ExpertsConfig().sum_columns)), ())


def _experts_sum_kernel(t: Tensors, a: Attributes, tactic: int) -> Kernel:
    sizes = ExpertSizes(1, a["top_k"], t["product"].shape[1], 64)
    return experts_kernels(sizes, WeightFormat("plain"), t["product"].dtype, ExpertsConfig())[3]


# ---------------------------------------------------------------- attention


def _attention(t: Tensors, a: Attributes) -> tuple[AttentionSizes, AttentionConfig]:
    _, kv_heads, page, _ = t["key"].shape
    sizes = AttentionSizes(t["query"].shape[2], kv_heads, t["query"].shape[3], a["window"], page)
    return sizes, AttentionConfig.for_sizes(sizes, t["key"].dtype)


def _parts_of(head_dim: int) -> int:
    return AttentionConfig.for_sizes(AttentionSizes(1, 1, head_dim, 0, 64), "bf16").parts


def _parts_outputs(t: Tensors, a: Attributes, math: Arithmetic) -> tuple[Tensor, ...]:
    shape, parts = t["query"].shape, _parts_of(a["head_dim"])
    return Tensor((parts, *shape), "fp32"), Tensor((parts, *shape[:3]), "fp32")


def _parts_launch(t: Tensors, a: Attributes, tactic: int, math: Arithmetic) -> Launch:
    rows, tokens, heads, _ = t["query"].shape
    kv_heads = t["key"].shape[1]
    pairs = AttentionConfig.for_sizes(AttentionSizes(1, 1, a["head_dim"], 0, 64), t["key"].dtype).pairs
    tiles, scales = math.cdiv(tokens * heads // kv_heads, pairs), (a["key_scale"], a["value_scale"])
    return Launch((tiles, rows * kv_heads, _parts_of(a["head_dim"])), (rows, tokens, t["table"].shape[1], *scales))


def _parts_kernel(t: Tensors, a: Attributes, tactic: int) -> Kernel:
    sizes, config = _attention(t, a)
    return attention_kernels(sizes, t["query"].dtype, t["key"].dtype, config)[0]


def _attention_sum_outputs(t: Tensors, a: Attributes, math: Arithmetic) -> tuple[Tensor, ...]:
    return (Tensor(t["part"].shape[1:], _NAMES[a["type_id"]]),)


def _attention_sum_launch(t: Tensors, a: Attributes, tactic: int, math: Arithmetic) -> Launch:
    _, rows, tokens, heads, _ = t["part"].shape
    return Launch((rows * tokens * heads,), (rows, tokens))


def _attention_sum_kernel(t: Tensors, a: Attributes, tactic: int) -> Kernel:
    parts, _, _, heads, head_dim = t["part"].shape
    sizes = AttentionSizes(heads, heads, head_dim, 0, 64)
    config = replace(AttentionConfig.for_sizes(sizes, "bf16"), parts=parts)
    return attention_kernels(sizes, _NAMES[a["type_id"]], "bf16", config)[1]


_STATISTICS = ("top", "mass", "moment")
_WEIGHTS = ("weight", "scale", "order", "begin")

OPERATIONS = {
    operation.name: operation
    for operation in (
        Operation(
            "head_tiles",
            ("hidden", "embedding", "temperature"),
            ("relative", *_STATISTICS, "argmax"),
            {"cap": float},
            _tiles_outputs,
            _tiles_launch,
            _head_kernel(0),
        ),
        Operation(
            "head_choose",
            ("hidden", "embedding", "temperature", "uniform", *_STATISTICS, "tile_argmax"),
            ("argmax", "sampled", "entropy", "factor"),
            {"cap": float},
            _choose_outputs,
            _choose_launch,
            _head_kernel(1),
        ),
        Operation(
            "head_soft",
            ("relative", "factor", "embedding"),
            ("part",),
            {},
            _soft_outputs,
            _soft_launch,
            _head_kernel(2),
        ),
        Operation(
            "head_sum",
            ("part",),
            ("soft",),
            {"scale": float, "type_id": int},
            _head_sum_outputs,
            _head_sum_launch,
            _head_sum_kernel,
        ),
        Operation(
            "experts_sort", ("expert",), ("order", "begin"), {"experts": int}, _sort_outputs, _sort_launch, _sort_kernel
        ),
        Operation(
            "experts_gate_up",
            ("x", *_WEIGHTS),
            ("gated",),
            {"group": int, "top_k": int},
            _gate_up_outputs,
            _gate_up_launch,
            _gate_up_kernel,
            TACTICS,
        ),
        Operation(
            "experts_down",
            ("gated", *_WEIGHTS, "share"),
            ("product",),
            {"group": int},
            _down_outputs,
            _down_launch,
            _down_kernel,
            TACTICS,
        ),
        Operation(
            "experts_sum",
            ("product",),
            ("out",),
            {"top_k": int},
            _experts_sum_outputs,
            _experts_sum_launch,
            _experts_sum_kernel,
        ),
        Operation(
            "attention_parts",
            ("query", "key", "value", "table", "position", "length", "canvas"),
            ("part", "log_sum"),
            {"head_dim": int, "key_scale": float, "value_scale": float, "window": int},
            _parts_outputs,
            _parts_launch,
            _parts_kernel,
        ),
        Operation(
            "attention_sum",
            ("part", "log_sum", "length"),
            ("out",),
            {"type_id": int},
            _attention_sum_outputs,
            _attention_sum_launch,
            _attention_sum_kernel,
        ),
    )
}
