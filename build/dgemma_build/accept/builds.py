"""Rows about engines that are built but cannot run here: TensorRT for RTX, which needs no GPU to build."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

from dgemma_build.accept.table import GENERATED, Result, Row, Setting
from dgemma_build.engine import BuildRequest, build_engine

SCRATCH_BAR = 1e9  # bytes, at one canvas behind the model's whole context
_PAIRS = (("bf16", "bf16"), ("fp8", "bf16"), ("int4", "bf16"), ("fp32", "fp32"), ("bf16", "fp8"))


def _built(setting: Setting, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Facts of one build after the other; the engines are removed."""
    for precision, kv in _PAIRS[: 1 if setting.quick else None]:
        output = GENERATED / "rtx"
        request = BuildRequest(setting.checkpoint(name), output, "tensorrt_rtx", precision, kv, max_batch_size=1)
        manifest = build_engine(request)
        size = (output / "rank0.engine").stat().st_size
        shutil.rmtree(output)
        key = precision if kv != "fp8" else f"{precision} with {kv} values"
        yield key, {"scratch": manifest.scratch_bytes, "engine": size, "context": manifest.max_model_len}


def builds(name: str, what: str, quick: bool) -> Row:
    """With bf16 keys and values the scratch must stay below its ceiling; with others it is told."""

    def measure(setting: Setting) -> Result:
        found = dict(_built(setting, name))
        figure = ", ".join(f"{key} {facts['scratch'] / 1e9:.2f}" for key, facts in found.items())
        below = all(facts["scratch"] < SCRATCH_BAR for key, facts in found.items() if key in ("bf16", "fp8", "int4"))
        whole = all(facts["context"] == 262_144 for facts in found.values())
        return Result(f"all build; GB of scratch: {figure}", below and whole, found)

    return Row(
        f"TensorRT for RTX, {what}, 262,144 tokens",
        "builds; scratch below 1 GB with bf16 keys and values",
        measure,
        quick,
    )


ROWS: tuple[Row, ...] = (
    builds("demo", "demo checkpoint", quick=True),
    builds("real", "two layers of the released dimensions", quick=False),
)
