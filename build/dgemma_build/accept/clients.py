"""Rows of programs that others wrote and that use the server: SDKs, an agent, a load generator, an evaluation harness.

The SDKs are those of this environment, called by the tests of tests/openai/live. The others want other versions of what
is installed here, so each has an environment of its own, made from its lock file. Knows no route.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dgemma_build.accept.table import GENERATED, Result, Row, Setting
from dgemma_build.bench.__main__ import ROOT
from dgemma_build.demo.skills import SKILLS, held_out_set
from dgemma_build.front_end import running_front_end
from dgemma_runtime.server import running_server

_TOOLING = ROOT / "build/tooling"
_HERE = GENERATED / "clients"
_MODEL = "diffusion_gemma"
_RUN_S = 300.0  # for one client; they import for seconds
_REQUESTS, _CONCURRENCY, _EXAMPLES = 16, 4, 8
_SDKS = {
    "openai-python": ("test_openai.py", "test_openai_responses.py"),
    "langchain-openai": ("test_langchain.py",),
    "litellm": ("test_litellm.py",),
    "Anthropic SDK": ("test_anthropic.py",),
}
_TASK = """task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
{more}
"""
_GENERATES = """generation_kwargs: {until: ["<never>"], max_gen_toks: 256}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]"""
_SCORES = "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]"


class ClientError(Exception):
    """A client that did not end well; the message has the end of its output."""


# ---------------------------------------------------------------- environments


def environment(name: str) -> Path:
    """The folder of the programs of build/tooling/NAME.lock, installed with hashes where they are not yet."""
    lock = _TOOLING / f"{name}.lock"
    root = ROOT / "artifacts/clients" / name
    marker = root / "installed"
    text = lock.read_text()
    digest = hashlib.sha256(text.encode()).hexdigest()
    if not marker.is_file() or marker.read_text() != digest:
        _run([sys.executable, "-m", "venv", "--clear", str(root)])
        install = [str(root / "bin/python"), "-m", "pip", "install", "-qq", "--disable-pip-version-check"]
        install += ["--no-deps", "--no-build-isolation", "--require-hashes", "--requirement"]
        with tempfile.TemporaryDirectory() as directory:  # first what builds source packages
            builder = Path(directory) / "setuptools.lock"
            builder.write_text("".join(re.findall(r"^setuptools==.*\n(?:[ ].*\n)*", text, re.MULTILINE)))
            _run([*install, str(builder)])
        _run([*install, str(lock)])
        marker.write_text(digest)
    return root / "bin"


def _run(command: Sequence[str], **variables: str) -> str:
    """Standard output and error together; raises ClientError."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("OPENAI_", "ANTHROPIC_"))}
    done = subprocess.run(
        command,
        env=kept | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=2 * _RUN_S if "pip" in command else _RUN_S,
        check=False,
    )
    if done.returncode:
        raise ClientError(f"{Path(command[0]).name} ended with {done.returncode}: {done.stdout[-4000:]}")
    return done.stdout


@contextlib.contextmanager
def _served(setting: Setting) -> Iterator[str]:
    """The demo model behind a front end; its URL."""
    engine = setting.engine("demo")
    with (
        running_server(engine, threads=2) as server,
        running_front_end(server.grpc_url, "--triton-metrics", server.metrics_url) as front,
    ):
        yield front.url


# ---------------------------------------------------------------- clients


