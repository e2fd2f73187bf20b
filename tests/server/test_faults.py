"""Faults under load on a real server: clients get their error soon, readiness tells the truth, service comes back."""

from __future__ import annotations

import contextlib
import http.client
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from tests.server.conftest import until
from tritonclient.grpc import service_pb2, service_pb2_grpc

from dgemma_runtime.server import ServerOptions, running_server
from dgemma_runtime.server_process import model_processes

if TYPE_CHECKING:
    from tests.server.conftest import Answer, Caller, Command

STEP_TIMEOUT_S = 3.0  # also without a heartbeat
ERROR_S = 5.0  # a client may wait so long for its error


@dataclass
class Supervised:
    """The command, restarted by fault after fault, and a caller that finds it under the same ports."""

    command: Command
    caller: Caller
    starts: int = 1

    @property
    def model_pid(self) -> int:
        return next(model_processes(self.command.ready(self.starts).pid))

    def back(self) -> None:
        """Ready again, and right."""
        self.starts += 1
        self.command.ready(self.starts)
        assert self.caller.ready()
        assert self.caller.infer(text_input="short").text == "a reply"


@pytest.fixture(scope="module")
def supervised(command: Callable[..., Command], call: type[Caller]) -> Supervised:
    """Two requests run at once. Each failure counts as the first one, so that none is followed by a pause."""
    timeout = ("--step-timeout", str(STEP_TIMEOUT_S))
    running = command("--max-batch-size", "2", "--restart-window", "0.01", *timeout)
    return Supervised(running, call(running.ready()))


def suffer(caller: Caller, fault: Callable[[], object], after_s: float = 0.0) -> list[Answer]:
    """What two running streams, a waiting one and one over HTTP get, within ERROR_S + `after_s` seconds of a fault."""
    with contextlib.ExitStack() as stack, ThreadPoolExecutor(1) as pool:
        streams = [stack.enter_context(caller.stream(text_input="forever", stream=True)) for _ in range(2)]
        for stream in streams:
            stream.next()
        streams.append(stack.enter_context(caller.stream(text_input="forever", stream=True)))
        over_http = pool.submit(posted, caller)
        time.sleep(0.1)
        started = time.monotonic()
        fault()
        answers = [stream.finish() for stream in streams]
        over_http.result(ERROR_S + after_s)
        assert time.monotonic() - started < ERROR_S + after_s
    assert all(answer.error is not None for answer in answers)
    assert sum(answer.last_flags for answer in answers) == 0  # the error is the only end
    return answers


def posted(caller: Caller) -> None:
    with contextlib.suppress(OSError):  # the connection is closed
        status, text = caller.post("generate", {"text_input": "forever"})
        assert status != 200, text


# ---------------------------------------------------------------- backend


@pytest.mark.parametrize("victim", ["model", "triton"])
def test_a_process_is_killed(supervised: Supervised, victim: str) -> None:
    pid = supervised.model_pid if victim == "model" else supervised.command.ready(supervised.starts).pid
    answers = suffer(supervised.caller, lambda: os.kill(pid, signal.SIGKILL))
    assert not supervised.caller.ready()
    assert all("StatusCode.UNAVAILABLE" in str(answer.error) for answer in answers)
    said = {"model": "the model's process has crashed", "triton": "the server ended by itself with status -9"}
    supervised.command.wait_for(f"error: {said[victim]}; starting the server again \\(restart 1 of 5\\)")
    supervised.back()


def test_the_engine_raises(supervised: Supervised) -> None:
    with contextlib.ExitStack() as stack:
        # Fewer than fill the batch, so that the failing prompt runs.
        running = stack.enter_context(supervised.caller.stream(text_input="forever", stream=True))
        running.next()
        started = time.monotonic()
        stack.enter_context(supervised.caller.stream(text_input="fail"))
        answer = running.finish()
        assert time.monotonic() - started < ERROR_S
        assert "the engine failed: scripted failure" in str(answer.error)
        until(lambda: not supervised.caller.ready(), 1.0)
    supervised.command.wait_for(r"error: the engine failed: scripted failure; loading the model again \(restart 1 of 5")
    supervised.back()


def test_an_engine_call_overruns(supervised: Supervised) -> None:
    caller = supervised.caller
    with contextlib.ExitStack() as stack:
        running = stack.enter_context(caller.stream(text_input="forever", stream=True))
        running.next()
        hanging = stack.enter_context(caller.stream(text_input="hang", stream=True))
        waiting = stack.enter_context(caller.stream(text_input="short"))
        started = time.monotonic()
        for stream in (running, hanging, waiting):
            answer = stream.finish()
            assert "has not returned after" in str(answer.error)
            assert answer.last_flags == 0
        assert time.monotonic() - started < STEP_TIMEOUT_S + ERROR_S
        until(lambda: not caller.ready(), 1.0)
    supervised.command.wait_for(r"\(denoise, \d rows?\) has not returned .*; loading the model again \(restart 1 of 5")
    supervised.back()


def test_a_process_that_stands_still(supervised: Supervised) -> None:
    """As a library would make it that holds Python's lock for ever: only another process can tell."""
    pid = supervised.model_pid
    suffer(supervised.caller, lambda: os.kill(pid, signal.SIGSTOP), after_s=STEP_TIMEOUT_S)
    assert not supervised.caller.ready()
    supervised.command.wait_for(r"has shown no sign of life for 3\.\d s; starting the server again")
    supervised.back()


