"""Rows about what the front end costs, and whether it answers probes under load. Needs a real server and both cores."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from urllib.parse import urlsplit

from dgemma_build.accept.streaming import TIMED_COMMITS, patched_repository
from dgemma_build.accept.table import Result, Row, Setting
from dgemma_build.demo.skills import held_out_set
from dgemma_build.front_end import running_front_end
from dgemma_client import Client, Delta
from dgemma_client.requests import Parameters
from dgemma_runtime.server import ServerOptions, running_server

CANVASES, STEPS, THREADS, CLIENTS = 2, 8, 2, 16
ADDED_MS, KEPT, PROBE_MS = 2.0, 0.9, 200.0
_MESSAGES = [{"role": "user", "content": held_out_set("table", 1)[0].prompt}]  # its answer fills a canvas and a half
_PROBES = ("/v1/health/live", "/v1/health/ready")
_PROBE_EVERY_S = 0.05


@dataclass(frozen=True)
class _Asked:
    """The same chat by either way: fixed steps, two canvases."""

    seed: int
    request_id: str = ""  # gRPC alone may choose it

    @property
    def parameters(self) -> Parameters:
        return {
            "max_denoising_steps": STEPS,
            "stability_threshold": -1,
            "seed": self.seed,
            "skip_special_tokens": False,
        }

    @property
    def body(self) -> dict[str, object]:
        return {
            "model": "diffusion_gemma",
            "messages": _MESSAGES,
            "stream": True,
            "max_denoising_steps": STEPS,
            "stability_threshold": -1,
            "seed": self.seed,
        }


Arrivals = dict[tuple[str, int], int]  # (the server's id of the request, canvas) -> nanoseconds
Way = Callable[[_Asked], Awaitable[Arrivals]]


# ---------------------------------------------------------------- the two ways


def _by_grpc(client: Client) -> Way:
    async def ask(asked: _Asked) -> Arrivals:
        found: Arrivals = {}
        stream = client.stream(messages=_MESSAGES, request_id=asked.request_id or None, **asked.parameters)
        async with aclosing(stream):
            async for event in stream:
                if isinstance(event, Delta) and event.text:
                    found[asked.request_id, len(found)] = time.monotonic_ns()
        return found

    return ask


def _by_http(url: str) -> Way:
    async def ask(asked: _Asked) -> Arrivals:
        found: Arrivals = {}
        async with aclosing(_lines(url, asked.body)) as lines:
            async for line in lines:
                now = time.monotonic_ns()
                if not line.startswith(b"data: {"):
                    continue
                chunk = json.loads(line[6:])
                if any(choice["delta"].get("content") for choice in chunk["choices"]):
                    found[f"{chunk['id']}-0", len(found)] = now
        return found

    return ask


async def _lines(url: str, body: dict[str, object]) -> AsyncGenerator[bytes]:
    """The lines of an answer, chunk sizes among them, read with as little of this process' time as Python allows."""
    address, content = urlsplit(url), json.dumps(body).encode()
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    try:
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {address.netloc}\r\nContent-Type: application/json\r\n"
        writer.write(f"{head}Content-Length: {len(content)}\r\nConnection: close\r\n\r\n".encode() + content)
        await writer.drain()
        status = await reader.readline()
        if b" 200 " not in status:
            raise RuntimeError(f"the front end answered {status!r}: {(await reader.read())[-500:]!r}")
        async for line in reader:
            yield line
    finally:
        writer.close()
        await writer.wait_closed()


# ---------------------------------------------------------------- latency


def _latency(setting: Setting) -> Result:
    """From the commit on the engine thread to the client, one request at a time, by either way in turn."""
    requests = 5 if setting.quick else 40
    engine = setting.engine("demo")
    with TemporaryDirectory() as folder:
        log = Path(folder) / "commits"
        repository = patched_repository(Path(folder) / "models", TIMED_COMMITS.format(log=str(log)))
        options = ServerOptions(http_port=0, grpc_port=0, metrics_port=0, model_repository=repository)
        with (
            running_server(engine, options=options, threads=THREADS) as server,
            running_front_end(server.grpc_url, "--log-level", "WARNING") as front,
        ):
            direct, front_end = asyncio.run(_in_turn(server.grpc_url, front.url, requests))
        commits = {(name, int(index)): int(when) for name, index, when in map(str.split, log.read_text().splitlines())}
    direct_ms, front_ms = (
        [(when - commits[key]) / 1e6 for key, when in arrivals.items()] for arrivals in (direct, front_end)
    )
    added_ms = median(front_ms) - median(direct_ms)
    figure = f"{added_ms:.2f} ms added; median {median(front_ms):.2f} ms, by gRPC {median(direct_ms):.2f} ms"
    details = {
        "front_ms": [round(value, 3) for value in front_ms],
        "grpc_ms": [round(value, 3) for value in direct_ms],
    }
    return Result(figure, added_ms <= (5 if setting.quick else 1) * ADDED_MS, details)


