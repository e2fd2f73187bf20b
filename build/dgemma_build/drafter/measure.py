"""What a drafter saves: steps and right answers with it and without, on the demo's held-out prompts. Trains nothing.

`python -m dgemma_build.drafter.measure --engine DIR --draft-model DIR --output FILE`. All runs have the same seeds.
Several values of `--confidence` and `--verification` are measured each with each, a JSON line for each pair.
A draft's cost beside that of a step is the processor time of calls on one core, which a busy machine changes little.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from dgemma_build.demo.skills import SKILLS, held_out_set
from dgemma_build.demo.tokenizer import render_turn
from dgemma_build.drafter.data import Distiller, Prompt
from dgemma_build.drafter.records import Record
from dgemma_runtime.codec import Codec
from dgemma_runtime.contract import DenoiseRow, DraftRow, EncodeRow, EngineLimits, SequencePages
from dgemma_runtime.engines.onnxruntime import OnnxRuntimeEngine
from dgemma_runtime.errors import DGemmaError
from dgemma_runtime.parameters import VERIFICATIONS

CONFIDENCE = 0.97  # positions that the drafter is less sure of start as noise; the server's own value
SEED = 20261121  # of the held-out prompts; to choose a value by, take others
_CALLS = 60  # timed, after as many that are not


@dataclass(frozen=True)
class Answers:
    """Of one skill or of all, with or without the drafter."""

    right: int  # answers
    of: int
    canvases: int
    steps: int
    one_pass: int  # canvases

    @property
    def steps_per_canvas(self) -> float:
        return round(self.steps / self.canvases, 3)


def measure_answers(
    engine: Path, draft_model: Path | None, count: int, threads: int, seed: int, **more: Any
) -> dict[str, Answers]:
    """By skill and over `all`; `count` held-out prompts of each, answered with seeds 0, 1, ...; `more` are request
    parameters.
    """
    examples = [example for skill in SKILLS for example in held_out_set(skill, count, seed)]
    prompts = [Prompt(str(index), render_turn(example.prompt)) for index, example in enumerate(examples)]
    with Distiller(engine, threads=threads, draft_model=draft_model, **more) as distiller:
        records = {int(record.group): record for record in distiller.records(prompts, seed=0)}
        found: dict[str, list[tuple[bool, Record]]] = {"all": []}
        for index, example in enumerate(examples):
            record = records[index]
            ids = np.array(record.canvases, np.int32).ravel()
            ended = np.flatnonzero(np.isin(ids, distiller.end_ids))
            text = distiller.codec.decode(ids[: ended[0]] if len(ended) else ids)
            right = SKILLS[example.skill].check(example.prompt, text)
            for name in (example.skill, "all"):
                found.setdefault(name, []).append((right, record))
    return {name: _answers(pairs) for name, pairs in found.items()}


def _answers(pairs: Sequence[tuple[bool, Record]]) -> Answers:
    steps = [count for _, record in pairs for count in record.steps]
    return Answers(sum(right for right, _ in pairs), len(pairs), len(steps), sum(steps), steps.count(1))


def measure_calls(engine_directory: Path, draft_model: Path) -> dict[str, float]:
    """Milliseconds of processor time: of a draft, of a step, and the first as a share of the second."""
    limits = EngineLimits(1, 512, 64, 16, 16)
    engine = OnnxRuntimeEngine(engine_directory, limits, 1, draft_model)
    ids = Codec.load(engine_directory).encode(render_turn(held_out_set("table", 1)[0].prompt))
    own = np.arange(16, dtype=np.int32)
    pages, length = SequencePages(own, own), engine.spec.canvas_length
    engine.encode([EncodeRow(ids, 0, pages)])
    drafted = [DraftRow(0, len(ids), pages, int(ids[-1]))]
    uniforms = np.linspace(0, 1, length, endpoint=False, dtype=np.float32)
    stepped = [DenoiseRow(0, np.full(length, 9, np.int32), uniforms, 0.7, len(ids), pages, False)]
    engine.draft(drafted)
    draft_ms, step_ms = (_cpu_ms(lambda: engine.draft(drafted)), _cpu_ms(lambda: engine.denoise(stepped)))
    engine.close()
    return {"draft_ms": round(draft_ms, 3), "step_ms": round(step_ms, 3), "share": round(draft_ms / step_ms, 3)}


def _cpu_ms(call: Callable[[], object]) -> float:
    taken = []
    for _ in range(2 * _CALLS):
        started = time.thread_time()
        call()
        taken.append(time.thread_time() - started)
    return 1e3 * median(taken[_CALLS:])


def measure(
    engine: Path,
    draft_model: Path,
    count: int,
    threads: int,
    confidences: Sequence[float] = (CONFIDENCE,),
    verifications: Sequence[str] = (VERIFICATIONS[0],),
    seed: int = SEED,
) -> Iterator[dict[str, Any]]:
    """Everything, a JSON document for each verification with each `draft_confidence`."""
    without = measure_answers(engine, None, count, threads, seed)
    calls = measure_calls(engine, draft_model)
    for verification, confidence in product(verifications, confidences):
        asked = {"draft_verification": verification, "draft_confidence": confidence}
        drafted = measure_answers(engine, draft_model, count, threads, seed, **asked)
        groups = {
            name: {
                "without": asdict(before) | {"steps_per_canvas": before.steps_per_canvas},
                "with": asdict(drafted[name]) | {"steps_per_canvas": drafted[name].steps_per_canvas},
                "steps_share": round(drafted[name].steps_per_canvas / before.steps_per_canvas, 3),
            }
            for name, before in without.items()
        }
        yield {"held_out_per_skill": count, "seed": seed, **asked, "calls": calls, "groups": groups}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--engine", type=Path, required=True, help="engine directory of the denoiser")
    parser.add_argument("--draft-model", type=Path, required=True, help="engine directory of the drafter")
    parser.add_argument("--output", type=Path, required=True, help="file of JSON lines to write")
    parser.add_argument("--count", type=int, default=100, help="of held-out prompts of every skill")
    parser.add_argument("--seed", type=int, default=SEED, help="of the held-out prompts")
    parser.add_argument("--confidence", type=float, nargs="+", default=[CONFIDENCE], help="values of draft_confidence")
    parser.add_argument("--verification", nargs="+", default=[VERIFICATIONS[0]], choices=VERIFICATIONS)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args(arguments)
    options = (args.confidence, args.verification, args.seed)
    with args.output.open("w") as file:
        for found in measure(args.engine, args.draft_model, args.count, args.threads, *options):
            file.write(json.dumps(found) + "\n")
            _say(found)


def _say(found: dict[str, Any]) -> None:
    print(f"{found['draft_verification']}, draft_confidence {found['draft_confidence']:g}")
    for name, group in found["groups"].items():
        before, after = group["without"], group["with"]
        print(
            f"{name:8} steps {before['steps_per_canvas']:.2f} to {after['steps_per_canvas']:.2f} "
            f"({group['steps_share']:.0%}), in one pass {after['one_pass']} of {after['canvases']}, "
            f"right {before['right']} to {after['right']} of {before['of']}"
        )
    print(f"a draft takes {found['calls']['share']:.0%} of a step")


if __name__ == "__main__":
    try:
        main()
    except (DGemmaError, OSError) as error:
        sys.exit(f"error: {error}")
