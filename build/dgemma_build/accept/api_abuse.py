"""Connections and bodies that no client should send, and what must come of them. Knows the front end by its URL."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import httpx

PATHS = ("/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize")
_ANSWER_S = 60.0  # in which a connection must have been answered or closed; a body has 30
_PROBE_S = 10.0
_SEED = 5
_MIB = 1 << 20
_BAD_BODIES = (
    b"",
    b"\xff\xfe\x00",
    b'{"model": "\xff"}',
    b'{"model": "\xed\xa0\x80"}',
    b'{"model": "\\ud800"}',
    '{"model": 1}'.encode("utf-16"),
    b"[" * 500_000,
    b'{"a":' * 500_000,
    b'{"n": ' + b"9" * 100_000 + b"}",
    b'{"n": 1e999, "seed": NaN}',
    b'{"a": 1, "a": 2}',
    b"{" * 7 * _MIB,
    b'{"messages": [' + b"{}," * _MIB + b"{}]}",
    b'{"prompt": "' + b"x" * 7 * _MIB,
    b'{"model": "m", "prompt": [' + b"-1," * 2 * _MIB + b"-1]}",
    b'{"tokens": [' + b"-1," * 2 * _MIB + b"-1]}",
    b"{" + b",".join(b'"%d": 1' % number for number in range(500_000)) + b"}",
)

_Send = Callable[[asyncio.StreamWriter], Awaitable[None]]


@dataclass
class Report:
    """What was tried and what came of it."""

    tried: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    slowest_probe_ms: float = 0.0


@dataclass(frozen=True)
class _Target:
    url: str
    model: str

    @asynccontextmanager
    async def connection(self) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        address = urlsplit(self.url)
        reader, writer = await asyncio.open_connection(address.hostname, address.port)
        try:
            yield reader, writer
        finally:
            writer.transport.abort()
            with suppress(OSError):
                await writer.wait_closed()

    def head(self, path: str, *headers: str) -> bytes:
        lines = [f"POST {path} HTTP/1.1", "Host: front", "Content-Type: application/json", *headers, "", ""]
        return "\r\n".join(lines).encode()

    def good(self, stream: bool = False, max_tokens: int = 4) -> bytes:
        body = {"model": self.model, "prompt": "An unusual prompt", "max_tokens": max_tokens, "stream": stream}
        content = json.dumps(body | {"ignore_eos": stream}).encode()
        return self.head(PATHS[1], f"Content-Length: {len(content)}") + content


async def abuse(url: str, model: str, rounds: int) -> Report:
    """Everything `rounds` times, in turns, while health is asked for; the same each time."""
    report, target = Report(), _Target(url, model)
    stop = asyncio.Event()
    probes = asyncio.create_task(_probe(url, report, stop))
    try:
        for number in range(rounds):
            for attack in _ATTACKS:
                await attack(target, report, random.Random(_SEED + number))
    finally:
        stop.set()
        await probes
    return report


async def _probe(url: str, report: Report, stop: asyncio.Event) -> None:
    async with httpx.AsyncClient(base_url=url, timeout=_PROBE_S) as http:
        while not stop.is_set():
            started = time.perf_counter()
            for path in ("/v1/health/live", "/v1/health/ready"):
                try:
                    answer = await http.get(path)
                except httpx.HTTPError as error:
                    report.problems.append(f"{path}: {type(error).__name__} {error}")
                    continue
                if answer.status_code != 200:
                    report.problems.append(f"{path}: {answer.status_code} {answer.text[:200]}")
            report.slowest_probe_ms = max(report.slowest_probe_ms, 1000 * (time.perf_counter() - started))
            with suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), 0.1)


# ---------------------------------------------------------------- what is sent


async def _bad_bodies(target: _Target, report: Report, _: random.Random) -> None:
    for path in PATHS:
        for body in _BAD_BODIES:
            sent = target.head(path, f"Content-Length: {len(body)}", "Connection: close") + body
            await _expect(target, report, "bad body", (b" 400 ",), _sending(sent))


async def _huge_bodies(target: _Target, report: Report, _: random.Random) -> None:
    declared = target.head(PATHS[0], f"Content-Length: {1 << 40}") + b"{"
    await _expect(target, report, "huge declared body", (b" 413 ",), _sending(declared))
    chunks = [target.head(PATHS[0], "Transfer-Encoding: chunked")]
    chunks += [b"100000\r\n" + b"x" * _MIB + b"\r\n"] * 64
    await _expect(target, report, "huge chunked body", (b" 413 ", b""), _sending(*chunks))


async def _garbage(target: _Target, report: Report, chance: random.Random) -> None:
    for _ in range(20):
        noise = chance.randbytes(chance.randrange(1, 4000))
        await _expect(target, report, "garbage", (b" 400 ", b" 408 ", b""), _sending(noise + b"\r\n\r\n"))
        await _expect(target, report, "pipelined garbage", (b" 400 ", b" 200 "), _sending(target.good() + noise))
    endless = b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 50_000
    await _expect(target, report, "endless headers", (b" 431 ", b""), _sending(endless))


async def _truncated(target: _Target, report: Report, chance: random.Random) -> None:
    good = target.good()
    for _ in range(20):
        async with target.connection() as (_, writer):
            writer.write(good[: chance.randrange(1, len(good))])
            await writer.drain()
        report.tried["truncated request"] += 1


async def _leaving(target: _Target, report: Report, chance: random.Random) -> None:
    async def leave(after_s: float) -> None:
        async with target.connection() as (_, writer):
            writer.write(target.good(stream=True, max_tokens=512))
            await writer.drain()
            await asyncio.sleep(after_s)
        report.tried["abrupt leave"] += 1

    await asyncio.gather(*(leave(chance.uniform(0, 0.5)) for _ in range(12)))


def _dribbling(content: bytes) -> _Send:
    async def send(writer: asyncio.StreamWriter) -> None:
        for letter in content:
            writer.write(bytes([letter]))
            await writer.drain()
            await asyncio.sleep(0.2)

    return send


async def _slow_headers(target: _Target, report: Report, _: random.Random) -> None:
    """Headers have 10 s."""
    send = _dribbling(target.head(PATHS[0], "X: " + "y" * 200))
    await asyncio.gather(*(_expect(target, report, "slow headers", (b" 408 ", b""), send) for _ in range(50)))


async def _slow_bodies(target: _Target, report: Report, _: random.Random) -> None:
    """A body has 30 s."""
    head, rest = target.head(PATHS[0], "Content-Length: 1000"), _dribbling(b"x" * 1000)

    async def send(writer: asyncio.StreamWriter) -> None:
        writer.write(head)
        await rest(writer)

    await asyncio.gather(*(_expect(target, report, "slow body", (b" 408 ", b""), send) for _ in range(50)))


async def _slow_readers(target: _Target, report: Report, _: random.Random) -> None:
    async def doze() -> None:
        async with target.connection() as (_, writer):
            writer.write(target.good(stream=True, max_tokens=512))
            await writer.drain()
            await asyncio.sleep(3)
        report.tried["slow reader"] += 1

    await asyncio.gather(*(doze() for _ in range(8)))


_ATTACKS = (
    *(_bad_bodies, _huge_bodies, _garbage, _truncated, _leaving),
    *(_slow_headers, _slow_bodies, _slow_readers),
)


# ---------------------------------------------------------------- what must come back


def _sending(*parts: bytes) -> _Send:
    async def send(writer: asyncio.StreamWriter) -> None:
        for part in parts:
            writer.write(part)
            await writer.drain()

    return send


async def _expect(target: _Target, report: Report, what: str, allowed: tuple[bytes, ...], send: _Send) -> None:
    """The first line of the answer has one of these; b"" is a connection that was closed without one."""
    report.tried[what] += 1
    async with target.connection() as (reader, writer):
        sending = asyncio.ensure_future(send(writer))
        try:
            async with asyncio.timeout(_ANSWER_S):
                line = await reader.readline()
        except TimeoutError:
            report.problems.append(f"{what}: no answer within {_ANSWER_S:g} s")
            return
        except OSError:
            line = b""  # closed while it was still being sent to
        finally:
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)
    if not any(status in line if status else line == b"" for status in allowed):
        report.problems.append(f"{what}: answered {line!r}")
