"""The row about hostile requests: made up from the published document, and by hand. Needs the real servers."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import httpx

from dgemma_build.accept.api_abuse import abuse
from dgemma_build.accept.api_requests import check
from dgemma_build.accept.table import Result, Row, Setting
from dgemma_build.front_end import running_front_end
from dgemma_runtime.server import running_server

MODEL = "diffusion_gemma"
EXAMPLES, ROUNDS = 200, 3  # made-up requests of each operation; hostile ones by hand
GROWN_MIB = 256  # that the front end may have grown by; bodies of 8 MiB are read whole
_LIVE = "dgemma_openai_live_requests "
_SETTLE_S = 30.0
_TOKENS = 8


def _fuzz(setting: Setting) -> Result:
    with (
        running_server(setting.engine("demo")) as server,
        running_front_end(server.grpc_url, "--triton-metrics", server.metrics_url) as front,
    ):
        _complete(front.url)
        before = _resident_mib(front.process.pid)
        made = check(front.url, EXAMPLES, MODEL, _TOKENS)
        forced = asyncio.run(abuse(front.url, MODEL, ROUNDS))
        problems = [*made.problems, *forced.problems, *_after(front.url)]
        grown = _resident_mib(front.process.pid) - before
        problems += [f"the front end grew by {grown:.0f} MiB"] if grown > GROWN_MIB else []
        problems += [f"log: {line}" for line in front.log if "Traceback" in line or " ERROR " in line]
        problems += [] if server.returncode is None else ["Triton has ended"]
    for problem in problems:
        setting.console.print(problem, markup=False, highlight=False)
    failed = sum(count for status, count in made.statuses.items() if status >= 500)
    figure = (
        f"{made.requests} requests of {made.operations} operations, {failed} answered 5xx; "
        f"{sum(forced.tried.values())} hostile connections, healthy throughout; {len(problems)} problems"
    )
    details = {
        "statuses": {str(status): count for status, count in sorted(made.statuses.items())},
        "tried": dict(forced.tried),
        "slowest_probe_ms": round(forced.slowest_probe_ms, 1),
        "grown_mib": round(grown, 1),
        "problems": problems,
    }
    return Result(figure, not problems and not failed, details)


def _after(url: str) -> list[str]:
    """What is wrong with the server afterwards."""
    problems = []
    end = time.monotonic() + _SETTLE_S
    while (live := _live_requests(url)) and time.monotonic() < end:
        time.sleep(0.2)
    if live:
        problems.append(f"{live:g} requests are still under way")
    if (status := httpx.get(f"{url}/v1/health/ready").status_code) != 200:
        problems.append(f"ready says {status}")
    if (tokens := _complete(url)) != _TOKENS:
        problems.append(f"a completion has {tokens} tokens")
    return problems


def _live_requests(url: str) -> float:
    page = httpx.get(f"{url}/metrics").text
    return float(next(line for line in page.splitlines() if line.startswith(_LIVE)).removeprefix(_LIVE))


def _complete(url: str) -> int:
    """Its tokens."""
    body = {"model": MODEL, "prompt": "An unusual prompt", "max_tokens": _TOKENS, "ignore_eos": True, "seed": 1}
    answer = httpx.post(f"{url}/v1/completions", json=body, timeout=60)
    answer.raise_for_status()
    return int(answer.json()["usage"]["completion_tokens"])


def _resident_mib(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    return float(next(line for line in status.splitlines() if line.startswith("VmRSS:")).split()[1]) / 1024


ROWS = (
    Row(
        "API fuzz: the published document, bad UTF-8, huge bodies, slow clients, garbage, abrupt leaves",
        "no 5xx, no hang, server healthy after",
        _fuzz,
        quick=False,  # slow clients take a minute; tests/openai has the same over a stand-in for Triton
    ),
)
