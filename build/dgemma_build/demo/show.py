"""What `make demo` runs: a real Triton server, a held-out prompt per skill over gRPC, canvases live, checked answers.

The one place that ties exporter, runtime and client together. `python -m dgemma_build.demo.show --engine DIR`.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dgemma_build.demo.records import Example
from dgemma_build.demo.skills import SKILLS, held_out_set, sudoku_template
from dgemma_build.signals import exit_on_sigterm
from dgemma_client import Client, ClientError, Delta, Done, Event, Parameters, Preview, Statistics
from dgemma_client.live import LiveCanvas, printable
from dgemma_client.picture import chosen, draw, frames
from dgemma_runtime.codec import Codec
from dgemma_runtime.contract import Manifest
from dgemma_runtime.errors import DGemmaError
from dgemma_runtime.noise import CanvasNoise
from dgemma_runtime.server import running_server

REQUIRED = ("sudoku4", "sudoku6", "json", "table", "infill")  # skills that must be right for exit code 0
# Which of the held-out examples is shown, the first if not named. Sudoku 34 takes more steps than most: more to see.
EXAMPLE = {"sudoku6": 34, "json": 2, "infill": 2}
PINNED = "sudoku6"  # the skill that is shown a second time, with what is known of the answer pinned
SEED = 7
PICTURE_SKILL, PICTURE_FRAMES = "sudoku6", 5
MAX_TOKENS = 512
PACE_S = 0.08  # a terminal shows each step at least so long; the figures are taken as the events arrive


@dataclass(frozen=True)
class Outcome:
    """One skill's answer and whether its checker took it."""

    name: str
    example: Example
    answer: str
    right: bool
    previews: tuple[Preview, ...]
    statistics: Statistics
    drafted: Statistics | None = None  # of the same, asked again with the server's drafter


def examples() -> list[Example]:
    """One held-out example of each skill, always the same."""
    return [held_out_set(skill, EXAMPLE.get(skill, 0) + 1)[-1] for skill in SKILLS]


async def ask(client: Client, example: Example, console: Console, pinned: bool = False) -> Outcome:
    """Send the prompt and show the answer as it is made; live on a terminal, a line per step elsewhere.

    `pinned`: with the clues of a Sudoku pinned in the canvas.
    """
    name = "pinned" if pinned else example.skill
    console.rule(Text(f"{example.skill}, clues pinned" if pinned else name, "bold"), align="left")
    console.print(Text(example.prompt, "dim"))
    console.rule(characters="·", style="dim")
    events: list[Event] = []
    given = _parameters(example, pinned)
    given["drafter"] = "off"  # so that there is something to see
    stream = client.stream(messages=_messages(example), previews=True, **given)
    if console.is_terminal:
        with LiveCanvas(console, console.file.write) as view:
            async for event in _paced(stream):
                view.show(event)
                events.append(event)
    else:
        async with aclosing(stream):
            async for event in stream:
                _print_step(console, event, events)
                events.append(event)
    answer = "".join(event.text for event in events if isinstance(event, Delta))
    right = SKILLS[example.skill].check(example.prompt, answer)
    console.print(Text("" if console.is_terminal else answer), soft_wrap=True)
    console.print(
        Text("right" if right else f"WRONG, a right answer is\n{example.answer}", "green" if right else "red")
    )
    previews = tuple(event for event in events if isinstance(event, Preview))
    statistics = next(event.statistics for event in events if isinstance(event, Done))
    return Outcome(name, example, answer, right, previews, statistics)


def _messages(example: Example) -> list[dict[str, Any]]:
    return [{"role": "user", "content": example.prompt}]


def _parameters(example: Example, pinned: bool) -> Parameters:
    given: Parameters = {"seed": SEED, "max_tokens": MAX_TOKENS}
    if pinned:
        given["template"] = sudoku_template(example.prompt)
    return given


async def ask_again(client: Client, outcome: Outcome) -> Outcome:
    """With drafts, and nothing to look at; a right answer counts only if this one is right, too."""
    example = outcome.example
    result = await client.generate(messages=_messages(example), **_parameters(example, outcome.name == "pinned"))
    right = outcome.right and SKILLS[example.skill].check(example.prompt, result.text)
    return replace(outcome, right=right, drafted=result.statistics)


async def _paced(stream: AsyncGenerator[Event]) -> AsyncGenerator[Event]:
    """The events, previews at least PACE_S apart; the stream itself is read without waiting."""
    arrived: asyncio.Queue[Event | None] = asyncio.Queue()

    async def read() -> None:
        try:
            async with aclosing(stream):
                async for event in stream:
                    arrived.put_nowait(event)
        finally:
            arrived.put_nowait(None)

    reader = asyncio.create_task(read())
    try:
        while (event := await arrived.get()) is not None:
            yield event
            if isinstance(event, Preview):
                await asyncio.sleep(PACE_S)
        await reader
    finally:
        reader.cancel()


def _print_step(console: Console, event: Event, before: Sequence[Event]) -> None:
    """A line for a preview that differs from the one before."""
    if isinstance(event, Preview):
        last = next((other.text for other in reversed(before) if isinstance(other, Preview)), None)
        if event.text != last:
            canvas = printable(event.text).replace("\n", "↵")
            console.print(Text(f"canvas {event.canvas_index + 1} step {event.step:>2}  {canvas}"), soft_wrap=True)


