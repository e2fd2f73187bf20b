"""The command `dgemma`: generate, chat, bench, info. Knows arguments and exit codes; the work is done elsewhere."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, cast

import typer
from rich.console import Console
from rich.table import Table

from dgemma_client.bench import Load, Report, fixed_steps, run_load
from dgemma_client.client import DEFAULT_MODEL, DEFAULT_URL, Client
from dgemma_client.events import Result, ServerInfo
from dgemma_client.requests import Message, Parameters
from dgemma_client.terminal import (
    EXIT_FAILED,
    EXIT_OK,
    EXIT_USAGE,
    exit_code,
    run,
    say,
    show,
    summary,
    wants_live,
    write_answer,
)

BENCH_PROMPT = "Convert to JSON:\nname: Ada\ncity: Oslo\nage: 36"

app = typer.Typer(
    name="dgemma",
    help="Talk to a DiffusionGemma model on a Triton server. Answers go to stdout, everything else to stderr.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"max_content_width": 100},
)

Url = Annotated[str, typer.Option(envvar="DGEMMA_URL", help="Triton's gRPC endpoint, host:port.")]
Model = Annotated[str, typer.Option(envvar="DGEMMA_MODEL", help="Name of the model on the server.")]
Timeout = Annotated[float, typer.Option(help="Seconds for a whole request.")]
ConnectTimeout = Annotated[float, typer.Option(help="Seconds to find the server.")]
MaxTokens = Annotated[int | None, typer.Option(help="Tokens to generate at most; default: what the context leaves.")]
Seed = Annotated[int | None, typer.Option(help="The same seed gives the same answer; default: a new one each time.")]
Temperature = Annotated[float | None, typer.Option(help="Flat temperature, 0 for greedy; default: the checkpoint's.")]
Stop = Annotated[list[str] | None, typer.Option(help="End the answer before this text; repeat for more.")]
Steps = Annotated[int | None, typer.Option(help="Denoising steps per canvas at most (max_denoising_steps).")]
EntropyBound = Annotated[float | None, typer.Option(help="Accept tokens up to this joint entropy per step, in nats.")]
Priority = Annotated[int | None, typer.Option(help="Lower ones are served first; -1000 to 1000, default: 0.")]
DeadlineMs = Annotated[
    int | None, typer.Option(help="Milliseconds on the server after which the answer ends as it is.")
]
CacheSalt = Annotated[str | None, typer.Option(help="Share cached prompts only with requests that have the same salt.")]
Retries = Annotated[
    int, typer.Option(help="Times to ask again while the server is too busy; never once an answer has begun.")
]
Set = Annotated[
    list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="Any other request parameter, as JSON.")
]
Live = Annotated[
    bool | None, typer.Option("--live/--no-live", help="Show the canvas being denoised; default: on a terminal.")
]
Drafter = Annotated[str | None, typer.Option(help="Who drafts canvases: auto, off, lookup, model; default: auto.")]
System = Annotated[str | None, typer.Option(help="System message.")]


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="User message; - reads it from standard input.")] = "-",
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text as it is, without the chat template.")] = False,
    system: System = None,
    max_tokens: MaxTokens = None,
    seed: Seed = None,
    temperature: Temperature = None,
    stop: Stop = None,
    steps: Steps = None,
    entropy_bound: EntropyBound = None,
    priority: Priority = None,
    deadline_ms: DeadlineMs = None,
    cache_salt: CacheSalt = None,
    drafter: Drafter = None,
    draft: Annotated[
        Path | None, typer.Option(help="File with a draft of the answer: a text to be revised, say.")
    ] = None,
    template: Annotated[
        Path | None, typer.Option(help="JSON file with the answer's fixed texts, and holes as numbers of tokens.")
    ] = None,
    suffix: Annotated[str | None, typer.Option(help="Text that comes behind the answer; it ends before it.")] = None,
    set_: Set = None,
    live: Live = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object with text and statistics.")] = False,
    url: Url = DEFAULT_URL,
    model: Model = DEFAULT_MODEL,
    timeout: Timeout = 120.0,
    connect_timeout: ConnectTimeout = 5.0,
    retries: Retries = 0,
) -> None:
    """Answer one message: text to stdout as canvases are done, figures to stderr.

    Exit codes: 0 done, 1 failed, 2 the request was refused, 124 the time ran out (--deadline-ms:
    what there is of the answer is printed; --timeout), 130 interrupted.
    """
    if raw and system is not None:
        raise typer.BadParameter("a system message needs the chat template; leave --raw out", param_hint="--system")
    text = _standard_input() if prompt == "-" else prompt
    parameters = _parameters(
        set_,
        max_tokens=max_tokens,
        seed=seed,
        temperature=temperature,
        stop_words=stop or None,
        max_denoising_steps=steps,
        entropy_bound=entropy_bound,
        priority=priority,
        deadline_ms=deadline_ms,
        cache_salt=cache_salt,
        drafter=drafter,
        draft_text=None if draft is None else _file(draft, "--draft"),
        template=None if template is None else _template_file(template),
        suffix=suffix,
    )

    async def work() -> int:
        async with Client(
            url, model=model, timeout_s=timeout, connect_timeout_s=connect_timeout, retries=retries
        ) as client:
            showing = wants_live(live) and not as_json
            chosen: dict[str, Any] = {"previews": showing, **parameters}
            events = client.stream(text, **chosen) if raw else client.stream(messages=_chat(system, text), **chosen)
            result = await show(events, _nothing if as_json else write_answer, showing)
            if as_json:
                print(json.dumps(_document(result), ensure_ascii=False))
            else:
                write_answer("" if result.text.endswith("\n") else "\n")
                say(summary(result.statistics))
            return exit_code(result.finish_reason)

    with asyncio.Runner() as runner:
        raise typer.Exit(run(runner, work()))


@app.command()
def chat(
    system: System = None,
    max_tokens: MaxTokens = None,
    seed: Seed = None,
    temperature: Temperature = None,
    stop: Stop = None,
    steps: Steps = None,
    entropy_bound: EntropyBound = None,
    priority: Priority = None,
    deadline_ms: DeadlineMs = None,
    cache_salt: CacheSalt = None,
    set_: Set = None,
    live: Live = None,
    url: Url = DEFAULT_URL,
    model: Model = DEFAULT_MODEL,
    timeout: Timeout = 120.0,
    connect_timeout: ConnectTimeout = 5.0,
    retries: Retries = 0,
) -> None:
    """Talk in turns, one line each; a line that ends in \\ goes on in the next. /reset forgets, Ctrl-D ends."""
    parameters = _parameters(
        set_,
        max_tokens=max_tokens,
        seed=seed,
        temperature=temperature,
        stop_words=stop or None,
        max_denoising_steps=steps,
        entropy_bound=entropy_bound,
        priority=priority,
        deadline_ms=deadline_ms,
        cache_salt=cache_salt,
    )
    history: list[Message] = _chat(system, None)

    async def turn(client: Client, message: str) -> int:
        asked: list[Message] = [*history, {"role": "user", "content": message}]
        chosen: dict[str, Any] = {"previews": wants_live(live), **parameters}
        result = await show(client.stream(messages=asked, **chosen), write_answer, wants_live(live))
        write_answer("" if result.text.endswith("\n") else "\n")
        say(summary(result.statistics))
        exit_code(result.finish_reason)  # says so; the next turn may be faster
        history[:] = [*asked, {"role": "assistant", "content": result.text}]
        return EXIT_OK

    async def connect() -> Client:
        return Client(url, model=model, timeout_s=timeout, connect_timeout_s=connect_timeout, retries=retries)

    with asyncio.Runner() as runner:
        client = runner.run(connect())
        code = EXIT_OK
        while code == EXIT_OK and (message := _next_message()) is not None:
            if message == "/reset":
                history[:] = _chat(system, None)
            elif message:
                code = run(runner, turn(client, message))
        runner.run(client.close())
    raise typer.Exit(code)


@app.command()
def bench(
    requests: Annotated[int, typer.Option(help="Requests to send.")] = 16,
    concurrency: Annotated[int, typer.Option(help="Requests under way at a time.")] = 4,
    prompt: Annotated[list[str] | None, typer.Option(help="User message; repeat to send several in turn.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="File with one JSON string per line, sent in turn.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Send prompts as they are, without the chat template.")] = False,
    fixed: Annotated[
        int | None, typer.Option("--fixed-steps", help="Denoising steps of every canvas, without adaptive stopping.")
    ] = None,
    max_tokens: MaxTokens = None,
    seed: Annotated[int, typer.Option(help="Request i is sent with this seed + i.")] = 0,
    uncached: Annotated[
        bool,
        typer.Option("--uncached", help="A cache_salt of its own for every request, so that none reuses another's."),
    ] = False,
    set_: Set = None,
    warmup: Annotated[int, typer.Option(help="Requests sent one by one before the clock starts.")] = 1,
    url: Url = DEFAULT_URL,
    model: Model = DEFAULT_MODEL,
    timeout: Timeout = 120.0,
    connect_timeout: ConnectTimeout = 5.0,
) -> None:
    """Load the server and measure: a table to stderr, one JSON line to stdout. Exit code 1 if a request failed."""
    texts = tuple(prompt or ()) + (_prompt_file(prompts) if prompts else ())
    load = Load(texts or (BENCH_PROMPT,), requests, concurrency, warmup, seed, chat=not raw, uncached=uncached)
    parameters = _parameters(set_, max_tokens=max_tokens)
    if fixed is not None:
        parameters = {**parameters, **fixed_steps(fixed)}

    async def work() -> int:
        async with Client(url, model=model, timeout_s=timeout, connect_timeout_s=connect_timeout) as client:
            server = await client.metadata()
            report = await run_load(client, load, parameters)
        _print_table(report)
        about = {"server": f"{server.server} {server.server_version}", "url": url, "model": model, "seed": seed}
        print(report.json_line(**about, parameters=parameters))
        return EXIT_FAILED if report.errors else EXIT_OK

    with asyncio.Runner() as runner:
        raise typer.Exit(run(runner, work()))


@app.command()
def info(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    url: Url = DEFAULT_URL,
    model: Model = DEFAULT_MODEL,
    connect_timeout: ConnectTimeout = 5.0,
) -> None:
    """Show what a server serves: versions, the model, its context length and limits."""

    async def work() -> int:
        async with Client(url, model=model, connect_timeout_s=connect_timeout) as client:
            server, ready = await client.metadata(), await client.is_ready()
        facts = _facts(server, ready)
        if as_json:
            print(json.dumps(facts))
        else:
            width = max(map(len, facts))
            for name, value in facts.items():
                write_answer(f"{name:{width}}  {value}\n")
        return EXIT_OK

    with asyncio.Runner() as runner:
        raise typer.Exit(run(runner, work()))


def main() -> None:
    """Entry point of the command `dgemma`."""
    app()


# ---------------------------------------------------------------- arguments


def _parameters(others: list[str] | None, **given: Any) -> Parameters:
    """Those that are given, by name, and those of --set."""
    parameters = {name: value for name, value in given.items() if value is not None}
    for item in others or ():
        name, equals, value = item.partition("=")
        if not equals or not name.isidentifier():
            raise typer.BadParameter(f"{item!r} is not NAME=VALUE, like confidence_threshold=0.01", param_hint="--set")
        try:
            parameters[name] = json.loads(value)
        except ValueError:
            parameters[name] = value
    return cast(Parameters, parameters)


def _chat(system: str | None, user: str | None) -> list[Message]:
    turns = (("system", system), ("user", user))
    return [{"role": role, "content": content} for role, content in turns if content is not None]


def _standard_input() -> str:
    if sys.stdin.isatty():
        say("reading the message from the terminal; end it with Ctrl-D")
    data = sys.stdin.buffer.read()
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        say(f"error: standard input is not valid UTF-8 at byte {error.start}; convert it first")
        raise typer.Exit(EXIT_USAGE) from None


def _file(path: Path, option: str) -> str:
    """As it is: line ends too, which `read_text` would change."""
    try:
        return path.read_bytes().decode()
    except (OSError, ValueError) as error:
        raise typer.BadParameter(f"{path}: {error}", param_hint=option) from None


def _template_file(path: Path) -> list[str | int]:
    """The list; the server judges what is in it."""
    try:
        items = json.loads(_file(path, "--template"))
    except ValueError as error:
        raise typer.BadParameter(f"{path}: not JSON: {error}", param_hint="--template") from None
    except RecursionError:
        items = None
    if not isinstance(items, list):
        raise typer.BadParameter(f"{path}: give a JSON list of texts and numbers", param_hint="--template")
    return items


def _prompt_file(path: Path) -> tuple[str, ...]:
    try:
        lines = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise typer.BadParameter(f"{path}: {error}; give one JSON string per line", param_hint="--prompts") from None
    if not lines or not all(isinstance(line, str) for line in lines):
        raise typer.BadParameter(f"{path}: give one JSON string per line", param_hint="--prompts")
    return tuple(lines)


def _next_message() -> str | None:
    """The next turn from standard input, None at its end or on Ctrl-C."""
    lines: list[str] = []
    while True:
        if sys.stdin.isatty():
            print("… " if lines else "> ", end="", file=sys.stderr, flush=True)
        try:
            line = input()
        except (EOFError, KeyboardInterrupt):
            return "\n".join(lines) if lines else None
        if not line.endswith("\\"):
            return "\n".join([*lines, line])
        lines.append(line[:-1])


# ---------------------------------------------------------------- output


def _nothing(text: str) -> None:
    """For --json: the text is printed at the end, inside of the object."""


def _document(result: Result) -> Mapping[str, Any]:
    figures = {
        **asdict(result.statistics),
        "tokens_per_forward": round(result.statistics.tokens_per_forward, 3),
        "tokens_per_second": round(result.statistics.tokens_per_second, 1),
    }
    return {
        "text": result.text,
        "finish_reason": result.finish_reason,
        "stop_reason": result.stop_reason,
        "token_ids": list(result.token_ids),
        "statistics": figures,
    }


def _facts(server: ServerInfo, ready: bool) -> dict[str, str]:
    about = {"server": f"{server.server} {server.server_version}", "model": server.model, "ready": str(ready).lower()}
    return {**about, **dict(sorted(server.parameters.items()))}


def _print_table(report: Report) -> None:
    table = Table("figure", "value")
    for row in report.rows():
        table.add_row(*row)
    Console(stderr=True).print(table)
