"""A transport without a server, for tests of code that uses the client. Knows no gRPC.

async with Client(transport=MockTransport(reply("Hello ", "world"))) as client:
    assert (await client.generate("hi")).text == "Hello world"
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator

from dgemma_client.errors import Cancelled, ClientError, ConnectError
from dgemma_client.events import ServerInfo
from dgemma_client.requests import InferRequest
from dgemma_client.tensors import INPUTS, OUTPUTS, encode
from dgemma_client.transport import Outputs

Item = Outputs | ClientError | float  # a response, an error to raise, or seconds to wait
Handler = Callable[[InferRequest], Iterable[Item]]


def prefill(cached_tokens: int, input_tokens: int) -> Outputs:
    """A response while a long prompt is read."""
    return {"prefilled_tokens": (cached_tokens,), "num_input_tokens": (input_tokens,)}


def preview(text: str, canvas_index: int = 0, step: int = 1) -> Outputs:
    """A response that shows the canvas after a step."""
    return {"preview_output": (text,), "canvas_index": (canvas_index,), "canvas_steps": (step,)}


def delta(text: str, token_ids: Iterable[int] = ()) -> Outputs:
    """A response with text that is final."""
    return {"text_output": (text,), "output_ids": tuple(token_ids)}


def final(
    finish_reason: str = "stop",
    *,
    stop_reason: str | int | None = None,
    input_tokens: int = 1,
    output_tokens: int = 1,
    steps: int = 1,
    canvases: int = 1,
    prefix_tokens: int = 0,
    preemptions: int = 0,
    **others: object,
) -> Outputs:
    """The last response; `others` are further figures of the statistics."""
    counts = {"canvases": canvases, "prefix_tokens": prefix_tokens, "preemptions": preemptions}
    figures = {**counts, "queue_ms": 0.0, "prefill_ms": 0.0, "engine_ms": 0.0, "stop_reason": stop_reason} | others
    return {
        "finish_reason": (finish_reason,),
        "num_input_tokens": (input_tokens,),
        "num_output_tokens": (output_tokens,),
        "denoising_steps": (steps,),
        "statistics": (json.dumps(figures),),
    }


def reply(*texts: str) -> Handler:
    """A handler that answers every request with these texts, one canvas each."""

    def handler(request: InferRequest) -> Iterator[Item]:
        wants_previews = request.inputs.get("stream_previews") == (True,)
        for index, text in enumerate(texts):
            if wants_previews:
                yield preview(text, index)
            yield delta(text)
        yield final(output_tokens=len(texts), steps=len(texts), canvases=len(texts))

    return handler


class MockTransport:
    """Answers each request with what `handler` yields; keeps what was asked.

    `requests` are the requests in order, `cancelled` the ids of those that were left before their end. A request is
    checked as gRPC's encoding would check it.
    """

    def __init__(self, handler: Handler) -> None:
        self._handler = handler
        self._closed = asyncio.Event()
        self.requests: list[InferRequest] = []
        self.cancelled: list[str] = []

    async def stream(
        self, request: InferRequest, timeout_s: float, connect_timeout_s: float
    ) -> AsyncGenerator[Outputs]:
        encode(request.model, request.request_id, request.inputs)
        if self._closed.is_set():
            raise ConnectError("the client is closed")
        self.requests.append(request)
        ended = False
        try:
            for item in self._handler(request):
                if isinstance(item, ClientError):
                    ended = True
                    raise item
                if isinstance(item, int | float):
                    await self._wait(item)
                else:
                    yield item
            ended = True
        finally:
            if not ended:
                self.cancelled.append(request.request_id)

    async def _wait(self, seconds: float) -> None:
        try:
            await asyncio.wait_for(self._closed.wait(), seconds)
        except TimeoutError:
            return
        raise Cancelled("the client was closed while the request was under way")

    async def live(self, timeout_s: float) -> bool:
        return not self._closed.is_set()

    async def ready(self, model: str, timeout_s: float) -> bool:
        return not self._closed.is_set()

    async def info(self, model: str, timeout_s: float) -> ServerInfo:
        return ServerInfo("mock", "0", model, tuple(INPUTS), tuple(OUTPUTS), {})

    async def close(self) -> None:
        self._closed.set()
