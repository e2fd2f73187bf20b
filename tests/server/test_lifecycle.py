"""From start to end of a real server: settings, cancellation, overload, engine failure, crash, shutdown, restart."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from tests.server.conftest import until

from dgemma_runtime.contract import MANIFEST_FILE, file_sha256
from dgemma_runtime.errors import ConfigurationError, ManifestError
from dgemma_runtime.process_settings import ProcessSettings
from dgemma_runtime.server import RunningServer, ServerOptions, ServerStartError, running_server, start_server
from dgemma_runtime.server_process import model_processes

if TYPE_CHECKING:
    from tests.server.conftest import Caller, Stream

FREE = ServerOptions(http_port=0, grpc_port=0, metrics_port=0)


def regions_of(run_directory: Path) -> list[Path]:
    """The shared-memory regions of one server; other servers of this machine have theirs."""
    return list(Path("/dev/shm").glob(run_directory.name.replace("-", "_") + "_*"))


# ---------------------------------------------------------------- one request at a time


@pytest.fixture(scope="module")
def narrow(engine: Path, call: type[Caller]) -> Iterator[Caller]:
    """A server that runs one request and lets one wait."""
    with running_server(engine, max_batch_size=1, queue_size=1) as server:
        yield call(server)


@pytest.fixture
def busy(narrow: Caller) -> Iterator[Stream]:
    """A request of many seconds under way there; cancelled at the end, if not before."""
    with narrow.stream(text_input="forever", stream=True) as stream:
        stream.next()
        yield stream
        stream.cancel()
    until(lambda: narrow.infer(text_input="short").text == "a reply")


def serves_soon(caller: Caller) -> bool:
    """Whether the only slot is free within a second; without a cancel it would be busy for many."""
    return caller.infer(text_input="short", timeout_s=5.0).text == "a reply"


def test_a_cancelled_stream_gives_its_slot_back(narrow: Caller, busy: Stream) -> None:
    busy.cancel()
    assert serves_soon(narrow)


def test_a_deadline_cancels(narrow: Caller) -> None:
    with narrow.stream(text_input="forever", stream=True, timeout_s=0.5) as stream:
        while not stream.ended:
            stream.next()
        assert "Deadline" in str(stream.answer.error)
    assert serves_soon(narrow)


def test_a_closed_http_connection_does_no_harm(narrow: Caller) -> None:
    """Triton 24.10 does not tell the model of it, so the request runs to its end."""
    with narrow.http_connection() as connection:
        body = json.dumps({"text_input": "forever", "max_tokens": 320, "stream": True})
        connection.request("POST", "/v2/models/diffusion_gemma/generate_stream", body)
        time.sleep(0.2)
    until(lambda: narrow.infer(text_input="short").text == "a reply")


def test_a_waiting_request_can_be_cancelled(narrow: Caller, busy: Stream) -> None:
    with narrow.stream(text_input="forever", stream=True) as waiting:
        time.sleep(0.2)
        waiting.cancel()
    time.sleep(0.2)
    with narrow.stream(text_input="short") as behind:  # takes the only place in the queue
        time.sleep(0.2)
        assert "the queue is full" not in str(behind.answer.error)
        busy.cancel()
        assert behind.finish().text == "a reply"


def test_more_than_the_queue_holds_is_refused(narrow: Caller, busy: Stream) -> None:
    with narrow.stream(text_input="short") as waiting:
        time.sleep(0.2)
        refused = narrow.infer(text_input="short", headers={"triton_grpc_error": "true"})
        assert "StatusCode.UNAVAILABLE" in str(refused.error)
        assert "queue" in str(refused.error)
        status, text = narrow.post("generate", {"text_input": "short"})
        assert (status, "queue" in text) == (400, True)  # for any error of a model, on 24.10
        busy.cancel()
        assert waiting.finish().text == "a reply"


# ---------------------------------------------------------------- failure


@pytest.fixture
def own_server(engine: Path) -> Iterator[RunningServer]:
    with running_server(engine) as server:
        yield server


def test_an_engine_failure_ends_every_request_and_the_readiness(own_server: RunningServer, call: type[Caller]) -> None:
    caller = call(own_server)
    with caller.stream(text_input="forever", stream=True) as live:
        live.next()
        failed = caller.infer(text_input="fail")
        ended = live.finish()
    for answer in (failed, ended):
        assert answer.error is not None
        assert "the engine failed: scripted failure" in answer.error
    assert ended.text.startswith("and so on")
    until(lambda: own_server.model_ready() is False)
    started = time.monotonic()
    assert caller.infer(text_input="short").error is not None
    assert time.monotonic() - started < 2
    assert own_server.returncode is None
    assert "scripted failure" in own_server.log_tail(100)
    until(lambda: not own_server.model_process_alive())  # its memory is free
    assert own_server.stop() == 0


def test_a_crash_of_the_model_s_process_is_seen(own_server: RunningServer) -> None:
    assert own_server.model_process_alive()
    (pid,) = model_processes(own_server.pid)
    os.kill(pid, signal.SIGKILL)
    until(lambda: not own_server.model_process_alive())
    assert own_server.model_ready()  # Triton's readiness does not tell, the reason for looking at the process
    own_server.kill()


# ---------------------------------------------------------------- shutdown


def test_a_clean_shutdown_leaves_nothing(engine: Path) -> None:
    with running_server(engine) as server:
        directory = server.log_file.parent
        assert directory.is_dir()
        assert regions_of(directory)
    assert server.returncode == 0
    assert not directory.exists()
    assert not regions_of(directory)
    assert server.stop() == 0  # again does no harm


def test_a_request_under_way_ends_before_the_server_does(own_server: RunningServer, call: type[Caller]) -> None:
    with call(own_server).stream(text_input="forever", max_tokens=640, stream=True) as stream:
        stream.next()
        own_server.terminate()
        answer = stream.finish()
    assert (answer.error, len(answer.output_ids), answer.last["finish_reason"]) == (None, 640, "length")
    assert own_server.stop() == 0


def test_a_request_that_outlives_the_exit_timeout_ends_with_an_error(engine: Path, call: type[Caller]) -> None:
    options = replace(FREE, exit_timeout_s=4)
    with running_server(engine, options=options) as server:
        with call(server).stream(text_input="forever", headers={"triton_grpc_error": "true"}) as stream:
            time.sleep(0.3)
            server.terminate()
            answer = stream.finish()
        assert server.stop() == 0
    assert answer.responses == []
    assert answer.error == "[StatusCode.UNAVAILABLE] the server is shutting down"


# ---------------------------------------------------------------- seeds


def test_seeds_hold_across_a_restart(tmp_path: Path, make_engine: Callable[..., Path], call: type[Caller]) -> None:
    directory = make_engine(tmp_path / "chaotic", chaotic=True, delay_s=0.0)
    request: dict[str, Any] = {"text_input": "short", "end_id": -1, "max_tokens": 40, "max_denoising_steps": 4}
    found = []
    for _ in range(2):
        with running_server(directory) as server:
            caller = call(server)
            with caller.stream(**(request | {"max_tokens": 400})) as beside:  # another batch must not matter
                found.append(caller.infer(**request, seed=7).output_ids)
                beside.finish()
            found.append(caller.infer(**request, seed=7).output_ids)
            unseeded = [caller.infer(**request).output_ids for _ in range(2)]
            assert unseeded[0] != unseeded[1]
            assert caller.infer(**request, seed=8).output_ids != found[0]
    assert len(found[0]) == 40
    assert found[0] == found[1] == found[2] == found[3]


# ---------------------------------------------------------------- what cannot start


def test_a_port_in_use(server: RunningServer, engine: Path) -> None:
    for name in ("http", "grpc", "metrics"):
        url = {"http": server.http_url, "grpc": server.grpc_url, "metrics": server.metrics_url}[name]
        port = int(url.removesuffix("/metrics").rpartition(":")[2])
        message = rf"{name}_port {port} on 127.0.0.1 cannot be used \(Address already in use\).*--{name}-port"
        options = replace(FREE, **{f"{name}_port": port})  # type: ignore[arg-type]
        with pytest.raises(ConfigurationError, match=message):
            start_server(ProcessSettings(engine), options)


def test_the_same_port_twice(engine: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"grpc_port 23456 on 127.0.0.1 cannot be used"):
        start_server(ProcessSettings(engine), ServerOptions(http_port=23456, grpc_port=23456, metrics_port=0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"http_port": 70000}, "http_port must be from 0 to 65535, got 70000"),
        ({"host": "203.0.113.1"}, "http_port 0 on 203.0.113.1 cannot be used"),
        ({"model_repository": Path("/nonexistent")}, "/nonexistent: no model repository with diffusion_gemma"),
    ],
)
def test_wrong_options(engine: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        start_server(ProcessSettings(engine), replace(FREE, **options))


def test_a_file_that_differs_from_the_manifest(tmp_path: Path, make_engine: Callable[..., Path]) -> None:
    directory = make_engine(tmp_path / "engine")
    with (directory / "tokenizer.json").open("a") as file:
        file.write(" ")
    with pytest.raises(ManifestError, match=r"tokenizer.json: SHA-256 is .*the manifest says .*dgemma-build engine"):
        start_server(ProcessSettings(directory), FREE)


def test_no_engine_directory(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match=r"config.json: not found; build the engine again"):
        start_server(ProcessSettings(tmp_path), FREE)


def test_a_context_longer_than_the_engine_s(engine: Path) -> None:
    settings = ProcessSettings.from_mapping({"engine": engine, "max_model_len": 5000})
    with pytest.raises(ConfigurationError, match="max_model_len is 5000, the engine was built for 4096"):
        start_server(settings, FREE)


def change_manifest(directory: Path, **changes: object) -> None:
    path = directory / MANIFEST_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_foreign_backend(tmp_path: Path, make_engine: Callable[..., Path]) -> None:
    directory = make_engine(tmp_path / "engine")
    change_manifest(directory, backend="abacus")
    with (
        pytest.raises(ServerStartError, match=r"it was ready: .*the backend 'abacus', this runtime has onnxruntime"),
        running_server(directory),
    ):
        pass


def test_what_fails_inside_of_the_model_is_shown(tmp_path: Path, make_engine: Callable[..., Path]) -> None:
    directory = make_engine(tmp_path / "engine")
    tokenizer = directory / "tokenizer.json"
    tokenizer.write_text("{}")
    files = json.loads((directory / MANIFEST_FILE).read_text())["files"]
    change_manifest(directory, files=files | {"tokenizer.json": file_sha256(tokenizer)})
    with pytest.raises(ServerStartError) as caught, running_server(directory):
        pass
    message = str(caught.value)
    assert message.startswith(
        f"the Triton server ended with status 1 before it was ready: {directory}/tokenizer.json: "
    )
    assert "tokenizer.json: not a tokenizer" in message
    assert "\n" not in message


def test_an_engine_that_fails_at_warm_up_is_never_ready(tmp_path: Path, make_engine: Callable[..., Path]) -> None:
    directory = make_engine(tmp_path / "engine", failing_prompt=[0])  # the warm-up's
    with (
        pytest.raises(ServerStartError, match=r"it was ready: the warm-up generation failed: .*scripted failure"),
        running_server(directory),
    ):
        pass


def test_a_start_that_takes_too_long(tmp_path: Path, make_engine: Callable[..., Path]) -> None:
    directory = make_engine(tmp_path / "engine", delay_s=2.0)
    with (
        pytest.raises(ServerStartError, match="not ready after 1 s; the end of its log"),
        running_server(directory, options=replace(FREE, exit_timeout_s=1), deadline_s=1.0),
    ):
        pass