async def _in_turn(grpc_url: str, url: str, requests: int) -> tuple[Arrivals, Arrivals]:
    direct: Arrivals = {}
    front_end: Arrivals = {}
    async with Client(grpc_url, timeout_s=120) as client:
        ways = ((_by_grpc(client), direct), (_by_http(url), front_end))
        for number in range(-1, requests):  # the first is warm-up
            for way, arrivals in ways:
                found = await way(_Asked(number % 2**32, f"direct-{number}"))
                if number >= 0:
                    arrivals |= found
    return direct, front_end


# ---------------------------------------------------------------- throughput


def _throughput(setting: Setting) -> Result:
    """Canvases per second at 16 clients by the front end, of those by gRPC; interleaved rounds."""
    rounds, each = (1, 1) if setting.quick else (7, 3)
    engine = setting.engine("demo")
    with (
        running_server(engine, threads=THREADS) as server,
        running_front_end(server.grpc_url, "--log-level", "WARNING") as front,
    ):
        shares = asyncio.run(_shares(server.grpc_url, front.url, rounds, each))
    share = median(shares)
    figure = f"{share:.1%} of gRPC's; {min(shares):.1%} to {max(shares):.1%} in {rounds} rounds"
    return Result(figure, share >= (0.5 if setting.quick else KEPT), {"shares": [round(share, 4) for share in shares]})


async def _shares(grpc_url: str, url: str, rounds: int, each: int) -> list[float]:
    shares = []
    async with Client(grpc_url, timeout_s=300) as client:
        direct, front_end = _by_grpc(client), _by_http(url)
        await _seconds(direct, 1)
        await _seconds(front_end, 1)
        for _ in range(rounds):
            before_s = await _seconds(direct, each)
            front_s = await _seconds(front_end, each)
            after_s = await _seconds(direct, each)
            shares.append((before_s + after_s) / 2 / front_s)
    return shares


async def _seconds(way: Way, each: int) -> float:
    """For `each` generations of every client."""

    async def one(number: int) -> None:
        for index in range(each):
            found = await way(_Asked(number * each + index))
            assert len(found) == CANVASES, found

    started = time.perf_counter()
    await asyncio.gather(*(one(number) for number in range(CLIENTS)))
    return time.perf_counter() - started


# ---------------------------------------------------------------- probes


def _probes(setting: Setting) -> Result:
    """Live and ready, asked over new connections while 16 clients stream."""
    seconds = 3 if setting.quick else 20
    engine = setting.engine("demo")
    with (
        running_server(engine, threads=THREADS) as server,
        running_front_end(server.grpc_url, "--log-level", "WARNING") as front,
    ):
        times_ms = asyncio.run(_probed(front.url, seconds))
    longest = max(times_ms)
    figure = f"{len(times_ms)} probes: median {median(times_ms):.1f} ms, longest {longest:.0f} ms"
    return Result(figure, longest <= (5 if setting.quick else 1) * PROBE_MS, {"longest_ms": round(longest, 1)})


async def _probed(url: str, seconds: float) -> list[float]:
    way, ended = _by_http(url), asyncio.Event()

    async def load(number: int) -> None:
        while not ended.is_set():
            await way(_Asked(number))

    clients = [asyncio.create_task(load(number)) for number in range(CLIENTS)]
    times_ms = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for path in _PROBES:
            times_ms.append(await _probe_ms(url, path))
        await asyncio.sleep(_PROBE_EVERY_S)
    ended.set()
    await asyncio.gather(*clients)
    return times_ms


async def _probe_ms(url: str, path: str) -> float:
    """Of a new connection, as an orchestrator's probe makes one."""
    address = urlsplit(url)
    started = time.perf_counter()
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    writer.write(f"GET {path} HTTP/1.1\r\nHost: {address.netloc}\r\nConnection: close\r\n\r\n".encode())
    answer = await reader.read()
    spent_ms = 1000 * (time.perf_counter() - started)
    writer.close()
    await writer.wait_closed()
    if b" 200 " not in answer.split(b"\r\n", 1)[0]:
        raise RuntimeError(f"{path} answered {answer[:200]!r}")
    return spent_ms


ROWS: tuple[Row, ...] = (
    Row("front end: time added to a streamed canvas, beside gRPC", "at most 2 ms at the median", _latency),
    Row("front end: throughput at 16 clients, beside gRPC", "at least 90%", _throughput),
    Row("front end: health probes while 16 clients stream", "all within 200 ms", _probes),
)
