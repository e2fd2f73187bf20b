"""Rows about faults under load, with the demo engine: what clients see, what a probe sees, when service is back.

None is quick: tests/server/test_faults.py asserts the same in CI, with a scripted engine.
"""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import asdict, dataclass
from statistics import median

import grpc
import psutil
from tritonclient.grpc import service_pb2_grpc

from dgemma_build.accept.supervised import SupervisedServer, supervised_server, wait_until
from dgemma_build.accept.table import Result, Row, Setting
from dgemma_client import Client, ClientError, ConnectError, Done, Overloaded, ServerError
from dgemma_client.requests import Parameters, Prompt, build
from dgemma_client.tensors import encode
from dgemma_runtime.contract import Manifest
from dgemma_runtime.server_process import MODEL_NAME

CLIENTS, THREADS = 4, 2
ERROR_BAR_S, BACK_S = 5.0, 60.0
STEP_TIMEOUT_S = 3.0
PROMPT = "An unusual prompt"
ENDLESS: Parameters = {"end_id": -1, "stability_threshold": -1}  # as far as the context goes
UNREAD: Parameters = {**ENDLESS, "max_tokens": 2048}
ONE_CANVAS: Parameters = {"end_id": -1, "stability_threshold": -1, "max_denoising_steps": 4, "max_tokens": 1}

TWO_CANVASES: Parameters = {**ONE_CANVAS, "max_tokens": 65}


# ---------------------------------------------------------------- engine and processes


@dataclass(frozen=True)
class Outcome:
    """Of one fault; seconds since it happened."""

    ends: list[str]  # how each client's request ended: its error's class, or "done"
    error_s: float  # the last client's
    unready_s: float  # the first probe that was answered no
    probed_ready_s: float  # the first one after that answered yes
    back_s: float  # the first answer to a new request


class Probe:
    """Asks for readiness all the time, as an orchestrator does more seldom."""

    def __init__(self, server: SupervisedServer) -> None:
        self._server, self._stopping = server, threading.Event()
        self.seen: list[tuple[float, bool]] = []  # moment of the answer, answer
        self._thread = threading.Thread(target=self._main)
        self._thread.start()

    def _main(self) -> None:
        while not self._stopping.wait(0.02):
            ready = self._server.ready()
            self.seen.append((time.monotonic(), ready))

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join()

    def changes(self, since: float) -> list[tuple[float, bool]]:
        """Seconds after `since`, and the new answer."""
        after = [(moment - since, ready) for moment, ready in self.seen if moment > since]
        return [entry for index, entry in enumerate(after) if entry[1] != (after[index - 1][1] if index else True)]


async def _suffer(server: SupervisedServer, fault: Callable[[], None]) -> Outcome:
    """Clients stream, the fault happens, somebody tries again and again until an answer comes."""
    async with Client(server.grpc_url, timeout_s=BACK_S) as client:
        under_way = [asyncio.Event() for _ in range(CLIENTS)]
        tasks = [asyncio.create_task(_end_of(client, event)) for event in under_way]
        await asyncio.gather(*(event.wait() for event in under_way))
        probe = Probe(server)
        try:
            started = time.monotonic()
            fault()
            ends = await asyncio.gather(*tasks)
            answered = await _first_answer(client)
            await asyncio.sleep(0.2)
        finally:
            await asyncio.to_thread(probe.stop)
    changes = probe.changes(started)
    if [ready for _, ready in changes] != [False, True]:
        raise RuntimeError(f"readiness changed otherwise than once to no and once to yes: {changes}")
    (unready_s, _), (ready_s, _) = changes
    error_s = max(moment for _, moment in ends) - started
    return Outcome([kind for kind, _ in ends], error_s, unready_s, ready_s, answered - started)


async def _end_of(client: Client, under_way: asyncio.Event) -> tuple[str, float]:
    """How one request ended, and when; raises where it ended twice."""
    end = ""
    try:
        async with aclosing(client.stream(PROMPT, previews=True, **ENDLESS)) as events:
            async for event in events:
                under_way.set()
                if end:
                    raise RuntimeError(f"{event} came after the end")
                end = "done" if isinstance(event, Done) else ""
    except ClientError as error:
        end = type(error).__name__
    return end, time.monotonic()