def aiperf(setting: Setting) -> Result:
    """NVIDIA's load generator: streamed chats with counts, metrics scraped."""
    programs, output = environment("clients"), _folder("aiperf")
    prompts = [example.prompt for skill in ("json", "table") for example in held_out_set(skill, _REQUESTS // 2)]
    questions = _lines(output / "prompts.jsonl", [{"text": prompt} for prompt in prompts])
    with _served(setting) as url:
        _run(
            [
                *(str(programs / "aiperf"), "profile", "--model", _MODEL, "--url", url, "--endpoint-type", "chat"),
                *("--streaming", "--concurrency", str(_CONCURRENCY), "--request-count", str(_REQUESTS)),
                *("--input-file", str(questions), "--custom-dataset-type", "single_turn", "--use-server-token-count"),
                *("--tokenizer", str(setting.checkpoint("demo")), "--server-metrics", f"{url}/metrics"),
                *("--random-seed", "1", "--ui-type", "none", "--output-artifact-dir", str(output)),
            ],
            HF_HOME=str(_HERE / "cache"),
        )
    found = json.loads((output / "profile_export_aiperf.json").read_text())
    metrics = json.loads((output / "server_metrics_export.json").read_text())["metrics"]
    details = {
        "requests": found["request_count"]["avg"],
        "errors": found["error_summary"],
        "output_tokens": found["total_usage_completion_tokens"]["avg"],
        "first_token_p50_ms": round(found["time_to_first_token"]["p50"], 1),
        "latency_p50_ms": round(found["request_latency"]["p50"], 1),
        "tokens_per_s": round(found["output_token_throughput"]["avg"], 1),
        "metrics": len(metrics),
    }
    passed = details["requests"] == _REQUESTS and not details["errors"] and details["output_tokens"] > _REQUESTS
    passed = passed and "vllm:num_requests_running" in metrics and "dgemma_openai_live_requests" in metrics
    figure = (
        f"{details['requests']:.0f} of {_REQUESTS} answered, first token {details['first_token_p50_ms']:.0f} ms, "
        f"{details['tokens_per_s']:.0f} tokens/s, {details['metrics']} metrics read"
    )
    return Result(figure, passed, details)


def lm_eval_chat(setting: Setting) -> Result:
    """The harness' generations through chat completions, on a task of held-out examples."""
    output = _folder("lm_eval_chat")
    with _served(setting) as url:
        arguments = {"base_url": f"{url}/v1/chat/completions", "num_concurrent": "2", "tokenized_requests": "False"}
        _evaluate(output, "local-chat-completions", arguments, "generate_until", "--apply_chat_template")
    scores = json.loads(next(output.rglob("results_*.json")).read_text())["results"]["dgemma_json"]
    samples = [json.loads(line) for line in next(output.rglob("samples_*.jsonl")).read_text().splitlines()]
    right = sum(SKILLS["json"].check(sample["doc"]["question"], sample["resps"][0][0]) for sample in samples)
    exact = scores["exact_match,none"]
    figure = f"{right} of {_EXAMPLES} right, exact_match {exact:.2f}"
    return Result(figure, right == _EXAMPLES, {"right": right, "exact_match": exact})


def lm_eval_likelihood(setting: Setting) -> Result:
    """What a diffusion model has no answer to, the likelihood of a given text, is refused so that its user knows."""
    output = _folder("lm_eval_likelihood")
    with _served(setting) as url:
        tokenizer = str(setting.checkpoint("demo"))
        arguments = {"base_url": f"{url}/v1/completions", "tokenizer_backend": "huggingface", "tokenizer": tokenizer}
        try:
            _evaluate(output, "local-completions", arguments | {"max_retries": "1"}, "loglikelihood")
        except ClientError as error:
            told = re.search(r'"message":"([^"]*)"', str(error))
            message = told[1] if told else ""
            return Result(message or "no message", "400 Client Error" in str(error) and "logprobs" in message)
    return Result("answered", False)


def _evaluate(output: Path, model: str, arguments: Mapping[str, str], kind: str, *more: str) -> None:
    data = _lines(
        output / "examples.jsonl",
        [{"question": example.prompt, "answer": example.answer} for example in held_out_set("json", _EXAMPLES)],
    )
    rest = _GENERATES if kind == "generate_until" else _SCORES
    (output / "task.yaml").write_text(_TASK.format(name="dgemma_json", data=data, kind=kind, more=rest))
    given = ",".join(f"{name}={value}" for name, value in {"model": _MODEL, **arguments}.items())
    _run(
        [
            *(str(environment("clients") / "lm_eval"), "run", "--model", model, "--model_args", given),
            *("--include_path", str(output), "--tasks", "dgemma_json", "--output_path", str(output / "results")),
            *("--log_samples", *more),
        ],
        HF_HOME=str(_HERE / "cache"),
        HF_HUB_OFFLINE="1",
        HF_DATASETS_OFFLINE="1",
    )


def hermes(setting: Setting) -> Result:
    """Hermes Agent's own search for the context length, its reading of our errors, and a conversation."""
    home = _folder("hermes")
    with _served(setting) as url:
        python = str(environment("hermes") / "python")
        told = _run([python, str(_TOOLING / "hermes_probe.py"), f"{url}/v1", _MODEL, str(home)])
    found = json.loads(told.splitlines()[-1])
    length = found["context_length"]
    passed = (
        found["minimum"] <= length == found["agent_context_length"] == found["limit_in_error"]
        and 0 < (found["room_in_error"] or 0) < length
        and found["api_calls"] >= 1
        and found["answered"]
        and not found["failed"]
    )
    figure = (
        f"{length:,} tokens, {found['limit_in_error'] or 0:,} read from an error; "
        f"a conversation of {found['api_calls']} call"
    )
    return Result(figure, passed, found)


def _sdk(name: str) -> Callable[[Setting], Result]:
    def measure(setting: Setting) -> Result:
        tests = [str(ROOT / "tests/openai/live" / file) for file in _SDKS[name]]
        told = _run([sys.executable, "-m", "pytest", "--rootdir", str(ROOT), "-q", *tests])
        counted = re.search(r"(\d+) passed", told)
        passed = int(counted[1]) if counted else 0
        only = re.search(r"\d+ (failed|error|skipped|xfailed)", told) is None
        return Result(f"{passed} tests pass", only and passed > 0, {"tests": passed})

    return measure


# ---------------------------------------------------------------- files


def _folder(name: str) -> Path:
    """A new, empty one."""
    folder = _HERE / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def _lines(path: Path, values: Sequence[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return path


# None is quick: CI runs the SDKs' tests as tests, and the others take an environment of a gigabyte.
ROWS: tuple[Row, ...] = (
    *(Row(f"{name} against the real server", "every test of its calls passes", _sdk(name), False) for name in _SDKS),
    Row("Hermes Agent: context length, errors, a conversation", "the server's own; at least 64,000", hermes, False),
    Row(
        f"aiperf: {_REQUESTS} streamed chats at concurrency {_CONCURRENCY}",
        "all answered and counted, metrics read",
        aiperf,
        False,
    ),
    Row(f"lm-eval: {_EXAMPLES} held-out examples through chat completions", "all right", lm_eval_chat, False),
    Row("lm-eval: likelihoods through completions", "a 400 that names logprobs", lm_eval_likelihood, False),
)
