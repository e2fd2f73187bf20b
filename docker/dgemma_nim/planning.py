"""What profiles would take, as `dgemma-build plan` says. Knows no engine and no machine."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dgemma_nim.profiles import CPU, GPUS, PRECISIONS, Need
from dgemma_runtime.errors import ConfigurationError

_TIMEOUT_S = 300
Needs = dict[tuple[str, str], Need]


def needs(program: tuple[str, ...], checkpoint: Path | None, context: int | None, gpus: Iterable[str]) -> Needs:
    """Memory of one sequence over the whole context, by GPU and precision; of the released model without a checkpoint.

    `program` is `dgemma-build engine`; its `plan` is asked. Raises ConfigurationError where that fails.
    """
    found: Needs = {}
    cpu = _plan(program, checkpoint, context, ["--cpu", *_repeat("--precision", PRECISIONS["onnxruntime"])])
    for row in cpu["cpu"]:  # the longest context comes last
        found[CPU, row["precision"]] = Need(int(row["peak"]), _SHORTER)
    if cards := {GPUS[name].card: name for name in gpus}:
        precisions = {each for name in cards.values() for each in PRECISIONS[GPUS[name].backend]}
        options = [*_repeat("--gpu", cards), *_repeat("--precision", sorted(precisions))]
        for plan in _plan(program, checkpoint, context, options)["plans"]:
            longest = plan["contexts"][-1]
            total = plan["weights_bytes"] + plan["reserve_bytes"]
            total += longest["runtime_bytes"]["total"] + longest["scratch_bytes"]["total"]
            found[cards[plan["gpu"]["name"]], plan["options"]["precision"]] = Need(int(total), _SHORTER)
    return found


_SHORTER = "a shorter NIM_MAX_MODEL_LEN takes less"


def _repeat(flag: str, values: Iterable[str]) -> list[str]:
    return [word for value in values for word in (flag, value)]


def _plan(program: tuple[str, ...], checkpoint: Path | None, context: int | None, options: list[str]) -> dict[str, Any]:
    command = [*program[:-1], "plan", "--json", "--max-batch-size", "1", *options]
    command += ["--checkpoint", str(checkpoint)] if checkpoint else []
    command += ["--max-model-len", str(context)] if context else []
    answer = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    if answer.returncode:
        raise ConfigurationError(f"the plan of this model failed: {' '.join(answer.stderr.split())}")
    values: dict[str, Any] = json.loads(answer.stdout)
    return values