# ---------------------------------------------------------------- clients


@pytest.fixture(scope="module")
def narrow(make_engine: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An engine whose `forever` lasts longer than any test."""
    return make_engine(tmp_path_factory.mktemp("engines") / "slow", delay_s=0.02)


_CLIENT = """
import sys, time, tritonclient.grpc as triton, numpy as np
client = triton.InferenceServerClient(sys.argv[1])
client.start_stream(lambda result, error: print("response", flush=True))
prompt, stream = triton.InferInput("text_input", [1], "BYTES"), triton.InferInput("stream", [1], "BOOL")
prompt.set_data_from_numpy(np.array([b"forever"], object))
stream.set_data_from_numpy(np.array([True]))
client.async_stream_infer("diffusion_gemma", [prompt, stream])
time.sleep(60)
"""


def test_a_client_that_is_killed_leaves_nothing_running(narrow: Path, call: type[Caller]) -> None:
    with running_server(narrow, max_batch_size=1) as server:
        client = subprocess.Popen([sys.executable, "-c", _CLIENT, server.grpc_url], stdout=subprocess.PIPE)
        assert client.stdout is not None
        assert client.stdout.readline() == b"response\n"
        client.kill()
        client.wait()
        client.stdout.close()
        assert call(server).infer(text_input="short", timeout_s=ERROR_S).text == "a reply"  # the only slot is free


def message(**inputs: Any) -> Any:
    """A request as protobuf, for a reader of its own pace."""
    request = service_pb2.ModelInferRequest(model_name="diffusion_gemma", id="slow")
    request.parameters["triton_enable_empty_final_response"].bool_param = True
    for name, value in inputs.items():
        tensor = request.inputs.add(name=name, shape=[1])
        if isinstance(value, bool):
            tensor.datatype, content = "BOOL", bytes([value])
        else:
            tensor.datatype, content = "BYTES", len(value).to_bytes(4, "little") + value.encode()
        request.raw_input_contents.append(content)
    return request


def resident_mib(pid: int) -> float:
    fields = Path(f"/proc/{pid}/statm").read_text().split()
    return int(fields[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def test_a_slow_reader_holds_up_nobody_and_misses_no_commit(
    make_engine: Callable[..., Path], tmp_path: Path, call: type[Caller]
) -> None:
    directory = make_engine(tmp_path / "fast", delay_s=0.0005, steps=8)
    small = [("grpc.http2.lookahead_bytes", 2**16), ("grpc.http2.bdp_probe", 0)]  # what the client's side may buffer
    with running_server(directory) as server, grpc.insecure_channel(server.grpc_url, options=small) as channel:
        caller, stub = call(server), service_pb2_grpc.GRPCInferenceServiceStub(channel)
        calm = caller.infer(text_input="long", stream=True).times[-1]
        before = resident_mib(server.pid)
        requests = iter([message(text_input="forever", stream=True, stream_previews=True)])
        responses = stub.ModelStreamInfer(requests, timeout=60)
        next(responses)
        for _ in range(20):
            assert caller.infer(text_input="long", stream=True).times[-1] < calm + 1.0
        time.sleep(1.0)
        assert resident_mib(server.pid) - before < 64
        infos = [response.infer_response for response in responses]
        outputs = [{output.name for output in info.outputs} for info in infos]
        assert sum("canvas_steps" in names and "text_output" in names for names in outputs) >= 250
        assert sum(info.parameters["triton_final_response"].bool_param for info in infos) == 1
        assert infos[-1].parameters["triton_final_response"].bool_param


# ---------------------------------------------------------------- shutdown


def ready_over(connection: http.client.HTTPConnection) -> bool:
    connection.request("GET", "/v2/models/diffusion_gemma/ready")
    with connection.getresponse() as answer:
        return answer.status == 200


def test_sigterm_under_load(narrow: Path, call: type[Caller]) -> None:
    options = ServerOptions(http_port=0, grpc_port=0, metrics_port=0, exit_timeout_s=6)  # 3 s of it for requests
    with running_server(narrow, options=options, max_batch_size=3) as server, contextlib.ExitStack() as stack:
        caller = call(server)

        def start(**request: Any) -> Any:
            return stack.enter_context(caller.stream(**request))

        channel = stack.enter_context(grpc.insecure_channel(server.grpc_url))
        requests = iter([message(text_input="forever", stream=True, stream_previews=True)])
        unread = service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelStreamInfer(requests, timeout=60)
        next(unread)
        endless = start(text_input="forever", stream=True)
        endless.next()
        ending = start(text_input="long", stream=True)
        ending.next()
        waiting = [start(text_input="short") for _ in range(3)]
        kept = stack.enter_context(caller.http_connection())
        assert ready_over(kept)
        started = time.monotonic()
        server.terminate()
        assert not ready_over(kept)
        assert not caller.ready()
        with caller.stream(text_input="short", timeout_s=5.0) as late:
            assert late.finish().error is not None
        assert ending.finish().error is None
        for stream in waiting:
            assert stream.finish().text == "a reply"
        assert time.monotonic() - started < 3
        cut = endless.finish()
        assert "the server is shutting down" in str(cut.error)
        assert cut.text.startswith("and so on")
        assert server.stop() == 0  # though clients keep their streams open, and one does not read its own
        assert time.monotonic() - started < 10
