"""What a suffix is worth: python -m dgemma_build.bench.suffixes [--count N] [--output DIRECTORY].

Held-out prompts of the demo's skills, each with the right answer cut in three at a random place: the beginning is given
as the answer's own, a hole of 1 to 20 tokens, and a suffix of 4 tokens at least. Asked three times: without the
suffix, with it, and with a template that says the length, too. An answer is right where the skill's checker takes all
of it. Accuracy alone: no clock.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

from dgemma_build.bench.__main__ import DEMO, ROOT, THREADS, prepare
from dgemma_build.bench.drafted import MAX_TOKENS, QUEUE_SIZE
from dgemma_build.bench.inprocess import Outcome, run_requests, running_service
from dgemma_build.bench.report import Environment, points_line
from dgemma_build.demo.skills import SKILLS, held_out_set
from dgemma_build.demo.tokenizer import render_turn
from dgemma_build.signals import exit_on_sigterm
from dgemma_runtime.codec import Codec
from dgemma_runtime.parameters import parse_parameters
from dgemma_runtime.service import GenerationRequest, Service

RESULT = "suffixes.json"
LONGEST_HOLE, SHORTEST_SUFFIX = 20, 4  # tokens; one or two of a suffix would fit in many places


@dataclass(frozen=True)
class Cut:
    """A right answer in three parts; the beginning is the end of `prompt`."""

    prompt: str
    task: str
    beginning: str
    suffix: str
    hole_tokens: int

    def right(self, skill: str, middle: str) -> bool:
        """Whether the answer is, with `middle` in its hole."""
        return SKILLS[skill].check(self.task, self.beginning + middle + self.suffix)


@dataclass(frozen=True)
class SuffixPoint:
    """One skill; counts are of answers."""

    skill: str
    of: int
    right_without: int
    right_with: int
    right_length: int  # holes as long as in the answer that was cut
    passes: float  # of the search, mean
    right_given_length: int


def cuts(skill: str, count: int, codec: Codec) -> list[Cut]:
    """Always the same."""
    found = []
    for number, example in enumerate(held_out_set(skill, count)):
        rng = random.Random(f"suffix:{skill}:{number}")
        ids = codec.encode(example.answer)[1:]  # without <bos>
        length = rng.randint(1, min(LONGEST_HOLE, len(ids) - SHORTEST_SUFFIX))
        start = rng.randint(0, len(ids) - SHORTEST_SUFFIX - length)
        beginning, suffix = codec.decode(ids[:start]), codec.decode(ids[start + length :])
        found.append(Cut(render_turn(example.prompt) + beginning, example.prompt, beginning, suffix, length))
    return found


def measure(directory: Path, count: int, console: Console) -> list[SuffixPoint]:
    """Every skill."""
    with running_service(directory, 8, THREADS, queue_size=QUEUE_SIZE, prefix_cache=False) as service:
        return [_skill(service, skill, count) for skill in track(SKILLS, "asking", console=console, transient=True)]


def _skill(service: Service, skill: str, count: int) -> SuffixPoint:
    asked = cuts(skill, count, service.codec)
    parameters = [
        parse_parameters({"seed": seed, "max_tokens": MAX_TOKENS}, service.defaults) for seed in range(len(asked))
    ]
    pairs = list(zip(asked, parameters, strict=True))
    without = run_requests(service, [GenerationRequest(cut.prompt, each) for cut, each in pairs])
    searched = run_requests(service, [GenerationRequest(cut.prompt, each, suffix=cut.suffix) for cut, each in pairs])
    templates = [(cut.hole_tokens, cut.suffix) for cut in asked]
    told = run_requests(
        service,
        [GenerationRequest(cut.prompt, each, template=t) for (cut, each), t in zip(pairs, templates, strict=True)],
    )
    return SuffixPoint(
        skill=skill,
        of=len(asked),
        right_without=sum(
            SKILLS[skill].check(cut.task, cut.beginning + text)
            for cut, text in zip(asked, _texts(without), strict=True)
        ),
        right_with=sum(cut.right(skill, text) for cut, text in zip(asked, _texts(searched), strict=True)),
        right_length=sum(
            outcome.result().statistics.hole_tokens == cut.hole_tokens
            for cut, outcome in zip(asked, searched, strict=True)
        ),
        passes=sum(map(_search, searched)) / len(asked),
        right_given_length=sum(
            SKILLS[skill].check(cut.task, cut.beginning + text) for cut, text in zip(asked, _texts(told), strict=True)
        ),
    )


def _texts(outcomes: Sequence[Outcome]) -> list[str]:
    return [outcome.result().text for outcome in outcomes]


def _search(outcome: Outcome) -> int:
    """Passes before the canvas itself."""
    return outcome.result().statistics.denoising_steps - sum(commit.steps for _, commit in outcome.commits)


def table(points: Sequence[SuffixPoint], environment: Environment) -> Table:
    """One row per skill."""
    found = Table(title=str(environment), title_justify="left")
    found.add_column("skill")
    for heading in ("right without", "right with", "length as in the answer", "passes", "right with that length given"):
        found.add_column(heading, justify="right")
    for point in points:
        shares = (point.right_without, point.right_with, point.right_length)
        found.add_row(
            point.skill,
            *(f"{share / point.of:.0%}" for share in shares),
            f"{point.passes:.1f}",
            f"{point.right_given_length / point.of:.0%}",
        )
    return found


def main() -> None:
    """Table on stderr, the JSON line on stdout and, with --output, as a file."""
    parser = argparse.ArgumentParser(prog="python -m dgemma_build.bench.suffixes", description=__doc__)
    parser.add_argument("--count", type=int, default=100, help="prompts of every skill (default: %(default)s)")
    parser.add_argument("--output", type=Path, help=f"directory for {RESULT}; the repository's: {ROOT / 'benchmarks'}")
    arguments = parser.parse_args()
    console = Console(stderr=True, width=140)
    environment = Environment.here(THREADS)
    prepare(DEMO)
    points = measure(DEMO.engine, arguments.count, console)
    console.print(table(points, environment))
    line = points_line("suffixes", points, environment)
    print(line)
    if arguments.output:
        arguments.output.mkdir(parents=True, exist_ok=True)
        (arguments.output / RESULT).write_text(line + "\n")


if __name__ == "__main__":
    exit_on_sigterm()
    main()