def summary(outcomes: Sequence[Outcome]) -> Table:
    """One row per skill."""
    table = Table(
        "skill",
        "answer",
        title="Held-out prompts, answered over gRPC",
        title_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
    )
    with_drafts = any(outcome.drafted for outcome in outcomes)
    last = "drafted" if with_drafts else "first, ms"
    for heading in ("tokens", "canvases", "steps", "tok/step", "all, ms", last):
        table.add_column(heading, justify="right")
    if with_drafts:
        table.caption = "drafted: steps and ms of the same request with the drafter"
    for outcome in outcomes:
        figures, drafted = outcome.statistics, outcome.drafted
        table.add_row(
            outcome.name,
            Text("right", "green") if outcome.right else Text("wrong", "red"),
            *(str(figures.num_output_tokens), str(figures.canvases), str(figures.denoising_steps)),
            f"{figures.tokens_per_forward:.1f}",
            f"{figures.total_ms:.0f}",
            f"{drafted.denoising_steps} in {drafted.total_ms:.0f}"
            if drafted
            else f"{figures.time_to_first_canvas_ms:.0f}",
        )
    return table


@dataclass(frozen=True)
class Picture:
    """Where to draw the canvas of PICTURE_SKILL, and the noise that it starts from."""

    path: Path
    noise: str


def noise_of(engine: Path) -> str:
    """The canvas that SEED starts from, as text; a dot for each token without a text of its own."""
    model, codec = Manifest.load(engine).model, Codec.load(engine)
    ids = CanvasNoise(SEED, 0, model.canvas_length, model.vocab_size).initial().tolist()
    silent = codec.bytes.keys() | codec.special_ids
    return "".join("·" if token in silent else codec.piece(token) or "·" for token in ids)


async def show(
    url: str, console: Console, picture: Picture | None = None, wait_s: float = 60.0, drafted: bool = False
) -> int:
    """Ask every example of the server at `url`; returns the exit code, 0 if all required answers are right.

    `drafted`: and once more with the server's drafter.
    """
    async with Client(url, timeout_s=60) as client:
        await client.wait_until_ready(wait_s)
        shown = examples()
        outcomes = [await ask(client, example, console) for example in shown]
        outcomes += [await ask(client, example, console, pinned=True) for example in shown if example.skill == PINNED]
        if drafted:
            outcomes = [await ask_again(client, outcome) for outcome in outcomes]
    console.print()
    console.print(summary(outcomes))
    if picture is not None:
        _write_picture(picture, next(outcome for outcome in outcomes if outcome.example.skill == PICTURE_SKILL))
        console.print(f"wrote {picture.path}")
    required = [outcome for outcome in outcomes if outcome.example.skill in REQUIRED]
    wrong = [outcome.name for outcome in required if not outcome.right]
    if wrong:
        console.print(Text(f"The demo failed: wrong answers for {', '.join(wrong)}.", "red"))
        return 1
    console.print(Text(f"All {len(required)} required answers are right.", "green"))
    return 0


def _write_picture(picture: Picture, outcome: Outcome) -> None:
    figures = outcome.statistics
    caption = (
        f"{figures.num_output_tokens} tokens in {figures.denoising_steps} denoising steps: "
        f"{figures.tokens_per_forward:.1f} tokens per forward pass"
    )
    shown = chosen(frames(picture.noise, outcome.previews, outcome.answer), PICTURE_FRAMES)
    picture.path.parent.mkdir(parents=True, exist_ok=True)
    picture.path.write_text(draw(outcome.example.prompt, shown, caption))


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the arguments (the process's own for None), run, and say in one line what went wrong."""
    parser = argparse.ArgumentParser(prog="python -m dgemma_build.demo.show", description="Show and check the demo.")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--engine", type=Path, help="engine directory; a server is started for it and stopped again")
    where.add_argument("--url", help="gRPC endpoint of a server that already runs")
    parser.add_argument("--draft-model", type=Path, help="engine directory of the drafter that the server is to have")
    parser.add_argument("--picture", type=Path, help=f"also draw the {PICTURE_SKILL} canvas to this SVG file")
    parser.add_argument("--wait", type=float, default=60.0, help="seconds until the model must be ready (%(default)s)")
    args = parser.parse_args(arguments)
    if args.picture is not None and args.engine is None:
        parser.error("--picture needs --engine, whose tokenizer makes the noise readable")
    console = Console()
    try:
        if args.url is not None:
            return asyncio.run(show(args.url, console, wait_s=args.wait))
        console.print(f"Starting Triton with the engine in {args.engine}")
        settings: dict[str, Any] = {} if args.draft_model is None else {"draft_model": str(args.draft_model)}
        with running_server(args.engine, **settings) as server:
            picture = None if args.picture is None else Picture(args.picture, noise_of(args.engine))
            code = asyncio.run(show(server.grpc_url, console, picture, args.wait, drafted=bool(settings)))
        console.print("Triton has stopped.")
        return code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except (ClientError, DGemmaError) as error:
        print(f"The demo failed: {type(error).__name__}: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    exit_on_sigterm()
    sys.exit(main())
