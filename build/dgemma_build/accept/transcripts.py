"""The row about tool calls and thinking: transcripts cut at every place parse as they do whole. Needs no server."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass

from dgemma_build.accept.table import Result, Row, Setting
from dgemma_build.accept.transcript_corpus import Called, Transcript, corpus
from dgemma_openai.parsing.events import Event, Turn, collect
from dgemma_openai.parsing.markers import MARKERS
from dgemma_openai.parsing.output import OutputParser

AT_LEAST = 200


@dataclass(frozen=True)
class Counts:
    """What a run over the corpus found."""

    transcripts: int
    cuts: int  # ways in which they were cut, all together
    wrong: tuple[str, ...]  # names of transcripts that were not read as they should


def run_corpus() -> Counts:
    """Every transcript whole, in two pieces cut at each place, and in canvases of each size."""
    transcripts = corpus()
    cuts = 0
    wrong = []
    for transcript in transcripts:
        whole = parsed(transcript, [transcript.text])
        right = means(transcript, whole)
        for pieces in every_cut(transcript.text):
            right = right and parsed(transcript, pieces) == whole
            cuts += 1
        if not right:
            wrong.append(transcript.name)
    return Counts(len(transcripts), cuts, tuple(wrong))


def every_cut(text: str) -> Iterator[list[str]]:
    """In two pieces at each place, then in pieces of each size that makes more of them."""
    for place in range(1, len(text)):
        yield [text[:place], text[place:]]
    for size in range(1, (len(text) + 1) // 2):
        yield [text[start : start + size] for start in range(0, len(text), size)]


def parsed(transcript: Transcript, pieces: list[str]) -> Turn:
    """The turn that the parser makes of the pieces; ids are numbers."""
    numbers = itertools.count()
    parser = OutputParser(
        tools=transcript.tools,
        primed=transcript.primed,
        parallel=transcript.parallel,
        new_id=lambda: f"call_{next(numbers)}",
    )
    events: list[Event] = []
    for piece in pieces:
        events += parser.feed(piece)
    return collect([*events, *parser.finish(cut=transcript.cut)])


def means(transcript: Transcript, turn: Turn) -> bool:
    """Whether the turn is what the transcript was made to mean, without any marker."""
    calls = tuple(
        Called(call.name, json.loads(call.arguments) if call.complete else call.arguments) for call in turn.calls
    )
    shown = (turn.reasoning, turn.content, *(call.arguments for call in turn.calls))
    return (turn.reasoning, turn.content, calls) == (transcript.reasoning, transcript.content, transcript.calls) and (
        not any(marker in text for marker in MARKERS for text in shown)
    )


def _transcripts(setting: Setting) -> Result:
    counts = run_corpus()
    right = counts.transcripts - len(counts.wrong)
    figure = f"{right} of {counts.transcripts} transcripts, cut in {counts.cuts:,} ways"
    return Result(figure, counts.transcripts >= AT_LEAST and not counts.wrong, {"wrong": list(counts.wrong)})


ROWS: tuple[Row, ...] = (
    Row(
        "tool calls and thinking: generated transcripts cut at every place",
        f"at least {AT_LEAST}, all as when whole and as constructed",
        _transcripts,
    ),
)
