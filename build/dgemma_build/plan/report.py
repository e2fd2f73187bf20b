"""A plan as tables for a person and as JSON for a program. Knows no arithmetic of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import groupby
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from dgemma_build.plan.drafter import DrafterPlan, plan_drafter
from dgemma_build.plan.floor import StepFloor
from dgemma_build.plan.kv import KvSizes
from dgemma_build.plan.options import PlanOptions
from dgemma_build.plan.planner import CardPlan, ContextPlan, Model, context_lengths
from dgemma_build.plan.weights import PARTS
from dgemma_runtime.memory_formulas import HostMemory

JSON_VERSION = 2
PART_TITLES = dict(
    zip(PARTS, ("experts", "attention", "dense MLP", "embedding, head", "self-cond.", "router, norms"), strict=True)
)


def tokens(count: int) -> str:
    """8k for 8,192; other numbers as they are."""
    return f"{count // 1024}k" if count % 1024 == 0 else f"{count:,}"


def gigabytes(size: int) -> str:
    """Decimal, for tables; small models keep their digits."""
    return f"{size / 1e9:,.2f}" if size >= 5e6 else f"{size / 1e9:.4f}"


def recipe_name(options: PlanOptions) -> str:
    """What sets a recipe apart, for a row's label."""
    kv = f", kv {options.kv}" if options.kv != options.activations else ""
    return f"{options.precision}{kv}"


# ---------------------------------------------------------------- tables


def render(model: Model, plans: Sequence[CardPlan]) -> Group:
    """Weights, keys and values, GPUs, and what would make fit what does not."""
    recipes = {plan.options: plan for plan in plans}
    first = plans[0]
    spec = model.config.spec
    kernels = "fused kernels (plugins)" if first.options.plugins else "the plugin-free graph"
    limit = first.options.max_batch_size
    heading = Text.assemble(
        (model.name, "bold"),
        f": {_billions(model.elements)} weights, canvas of {spec.canvas_length}, context up to "
        f"{spec.max_position_embeddings:,}; {kernels}; "
        + (f"at most {limit} canvases a step" if limit else "a canvas of every sequence in a step"),
    )
    parts: list[RenderableType] = [
        heading,
        _weights_table(list(recipes.values())),
        _kv_table(model, list(recipes)),
        _card_table(plans),
        _drafter_table(model, plans),
    ]
    if notes := _notes(plans):
        parts.append(notes)
    remark = "\nGB are 10^9 bytes. Floors are from peak figures and the work that no engine can leave out."
    if not first.options.plugins:
        remark += "\nThe plugin-free graph runs every expert over every token besides, which tells in large batches."
    parts.append(Text(remark, "dim"))
    return Group(*parts)


def _billions(count: int) -> str:
    return f"{count / 1e9:,.2f} B" if count >= 1e8 else f"{count / 1e6:,.2f} M"


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, header_style="dim")


def _weights_table(plans: Sequence[CardPlan]) -> Table:
    table = _table("\nWeights, GB")
    table.add_column("precision")
    for part in PARTS:
        table.add_column(PART_TITLES[part], justify="right")
    table.add_column("all", justify="right", style="bold")
    for plan in plans:
        sizes = [gigabytes(plan.parts[part]) for part in PARTS]
        table.add_row(recipe_name(plan.options), *sizes, gigabytes(plan.weights_bytes))
    return table


def _kv_table(model: Model, recipes: Sequence[PlanOptions]) -> Table:
    lengths = context_lengths(model, recipes[0].max_model_len)
    table = _table("\nKeys and values of a sequence: by token, and all of them in pages and once more in order")
    for name in ("precision", "full, B/token", "sliding, B/token", "tokens kept"):
        table.add_column(name, justify="left" if name == "precision" else "right")
    for length in lengths:
        table.add_column(f"{tokens(length)}, GB", justify="right")
    for precision, options in {options.kv: options for options in recipes}.items():
        kv = model.kv(options)
        sizes = [gigabytes(model.sequence_bytes(options, length)) for length in lengths]
        table.add_row(
            precision, f"{kv.full_token_bytes:,}", f"{kv.sliding_token_bytes:,}", f"{kv.window - 1:,}", *sizes
        )
    return table


