"""One client's requests and what each came to. Knows the project's client; not how the server is watched."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Mapping
from contextlib import aclosing, suppress
from dataclasses import dataclass, field, replace

from dgemma_build.stress.load import BAD, UNDISTURBED, Ask, Question, draw
from dgemma_client import Client, ClientError, Delta, Done, GrpcTransport
from dgemma_client.collect import Collector
from dgemma_client.errors import Cancelled, DeadlineExceeded, InvalidRequest, Overloaded
from dgemma_client.requests import Parameters, Prompt, build

PATIENCE_S = 120.0  # a request without an end after this long hangs
_PAUSE_S = (0.1, 0.6)  # of a client that was refused for a full queue
MODEL = "diffusion_gemma"


@dataclass(frozen=True)
class Outcome:
    """What one request came to."""

    manner: str
    end: str  # stop, length or deadline; cancelled, timed out, disconnected; refused, overloaded; wrong
    seconds: float
    problem: str | None = None  # what should not have happened
    compared: bool = False  # its whole answer was held against the reference


@dataclass
class _Heard:
    """What has come of one answer."""

    token_ids: list[int] = field(default_factory=list)
    ends: list[str] = field(default_factory=list)  # finish reasons; one, if all is well


class Site:
    """The server as its clients see it: its address, its context, and the answers it gave undisturbed."""

    def __init__(self, url: str, max_model_len: int, references: Mapping[str, tuple[int, ...]]) -> None:
        self._url, self._max_model_len = url, max_model_len
        self._references = references  # Question.name -> token ids
        self._transport = GrpcTransport(url)
        self._client = Client(transport=self._transport, timeout_s=PATIENCE_S)

    async def close(self) -> None:
        """Of the connection that undisturbed requests share."""
        await self._client.close()

    async def live(self, rng: random.Random, questions: list[Question], until: float, outcomes: list[Outcome]) -> None:
        """One client's requests one after the other, until `until` of the loop's clock."""
        while asyncio.get_running_loop().time() < until:
            outcome = await self.send(draw(rng, questions))
            outcomes.append(outcome)
            if outcome.end == "overloaded":
                await asyncio.sleep(rng.uniform(*_PAUSE_S))

    async def send(self, ask: Ask) -> Outcome:
        """One request to its end."""
        started, heard = time.monotonic(), _Heard()
        try:
            end, problem = await self._ended(ask, heard)
        except Exception as error:  # noqa: BLE001 - whatever a request ends with belongs into the report
            end, problem = "wrong", f"{type(error).__name__}: {error}"
        if problem is None:
            problem = self._judge(ask, end, heard)
        about = None if problem is None else f"{ask.question.name}, {ask.manner}: {problem}"
        return Outcome(ask.manner, end, time.monotonic() - started, about, end in ("stop", "length") and not problem)

    async def _ended(self, ask: Ask, heard: _Heard) -> tuple[str, str | None]:
        """How the request ended, and what is wrong with that."""
        try:
            await asyncio.wait_for(self._send(ask, heard), PATIENCE_S + 10)
        except Overloaded:
            return "overloaded", None
        except InvalidRequest as error:
            return "refused", self._refusal(ask, error)
        except DeadlineExceeded:
            return "timed out", None if ask.manner == "timed out" else f"no end after {PATIENCE_S:g} s"
        except TimeoutError:
            return "wrong", "hangs beyond the client's own deadline"
        except Cancelled:
            return "disconnected", None if ask.manner == "disconnected" else "the server cancelled it"
        except ClientError as error:
            return "wrong", f"{type(error).__name__}: {error}"
        if not heard.ends:
            return "cancelled", None if ask.manner == "cancelled" else "the stream ended without an end"
        return heard.ends[0], None

    async def _send(self, ask: Ask, heard: _Heard) -> None:
        if ask.manner == "whole":
            await self._whole(ask, heard)
        elif ask.manner == "cancelled":
            await self._cancelled(ask, heard)
        elif ask.manner == "disconnected":
            await self._disconnected(ask, heard)
        elif ask.manner == "oversize":
            ids = [3] * (self._max_model_len + 1 + ask.detail)
            async with aclosing(self._client.stream(input_ids=ids, max_tokens=1)) as events:
                async for _ in events:
                    pass
        else:
            await self._stream(self._client, ask, heard)

    async def _stream(self, client: Client, ask: Ask, heard: _Heard) -> None:
        messages, parameters = ask.question.messages, parameters_of(ask)
        timeout_s = max(ask.after_s, 0.005) if ask.manner == "timed out" else None
        previews = ask.manner == "previews"
        events = client.stream(messages=messages, previews=previews, timeout_s=timeout_s, **parameters)
        async with aclosing(events):
            async for event in events:
                if isinstance(event, Delta):
                    heard.token_ids += event.token_ids
                elif isinstance(event, Done):
                    heard.ends.append(event.finish_reason)

    async def _whole(self, ask: Ask, heard: _Heard) -> None:
        """The client always streams; this is the same request with one response."""
        prompt = Prompt(messages=ask.question.messages)
        request = build(MODEL, "", prompt, parameters_of(ask), previews=False)
        request = replace(request, inputs={**request.inputs, "stream": (False,)})
        collector, responses = Collector(), 0
        async with aclosing(self._transport.stream(request, PATIENCE_S, 5.0)) as stream:
            async for outputs in stream:
                responses += 1
                for event in collector.events(outputs):
                    if isinstance(event, Delta):
                        heard.token_ids += event.token_ids
                    elif isinstance(event, Done):
                        heard.ends.append(event.finish_reason)
        if responses != 1:
            raise RuntimeError(f"{responses} responses without stream")

    async def _cancelled(self, ask: Ask, heard: _Heard) -> None:
        task = asyncio.create_task(self._stream(self._client, ask, heard))
        await asyncio.wait([task], timeout=ask.after_s)
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task

    async def _disconnected(self, ask: Ask, heard: _Heard) -> None:
        client = Client(self._url, timeout_s=PATIENCE_S)
        task = asyncio.create_task(self._stream(client, ask, heard))
        await asyncio.wait([task], timeout=ask.after_s)
        await client.close()
        await task

    def _refusal(self, ask: Ask, error: InvalidRequest) -> str | None:
        if ask.manner == "oversize":
            numbers = (str(self._max_model_len), str(self._max_model_len + 1 + ask.detail))
            return None if all(number in str(error) for number in numbers) else f"refused without the numbers: {error}"
        if ask.manner == "bad parameter":
            name = BAD[ask.detail % len(BAD)][1]
            return None if error.field == name else f"refused by the name {error.field}, not {name}: {error}"
        return f"refused: {error}"

    def _judge(self, ask: Ask, end: str, heard: _Heard) -> str | None:
        """What is wrong with an answer that ended as it may."""
        if len(heard.ends) > 1:
            return f"{len(heard.ends)} ends"
        if ask.manner in ("oversize", "bad parameter"):
            return None if end in ("refused", "overloaded") else f"ended with {end} instead of a refusal"
        if end == "deadline" and ask.manner != "deadline":
            return "a deadline that nobody asked for"
        if ask.manner in UNDISTURBED and end not in ("stop", "length", "overloaded"):
            return f"ended with {end}"
        expected, got = self._references[ask.question.name], tuple(heard.token_ids)
        if got != (expected if end in ("stop", "length") else expected[: len(got)]):
            first = next(
                (i for i, (a, b) in enumerate(zip(expected, got, strict=False)) if a != b), min(len(expected), len(got))
            )
            return f"differs from the undisturbed answer from token {first} on ({len(got)} of {len(expected)} tokens)"
        return None


def parameters_of(ask: Ask) -> Parameters:
    """The named values of a request."""
    question = ask.question
    parameters: Parameters = {"seed": question.seed, "max_tokens": question.max_tokens, "priority": ask.priority}
    if ask.cache_salt:
        parameters["cache_salt"] = ask.cache_salt
    if ask.manner == "deadline":
        parameters["deadline_ms"] = max(1, round(1000 * ask.after_s))
    if ask.manner == "bad parameter":
        parameters |= BAD[ask.detail % len(BAD)][0]
    return parameters
