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

import numpy as np
from rich.console import Console
from rich.progress import track

from dgemma_build.demo.skills import SKILLS, draw, held_out_set
from dgemma_build.demo.tokenizer import render_turn
from dgemma_runtime.canvas import Canvas
from dgemma_runtime.codec import Codec
from dgemma_runtime.contract import CommitRow, EncodeRow, Engine, EngineLimits, Int32Array, Manifest, SequencePages
from dgemma_runtime.engines.onnxruntime import OnnxRuntimeEngine
from dgemma_runtime.errors import ConfigurationError
from dgemma_runtime.noise import CanvasNoise
from dgemma_runtime.parameters import GenerationParameters, default_parameters

_PAGE = 64  # tokens
_MAX_TOKENS = 2048  # prompt and output together


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
    """Of the training split, skills in the shares that the denoiser was trained with."""
    rng = random.Random(f"drafter:{seed}")
    weights = [skill.weight for skill in SKILLS.values()]
    for _ in range(count):
        skill = rng.choices(list(SKILLS), weights)[0]
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
    prompt: Prompt
    ids: Int32Array  # of the prompt
    parameters: GenerationParameters
    pages: SequencePages
    canvas: Canvas
    canvases: list[Int32Array] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)

    @property
    def position(self) -> int:
        return len(self.ids) + sum(len(ids) for ids in self.canvases)


class Distiller:
    """Asks an engine for whole answers, as many at once as it has slots."""

    def __init__(self, directory: Path, slots: int = 8, threads: int = 1) -> None:
        manifest = Manifest.load(directory)
        self._spec, self._codec = manifest.model, Codec.load(directory)
        self._defaults = default_parameters(manifest.generation_defaults)
        self._longest = min(_MAX_TOKENS, manifest.max_model_len)
        self._per_slot = -(-self._longest // _PAGE)
        pages = slots * self._per_slot
        limits = EngineLimits(slots, self._longest, _PAGE, pages, pages)
        self._engine: Engine = OnnxRuntimeEngine(directory, limits, threads)

    def __enter__(self) -> Distiller:
        return self

    def __exit__(self, *raised: object) -> None:
        self._engine.close()

    def records(self, prompts: Iterable[Prompt], seed: int) -> Iterator[Record]:
        """In the order in which answers end; those that would not fit are cut after their last whole canvas."""
        waiting = enumerate(prompts, seed)
        free = list(range(self._engine.limits.max_batch_size))
        running: list[_Sequence] = []
        commits: list[CommitRow] = []
        while True:
            while free and (item := next(waiting, None)):
                started = self._start(free.pop(), item[0], item[1])
                running.append(started)
            if not running:
                return
            rows = [each.canvas.row(each.slot, each.position, each.pages) for each in running]
            result = self._engine.denoise(rows)
            outcomes = zip(running, result.argmax_ids, result.sampled_ids, result.entropies, strict=True)
            ended = [each for each, *found in outcomes if each.canvas.advance(*found)]
            commits = [commit for each in ended if (commit := self._next_canvas(each))]
            if commits:
                self._engine.denoise([], commits)
            for each in ended:
                if each.slot not in [commit.slot for commit in commits]:
                    running.remove(each)
                    self._engine.release(each.slot)
                    free.append(each.slot)
                    canvases = [ids.tolist() for ids in each.canvases]
                    yield Record(each.prompt.group, each.ids.tolist(), canvases, each.steps)

    def _start(self, slot: int, seed: int, prompt: Prompt) -> _Sequence:
        ids = self._codec.encode(prompt.text)
        if len(ids) + self._spec.canvas_length > self._longest:
            raise ConfigurationError(
                f"a prompt has {len(ids)} tokens, with a canvas of {self._spec.canvas_length} more than the "
                f"{self._longest} that records hold; leave it out"
            )
        own = np.arange(slot * self._per_slot, (slot + 1) * self._per_slot, dtype=np.int32)
        pages = SequencePages(own, own)
        self._engine.encode([EncodeRow(ids, 0, pages)])
        parameters = replace(self._defaults, seed=seed)
        return _Sequence(slot, prompt, ids, parameters, pages, self._canvas(seed, 0, parameters))

    def _canvas(self, seed: int, index: int, parameters: GenerationParameters) -> Canvas:
        return Canvas(parameters, CanvasNoise(seed, index, self._spec.canvas_length, self._spec.vocab_size))

    def _next_canvas(self, sequence: _Sequence) -> CommitRow | None:
        """Note the canvas that ended; what is to be committed before the next one, None after the last."""
        canvas, position = sequence.canvas, sequence.position
        sequence.canvases.append(canvas.argmax_ids)
        sequence.steps.append(canvas.step)
        room = self._longest - sequence.position >= self._spec.canvas_length
        if not room or np.isin(canvas.argmax_ids, list(sequence.parameters.end_ids)).any():
            return None
        seed = sequence.parameters.seed
        assert seed is not None
        sequence.canvas = self._canvas(seed, len(sequence.canvases), sequence.parameters)
        return CommitRow(sequence.slot, canvas.argmax_ids, position, sequence.pages)


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
