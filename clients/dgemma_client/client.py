"""The client: generations as typed events, with deadlines. Knows tensors by name, not the connection.

async with Client("127.0.0.1:8001") as client:
    result = await client.generate("Why is the sky blue?", max_tokens=64, seed=1)
    print(result.text)
"""

from __future__ import annotations

import asyncio
import math
import time
import uuid
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from types import TracebackType
from typing import Self, Unpack

from dgemma_client.collect import Collector
from dgemma_client.errors import ClientError, DeadlineExceeded, InvalidRequest, ServerError
from dgemma_client.events import Delta, Done, Event, Result, ServerInfo, Tokens
from dgemma_client.requests import ChatOptions, InferRequest, Message, Parameters, Prompt, build
from dgemma_client.transport import GrpcTransport, Outputs, Transport

DEFAULT_URL = "127.0.0.1:8001"
DEFAULT_MODEL = "diffusion_gemma"


class Client:
    """A DiffusionGemma model on one Triton server.

    `timeout_s` is the deadline of a whole request, `connect_timeout_s` of finding the server; both in seconds. One
    client serves any number of concurrent requests of one event loop. `retries` is how often a request is sent again
    that the server was too busy for, see `GrpcTransport`. `transport` replaces gRPC, see `MockTransport`.
    """

    def __init__(
        self,
        url: str = DEFAULT_URL,
        *,
        model: str = DEFAULT_MODEL,
        timeout_s: float = 120.0,
        connect_timeout_s: float = 5.0,
        retries: int = 0,
        transport: Transport | None = None,
    ) -> None:
        self._model = model
        self._timeout_s = _seconds("timeout_s", timeout_s)
        self._connect_timeout_s = _seconds("connect_timeout_s", connect_timeout_s)
        if transport is not None and retries:
            raise InvalidRequest(f"retries: {retries} are for the client's own transport; give them to yours")
        self._transport = transport if transport is not None else GrpcTransport(url, retries=retries)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Cancel what is under way and close the connection."""
        await self._transport.close()

    async def generate(
        self,
        prompt: str | None = None,
        *,
        messages: Sequence[Message] | None = None,
        input_ids: Sequence[int] | None = None,
        tools: Sequence[Mapping[str, object]] | None = None,
        enable_thinking: bool = False,
        chat: ChatOptions | None = None,
        timeout_s: float | None = None,
        request_id: str | None = None,
        **parameters: Unpack[Parameters],
    ) -> Result:
        """The whole answer to exactly one of `prompt` (raw text), `messages` (a chat) and `input_ids`.

        `tools`, `enable_thinking` and `chat` go to the chat template with `messages`.
        Raises any ClientError; its `text` is what had arrived. Cancelling the task cancels the request on the server.
        """
        texts: list[str] = []
        token_ids: list[int] = []
        done: Done | None = None
        events = self.stream(
            prompt,
            messages=messages,
            input_ids=input_ids,
            tools=tools,
            enable_thinking=enable_thinking,
            chat=chat,
            timeout_s=timeout_s,
            request_id=request_id,
            **parameters,
        )
        async with aclosing(events):
            async for event in events:
                if isinstance(event, Delta):
                    texts.append(event.text)
                    token_ids += event.token_ids
                elif isinstance(event, Done):
                    done = event
        assert done is not None, "a stream ends with Done or with an error"
        return Result("".join(texts), tuple(token_ids), done.finish_reason, done.statistics, done.stop_reason)

    async def tokenize(
        self,
        prompt: str | None = None,
        *,
        messages: Sequence[Message] | None = None,
        input_ids: Sequence[int] | None = None,
        tools: Sequence[Mapping[str, object]] | None = None,
        enable_thinking: bool = False,
        chat: ChatOptions | None = None,
        skip_special_tokens: bool = True,
        timeout_s: float | None = None,
        request_id: str | None = None,
    ) -> Tokens:
        """The prompt's token ids and its text, of any length; nothing is generated.

        For `messages` the text is what the chat template makes of them, for `input_ids` what they say, with their
        special tokens if those are not skipped. Raises any ClientError.
        """
        result = await self.generate(
            prompt,
            messages=messages,
            input_ids=input_ids,
            tools=tools,
            enable_thinking=enable_thinking,
            chat=chat,
            timeout_s=timeout_s,
            request_id=request_id,
            max_tokens=0,
            exclude_input_in_output=False,
            skip_special_tokens=skip_special_tokens,
        )
        return Tokens(result.token_ids, result.text)

    async def stream(
        self,
        prompt: str | None = None,
        *,
        messages: Sequence[Message] | None = None,
        input_ids: Sequence[int] | None = None,
        tools: Sequence[Mapping[str, object]] | None = None,
        enable_thinking: bool = False,
        chat: ChatOptions | None = None,
        previews: bool = False,
        timeout_s: float | None = None,
        request_id: str | None = None,
        **parameters: Unpack[Parameters],
    ) -> AsyncGenerator[Event]:
        """Events as they come: `Delta` per committed canvas, `Done` last; with `previews` also `Prefill` and `Preview`.

        Closing the generator or cancelling its task cancels the request on the server; to leave a loop early, wrap it
        in `contextlib.aclosing`. Raises any ClientError; its `text` is what had arrived.
        """
        within_s = self._timeout_s if timeout_s is None else _seconds("timeout_s", timeout_s)
        asked = Prompt(prompt, input_ids, messages, tools, enable_thinking, chat)
        request = build(self._model, request_id or uuid.uuid4().hex, asked, parameters, previews)
        collector = Collector()
        try:
            responses = self._responses(request, within_s)
            async with aclosing(responses):
                async for outputs in responses:
                    for event in collector.events(outputs):
                        yield event
            if not collector.done:
                raise ServerError("the stream ended without a finish reason; see the server's log")
        except ClientError as error:
            error.text, error.request_id = collector.text, request.request_id
            raise

    async def _responses(self, request: InferRequest, within_s: float) -> AsyncGenerator[Outputs]:
        """The transport's responses, none later than the deadline."""
        deadline = asyncio.get_running_loop().time() + within_s
        responses = self._transport.stream(request, within_s, self._connect_timeout_s)
        async with aclosing(responses):
            while True:
                try:
                    async with asyncio.timeout_at(deadline):
                        outputs = await anext(responses)
                except StopAsyncIteration:
                    return
                except (TimeoutError, DeadlineExceeded):
                    raise DeadlineExceeded(
                        f"no end after {within_s:g} s; the request is cancelled, give a longer timeout_s"
                    ) from None
                yield outputs

    async def is_live(self, timeout_s: float | None = None) -> bool:
        """Whether a Triton server answers."""
        return await self._transport.live(timeout_s or self._connect_timeout_s)

    async def is_ready(self, timeout_s: float | None = None) -> bool:
        """Whether the server serves the model. Triton says so of a crashed Python process too: only a request tells."""
        return await self._transport.ready(self._model, timeout_s or self._connect_timeout_s)

    async def wait_until_ready(self, timeout_s: float, poll_s: float = 0.1) -> None:
        """Return when the model is ready; raises DeadlineExceeded after `timeout_s`."""
        deadline = time.monotonic() + _seconds("timeout_s", timeout_s)
        while not await self.is_ready():
            if time.monotonic() + poll_s > deadline:
                raise DeadlineExceeded(f"{self._model} is not ready after {timeout_s:g} s; see the server's log")
            await asyncio.sleep(poll_s)

    async def metadata(self, timeout_s: float | None = None) -> ServerInfo:
        """Names, versions and configuration of server and model."""
        return await self._transport.info(self._model, timeout_s or self._connect_timeout_s)


def _seconds(name: str, value: float) -> float:
    if not math.isfinite(value) or value <= 0:
        raise InvalidRequest(f"{name}: {value} is not a time in seconds; give a finite number above 0")
    return value
