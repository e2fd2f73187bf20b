"""The application over a stand-in for Triton: no server, no socket. Knows no route."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
from fastapi import FastAPI

from dgemma_client import Client, MockTransport
from dgemma_client.errors import ClientError
from dgemma_client.events import ServerInfo
from dgemma_client.mock import Handler, delta, final, prefill, preview, reply
from dgemma_client.requests import InferRequest
from dgemma_openai.app import create_app
from dgemma_openai.settings import Settings

MODEL = "diffusion_gemma"
FACTS = {"max_model_len": "4096", "checkpoint": "demo", "server_version": "1.2.3"}
SAY = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}
GO_ON = {"model": MODEL, "prompt": "Once"}


class Triton(MockTransport):
    """Tells facts of its model; `failure` is raised instead of them, `loaded` is what its readiness says."""

    def __init__(self, handler: Handler) -> None:
        super().__init__(handler)
        self.facts = dict(FACTS)
        self.failure: ClientError | None = None
        self.loaded = True
        self.asked_for_facts = 0

    async def info(self, model: str, timeout_s: float) -> ServerInfo:
        self.asked_for_facts += 1
        if self.failure is not None:
            raise self.failure
        told = await super().info(model, timeout_s)
        return ServerInfo(told.server, "2.51.0", model, told.inputs, told.outputs, dict(self.facts))

    async def ready(self, model: str, timeout_s: float) -> bool:
        return self.loaded and await super().ready(model, timeout_s)


@dataclass
class Front:
    """One application, its clients and what stands behind it."""

    app: FastAPI
    triton: Triton
    http: httpx.AsyncClient

    async def get(self, path: str, **headers: str) -> httpx.Response:
        return await self.http.get(path, headers={name.replace("_", "-"): value for name, value in headers.items()})

    async def post(self, path: str, body: Any, **headers: str) -> httpx.Response:
        """`body` is JSON, or bytes to send as they are."""
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return await self.http.post(path, content=content, headers={"content-type": "application/json", **named})

    async def chat(self, **changes: Any) -> httpx.Response:
        return await self.post("/v1/chat/completions", SAY | changes)

    async def complete(self, **changes: Any) -> httpx.Response:
        return await self.post("/v1/completions", GO_ON | changes)

    async def refusal(self, path: str, body: Any, **headers: str) -> tuple[int, Any, Any, str]:
        """Status, param, code and message."""
        answer = await self.post(path, body, **headers)
        error = answer.json()["error"]
        return answer.status_code, error["param"], error["code"], error["message"]

    def call(self, path: str, body: Any) -> Call:
        """A request whose connection the test holds."""
        return Call(self.app, path, json.dumps(body).encode())

    def asked(self, index: int = -1) -> Mapping[str, Any]:
        """The tensors of a request to Triton, as single values where they are."""
        inputs = self.triton.requests[index].inputs
        return {name: values[0] if len(values) == 1 else values for name, values in inputs.items()}


@dataclass
class Call:
    """A POST of which each message is seen as it comes; the client may leave in the middle."""

    app: FastAPI
    path: str
    body: bytes
    status: int | None = None
    content: bytes = b""
    _left: asyncio.Event = field(default_factory=asyncio.Event)
    _came: asyncio.Event = field(default_factory=asyncio.Event)
    _task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Call:
        self._task = asyncio.create_task(self.app(self._scope(), self._receive, self._send))
        return self

    async def __aexit__(self, *_: object) -> None:
        self._left.set()
        assert self._task is not None
        await asyncio.wait_for(self._task, 10)

    def leave(self) -> None:
        self._left.set()

    async def until(self, text: bytes) -> None:
        """Return when this has come."""
        while text not in self.content:
            self._came.clear()
            await asyncio.wait_for(self._came.wait(), 10)

    async def end(self) -> None:
        assert self._task is not None
        await asyncio.wait_for(asyncio.shield(self._task), 10)

    def _scope(self) -> dict[str, Any]:
        head = {"type": "http", "method": "POST", "http_version": "1.1", "scheme": "http", "query_string": b""}
        headers = [(b"content-type", b"application/json"), (b"host", b"x")]
        address = {"client": ("127.0.0.1", 1), "server": ("127.0.0.1", 2), "root_path": ""}
        raw = {"path": self.path, "raw_path": self.path.encode()}
        return {**head, **address, **raw, "headers": headers, "asgi": {"version": "3.0", "spec_version": "2.3"}}

    async def _receive(self) -> dict[str, Any]:
        if self.body:
            body, self.body = self.body, b""
            return {"type": "http.request", "body": body, "more_body": False}
        await self._left.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
        self.content += message.get("body", b"")
        self._came.set()


@asynccontextmanager
async def front(handler: Handler | None = None, **settings: Any) -> AsyncIterator[Front]:
    """An application with these settings, on a server that answers what `handler` yields, or a greeting."""
    triton = Triton(handler or reply("Hello ", "world"))
    app = create_app(Settings(**settings), Client(transport=triton))
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(app.router.lifespan_context(app))
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        http = await stack.enter_async_context(httpx.AsyncClient(transport=transport, base_url="http://front"))
        yield Front(app, triton, http)


def events(answer: httpx.Response) -> list[Any]:
    """The data of a stream's events, as JSON but for the last of OpenAI's."""
    assert answer.headers["content-type"].startswith("text/event-stream"), answer.text
    return parse_events(answer.content)


def parse_events(content: bytes) -> list[Any]:
    parts = [part for part in content.decode().split("\n\n") if part.startswith("data: ")]
    texts = [part.removeprefix("data: ") for part in parts]
    return [text if text == "[DONE]" else json.loads(text) for text in texts]


def typed_events(answer: httpx.Response) -> list[dict[str, Any]]:
    """The data of a stream's events, where each event is named as its type."""
    assert answer.headers["content-type"].startswith("text/event-stream"), answer.text
    found = []
    for part in answer.text.removesuffix("\n\n").split("\n\n"):
        name, data = part.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {found[-1]['type']}"
    return found


def without(items: list[dict[str, Any]], *names: str) -> list[dict[str, Any]]:
    """The items without these keys."""
    return [{name: value for name, value in item.items() if name not in names} for item in items]


def say(*texts: str, **end: Any) -> Handler:
    """Answers in these canvases; prompts have 30 tokens, of which ten are cached, and what is only tokenized three."""

    def handler(request: InferRequest) -> Iterator[Any]:
        if request.inputs.get("max_tokens") == (0,):
            yield delta("<bos>text", [2, 5, 6])
            yield final(input_tokens=3, output_tokens=0)
            return
        if request.inputs["stream_previews"] == (True,):
            yield prefill(8, 30)
            yield preview("Hel<|turn>")
        for text in texts:
            yield delta(text)
        yield final(**{"input_tokens": 30, "output_tokens": 25, "steps": 7, "prefix_tokens": 10, **end})

    return handler


def in_turns(*answers: list[Any]) -> Handler:
    """A handler that gives the first request the first list, the second the second, and so on."""
    left = iter(answers)

    def handler(request: InferRequest) -> Iterator[Any]:
        yield from next(left)

    return handler


async def until(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.01)


def metric(text: str, name: str, **labels: str) -> float:
    """One figure of a page of metrics; 0 where it is not there."""
    for line in text.splitlines():
        if line.startswith(name) and all(f'{key}="{value}"' in line for key, value in labels.items()):
            return float(line.rpartition(" ")[2])
    return 0.0