def _card_table(plans: Sequence[CardPlan]) -> Table:
    shortest = plans[0].contexts[0].context
    table = _table(f"\nSequences that fit, by context; scratch for them and least ms of a step at {tokens(shortest)}")
    table.add_column("GPU", no_wrap=True)
    table.add_column("precision")
    table.add_column("weights", justify="right")
    table.add_column("scratch", justify="right")
    for item in plans[0].contexts:
        table.add_column(tokens(item.context), justify="right")
    table.add_column("one canvas", justify="right")
    table.add_column("all that fit", justify="right")
    previous = ""
    for plan in plans:
        first = plan.contexts[0]
        title = plan.card.title if plan.card.title != previous else ""
        previous = plan.card.title
        counts = [_count(item) for item in plan.contexts]
        table.add_row(
            title,
            recipe_name(plan.options),
            gigabytes(plan.weights_bytes),
            gigabytes(first.scratch.total),
            *counts,
            _step(first.step_one) if first.sequences else "-",
            _step(first.step_all) if first.step_all else "-",
        )
    return table


def _drafter_table(model: Model, plans: Sequence[CardPlan]) -> Table:
    drafter = plan_drafter(model.config)
    layers = ", ".join(map(str, drafter.config.reads))
    context = plans[0].contexts[0].context
    table = _table(
        f"\nA drafter of {_billions(drafter.values)} weights over layers {layers} and the model's embedding once more; "
        f"least ms of a draft at {tokens(context)}, and what share of a step's that is"
    )
    table.add_column("GPU", no_wrap=True)
    table.add_column("precision")
    for name in ("weights, GB", "logits, GB", "one canvas", "of a step"):
        table.add_column(name, justify="right")
    previous = ""
    for plan in plans:
        title = plan.card.title if plan.card.title != previous else ""
        previous = plan.card.title
        floor = drafter.floor(plan.options, plan.card, 1, context)
        sizes = [gigabytes(drafter.bytes_of(plan.options)), gigabytes(drafter.activations_bytes)]
        share = floor.ms / plan.contexts[0].step_one.ms
        table.add_row(title, recipe_name(plan.options), *sizes, _step(floor), f"{share:.0%}")
    return table


def _count(item: ContextPlan) -> Text:
    return Text(f"{item.sequences:,}", "green") if item.sequences else Text("no", "red")


def _step(step: StepFloor) -> str:
    return f"{step.ms:,.1f} {step.bound}" if step.ms >= 1 else f"{step.ms:.3f} {step.bound}"


def _notes(plans: Sequence[CardPlan]) -> Table | None:
    table = _table("\nWhat does not fit, and what would make it fit")
    for name in ("GPU", "precision", "context"):
        table.add_column(name)
    table.add_column("short of", justify="right")
    table.add_column("any of")
    for plan in plans:
        lacking = [item for item in plan.contexts if not item.sequences]
        for remedies, group in groupby(lacking, key=lambda item: item.remedies):  # mostly the same for all lengths
            items = list(group)
            lengths = ", ".join(tokens(item.context) for item in items)
            missing = " to ".join(dict.fromkeys(f"{items[end].missing_bytes / 1e9:,.1f}" for end in (0, -1)))
            table.add_row(plan.card.title, recipe_name(plan.options), lengths, f"{missing} GB", "; ".join(remedies))
    return table if table.row_count else None


def render_host(model: Model, batch: int, plans: Mapping[tuple[str, int], HostMemory]) -> Group:
    """Peak memory of the onnxruntime engine by (precision, context)."""
    table = _table(f"{model.name}: onnxruntime on a CPU, {batch} sequences at once, GB\n")
    for name in ("precision", "context"):
        table.add_column(name)
    for name in ("weights", "head's copies", "KV pages", "workspaces", "activations", "process"):
        table.add_column(name, justify="right")
    table.add_column("peak", justify="right", style="bold")
    for (precision, context), memory in plans.items():
        sizes = (memory.weights, memory.packed_embedding, memory.kv_pools, memory.workspaces, memory.activations)
        cells = [gigabytes(size) for size in (*sizes, memory.process, memory.peak)]
        table.add_row(precision, tokens(context), *cells)
    remark = "\nGB are 10^9 bytes. Pages and buffers count as if all of them were written to."
    return Group(table, Text(remark, "dim"))


# ---------------------------------------------------------------- JSON


def to_json(model: Model, plans: Sequence[CardPlan]) -> dict[str, Any]:
    """The whole plan; sizes in bytes, times in milliseconds."""
    drafter = plan_drafter(model.config)
    described = asdict(drafter.config) | {
        "weights": drafter.values,
        "embedding_weights": drafter.embedding_values,
        "logits_bytes": drafter.activations_bytes,
    }
    return _heading(model) | {
        "drafter": {name: value for name, value in described.items() if name != "denoiser_sha256"},
        "plans": [_card_json(plan, model.kv(plan.options)) | _drafter_json(drafter, plan) for plan in plans],
    }


def _drafter_json(drafter: DrafterPlan, plan: CardPlan) -> dict[str, Any]:
    floor = drafter.floor(plan.options, plan.card, 1, plan.contexts[0].context)
    return {"drafter_bytes": drafter.bytes_of(plan.options), "draft_floor_one_canvas": _step_json(floor)}


def host_json(model: Model, batch: int, plans: Mapping[tuple[str, int], HostMemory]) -> dict[str, Any]:
    """The same for the onnxruntime engine on a CPU; sizes in bytes."""
    return _heading(model) | {
        "sequences": batch,
        "cpu": [
            {"precision": precision, "context": context} | asdict(memory) | {"peak": memory.peak}
            for (precision, context), memory in plans.items()
        ],
    }


def _heading(model: Model) -> dict[str, Any]:
    spec = model.config.spec
    described = {
        "name": model.name,
        "weights": model.elements,
        "canvas_length": spec.canvas_length,
        "sliding_window": spec.sliding_window,
        "max_position_embeddings": spec.max_position_embeddings,
    }
    return {"version": JSON_VERSION, "model": described}


def _card_json(plan: CardPlan, kv: KvSizes) -> dict[str, Any]:
    options = plan.options
    return {
        "gpu": asdict(plan.card),
        "options": asdict(options) | {"kv_precision": options.kv},
        "weights_bytes": plan.weights_bytes,
        "weights_bytes_by_part": plan.parts,
        "reserve_bytes": plan.reserve_bytes,
        "kv_bytes_per_token": {"full": kv.full_token_bytes, "sliding": kv.sliding_token_bytes},
        "contexts": [_context_json(item) for item in plan.contexts],
    }


def _context_json(item: ContextPlan) -> dict[str, Any]:
    return {
        "context": item.context,
        "fits": item.sequences > 0,
        "sequences": item.sequences,
        "kv_bytes_per_sequence": item.kv_bytes,
        "runtime_bytes": asdict(item.runtime) | {"total": item.runtime.total},
        "scratch_bytes": asdict(item.scratch) | {"total": item.scratch.total},
        "missing_bytes": item.missing_bytes,
        "remedies": list(item.remedies),
        "step_floor_one_canvas": _step_json(item.step_one),
        "step_floor_all_that_fit": _step_json(item.step_all) if item.step_all else None,
    }


def _step_json(step: StepFloor) -> dict[str, Any]:
    return {
        "canvases": step.batch,
        "bytes_ms": round(step.bytes_ms, 4),
        "flops_ms": round(step.flops_ms, 4),
        "ms": round(step.ms, 4),
        "bound": step.bound,
    }
