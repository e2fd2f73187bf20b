"""A figure of panels, as an SVG file. Knows nothing of what is drawn in it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

GREEN, GREY = "#76b900", "#9aa5b1"


@contextmanager
def svg_figure(
    path: Path, title: str, size: tuple[float, float], rows: int = 1, columns: int = 1, **options: Any
) -> Iterator[Any]:
    """Gives matplotlib's axes [rows, columns] to draw in, and writes the file; the same figures give the same file.

    `size` is in inches; `options` go to `pyplot.subplots`.
    """
    import matplotlib as mpl  # here, since only a run that writes draws

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "dgemma"
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, **options)
    try:
        yield axes
        for axis in axes.flat:
            axis.spines[["top", "right"]].set_visible(False)
        figure.suptitle(title, fontsize=8)
        figure.tight_layout()
        figure.savefig(path, metadata={"Date": None})
    finally:
        plt.close(figure)
