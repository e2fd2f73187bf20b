"""Engine directories on a script, real Triton servers over them, the command, and a caller that sees every response."""

from __future__ import annotations

import contextlib
import http.client
import json
import queue
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as triton

from dgemma_runtime.engines.scripted_directory import ScriptFile, write_scripted
from dgemma_runtime.server import RunningServer, running_server
from dgemma_runtime.tensors import INPUTS, NUMPY_TYPES
from dgemma_runtime.testing import EOS, tiny_codec, tiny_tokenizer

MODEL = "diffusion_gemma"
CANVAS = 16  # tokens; each character of the script's texts is one token
LONG_ANSWER = "one canvas here, and another one; then the end"  # three canvases
TEMPLATE = """{% for message in messages %}
{%- if message.role == 'robot' %}{{ raise_exception('no robots') }}{% endif %}{{ message.content }}
{%- endfor %}{{ ending }}{% if not add_generation_prompt %} (no answer wanted){% endif %}"""
_DATATYPES = {spec.name: spec.datatype for spec in INPUTS}


def encode(text: str) -> list[int]:
    """As the server does: with <bos>."""
    ids: list[int] = tiny_codec().encode(text).tolist()
    return ids


def _answer(text: str) -> list[int]:
    return [*encode(text)[1:], EOS]


def write_engine(directory: Path, **changes: Any) -> Path:
    """Answers: `short` a few words, `long` LONG_ANSWER, `marked` with special tokens, `forever` no end.

    `fail` and `hang` make the engine do that.
    """
    directory.mkdir(parents=True, exist_ok=True)
    tiny_tokenizer().save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<bos>", "eos_token": "<eos>"}))
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    answers = [(encode("short"), _answer("a reply")), (encode("long"), _answer(LONG_ANSWER))]
    answers.append((encode("marked"), _answer("one <|turn>two<turn|> three")))
    forever = (encode("forever"), encode("and so on "))
    script = ScriptFile(_answer("?"), [*answers, forever], encode("fail"), encode("hang"), delay_s=0.004)
    write_scripted(directory, replace(script, **changes), tiny_tokenizer().get_vocab_size(), canvas_length=CANVAS)
    return directory


@pytest.fixture(scope="session")
def make_engine() -> Callable[..., Path]:
    return write_engine


@pytest.fixture(scope="session")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_engine(tmp_path_factory.mktemp("engines") / "scripted")


@pytest.fixture(scope="session")
def server(engine: Path) -> Iterator[RunningServer]:
    """The server that most tests share; none of them may break it."""
    with running_server(engine) as running:
        yield running
        assert running.returncode is None, running.log_tail()


