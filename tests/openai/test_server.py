"""The real process: start, stop, ports, TLS, connections that do not behave. Triton is a stand-in over real gRPC."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import ssl
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import trustme
from tests.openai.conftest import SAY, events, metric

from dgemma_client.fake_triton import FakeTriton
from dgemma_client.mock import delta, final
from dgemma_client.requests import InferRequest
from dgemma_openai import protocol
from dgemma_openai.protocol import LimitedProtocol

pytestmark = pytest.mark.asyncio
FACTS = {"max_model_len": "4096"}
START_S = 60.0


def handler(request: InferRequest) -> Iterator[Any]:
    """Says a word; where the chat has `slow`, another one after a second; where `endless`, words for a minute."""
    text = str(request.inputs.get("messages", [""])[0])
    yield delta("one ")
    for _ in range(600 if "endless" in text else 0):
        yield 0.1
        yield delta("more ")
    if "slow" in text:
        yield 1.0
    yield delta("two")
    yield final()


def say(text: str) -> dict[str, Any]:
    return SAY | {"messages": [{"role": "user", "content": text}], "stream": True}


@dataclass
class Server:
    """A started `dgemma-openai serve`."""

    process: asyncio.subprocess.Process
    url: str
    log: list[str]
    triton: FakeTriton

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def client(self, **options: Any) -> httpx.AsyncClient:
        return httpx.AsyncClient(base_url=self.url, timeout=30.0, **options)

    async def end(self) -> int:
        return await asyncio.wait_for(self.process.wait(), 30)


@asynccontextmanager
async def serving(*arguments: str) -> AsyncIterator[Server]:
    async with FakeTriton(handler, parameters=FACTS) as triton:
        command = [sys.executable, "-m", "dgemma_openai", "serve", "--port=0", f"--triton={triton.url}", *arguments]
        process = await asyncio.create_subprocess_exec(*command, stderr=subprocess.PIPE)
        assert process.stderr is not None
        log: list[str] = []
        async with asyncio.timeout(START_S):
            while line := (await process.stderr.readline()).decode():
                log.append(line)
                if "serving on" in line:
                    break
        assert line, "".join(log)
        reader = asyncio.create_task(_read(process.stderr, log))
        try:
            yield Server(process, line.split()[-1], log, triton)
        finally:
            if process.returncode is None:
                process.kill()
            await process.wait()
            await reader


async def _read(stream: asyncio.StreamReader, log: list[str]) -> None:
    while line := (await stream.readline()).decode():
        log.append(line)


def failing(*arguments: str) -> tuple[int, str]:
    """Status and stderr of a server that does not start."""
    command = [sys.executable, "-m", "dgemma_openai", "serve", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=START_S, stdin=subprocess.DEVNULL)
    return done.returncode, done.stderr


# ---------------------------------------------------------------- start and stop


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_lets_running_answers_end(number: int) -> None:
    async with serving() as server, server.client() as http:
        async with http.stream("POST", "/v1/chat/completions", json=say("slow")) as stream:
            lines = stream.aiter_lines()
            await anext(lines)
            server.process.send_signal(number)
            await asyncio.sleep(0.2)
            async with server.client() as other:
                assert (await other.get("/v1/health/ready")).status_code == 503
                refused = await other.post("/v1/chat/completions", json=SAY)
            rest = [line async for line in lines if line]
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
        assert rest[-1] == "data: [DONE]"
        assert await server.end() == 0
        assert server.triton.left == []


async def test_a_second_signal_does_not_wait() -> None:
    async with serving() as server, server.client() as http:
        async with http.stream("POST", "/v1/chat/completions", json=say("endless")) as stream:
            lines = stream.aiter_lines()  # closes the stream where nobody holds it
            await anext(lines)
            server.process.send_signal(signal.SIGTERM)
            await asyncio.sleep(0.2)
            server.process.send_signal(signal.SIGTERM)
            assert await server.end() == 0
        await server.triton.until_left()


async def test_answers_that_do_not_end_in_time_are_ended() -> None:
    async with serving("--drain-s=0.3") as server, server.client() as http:
        async with http.stream("POST", "/v1/chat/completions", json=say("endless")) as stream:
            lines = stream.aiter_lines()  # closes the stream where nobody holds it
            await anext(lines)
            server.process.send_signal(signal.SIGTERM)
            assert await server.end() == 0
        await server.triton.until_left()
    assert any("1 answers did not end in time" in line for line in server.log), server.log


async def test_a_port_for_health_alone() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    async with serving(f"--health-port={port}") as server:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as http:
            assert (await http.get("/v1/health/ready")).status_code == 200
            assert (await http.get("/v1/health/live")).status_code == 200
            for path in ("/v1/models", "/v1/metadata", "/v1/manifest", "/metrics", "/openapi.json", "/docs", "/"):
                assert (await http.get(path)).status_code == 404
            assert (await http.post("/v1/chat/completions", json=SAY)).status_code == 404
        server.process.send_signal(signal.SIGTERM)
        assert await server.end() == 0


async def test_a_port_that_is_taken_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        status, text = await asyncio.to_thread(failing, f"--port={port}")
    assert status == 1
    assert text.startswith(f"dgemma-openai: error: port: cannot listen on 127.0.0.1:{port} ")
    assert text.count("\n") == 1


async def test_an_address_of_another_machine_is_named() -> None:
    status, text = await asyncio.to_thread(failing, "--port=0", "--host=192.0.2.1")
    assert (status, text.count("\n")) == (1, 1)
    assert "port: cannot listen on 192.0.2.1:0" in text


# ---------------------------------------------------------------- TLS


@dataclass(frozen=True)
class Papers:
    """Of a server and a client, from one authority."""

    certificate: Path
    key: Path
    authority: Path
    client: Path  # with its key


@pytest.fixture(scope="module")
def papers(tmp_path_factory: pytest.TempPathFactory) -> Papers:
    directory, authority = tmp_path_factory.mktemp("tls"), trustme.CA()
    found = Papers(*(directory / name for name in ("server.pem", "server.key", "ca.pem", "client.pem")))
    server, client = authority.issue_cert("127.0.0.1"), authority.issue_cert("client@example.org")
    server.cert_chain_pems[0].write_to_path(str(found.certificate))
    server.private_key_pem.write_to_path(str(found.key))
    authority.cert_pem.write_to_path(str(found.authority))
    client.private_key_and_cert_chain_pem.write_to_path(str(found.client))
    return found


async def test_https(papers: Papers) -> None:
    options = [f"--tls-certificate={papers.certificate}", f"--tls-key={papers.key}"]
    async with serving(*options) as server:
        assert server.url.startswith("https://")
        trust = ssl.create_default_context(cafile=str(papers.authority))
        async with server.client(verify=trust) as http:
            assert events(await http.post("/v1/chat/completions", json=say("x")))[-1] == "[DONE]"
        async with server.client(verify=ssl.create_default_context()) as http:
            with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
                await http.get("/health")
        old = ssl.create_default_context(cafile=str(papers.authority))
        with pytest.warns(DeprecationWarning, match="TLSv1"):
            old.minimum_version, old.maximum_version = ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1
        async with server.client(verify=old) as http:
            with pytest.raises(httpx.ConnectError):
                await http.get("/health")


async def test_clients_with_certificates_alone(papers: Papers) -> None:
    options = [f"--tls-certificate={papers.certificate}", f"--tls-key={papers.key}"]
    async with serving(*options, f"--tls-client-ca={papers.authority}") as server:
        trust = ssl.create_default_context(cafile=str(papers.authority))
        async with server.client(verify=trust) as http:
            with pytest.raises(httpx.TransportError):
                await http.get("/health")
        trust.load_cert_chain(papers.client)
        async with server.client(verify=trust) as http:
            assert (await http.get("/health")).status_code == 200


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"certificate": "key"}, "are not a PEM pair without a password"),
        ({"key": "client"}, "are not a PEM pair without a password"),
        ({"authority": "key"}, "has no PEM certificate"),
    ],
)
async def test_papers_that_do_not_fit_are_named(papers: Papers, changes: dict[str, str], message: str) -> None:
    names = {"certificate": "certificate", "key": "key", "authority": "authority"} | changes
    status, text = await asyncio.to_thread(
        failing,
        "--port=0",
        f"--tls-certificate={getattr(papers, names['certificate'])}",
        f"--tls-key={getattr(papers, names['key'])}",
        f"--tls-client-ca={getattr(papers, names['authority'])}",
    )
    assert (status, text.count("\n")) == (1, 1)
    assert message in text


# ---------------------------------------------------------------- connections


@asynccontextmanager
async def connection(port: int, **options: Any) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port, **options)
    try:
        yield reader, writer
    finally:
        writer.transport.abort()
        with suppress(OSError):
            await writer.wait_closed()


async def exchange(port: int, *parts: bytes, pause_s: float = 0.0, end: bool = True) -> bytes:
    """What comes back on a connection on which these are sent; until the server closes it."""
    async with connection(port) as (reader, writer):
        for part in parts:
            writer.write(part)
            await writer.drain()
            await asyncio.sleep(pause_s)
        if end:
            writer.write_eof()
        async with asyncio.timeout(20):
            return await reader.read()


def request(body: bytes, *headers: bytes) -> bytes:
    named = [b"POST /v1/chat/completions HTTP/1.1", b"Host: x", b"Content-Type: application/json", *headers]
    return b"\r\n".join([*named, b"", body])


async def test_connections_that_do_not_behave_leave_a_healthy_server() -> None:
    body = json.dumps(SAY).encode()
    length = b"Content-Length: %d" % len(body)
    async with serving() as server:
        port = server.port
        garbage = [b"\x16\x03\x01\x02\x00\x01" * 50, b"GET\r\n\r\n", b"\x00" * 500, b"GET / HTTP/9.9\r\n\r\n"]
        for content in garbage:
            assert (await exchange(port, content)).startswith(b"HTTP/1.1 400 ")
        assert await exchange(port, b"") == b""
        head = await exchange(port, b"GET /health HTTP/1.1\r\nX: " + b"a" * 70_000, end=False)
        assert head.startswith(b"HTTP/1.1 431 ")
        both = await exchange(port, request(body, length, b"Transfer-Encoding: chunked", b"Connection: close"))
        assert both.startswith(b"HTTP/1.1 400 "), "two lengths are how requests are smuggled"
        assert b" 413 " in await exchange(port, request(b"", b"Content-Length: 99999999999", b"Connection: close"))
        for cut in (b"", body[:5]):
            async with connection(port) as (_, writer):
                writer.write(request(cut, length))
                await writer.drain()
        good = request(body, length)
        last = request(body, length, b"Connection: close")
        assert (await exchange(port, good + good + last, end=False)).count(b" 200 OK") == 3
        assert b" 400 " in await exchange(port, good + b"\x00garbage\r\n\r\n")
        async with server.client() as http:
            assert (await http.get("/v1/health/ready")).status_code == 200
            assert (await http.post("/v1/chat/completions", json=SAY)).status_code == 200
            page = (await http.get("/metrics")).text
        assert metric(page, "dgemma_openai_live_requests") == 0
    assert not any("Traceback" in line for line in server.log)


async def test_clients_that_leave_in_the_middle_leave_nothing_behind() -> None:
    async with serving() as server:
        body = json.dumps(say("endless")).encode()
        async with AsyncExitStack() as stack:
            for _ in range(5):
                reader, writer = await stack.enter_async_context(connection(server.port))
                writer.write(request(body, b"Content-Length: %d" % len(body)))
                await reader.readuntil(b"one")
        async with server.client() as http:
            async with asyncio.timeout(20):
                while metric((await http.get("/metrics")).text, "dgemma_openai_live_requests"):
                    await asyncio.sleep(0.1)
        assert len(server.triton.left) == 5


# ---------------------------------------------------------------- time, with less of it


@asynccontextmanager
async def limited(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[int]:
    """The port of a server in this process with short times, whose answers fill every buffer."""
    import uvicorn

    monkeypatch.setattr(protocol, "_HEADERS_S", 0.3)
    monkeypatch.setattr(protocol, "_UNREAD_S", 0.3)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for _ in range(100 if scope["path"] == "/large" else 1):
            await send({"type": "http.response.body", "body": b"x" * 1_000_000, "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    config = uvicorn.Config(app, http=LimitedProtocol, lifespan="off", log_config=None, ws="none", port=0)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(config)
        task = asyncio.create_task(server._serve([listener]))
        yield listener.getsockname()[1]
        server.should_exit = True
        await asyncio.wait_for(task, 20)


@pytest.mark.parametrize(
    "parts", [[], [b"G"], [b"GET / HTTP/1.1\r\nHost: x\r\n"], [b"GET / HTTP/1.1\r\n", *[b"A: b\r\n"] * 20]]
)
async def test_headers_that_do_not_come_are_not_waited_for(parts: list[bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    async with limited(monkeypatch) as port, connection(port) as (reader, writer):
        for part in parts:
            writer.write(part)
            await asyncio.sleep(0.01)
        async with asyncio.timeout(5):
            assert (await reader.read()).startswith(b"HTTP/1.1 408 ")


async def test_the_second_request_of_a_connection_is_not_waited_for_either(monkeypatch: pytest.MonkeyPatch) -> None:
    async with limited(monkeypatch) as port, connection(port, limit=2**22) as (reader, writer):
        writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        await reader.readuntil(b"\r\n0\r\n\r\n")
        await asyncio.sleep(0.5)  # longer than headers may take: a quiet connection has uvicorn's own limit
        writer.write(b"GET / HTTP/1.1\r\n")
        async with asyncio.timeout(3):
            assert (await reader.read()).startswith(b"HTTP/1.1 408 ")


async def test_who_does_not_read_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    async with limited(monkeypatch) as port, connection(port, limit=1000) as (reader, writer):
        writer.write(b"GET /large HTTP/1.1\r\nHost: x\r\n\r\n")
        await asyncio.sleep(1.5)
        with pytest.raises((ConnectionResetError, asyncio.IncompleteReadError)):
            await reader.readexactly(90_000_000)
