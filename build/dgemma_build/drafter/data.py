"""What drafters learn from: canvases that the denoiser committed, asked of its own engine. Knows no network.

`python -m dgemma_build.drafter.data --engine DIR --output FILE` writes one JSON line per prompt: the prompt's ids, its
canvases, the steps each of them took, and the hash of the denoiser's checkpoint. Prompts are of the demo's skills, of
the training split unless `--held-out` is given, or, for another checkpoint, read from a file of JSON lines with a field
`text_input`. The seed chooses prompts; request i of seed s has the engine's seed s + i.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from dgemma_build.demo.skills import SKILLS, draw, held_out_set
from dgemma_build.demo.tokenizer import render_turn
from dgemma_build.drafter.records import Record, write_records
from dgemma_runtime.canvas import Canvas
from dgemma_runtime.codec import Codec
from dgemma_runtime.contract import (
    CommitRow,
    DenoiseRow,
    DraftRow,
    EncodeRow,
    Engine,
    EngineLimits,
    Int32Array,
    Manifest,
    SequencePages,
)
from dgemma_runtime.drafting.proposal import Proposal
from dgemma_runtime.engines.onnxruntime import OnnxRuntimeEngine
from dgemma_runtime.errors import ConfigurationError, DGemmaError
from dgemma_runtime.noise import CanvasNoise
from dgemma_runtime.parameters import default_parameters, parse_parameters

_PAGE = 64  # tokens
_MAX_TOKENS = 2048  # prompt and output together
_SHARES = {"sudoku4": 0.12, "sudoku6": 0.36, "json": 0.14, "table": 0.26, "infill": 0.12}  # of the prompts
_LINES = "write one JSON object with text_input a line"


@dataclass(frozen=True)
class Prompt:
    """What is asked; `group` is the skill, or what the file of prompts calls it."""

    group: str
    text: str


def demo_prompts(count: int, seed: int) -> Iterator[Prompt]:
    """Of the training split, about as many of each skill as the denoiser was trained with."""
    rng = random.Random(f"drafter:{seed}")
    for _ in range(count):
        skill = rng.choices(list(_SHARES), list(_SHARES.values()))[0]
        yield Prompt(skill, render_turn(draw(skill, rng, held_out=False).prompt))


def held_out_prompts(count: int, seed: int) -> Iterator[Prompt]:
    """`count` of every skill."""
    for skill in SKILLS:
        yield from (Prompt(skill, render_turn(example.prompt)) for example in held_out_set(skill, count, seed))


def read_prompts(path: Path) -> list[Prompt]:
    """JSON lines with `text_input` and, if they like, `group`."""
    if not path.is_file():
        raise ConfigurationError(f"--prompts {path}: not found; {_LINES}")
    prompts = []
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                prompts.append(_prompt(json.loads(line)))
            except ValueError as error:
                raise ConfigurationError(f"--prompts {path}: line {number} is no prompt: {error}; {_LINES}") from None
    if not prompts:
        raise ConfigurationError(f"--prompts {path}: holds no prompt; {_LINES}")
    return prompts


def _prompt(raw: Any) -> Prompt:
    if not isinstance(raw, dict):
        raise ValueError("it is not a JSON object")
    if "text_input" not in raw:
        raise ValueError("text_input is missing")
    group, text = raw.get("group", "all"), raw["text_input"]
    for name, value in (("group", group), ("text_input", text)):
        if not isinstance(value, str):
            raise ValueError(f"{name} is {value!r}, expected a text")
    return Prompt(group, text)


@dataclass
class _Sequence:
    """An answer in the making, in one slot."""

    slot: int
    group: str
    token_ids: Int32Array  # prompt and committed canvases
    prompt_length: int
    seed: int
    pages: SequencePages
    canvas: Canvas | None = None  # the one at work
    steps: list[int] = field(default_factory=list)  # of those that have ended

    @property
    def place(self) -> tuple[int, int, SequencePages]:
        """Of its canvas, as rows name it."""
        return self.slot, len(self.token_ids), self.pages

    def record(self, canvas_length: int, denoiser_sha256: str) -> Record:
        canvases = self.token_ids[self.prompt_length :].reshape(-1, canvas_length)
        prompt = self.token_ids[: self.prompt_length].tolist()
        return Record(self.group, prompt, canvases.tolist(), self.steps, denoiser_sha256)


class Distiller:
    """Asks an engine for whole answers, as many at once as it has slots; with a drafter if one is given."""

    def __init__(
        self, directory: Path, slots: int = 8, threads: int = 1, draft_model: Path | None = None, **more: Any
    ) -> None:
        """`more` are request parameters other than the defaults."""
        manifest = Manifest.load(directory)
        self._spec, self.codec = manifest.model, Codec.load(directory)
        self._denoiser_sha256 = manifest.checkpoint_sha256
        self._defaults = parse_parameters(more, default_parameters(manifest.generation_defaults))
        self.end_ids = list(self._defaults.end_ids)
        self._longest = min(_MAX_TOKENS, manifest.max_model_len)
        self._per_slot = -(-self._longest // _PAGE)
        pages = slots * self._per_slot
        limits = EngineLimits(slots, self._longest, _PAGE, pages, pages)
        self._engine: Engine = OnnxRuntimeEngine(directory, limits, threads, draft_model)

    def __enter__(self) -> Distiller:
        return self

    def __exit__(self, *raised: object) -> None:
        self._engine.close()

    def records(self, prompts: Iterable[Prompt], seed: int) -> Iterator[Record]:
        """In the order in which answers end; those that would not fit are cut after their last whole canvas."""
        waiting = enumerate(prompts, seed)
        free = list(range(self._engine.limits.max_batch_size))
        running: list[_Sequence] = []
        while True:
            while free and (item := next(waiting, None)):
                running.append(self._start(free.pop(), *item))
            if not running:
                return
            self._begin([each for each in running if each.canvas is None])
            commits = []
            for each in self._step(running):
                commit = self._commit(each)
                if self._goes_on(each, commit.token_ids):
                    commits.append(commit)
                    continue
                running.remove(each)
                self._engine.release(each.slot)
                free.append(each.slot)
                yield each.record(self._spec.canvas_length, self._denoiser_sha256)
            if commits:
                self._engine.denoise([], commits)

    def _start(self, slot: int, seed: int, prompt: Prompt) -> _Sequence:
        ids = self.codec.encode(prompt.text)
        if len(ids) + self._spec.canvas_length > self._longest:
            raise ConfigurationError(
                f"a prompt has {len(ids)} tokens, with a canvas of {self._spec.canvas_length} more than the "
                f"{self._longest} that records hold; leave it out"
            )
        own = np.arange(slot * self._per_slot, (slot + 1) * self._per_slot, dtype=np.int32)
        pages = SequencePages(own, own)
        self._engine.encode([EncodeRow(ids, 0, pages)])
        return _Sequence(slot, prompt.group, ids, len(ids), seed, pages)

    def _begin(self, sequences: Sequence[_Sequence]) -> None:
        """Start a canvas of each, from what the drafter proposes."""
        proposals: list[Proposal | None] = [None] * len(sequences)
        if sequences and self._engine.drafter is not None:
            rows = [DraftRow(each.slot, len(each.token_ids), each.pages, int(each.token_ids[-1])) for each in sequences]
            found = self._engine.draft(rows)
            pairs = zip(found.token_ids, found.confidences, strict=True)
            proposals = [Proposal(ids, confidences, "model") for ids, confidences in pairs]
        for each, proposal in zip(sequences, proposals, strict=True):
            noise = CanvasNoise(each.seed, len(each.steps), self._spec.canvas_length, self._spec.vocab_size)
            each.canvas = Canvas(replace(self._defaults, seed=each.seed), noise, proposal)

    def _step(self, sequences: Sequence[_Sequence]) -> list[_Sequence]:
        """Those whose canvases have ended with it."""
        work = [(each, each.canvas) for each in sequences if each.canvas is not None]
        twice = [index for index, (_, canvas) in enumerate(work) if canvas.halves and canvas.step == 0]
        before = [canvas.second_row(*each.place) for each, canvas in map(work.__getitem__, twice)]
        second = self._pass(before) if before else ()
        arrays = self._pass([canvas.row(*each.place) for each, canvas in work])
        for array, other in zip(arrays, second, strict=False):
            array[twice, 1::2] = other[:, 1::2]
        outcomes = zip(*arrays, strict=True)
        return [each for (each, canvas), found in zip(work, outcomes, strict=True) if canvas.advance(*found)]

    def _pass(self, rows: Sequence[DenoiseRow]) -> tuple[NDArray[Any], ...]:
        """The engine may use the arrays of its result again."""
        result = self._engine.denoise(rows)
        return result.argmax_ids.copy(), result.sampled_ids.copy(), result.entropies.copy()

    def _commit(self, sequence: _Sequence) -> CommitRow:
        """The canvas that ended, which is part of the answer from now on."""
        canvas, position = sequence.canvas, len(sequence.token_ids)
        assert canvas is not None
        sequence.token_ids = np.concatenate([sequence.token_ids, canvas.argmax_ids])
        sequence.steps.append(canvas.step)
        sequence.canvas = None
        return CommitRow(sequence.slot, canvas.argmax_ids, position, sequence.pages)

    def _goes_on(self, sequence: _Sequence, canvas_ids: Int32Array) -> bool:
        room = self._longest - len(sequence.token_ids) >= self._spec.canvas_length
        return room and not bool(np.isin(canvas_ids, self.end_ids).any())


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--engine", type=Path, required=True, help="engine directory of the denoiser")
    parser.add_argument("--output", type=Path, required=True, help="file of JSON lines to write")
    parser.add_argument("--prompts", type=Path, help="file of JSON lines with text_input; without, the demo's skills")
    parser.add_argument("--count", type=int, default=20_000, help="of prompts of the demo's skills")
    parser.add_argument("--held-out", action="store_true", help="of the held-out split, COUNT of every skill")
    parser.add_argument("--seed", type=int, default=0, help="of the skills' prompts, and of the engine's answers")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args(arguments)
    if args.prompts:
        prompts = read_prompts(args.prompts)
    elif args.held_out:
        prompts = list(held_out_prompts(args.count, args.seed))
    else:
        prompts = list(demo_prompts(args.count, args.seed))
    with Distiller(args.engine, threads=args.threads) as distiller:
        write_records(args.output, distiller.records(prompts, args.seed), len(prompts), Console(stderr=True))


if __name__ == "__main__":
    try:
        main()
    except (DGemmaError, OSError) as error:
        sys.exit(f"error: {error}")
