"""Generations on Triton for the routes: several answers at once, the model's facts, health. Knows no HTTP."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from dgemma_client import Client, Delta, Event
from dgemma_client.errors import ClientError
from dgemma_client.events import ServerInfo, Tokens
from dgemma_client.requests import ChatOptions, Message, Parameters
from dgemma_openai import logs

_log = logging.getLogger(__name__)
_WAITING = 64  # events between the answers' tasks and whoever sends them on
_PROBE_S = 0.9  # orchestrators give a probe a second


@dataclass(frozen=True)
class Ask:
    """One answer to make: exactly one of text, ids and messages, and the parameters of Triton's names."""

    request_id: str
    parameters: Parameters
    text: str | None = None
    input_ids: Sequence[int] | None = None
    messages: Sequence[Message] | None = None
    tools: Sequence[Mapping[str, object]] | None = None
    enable_thinking: bool = False
    chat: ChatOptions | None = None  # what else the chat template is given
    previews: bool = False


class Backend:
    """One Triton server; used by one event loop. Only with `log_prompts` does the log hold prompts and answers."""

    def __init__(self, client: Client, timeout_s: float, log_prompts: bool = False) -> None:
        self._client, self._timeout_s, self._log_prompts = client, timeout_s, log_prompts

    async def close(self) -> None:
        """Ends what is under way."""
        await self._client.close()

    async def ready(self) -> bool:
        """Whether the model would take a request now."""
        return await self._client.is_ready(_PROBE_S)

    async def info(self) -> ServerInfo:
        """Raises ClientError where no server answers."""
        return await self._client.metadata()

    async def tokenize(self, ask: Ask) -> Tokens:
        """The prompt's ids and its text, special tokens included; raises ClientError."""
        return await self._client.tokenize(
            ask.text,
            input_ids=ask.input_ids,
            messages=ask.messages,
            tools=ask.tools,
            enable_thinking=ask.enable_thinking,
            chat=ask.chat,
            skip_special_tokens=False,
            timeout_s=self._timeout_s,
            request_id=ask.request_id,
        )

    async def events(self, asks: Sequence[Ask]) -> AsyncGenerator[tuple[int, Event]]:
        """(index of the answer, event) as they come; each answer ends with Done. Raises the first ClientError.

        Closing the generator cancels what is under way on the server.
        """
        if len(asks) == 1:
            async with aclosing(self._stream(asks[0])) as events:
                async for event in events:
                    yield 0, event
            return
        queue: asyncio.Queue[tuple[int, Event | ClientError | None]] = asyncio.Queue(_WAITING)
        tasks = [asyncio.create_task(self._pump(index, ask, queue)) for index, ask in enumerate(asks)]
        try:
            left = len(tasks)
            while left:
                index, item = await queue.get()
                if isinstance(item, ClientError):
                    raise item
                if item is None:
                    left -= 1
                else:
                    yield index, item
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _pump(self, index: int, ask: Ask, queue: asyncio.Queue[tuple[int, Event | ClientError | None]]) -> None:
        try:
            async with aclosing(self._stream(ask)) as events:
                async for event in events:
                    await queue.put((index, event))
            await queue.put((index, None))
        except ClientError as error:
            await queue.put((index, error))

    def _stream(self, ask: Ask) -> AsyncGenerator[Event]:
        events = self._events(ask)
        return _logged(ask, events) if self._log_prompts else events

    def _events(self, ask: Ask) -> AsyncGenerator[Event]:
        return self._client.stream(
            ask.text,
            input_ids=ask.input_ids,
            messages=ask.messages,
            tools=ask.tools,
            enable_thinking=ask.enable_thinking,
            chat=ask.chat,
            previews=ask.previews,
            timeout_s=self._timeout_s,
            request_id=ask.request_id,
            **ask.parameters,
        )


async def _logged(ask: Ask, events: AsyncGenerator[Event]) -> AsyncGenerator[Event]:
    prompt = ask.text if ask.text is not None else list(ask.messages or ask.input_ids or ())
    fields = {"request_id": logs.request_id.get(), "answer_id": ask.request_id}
    given = json.dumps(prompt, ensure_ascii=False)
    _log.info("request %s, prompt of %s: %s", *fields.values(), given, extra={**fields, "prompt": prompt})
    texts: list[str] = []
    try:
        async with aclosing(events):
            async for event in events:
                if isinstance(event, Delta):
                    texts.append(event.text)
                yield event
    finally:
        answer = "".join(texts)
        told = json.dumps(answer, ensure_ascii=False)
        _log.info("request %s, answer %s: %s", *fields.values(), told, extra={**fields, "answer": answer})