async def _first_answer(client: Client) -> float:
    end = time.monotonic() + BACK_S
    while True:
        try:
            await client.generate(PROMPT, **ONE_CANVAS)
        except ClientError:
            if time.monotonic() > end:
                raise
            await asyncio.sleep(0.02)
        else:
            return time.monotonic()


def _row(what: str, fault: Callable[[SupervisedServer], None], error_kind: type[ClientError], late_s: float = 0) -> Row:
    """`late_s`: how long nobody can know of the fault."""

    def measure(setting: Setting) -> Result:
        arguments = ("--threads", str(THREADS), "--step-timeout", str(STEP_TIMEOUT_S))
        with supervised_server(setting.engine("demo"), *arguments) as server:
            outcome = asyncio.run(_suffer(server, lambda: fault(server)))
        passed = outcome.error_s < ERROR_BAR_S + late_s and set(outcome.ends) == {error_kind.__name__}
        passed &= outcome.unready_s < ERROR_BAR_S + late_s
        figure = (
            f"{CLIENTS} clients: {error_kind.__name__} within {outcome.error_s:.2f} s; not ready from "
            f"{outcome.unready_s:.2f} to {outcome.probed_ready_s:.2f} s; answers after {outcome.back_s:.2f} s"
        )
        return Result(figure, passed, asdict(outcome))

    after = f" after the {late_s:g} s of --step-timeout" if late_s else ""
    bar = f"error within {ERROR_BAR_S:g} s{after}, not ready meanwhile, back without a human"
    return Row(f"fault: {what}", bar, measure, quick=False)


def _kill_model(server: SupervisedServer) -> None:
    os.kill(server.model_pid, signal.SIGKILL)


def _stop_model(server: SupervisedServer) -> None:
    os.kill(server.model_pid, signal.SIGSTOP)


def _kill_triton(server: SupervisedServer) -> None:
    os.kill(server.triton_pid, signal.SIGKILL)


# ---------------------------------------------------------------- clients


def _client_gone(setting: Setting) -> Result:
    """The only slot is taken by a client that closes its connection; another one waits for it."""
    with supervised_server(setting.engine("demo"), "--threads", str(THREADS), "--max-batch-size", "1") as server:
        waited_s = asyncio.run(_after_a_client_that_goes(server.grpc_url))
    figure = f"its slot serves the next client within {waited_s:.2f} s"
    return Result(figure, waited_s < ERROR_BAR_S, {"waited_s": waited_s})


async def _after_a_client_that_goes(url: str) -> float:
    async with Client(url, timeout_s=BACK_S) as staying:
        leaving = Client(url, timeout_s=BACK_S)
        under_way = asyncio.Event()
        task = asyncio.create_task(_end_of(leaving, under_way))
        await under_way.wait()
        waiting = asyncio.create_task(staying.generate(PROMPT, **ONE_CANVAS))
        await asyncio.sleep(0.2)
        started = time.monotonic()
        await leaving.close()
        await waiting
        waited_s = time.monotonic() - started
        await task
    return waited_s


def _slow_reader(setting: Setting) -> Result:
    """One client asks for previews and reads none for a while; others go on."""
    engine = setting.engine("demo")
    expected = UNREAD["max_tokens"] // Manifest.load(engine).model.canvas_length
    with supervised_server(engine, "--threads", str(THREADS)) as server:
        beside, calm, growth_mib, canvases = asyncio.run(_beside_a_slow_reader(server))
    figure = (
        f"others: {beside:.1f} ms beside one that reads, {calm:.1f} ms beside one that does not; "
        f"Triton grew by {growth_mib:.1f} MiB; {canvases} of {expected} canvases were there when it read"
    )
    passed = beside < 1.5 * calm and growth_mib < 64 and canvases == expected
    return Result(figure, passed, {"slow_ms": beside, "calm_ms": calm, "growth_mib": growth_mib, "canvases": canvases})


