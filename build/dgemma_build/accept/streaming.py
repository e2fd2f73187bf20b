"""The row about streaming: from the commit on the engine thread to the event at the client. Needs a real server."""

from __future__ import annotations

import asyncio
import time
from contextlib import aclosing
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory

from dgemma_build.accept.table import Result, Row, Setting
from dgemma_client import Client, Delta
from dgemma_client.requests import Parameters
from dgemma_runtime.contract import Manifest
from dgemma_runtime.server import ServerOptions, running_server
from dgemma_runtime.server_process import MODEL_NAME, default_model_repository

CANVASES, THREADS = 4, 2
BAR_MS = 2.0
QUICK_BAR_MS = 10.0  # in CI, where other work shares the cores

# Behind the model's own file: notes when the engine thread commits a canvas. Changes nothing else.
TIMED_COMMITS = """

import time

from dgemma_runtime.events import Commit
from dgemma_runtime.service import Service

_submit = Service.submit


def _timed_submit(self, request, sink, *rest):
    def timed(event):
        now = time.monotonic_ns()
        sink(event)
        if isinstance(event, Commit):
            with open({log!r}, "a") as file:
                print(request.request_id, event.canvas_index, now, file=file)

    return _submit(self, request, timed, *rest)


Service.submit = _timed_submit
"""


def _streaming(setting: Setting) -> Result:
    """Both processes read the machine's CLOCK_MONOTONIC, so their times compare."""
    requests = 5 if setting.quick else 25
    canvas_length = Manifest.load(setting.engine("demo")).model.canvas_length
    with TemporaryDirectory() as folder:
        log = Path(folder) / "commits"
        repository = patched_repository(Path(folder) / "models", TIMED_COMMITS.format(log=str(log)))
        options = ServerOptions(http_port=0, grpc_port=0, metrics_port=0, model_repository=repository)
        with running_server(setting.engine("demo"), options=options, threads=THREADS) as server:
            arrivals = asyncio.run(_arrivals(server.grpc_url, requests, canvas_length))
        commits = {(name, int(index)): int(when) for name, index, when in map(str.split, log.read_text().splitlines())}
    latencies_ms = [(when - commits[key]) / 1e6 for key, when in arrivals.items()]
    early = sum(arrivals[_name(number), 0] < commits[_name(number), 1] for number in range(requests))
    average, longest = mean(latencies_ms), max(latencies_ms)
    figure = f"{early} of {requests} first canvases in time; mean {average:.2f} ms, longest {longest:.1f} ms"
    details = {"latencies_ms": [round(value, 3) for value in latencies_ms]}
    return Result(figure, early == requests and average <= (QUICK_BAR_MS if setting.quick else BAR_MS), details)


def patched_repository(folder: Path, code: str) -> Path:
    """The model repository with `code` behind the model's file, in the new folder."""
    model, original = folder / MODEL_NAME, default_model_repository() / MODEL_NAME
    (model / "1").mkdir(parents=True)
    (model / "config.pbtxt").write_text((original / "config.pbtxt").read_text())
    (model / "1/model.py").write_text((original / "1/model.py").read_text() + code)
    return folder


def _name(number: int) -> str:
    return f"request-{number}"


async def _arrivals(url: str, requests: int, canvas_length: int) -> dict[tuple[str, int], int]:
    """(request, canvas) -> when the client had it, in nanoseconds; one request at a time."""
    found: dict[tuple[str, int], int] = {}
    parameters: Parameters = {"max_denoising_steps": 8, "stability_threshold": -1, "end_id": -1}
    async with Client(url, timeout_s=60) as client:
        for number in range(requests):
            parameters |= {"seed": number, "max_tokens": CANVASES * canvas_length}
            stream = client.stream("An unusual prompt", request_id=_name(number), **parameters)
            index = 0
            async with aclosing(stream):
                async for event in stream:
                    if isinstance(event, Delta):
                        found[_name(number), index] = time.monotonic_ns()
                        index += 1
    return found


ROWS: tuple[Row, ...] = (
    Row(
        "streaming: first canvas at the client before the second is denoised; commit to client",
        "all; mean at most 2 ms",
        _streaming,
    ),
)
