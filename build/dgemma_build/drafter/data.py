"""What drafters learn from: canvases that the denoiser committed, asked of its own engine. Knows no network.

`python -m dgemma_build.drafter.data --engine DIR --output FILE` writes one JSON line per prompt: the prompt's ids, its
canvases and the steps each of them took. Prompts are drawn from the demo skills' training split, or, for another
checkpoint, read from a file of JSON lines with a field `text_input`. Request i of seed s has the engine's seed s + i.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track

from dgemma_build.demo.skills import SKILLS, draw, held_out_set
from dgemma_build.demo.tokenizer import render_turn
from dgemma_runtime.canvas import Canvas
from dgemma_runtime.codec import Codec
from dgemma_runtime.contract import (
    CommitRow,
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
from dgemma_runtime.errors import ConfigurationError
from dgemma_runtime.noise import CanvasNoise
from dgemma_runtime.parameters import default_parameters

_PAGE = 64  # tokens
_MAX_TOKENS = 2048  # prompt and output together
_SHARES = {"sudoku4": 0.12, "sudoku6": 0.36, "json": 0.14, "table": 0.26, "infill": 0.12}  # of the prompts


@dataclass(frozen=True)
class Prompt:
    """What is asked; `group` is the skill, or what the file of prompts calls it."""

    group: str
    text: str


@dataclass(frozen=True)
class Record:
    """One answer of the denoiser; every canvas is whole, what follows its end token included."""

    group: str
    prompt: list[int]
    canvases: list[list[int]]
    steps: list[int]  # that each canvas took


def demo_prompts(count: int, seed: int) -> Iterator[Prompt]:
    """Of the training split, about as many of each skill as the denoiser was trained with."""
    rng = random.Random(f"drafter:{seed}")
    for _ in range(count):
        skill = rng.choices(list(_SHARES), list(_SHARES.values()))[0]
        yield Prompt(skill, render_turn(draw(skill, rng, held_out=False).prompt))


def held_out_prompts(count: int, seed: int = 20261121) -> Iterator[Prompt]:
    """`count` of every skill."""
    for skill in SKILLS:
        yield from (Prompt(skill, render_turn(example.prompt)) for example in held_out_set(skill, count, seed))


def read_prompts(path: Path) -> Iterator[Prompt]:
    """JSON lines with `text_input` and, if they like, `group`."""
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                raw = json.loads(line)
                yield Prompt(str(raw.get("group", "all")), str(raw["text_input"]))
            except (ValueError, KeyError, AttributeError) as error:
                raise ConfigurationError(
                    f"{path}: line {number} has no text_input ({error!r}); write one JSON object a line"
                ) from None


def read_records(path: Path) -> list[Record]:
    """What `main` wrote; raises ConfigurationError naming the line that is not a record."""
    if not path.is_file():
        raise ConfigurationError(f"{path}: not found; make it with `python -m dgemma_build.drafter.data`")
    records = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            records.append(Record(**json.loads(line)))
        except (ValueError, TypeError) as error:
            raise ConfigurationError(f"{path}: line {number} is no record ({error}); make the file again") from None
    return records


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

    def record(self, canvas_length: int) -> Record:
        canvases = self.token_ids[self.prompt_length :].reshape(-1, canvas_length)
        return Record(self.group, self.token_ids[: self.prompt_length].tolist(), canvases.tolist(), self.steps)


class Distiller:
    """Asks an engine for whole answers, as many at once as it has slots; with a drafter if one is given."""

    def __init__(
        self, directory: Path, slots: int = 8, threads: int = 1, draft_model: Path | None = None, **more: Any
    ) -> None:
        """`more` are request parameters other than the defaults."""
        manifest = Manifest.load(directory)
        self._spec, self.codec = manifest.model, Codec.load(directory)
        self._defaults = replace(default_parameters(manifest.generation_defaults), draft_verification="direct", **more)
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
                yield each.record(self._spec.canvas_length)
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
        result = self._engine.denoise([canvas.row(s.slot, len(s.token_ids), s.pages) for s, canvas in work])
        outcomes = zip(result.argmax_ids, result.sampled_ids, result.entropies, strict=True)
        return [each for (each, canvas), found in zip(work, outcomes, strict=True) if canvas.advance(*found)]

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


def write_records(path: Path, records: Iterable[Record], total: int, console: Console) -> None:
    """Under `path` when all are there."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w") as file:
        for record in track(records, "asking the denoiser", total, console=console, disable=not console.is_terminal):
            file.write(json.dumps(asdict(record)) + "\n")
    temporary.replace(path)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--engine", type=Path, required=True, help="engine directory of the denoiser")
    parser.add_argument("--output", type=Path, required=True, help="file of JSON lines to write")
    parser.add_argument("--prompts", type=Path, help="file of JSON lines with text_input; without, the demo's skills")
    parser.add_argument("--count", type=int, default=20_000, help="of prompts of the demo's skills")
    parser.add_argument("--held-out", action="store_true", help="of the held-out split, COUNT of every skill")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args(arguments)
    if args.prompts:
        prompts = list(read_prompts(args.prompts))
    elif args.held_out:
        prompts = list(held_out_prompts(args.count))
    else:
        prompts = list(demo_prompts(args.count, args.seed))
    with Distiller(args.engine, threads=args.threads) as distiller:
        write_records(args.output, distiller.records(prompts, args.seed), len(prompts), Console(stderr=True))


if __name__ == "__main__":
    main()