def until(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "it did not come true in time"
        time.sleep(0.02)


@pytest.fixture(scope="session")
def caller(server: RunningServer) -> Caller:
    return Caller(server)


@pytest.fixture(scope="session")
def call() -> type[Caller]:
    """To make a caller for a server of the test's own."""
    return Caller


# ---------------------------------------------------------------- the command


@dataclass(frozen=True)
class Addresses:
    """Where a server said that it is."""

    grpc_url: str
    http_url: str
    pid: int  # of Triton


class Command:
    """`dgemma-server run` with its stderr read line by line."""

    def __init__(self, *arguments: str) -> None:
        command = [sys.executable, "-m", "dgemma_runtime.server", "run", *arguments]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.lines: list[str] = []
        self._changed = threading.Condition()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            with self._changed:
                self.lines.append(line.rstrip())
                self._changed.notify_all()

    def wait_for(self, pattern: str, timeout_s: float = 30.0, number: int = 1) -> re.Match[str]:
        """The first line on stderr that matches, or a later one."""

        def find() -> list[re.Match[str]]:
            return [match for line in self.lines if (match := re.search(pattern, line))]

        with self._changed:
            self._changed.wait_for(lambda: len(find()) >= number, timeout_s)
            matches = find()
        assert len(matches) >= number, f"{len(matches)} lines match {pattern}: {self.lines}"
        return matches[number - 1]

    def end(self, timeout_s: float = 40.0) -> int:
        status = self.process.wait(timeout_s)
        self._reader.join()
        return status

    def ready(self, number: int = 1) -> Addresses:
        """Once it is ready for the first time, or again."""
        pattern = r"ready: gRPC (\S+), HTTP (http://\S+), metrics http://\S+/metrics \(pid (\d+)\)"
        match = self.wait_for(pattern, number=number)
        return Addresses(match[1], match[2], int(match[3]))

    def close(self) -> None:
        """End it, if it has not ended."""
        self.process.terminate()
        self.end()
        for pipe in (self.process.stdout, self.process.stderr):
            assert pipe is not None
            pipe.close()


@pytest.fixture(scope="module")
def command(engine: Path) -> Iterator[Callable[..., Command]]:
    """Starts the command on free ports; `directory` is the engine's."""
    commands: list[Command] = []

    def start(*arguments: str, directory: Path = engine) -> Command:
        ports = [argument for name in ("http", "grpc", "metrics") for argument in (f"--{name}-port", "0")]
        commands.append(Command("--engine", str(directory), *ports, *arguments))
        return commands[-1]

    yield start
    for each in commands:
        each.close()


# ---------------------------------------------------------------- caller


@dataclass
class Answer:
    """All responses to one request until the last one or an error."""

    responses: list[dict[str, Any]] = field(default_factory=list)  # name -> value, or list for `many` outputs
    times: list[float] = field(default_factory=list)  # seconds since the request was sent
    error: str | None = None
    last_flags: int = 0  # how many responses were marked as the last one

    @property
    def text(self) -> str:
        return "".join(response.get("text_output", "") for response in self.responses)

    @property
    def output_ids(self) -> list[int]:
        return [token for response in self.responses for token in response.get("output_ids", [])]

    @property
    def last(self) -> dict[str, Any]:
        return self.responses[-1]


class Stream:
    """One request on a gRPC stream of its own."""

    def __init__(self, url: str, timeout_s: float | None, headers: Mapping[str, str] | None) -> None:
        self.client = triton.InferenceServerClient(url)
        self._received: queue.Queue[tuple[float, Any, Any]] = queue.Queue()
        self.started = time.monotonic()
        self.client.start_stream(
            lambda result, error: self._received.put((time.monotonic(), result, error)),
            stream_timeout=timeout_s,
            headers=headers,
        )
        self.answer = Answer()
        self.ended = False

    def next(self, timeout_s: float = 20.0) -> dict[str, Any] | None:
        """The next response; None after an error or an empty last one."""
        at, result, error = self._received.get(timeout=timeout_s)
        if error is not None:
            self.ended, self.answer.error = True, str(error)
            return None
        response = result.get_response()
        self.ended = response.parameters["triton_final_response"].bool_param
        self.answer.last_flags += self.ended
        if not response.outputs:
            return None
        values = {output.name: _plain(result.as_numpy(output.name), output.shape) for output in response.outputs}
        self.answer.responses.append(values)
        self.answer.times.append(at - self.started)
        return values

    def finish(self) -> Answer:
        """Everything up to the end; nothing may come after it."""
        while not self.ended:
            self.next()
        with pytest.raises(queue.Empty):
            self._received.get(timeout=0.05)
        return self.answer

    def cancel(self) -> None:
        self.client.stop_stream(cancel_requests=True)

    def close(self) -> None:
        self.client.close()


class Caller:
    """Sends requests to a server; inputs by name, as plain values, lists, or arrays for other shapes and types.

    `timeout_s` is the stream's, kept by gRPC; `timeout_us` is Triton's own, which the request carries.
    """

    def __init__(self, server: RunningServer | Addresses) -> None:
        self.server = server

    @contextlib.contextmanager
    def stream(
        self,
        *,
        timeout_s: float | None = 60.0,
        timeout_us: int | None = None,
        request_id: str = "",
        parameters: Mapping[str, Any] | None = None,
        outputs: list[str] | None = None,
        headers: Mapping[str, str] | None = None,
        **inputs: Any,
    ) -> Iterator[Stream]:
        stream = Stream(self.server.grpc_url, timeout_s, headers)
        try:
            stream.client.async_stream_infer(
                MODEL,
                [_tensor(name, value) for name, value in inputs.items()],
                outputs=None if outputs is None else [triton.InferRequestedOutput(name) for name in outputs],
                request_id=request_id,
                timeout=timeout_us,
                enable_empty_final_response=True,
                parameters=parameters,
            )
            yield stream
        finally:
            stream.close()

    def infer(self, **request: Any) -> Answer:
        """`request` as for `stream`."""
        with self.stream(**request) as stream:
            return stream.finish()

    def post(self, path: str, body: Mapping[str, Any] | bytes) -> tuple[int, str]:
        """Status and body of an HTTP request to the model's `path`, e.g. `generate`."""
        with self.http_connection() as connection:
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            connection.request("POST", f"/v2/models/{MODEL}/{path}", data)
            answer = connection.getresponse()
            return answer.status, answer.read().decode()

    def events(self, body: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The server-sent events of `generate_stream`."""
        status, text = self.post("generate_stream", body)
        assert status == 200, text
        return [json.loads(line.removeprefix("data: ")) for line in text.splitlines() if line.strip()]

    def ready(self) -> bool:
        """Whether a probe would send requests to this server."""
        try:
            with self.http_connection() as connection:
                connection.request("GET", f"/v2/models/{MODEL}/ready")
                return connection.getresponse().status == 200
        except OSError:
            return False

    @contextlib.contextmanager
    def http_connection(self) -> Iterator[http.client.HTTPConnection]:
        connection = http.client.HTTPConnection(self.server.http_url.removeprefix("http://"), timeout=30)
        try:
            yield connection
        finally:
            connection.close()


def _tensor(name: str, value: Any) -> triton.InferInput:
    if not isinstance(value, np.ndarray):
        items = value if isinstance(value, list) else [value]
        items = [item.encode() if isinstance(item, str) else item for item in items]
        value = np.array(items, NUMPY_TYPES[_DATATYPES[name]])
    datatypes = {dtype: name for name, dtype in NUMPY_TYPES.items()}
    tensor = triton.InferInput(name, list(value.shape), datatypes.get(value.dtype.type, "INT64"))
    tensor.set_data_from_numpy(value)
    return tensor


def _plain(array: Any, shape: list[int]) -> Any:
    values = [item.decode() if isinstance(item, bytes) else item for item in array.tolist()]
    return values[0] if list(shape) == [1] and not isinstance(values[0], int) else values
