"""Front ends before real Triton servers, for real clients; one engine is a script, one is the demo model."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from dgemma_build.front_end import FrontEnd, running_front_end
from dgemma_runtime.codec import Codec
from dgemma_runtime.engines.scripted_directory import ScriptFile, write_scripted
from dgemma_runtime.server import RunningServer, running_server

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # else importing litellm asks the internet for prices
ROOT = Path(__file__).parents[3]
CHECKPOINT, DEMO_ENGINE = ROOT / "build/checkpoints/demo", ROOT / "artifacts/engines/demo"
NAME = "scripted-model"
CANVAS, MAX_MODEL_LEN = 16, 8192  # tokens; an answer without an end takes seconds
EOS = 1
# What the script answers to depends on the last message, the names of the tools, and whether thinking is on.
TEMPLATE = """{{ bos_token }}{% for tool in tools or [] %}[{{ tool.function.name }}]{% endfor -%}
{%- if enable_thinking %}[think]{% endif -%}
{%- set last = messages[-1] -%}
{{ last.role }}{% if last.role == 'tool' %} {{ last.name }}{% endif %}: {{ last.content }}
"""
CALL = '<|tool_call>call:get_weather{city:<|"|>Paris<|"|>,days:2}<tool_call|>'
TWO_CALLS = CALL + '<|tool_call>call:get_time{zone:<|"|>CET<|"|>}<tool_call|>'
THOUGHT = "<|channel>thought\nThe user is polite.<channel|>"
EDITED = "```python\n<|code_to_edit|>\n    x = 2<|cursor|>\n<|/code_to_edit|>\n```"
LONG = "One canvas is not enough for this sentence, which goes on, and on, until it stops here."
ANSWERS = {
    "user: hello": "Hello there!",
    "user: long": LONG,
    "user: <|code_to_edit|>\nx = 1<|cursor|>\n<|/code_to_edit|>": EDITED,
    "user: repeat": "forever and ever ",  # without an end
    "[get_weather]user: hello": "No tool is needed for that.",
    "[get_weather]user: weather": CALL,
    "[get_weather]tool get_weather: 21": "It is 21 degrees in Paris.",
    "[get_weather][get_time]user: both": "Let me look." + TWO_CALLS,
    "[think]user: hello": THOUGHT + "Hello, thoughtfully.",
    "[get_weather][think]user: weather": THOUGHT + CALL,
}


@dataclass(frozen=True)
class Service:
    """A front end before a Triton."""

    url: str  # http://127.0.0.1:PORT
    model: str
    triton: RunningServer
    log: list[str]

    @property
    def v1(self) -> str:
        return f"{self.url}/v1"

    def live_requests(self) -> float:
        """Requests under way in the front end."""
        return self._gauge("dgemma_openai_live_requests")

    def running(self) -> float:
        """Generations that the engine runs."""
        return self._gauge("vllm:num_requests_running")

    def _gauge(self, name: str) -> float:
        page = httpx.get(f"{self.url}/metrics").text
        return float(next(line for line in page.splitlines() if line.startswith(name)).rpartition(" ")[2])


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """The scripted engine."""
    engine = _write_engine(tmp_path_factory.mktemp("live") / "scripted")
    with running_server(engine) as triton, _front_end(triton, "--served-model-name", NAME) as front:
        yield Service(front.url, NAME, triton, front.log)
        assert triton.returncode is None, triton.log_tail()
        assert front.process.poll() is None, front.log


@pytest.fixture(scope="session")
def demo() -> Iterator[Service]:
    """The model that the repository holds."""
    with running_server(DEMO_ENGINE, threads=2) as triton, _front_end(triton) as front:
        yield Service(front.url, "diffusion_gemma", triton, front.log)
        assert triton.returncode is None, triton.log_tail()


@pytest.fixture(scope="session")
def front_end(service: Service) -> Callable[..., contextlib.AbstractContextManager[FrontEnd]]:
    """Starts another front end, with options, before the scripted engine."""

    def start(*options: str) -> contextlib.AbstractContextManager[FrontEnd]:
        return _front_end(service.triton, "--served-model-name", NAME, *options)

    return start


def _front_end(triton: RunningServer, *options: str) -> contextlib.AbstractContextManager[FrontEnd]:
    return running_front_end(triton.grpc_url, "--triton-metrics", triton.metrics_url, *options)


def _write_engine(directory: Path) -> Path:
    """With the demo checkpoint's tokenizer, which has the markers of thinking and tool calls."""
    directory.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(CHECKPOINT / name, directory)
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    codec = Codec.load(directory)

    def ids(text: str) -> list[int]:
        found: list[int] = codec.encode(text).tolist()
        return found

    answers = [(ids(prompt), _answer(ids(text)[1:], prompt)) for prompt, text in ANSWERS.items()]
    script = ScriptFile([*ids("What?")[1:], EOS], answers, delay_s=0.002)
    write_scripted(directory, script, vocab_size=761, canvas_length=CANVAS, max_model_len=MAX_MODEL_LEN)
    return directory


def _answer(ids: list[int], prompt: str) -> list[int]:
    return ids if prompt == "user: repeat" else [*ids, EOS]


def until(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    """Waits for it."""
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "it did not come true in time"
        time.sleep(0.02)