async def _beside_a_slow_reader(server: SupervisedServer) -> tuple[float, float, float, int]:
    """Median ms of others beside it, and beside a reader that keeps up; MiB; canvases that the slow one got."""

    async def others(client: Client) -> float:
        times = []
        for _ in range(20):
            started = time.monotonic()
            await client.generate(PROMPT, **ONE_CANVAS)
            times.append((time.monotonic() - started) * 1e3)
        return median(times)

    async with Client(server.grpc_url, timeout_s=BACK_S) as client:
        under_way = asyncio.Event()
        reading = asyncio.create_task(_end_of(client, under_way))
        await under_way.wait()
        calm = await others(client)
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)
        triton = psutil.Process(server.triton_pid)
        before = triton.memory_info().rss
        request = build(MODEL_NAME, "slow", Prompt(PROMPT, None, None, None, False), UNREAD, True)
        message = encode(request.model, request.request_id, request.inputs)
        options = [("grpc.http2.lookahead_bytes", 2**16), ("grpc.http2.bdp_probe", 0)]
        with grpc.insecure_channel(server.grpc_url, options=options) as channel:
            responses = service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelStreamInfer(iter([message]))
            next(responses)
            slow = await others(client)
            await asyncio.sleep(5.0)  # more of what is not read
            growth = triton.memory_info().rss - before
            infos = [response.infer_response for response in responses]
        growth = max(growth, triton.memory_info().rss - before)
    outputs = [{output.name for output in info.outputs} for info in infos]
    canvases = sum({"canvas_steps", "text_output"} <= names for names in outputs)  # the rest are previews
    return slow, calm, growth / 2**20, canvases


# ---------------------------------------------------------------- shutdown


def _sigterm(setting: Setting) -> Result:
    """More clients than fit the batch; short requests are to end, the endless ones to get a clear status."""
    arguments = ("--threads", str(THREADS), "--max-batch-size", "3", "--exit-timeout", "8")
    with supervised_server(setting.engine("demo"), *arguments) as server:
        kinds, unready_s, ended_s, status = asyncio.run(_terminated(server))
    count = {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)}
    told = ", ".join(f"{number} {kind}" for kind, number in count.items())
    figure = f"{told}; not ready after {unready_s:.2f} s; ended after {ended_s:.1f} s with status {status}"
    passed = set(kinds) <= {"done", Overloaded.__name__} and status == 0 and unready_s < 1 and ended_s < 15
    return Result(figure, passed, {"ends": kinds, "unready_s": unready_s, "ended_s": ended_s, "status": status})


async def _terminated(server: SupervisedServer) -> tuple[list[str], float, float, int]:
    async with Client(server.grpc_url, timeout_s=BACK_S) as client:
        events = [asyncio.Event() for _ in range(2)]
        endless = [asyncio.create_task(_end_of(client, event)) for event in events]
        await asyncio.gather(*(event.wait() for event in events))
        short = [asyncio.create_task(_short(client)) for _ in range(10)]
        await asyncio.sleep(0.15)
        started = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        unready_s = await asyncio.to_thread(wait_until, lambda: not server.ready(), 10)
        kinds = [kind for kind, _ in await asyncio.gather(*endless)] + await asyncio.gather(*short)
    status = await asyncio.to_thread(server.process.wait, 60)
    return kinds, unready_s, time.monotonic() - started, status


async def _short(client: Client) -> str:
    try:
        await client.generate(PROMPT, **TWO_CANVASES)
    except ClientError as error:
        return type(error).__name__
    return "done"


ROWS: tuple[Row, ...] = (
    _row("the model's process is killed", _kill_model, ConnectError),
    _row("Triton is killed", _kill_triton, ConnectError),
    _row("the model's process stands still", _stop_model, ConnectError, STEP_TIMEOUT_S),
    _row("the engine raises an exception", lambda server: server.tell_engine("raise"), ServerError),
    _row("a denoising step overruns", lambda server: server.tell_engine("hang"), ServerError, STEP_TIMEOUT_S),
    Row("fault: a client is gone", f"its slot is free within {ERROR_BAR_S:g} s", _client_gone, quick=False),
    Row(
        "fault: a client does not read its stream",
        "others at most 1.5x; at most 64 MiB kept",
        _slow_reader,
        quick=False,
    ),
    Row(
        "fault: SIGTERM under load",
        "each request done or Overloaded; ends within 15 s, status 0",
        _sigterm,
        quick=False,
    ),
)
