"""What the routes make of generations alike: the asks, the counts, the end, waiting for a client that may leave."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from starlette.requests import Request

from dgemma_client import Done
from dgemma_client.requests import Parameters
from dgemma_openai.errors import ApiError, invalid
from dgemma_openai.schemas.base import ChatLength, CompletionTokensDetails, PromptTokensDetails, Sampling, Usage

T = TypeVar("T")


@dataclass(frozen=True)
class End:
    """Why an answer ended, in OpenAI's words and in vLLM's."""

    finish_reason: Literal["stop", "length"]
    stop_reason: str | None

    @staticmethod
    def of(done: Done) -> End:
        """A deadline cuts an answer as a length does; `stop_reason` tells them apart. The end of a turn has none."""
        if done.finish_reason == "deadline":
            return End("length", "deadline")
        return End(done.finish_reason, done.stop_reason if isinstance(done.stop_reason, str) else None)


def check_stream_only(body: Sampling) -> None:
    """Raises ApiError for options of streams beside stream=false."""
    for name in ("stream_options", "diffusing"):
        if getattr(body, name, None) and not getattr(body, "stream", None):
            raise invalid(name, "is for streams; send stream=true or leave it out")


def length(body: ChatLength) -> tuple[int | None, str]:
    """The limit, and the name under which it was given; raises ApiError."""
    new, old = body.max_completion_tokens, body.max_tokens
    if new is not None and old is not None and new != old:
        raise invalid("max_tokens", f"is {old}, but its newer name max_completion_tokens is {new}; give one of them")
    return (old, "max_tokens") if new is None else (new, "max_completion_tokens")


def usage(dones: Sequence[Done], prompts: int) -> Usage:
    """Of all answers; each of the `prompts` counts once, however many answers it has."""
    per_prompt = len(dones) // prompts
    firsts = [done.statistics for done in dones[::per_prompt]]
    prompt_tokens = sum(figures.num_input_tokens for figures in firsts)
    completion_tokens = sum(done.statistics.num_output_tokens for done in dones)
    given = [draft for done in dones for draft in done.statistics.drafts if draft.drafter == "client"]
    accepted = sum(draft.accepted_tokens for draft in given)
    return Usage(
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        total_tokens=prompt_tokens + completion_tokens,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=sum(figures.prefix_tokens for figures in firsts)),
        completion_tokens_details=CompletionTokensDetails(
            accepted_prediction_tokens=accepted,
            rejected_prediction_tokens=sum(draft.drafted_tokens for draft in given) - accepted,
        ),
        denoising_steps=sum(done.statistics.denoising_steps for done in dones),
    )


async def unless_left(request: Request, work: Awaitable[T]) -> T:
    """The work's result; cancels it, and so the generation, where the client goes away first."""
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(_left(request))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ApiError(499, "the client went away")
        return task.result()
    finally:
        for other in (task, watch):
            other.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await other


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def parameters(body: Sampling, max_tokens: int | None, seed: int | None, **more: Any) -> Parameters:
    """Under Triton's names."""
    given: dict[str, Any] = {**body.sampling(), **more}
    if max_tokens is not None:
        given["max_tokens"] = max_tokens
    if seed is not None:
        given["seed"] = seed
    result: Parameters = given  # type: ignore[assignment]  # the client checks names
    return result
