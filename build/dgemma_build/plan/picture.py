"""A plan as a picture: per GPU one bar of memory for each recipe, and the sequences that fit. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from dgemma_build.plan.planner import CardPlan, Model
from dgemma_build.plan.report import recipe_name, tokens
from dgemma_build.plan.weights import ATTENTION, DENSE_MLP, EXPERTS
from dgemma_runtime.errors import ConfigurationError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLOURS = {
    "experts": "#33506e",
    "attention, MLP": "#5b84ad",
    "embedding and the rest": "#9bb7d1",
    "CUDA and library": "#c9c9c9",
    "scratch": "#e8b04a",
    "keys and values": "#76b900",
}
_MISSING = "#c0392b"


def draw(model: Model, plans: Sequence[CardPlan], path: Path) -> None:
    """Write an SVG; the same plan gives the same file. Raises ConfigurationError without matplotlib."""
    try:
        import matplotlib as mpl
    except ImportError as error:
        raise ConfigurationError(f"--picture {path}: {error}; install matplotlib (the extra `bench`)") from None
    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "dgemma"
    from matplotlib import pyplot as plt
    from matplotlib.patches import Patch

    panels = [list(group) for _, group in groupby(plans, key=lambda plan: plan.card)]
    heights = [len(panel) + 0.9 for panel in panels]
    figure, axes = plt.subplots(
        len(panels), 1, figsize=(10, 0.38 * sum(heights) + 1.3), squeeze=False, height_ratios=heights
    )
    for axis, panel in zip(axes[:, 0], panels, strict=True):
        _panel(axis, panel)
    context = plans[0].contexts[0].context
    kernels = "fused kernels" if plans[0].options.plugins else "plugin-free graph"
    words = f"{model.name}: memory with as many sequences of {tokens(context)} as fit ({kernels})"
    figure.suptitle(words, fontsize=11)
    handles = [Patch(color=colour) for colour in _COLOURS.values()]
    handles.append(Patch(facecolor="none", edgecolor=_MISSING, hatch="////"))
    figure.legend(handles, [*_COLOURS, "too much"], loc="lower center", ncols=7, fontsize=7.5, frameon=False)
    figure.tight_layout(rect=(0, 0.45 / figure.get_figheight(), 1, 1))
    try:
        figure.savefig(path, format="svg", metadata={"Date": None})
    except OSError as error:
        raise ConfigurationError(f"--picture {path}: cannot be written ({error.strerror}); choose another") from None
    finally:
        plt.close(figure)


def _panel(axis: Axes, panel: Sequence[CardPlan]) -> None:
    """The bars of one GPU, over its own memory as scale."""
    memory = panel[0].card.memory_bytes / 1e9
    room = 1.32 * memory  # to the right, for what is said of a bar
    for row, plan in enumerate(panel):
        left = 0.0
        for label, size in _segments(plan).items():
            inside = max(0.0, min(size, memory - left))
            alpha = 1.0 if plan.contexts[0].sequences else 0.3
            axis.barh(row, inside, left=left, height=0.62, color=_COLOURS[label], alpha=alpha, edgecolor="white")
            left += size
        if left > memory:
            axis.barh(row, memory, height=0.62, facecolor="none", edgecolor=_MISSING, hatch="////", linewidth=0)
        axis.text(1.015 * memory, row, _verdict(plan), va="center", fontsize=8, color=_tone(plan))
    axis.axvline(memory, color="#444444", linewidth=1)
    axis.set_xlim(0, room)
    axis.set_xticks([*_ticks(memory), memory])
    axis.set_yticks(range(len(panel)), [recipe_name(plan.options) for plan in panel])
    axis.set_ylim(len(panel) - 0.5, -0.5)
    axis.set_title(panel[0].card.title, loc="left", fontsize=9)
    axis.text(1.015 * memory, len(panel) - 0.33, "GB", va="top", fontsize=8)
    axis.spines["bottom"].set_bounds(0, memory)
    axis.tick_params(labelsize=8, length=2)
    axis.spines[["top", "right"]].set_visible(False)


def _ticks(memory: float) -> list[float]:
    """Round numbers of GB up to a tenth below `memory`."""
    step = next(size for size in (1, 2, 4, 5, 10, 20, 25, 50, 100, 250, 1e9) if memory / size <= 7)
    return [step * index for index in range(8) if step * index < 0.9 * memory]


def _segments(plan: CardPlan) -> dict[str, float]:
    """GB by colour, at the shortest context; one sequence where none fits."""
    parts, item = plan.parts, plan.contexts[0]
    layers = parts[ATTENTION] + parts[DENSE_MLP]
    sizes = {
        "experts": parts[EXPERTS],
        "attention, MLP": layers,
        "embedding and the rest": plan.weights_bytes - parts[EXPERTS] - layers,
        "CUDA and library": plan.reserve_bytes,
        "scratch": item.scratch.total,
        "keys and values": item.runtime.total,
    }
    return {label: size / 1e9 for label, size in sizes.items()}


def _verdict(plan: CardPlan) -> str:
    first, *longer = plan.contexts
    if not first.sequences:
        return f"{first.missing_bytes / 1e9:,.1f} GB short"
    counts = [f"{item.sequences} of {tokens(item.context)}" for item in (first, *longer) if item.sequences]
    return ",  ".join(counts)


def _tone(plan: CardPlan) -> str:
    return "#222222" if plan.contexts[0].sequences else _MISSING
