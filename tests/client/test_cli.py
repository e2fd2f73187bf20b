"""The command as a user runs it: a process of its own against a gRPC server; streams, exit codes, Ctrl-C, terminal."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import re
import signal
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from dgemma_client.fake_triton import FakeTriton, Item, ModelError
from dgemma_client.mock import delta, final, prefill, preview
from dgemma_client.reference import render
from dgemma_client.requests import InferRequest

pytestmark = pytest.mark.asyncio
DOCS = Path(__file__).parents[2] / "docs" / "cli.md"


def answer(request: InferRequest) -> Iterator[Item]:
    if request.inputs["stream_previews"] == (True,):
        for step, text in enumerate(("1?\n??", "12\n?4", "12\n34"), start=1):
            yield from (preview(text, 0, step), 0.05)
    yield from (delta("12\n34", [1, 2, 3]), delta(" wörld\x07", [4]))
    yield final("length", input_tokens=5, output_tokens=4, steps=8, canvases=2)


def hang(request: InferRequest) -> Iterator[Item]:
    yield from (delta("half"), 60.0)


async def start(url: str, *arguments: str, stdin: int | None = PIPE, stdout: int = PIPE, stderr: int = PIPE) -> Process:
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "dgemma_client", *arguments),
        stdin=stdin,
        stdout=stdout,
        stderr=stderr,
        env={**os.environ, "DGEMMA_URL": url, "PYTHONIOENCODING": "utf-8", "TERM": "xterm", "COLUMNS": "80"},
    )


async def run(url: str, *arguments: str, stdin: bytes = b"") -> tuple[int | None, str, str]:
    process = await start(url, *arguments)
    out, err = await asyncio.wait_for(process.communicate(stdin), 20)
    return process.returncode, out.decode(), err.decode()


async def test_piped_text_is_plain_and_alone_on_stdout() -> None:
    async with FakeTriton(answer) as server:
        code, out, err = await run(
            server.url,
            *("generate", "hello", "--max-tokens", "4", "--seed", "3", "--steps", "8", "--stop", "x", "--stop", "y"),
            *("--set", "confidence_threshold=0.25", "--set", "drafter=off", "--system", "be brief"),
        )
        (request,) = server.requests
    assert (code, out) == (0, "12\n34 wörld\x07\n")
    assert "4 tokens in 2 canvases, 8 steps (0.5 tokens per step)" in err
    inputs = request.inputs
    assert json.loads(str(inputs["messages"][0]))["messages"] == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "hello"},
    ]
    sent = ("max_tokens", "seed", "max_denoising_steps", "stop_words", "confidence_threshold", "drafter")
    assert [inputs[name] for name in sent] == [(4,), (3,), (8,), ("x", "y"), (0.25,), ("off",)]
    assert inputs["stream_previews"] == (False,)


async def test_standard_input_and_raw_and_json() -> None:
    async with FakeTriton(answer) as server:
        code, out, err = await run(server.url, "generate", "--raw", "--json", stdin="prömpt\n".encode())
        (request,) = server.requests
    assert (code, err) == (0, "")
    document = json.loads(out)
    assert document["text"] == "12\n34 wörld\x07"
    assert document["finish_reason"] == "length"
    assert document["token_ids"] == [1, 2, 3, 4]
    assert document["statistics"]["denoising_steps"] == 8
    assert request.inputs["text_input"] == ("prömpt\n",)


async def test_scheduling_options_reach_the_server() -> None:
    options = ("--priority", "-5", "--deadline-ms", "250", "--cache-salt", "7")
    async with FakeTriton(answer) as server:
        codes = [(await run(server.url, "generate", "hi", *options))[0]]
        codes.append((await run(server.url, "chat", *options, stdin=b"hi\n"))[0])
        for request in server.requests:
            assert [request.inputs[name] for name in ("priority", "deadline_ms", "cache_salt")] == [
                (-5,),
                (250,),
                ("7",),
            ]
    assert codes == [0, 0]


def late(request: InferRequest) -> Iterator[Item]:
    yield delta("so far", [1, 2])
    yield final("deadline", input_tokens=9, output_tokens=2, prefix_tokens=8, preemptions=1)


async def test_a_deadline_is_an_exit_code_of_its_own_and_the_text_is_printed() -> None:
    async with FakeTriton(late) as server:
        code, out, err = await run(server.url, "generate", "hi", "--deadline-ms", "5")
        assert (code, out) == (124, "so far\n")
        assert ", 8 of 9 prompt tokens known already, preemptions: 1\n" in err
        assert err.endswith("\nthe deadline has passed; the answer may not be whole\n")
        code, out, _ = await run(server.url, "generate", "hi", "--json")
        document = json.loads(out)
        assert (code, document["finish_reason"], document["text"]) == (124, "deadline", "so far")
        assert (document["statistics"]["prefix_tokens"], document["statistics"]["preemptions"]) == (8, 1)
        code, out, err = await run(server.url, "chat", stdin=b"one\ntwo\n")
        assert (code, out, err.count("deadline")) == (0, "so far\nso far\n", 2), "a chat goes on"


async def test_the_client_s_own_time_runs_out_with_the_same_code() -> None:
    async with FakeTriton(hang) as server:
        code, out, err = await run(server.url, "generate", "hi", "--timeout", "0.3")
    assert (code, out) == (124, "half")
    assert err == "error: no end after 0.3 s; the request is cancelled, give a longer timeout_s\n"


async def test_a_busy_server_is_asked_again_on_request() -> None:
    asked: list[str] = []

    def busy_once(request: InferRequest) -> Iterator[Item]:
        asked.append(request.request_id)
        if len(asked) == 1:
            yield ModelError(grpc.StatusCode.UNAVAILABLE, "the queue is full")
        yield from answer(request)

    async with FakeTriton(busy_once) as server:
        code, out, _ = await run(server.url, "generate", "hi", "--retries", "1")
    assert (code, out) == (0, "12\n34 wörld\x07\n")
    assert len(asked) == 2


async def test_info_says_what_is_served() -> None:
    async with FakeTriton(answer) as server:
        plain = await run(server.url, "info", "--model", "demo")
        as_json = await run(server.url, "info", "--json")
    lines = "server         fake 0\nmodel          demo\nready          true\nmax_model_len  4096\n"
    assert plain == (0, lines, "")
    assert json.loads(as_json[1]) == {
        "server": "fake 0",
        "model": "diffusion_gemma",
        "ready": "true",
        "max_model_len": "4096",
    }


async def test_info_of_nobody_is_one_line(unused_tcp_port: int) -> None:
    code, out, err = await run(f"127.0.0.1:{unused_tcp_port}", "info")
    assert (code, out, err.count("\n")) == (1, "", 1)


async def test_invalid_utf8_on_standard_input() -> None:
    async with FakeTriton(answer) as server:
        code, out, err = await run(server.url, "generate", stdin=b"ab\xff")
        assert not server.requests
    assert (code, out) == (2, "")
    assert "not valid UTF-8 at byte 2" in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("status", "message", "expected"),
    [
        (grpc.StatusCode.INVALID_ARGUMENT, "top_k: is not supported, got 5", 2),
        (grpc.StatusCode.UNAVAILABLE, "the queue is full; try again in 2 s", 1),
    ],
)
async def test_errors_are_one_line_and_an_exit_code(status: grpc.StatusCode, message: str, expected: int) -> None:
    async with FakeTriton(lambda request: [ModelError(status, message)]) as server:
        code, out, err = await run(server.url, "generate", "hi", "--set", "top_k=5")
    assert (code, out, err) == (expected, "", f"error: {message}\n")


async def test_no_server(unused_tcp_port: int) -> None:
    code, out, err = await run(f"127.0.0.1:{unused_tcp_port}", "generate", "hi")
    assert (code, out) == (1, "")
    assert err.startswith(f"error: no Triton gRPC server at 127.0.0.1:{unused_tcp_port}: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize("arguments", [("generate", "x", "--set", "oops"), ("generate", "x", "--raw", "--system", "s")])
async def test_wrong_usage(arguments: tuple[str, ...]) -> None:
    code, _, err = await run("127.0.0.1:1", *arguments)
    assert code == 2
    assert "Invalid value for --s" in err


async def test_an_unknown_parameter_is_named() -> None:
    code, _, err = await run("127.0.0.1:1", "generate", "x", "--set", "max_token=3")
    assert code == 2
    assert "max_token: not a parameter; did you mean max_tokens?" in err


async def test_ctrl_c_cancels_on_the_server_and_exits_130() -> None:
    async with FakeTriton(hang) as server:
        process = await start(server.url, "generate", "hi")
        assert process.stdout is not None
        assert await process.stdout.readexactly(4) == b"half", "text comes before the end"
        process.send_signal(signal.SIGINT)
        _, err = await asyncio.wait_for(process.communicate(), 10)
        await server.until_left()
    assert process.returncode == 130
    assert err.decode() == "interrupted; the request is cancelled\n"


async def test_a_reader_that_goes_away_is_no_traceback() -> None:
    def many(request: InferRequest) -> Iterator[Item]:
        for _ in range(200):
            yield from (delta("x" * 1000 + "\n"), 0.005)
        yield final()

    async with FakeTriton(many) as server:
        read, write = os.pipe()
        process = await start(server.url, "generate", "hi", stdout=write)
        os.close(write)
        while not server.requests:
            await asyncio.sleep(0.01)
        os.close(read)
        _, err = await asyncio.wait_for(process.communicate(), 10)
        await server.until_left()
    assert process.returncode == 1
    assert err == b""


async def screen_of(server: FakeTriton, *arguments: str, typed: bytes = b"") -> tuple[int | None, str]:
    """Exit code and everything a terminal gets from the command."""
    ours, theirs = pty.openpty()
    process = await start(server.url, *arguments, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    os.write(ours, typed)
    screen = bytearray()
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()

    def read() -> None:
        try:
            data = os.read(ours, 65536)
        except OSError:  # Linux says EIO when the other side is closed
            data = b""
        screen.extend(data)
        if not data:
            loop.remove_reader(ours)
            ended.set()

    loop.add_reader(ours, read)
    await asyncio.wait_for(ended.wait(), 20)
    os.close(ours)
    await process.wait()
    return process.returncode, screen.decode()


async def test_a_terminal_shows_the_canvas_and_keeps_only_the_text() -> None:
    async with FakeTriton(answer) as server:
        code, screen = await screen_of(server, "generate", "hi")
        assert server.requests[0].inputs["stream_previews"] == (True,)
    assert code == 0
    assert "canvas 1, step 1" in screen
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen)
    assert "\x07" not in plain, "control characters of an answer do not reach a terminal"
    assert "34 wörld␇" in plain.replace("\r", "")
    assert "\x1b[31m" in screen or "\x1b[1;31m" in screen, "what changes is red"


async def test_a_terminal_shows_a_long_prompt_being_read() -> None:
    def long_prompt(request: InferRequest) -> Iterator[Item]:
        yield from (prefill(12_288, 65_536), 0.1, prefill(65_536, 65_536), 0.1)
        yield from answer(request)

    async with FakeTriton(long_prompt) as server:
        code, screen = await screen_of(server, "generate", "hi")
    assert code == 0
    assert "reading the prompt 12,288 / 65,536" in screen
    assert "canvas 1, step 1" in screen.partition("65,536 / 65,536")[2]


async def test_chat_keeps_the_history() -> None:
    async with FakeTriton(answer) as server:
        code, out, err = await run(server.url, "chat", "--system", "s", stdin=b"one\\\ntwo\n\nthree\n/reset\nfour\n")
        chats = [json.loads(str(request.inputs["messages"][0]))["messages"] for request in server.requests]
    assert code == 0
    assert out == "12\n34 wörld\x07\n" * 3
    assert err.count("tokens/s") == 3
    system = {"role": "system", "content": "s"}
    first = {"role": "user", "content": "one\ntwo"}
    reply = {"role": "assistant", "content": "12\n34 wörld\x07"}
    assert chats == [
        [system, first],
        [system, first, reply, {"role": "user", "content": "three"}],
        [system, {"role": "user", "content": "four"}],
    ]


async def test_chat_on_a_terminal_ends_with_ctrl_d() -> None:
    async with FakeTriton(answer) as server:
        code, screen = await screen_of(server, "chat", typed=b"hello\n\x04")
    assert code == 0
    assert "> " in screen
    assert "34 wörld" in screen


async def test_bench_prints_a_table_and_one_json_line(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('"one\\ntwo"\n\n"three"\n')
    async with FakeTriton(answer) as server:
        code, out, err = await run(
            server.url,
            *("bench", "--requests", "4", "--concurrency", "2", "--fixed-steps", "8", "--prompts", str(prompts)),
        )
        contents = [
            json.loads(str(request.inputs["messages"][0]))["messages"][0]["content"] for request in server.requests
        ]
    assert code == 0
    assert set(contents) == {"one\ntwo", "three"}
    (line,) = out.splitlines()
    report = json.loads(line)
    assert (report["requests"], report["output_tokens"], report["steps_per_canvas"]) == (4, 16, 4)
    assert report["parameters"] == {"max_denoising_steps": 8, "stability_threshold": -1}
    assert "tokens per second" in err
    assert "time to first canvas" in err


async def test_bench_refuses_a_file_of_something_else(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("plain text\n")
    code, _, err = await run("127.0.0.1:1", "bench", "--prompts", str(prompts))
    assert code == 2
    assert "one JSON string per line" in " ".join(err.split())


async def test_the_documented_help_is_the_command_s() -> None:
    assert DOCS.read_text() == render(), "run: python -m dgemma_client.reference > docs/cli.md"
