"""Where the command's output goes: answers to stdout, everything else to stderr. Knows events, no connection."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import aclosing, nullcontext
from typing import Any

from rich.console import Console

from dgemma_client.errors import ClientError, DeadlineExceeded, InvalidRequest
from dgemma_client.events import Delta, Done, Event, FinishReason, Result, Statistics
from dgemma_client.live import LiveCanvas, printable

EXIT_OK, EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 0, 1, 2, 130
EXIT_LATE = 124  # as timeout(1) has it


def write_answer(text: str) -> None:
    """To stdout at once; on a terminal without control characters."""
    sys.stdout.write(printable(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def say(message: str) -> None:
    """To stderr, one line."""
    print(printable(message), file=sys.stderr, flush=True)


def wants_live(choice: bool | None) -> bool:
    """Whether to show the live canvas: as chosen, else if both outputs are terminals."""
    return sys.stdout.isatty() and sys.stderr.isatty() if choice is None else choice


def summary(statistics: Statistics) -> str:
    """One line about a finished request."""
    cached = f", {statistics.prefix_tokens} of {statistics.num_input_tokens} prompt tokens known already"
    preempted = f", preemptions: {statistics.preemptions}"
    drafted = "".join(
        f", drafts of {draft.drafter}: {draft.accepted_tokens} of {draft.drafted_tokens} tokens kept, "
        f"{draft.steps_saved:.1f} steps saved"
        for draft in statistics.drafts
    )
    hole = "" if statistics.hole_tokens is None else f", a hole of {statistics.hole_tokens} tokens"
    return (
        f"{statistics.num_output_tokens} tokens in {statistics.canvases} canvases, "
        f"{statistics.denoising_steps} steps ({statistics.tokens_per_forward:.1f} tokens per step), "
        f"first canvas {statistics.time_to_first_canvas_ms:.0f} ms, total {statistics.total_ms:.0f} ms, "
        f"{statistics.tokens_per_second:.0f} tokens/s"
        f"{cached if statistics.prefix_tokens else ''}{preempted if statistics.preemptions else ''}{drafted}{hole}"
    )


def exit_code(finish_reason: FinishReason) -> int:
    """Of a request that ended without an error; says so where its deadline has ended it."""
    if finish_reason == "deadline":
        say("the deadline has passed; the answer may not be whole")
        return EXIT_LATE
    return EXIT_OK


async def show(events: AsyncGenerator[Event], write: Callable[[str], None], live: bool) -> Result:
    """Write the answer as it comes, with the live canvas on stderr if `live`; returns it whole."""
    deltas: list[Delta] = []
    done: Done | None = None
    view = LiveCanvas(Console(stderr=True), write) if live else None
    async with aclosing(events):
        with view or nullcontext():
            async for event in events:
                if view is not None:
                    view.show(event)
                elif isinstance(event, Delta):
                    write(event.text)
                if isinstance(event, Delta):
                    deltas.append(event)
                elif isinstance(event, Done):
                    done = event
    assert done is not None, "a stream ends with Done or with an error"
    text = "".join(delta.text for delta in deltas)
    ids = tuple(token for delta in deltas for token in delta.token_ids)
    return Result(text, ids, done.finish_reason, done.statistics, done.stop_reason)


def run(runner: asyncio.Runner, work: Coroutine[Any, Any, int]) -> int:
    """Run `work` and return its exit code; Ctrl-C cancels it, and with it the request on the server."""
    try:
        return runner.run(work)
    except KeyboardInterrupt:
        say("interrupted; the request is cancelled")
        return EXIT_INTERRUPTED
    except ClientError as error:
        say(f"error: {error}")
        if isinstance(error, DeadlineExceeded):
            return EXIT_LATE
        return EXIT_USAGE if isinstance(error, InvalidRequest) else EXIT_FAILED
    except BrokenPipeError:
        # The reader of stdout is gone; without this, Python would complain again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED
