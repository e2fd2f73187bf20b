"""The runtime's log: what a line holds, in both formats, and that nobody waits for whoever reads it."""

from __future__ import annotations

import io
import json
import logging
import threading
from collections.abc import Iterator
from datetime import UTC, datetime

import pytest

from dgemma_runtime.deferred import Deferred
from dgemma_runtime.errors import InvalidRequest
from dgemma_runtime.logs import LogObserver, RuntimeLog
from dgemma_runtime.parameters import default_parameters
from dgemma_runtime.requests import GenerationRequest
from dgemma_runtime.service import Service
from dgemma_runtime.testing import EOS, Recorder, scripted_engine, small_settings, tiny_codec

ANSWERS = {"a secret prompt": "a secret answer"}
_log = logging.getLogger("dgemma_runtime.some.module")


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in ("dgemma_runtime", "opentelemetry")]
    before = [(logger.handlers, logger.level) for logger in loggers]
    yield
    for logger, (handlers, level) in zip(loggers, before, strict=True):
        logger.handlers, logger.level = handlers, level


def lines(stream: io.StringIO) -> list[dict[str, object]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def served(log_format: str, level: str = "DEBUG", fail: bool = False) -> io.StringIO:
    """The log of one request that is answered (or not), and of one that is refused."""
    stream = io.StringIO()
    log = RuntimeLog(level, log_format, stream)
    engine = scripted_engine(ANSWERS, fail_on={"denoise": 1} if fail else None)
    defaults = default_parameters({"eos_token_id": EOS})
    deferred = Deferred("test")
    service = Service(engine, tiny_codec(), small_settings(), defaults, LogObserver(deferred))
    service.start()
    recorder = Recorder()
    with pytest.raises(InvalidRequest):
        service.submit(GenerationRequest("", defaults, "bad-1"), recorder)
    service.submit(GenerationRequest("a secret prompt", defaults, "good-1"), recorder)
    recorder.finished()
    service.stop()
    deferred.close(10)
    log.close()
    return stream


def test_a_prompt_that_is_only_tokenized_has_a_line_of_its_own() -> None:
    stream = io.StringIO()
    log = RuntimeLog("DEBUG", "json", stream)
    LogObserver(Deferred("test")).tokenized("count-1", 16)
    log.close()
    (line,) = lines(stream)
    assert (line["level"], line["request_id"], line["message"]) == (
        "DEBUG",
        "count-1",
        "request count-1: 16 prompt tokens, and none asked for",
    )


def test_json_lines_have_the_request_s_id_and_its_figures() -> None:
    refused, accepted, finished = lines(served("json"))
    assert refused["request_id"] == "bad-1"
    assert (refused["level"], refused["error"]) == ("INFO", "InvalidRequest")
    assert (accepted["level"], accepted["request_id"], accepted["prompt_tokens"]) == ("DEBUG", "good-1", 16)
    assert (finished["level"], finished["request_id"], finished["reason"]) == ("INFO", "good-1", "stop")
    assert finished["num_output_tokens"] == 15
    assert float(str(finished["total_ms"])) > float(str(finished["queue_ms"])) > 0
    assert {"time", "level", "logger", "message"} <= set(finished)
    moment = datetime.fromisoformat(str(finished["time"]))
    assert abs((datetime.now(UTC) - moment).total_seconds()) < 60


def test_text_lines_say_the_same() -> None:
    refused, accepted, finished = served("text").getvalue().splitlines()
    assert "INFO dgemma_runtime.logs: request bad-1: refused, InvalidRequest" in refused
    assert "DEBUG dgemma_runtime.logs: request good-1: accepted, 16 prompt tokens" in accepted
    assert "request good-1: finished (stop), 15 tokens in 2 canvases and 4 steps" in finished


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_no_prompt_and_no_answer(log_format: str) -> None:
    assert "secret" not in served(log_format).getvalue()


def test_debug_lines_are_left_out_at_info() -> None:
    assert [line["level"] for line in lines(served("json", "INFO"))] == ["INFO", "INFO"]


def test_a_request_that_failed_is_an_error() -> None:
    last = lines(served("json", fail=True))[-1]
    assert (last["level"], last["reason"]) == ("ERROR", "error")
    assert "the engine failed" in str(last["message"])


def test_a_traceback_stays_on_its_line() -> None:
    stream = io.StringIO()
    log = RuntimeLog("INFO", "json", stream)
    try:
        raise ValueError("what went wrong")
    except ValueError:
        _log.exception("request %s: its sink failed", "abc")
    log.close()
    (line,) = lines(stream)
    assert line["request_id"] == "abc"
    assert "ValueError: what went wrong" in str(line["message"])


def test_nobody_waits_for_a_reader_who_has_stopped() -> None:
    class Stuck(io.StringIO):
        def write(self, text: str) -> int:
            assert go_on.wait(20)
            return super().write(text)

    go_on, stream = threading.Event(), Stuck()
    log = RuntimeLog("INFO", "text", stream)
    for number in range(100):
        _log.info("line %d", number)  # returns, though nothing is written yet
    assert stream.getvalue() == ""
    go_on.set()
    log.close()
    assert len(stream.getvalue().splitlines()) == 100


def test_after_the_end_lines_are_written_at_once() -> None:
    stream = io.StringIO()
    log = RuntimeLog("INFO", "json", stream)
    log.close()
    log.close()
    _log.info("late")
    assert lines(stream)[0]["message"] == "late"


def test_what_opentelemetry_says_is_in_the_same_format() -> None:
    stream = io.StringIO()
    log = RuntimeLog("DEBUG", "json", stream)
    logging.getLogger("opentelemetry.sdk").info("nobody needs this")
    logging.getLogger("opentelemetry.sdk").warning("the collector is away")
    log.close()
    (line,) = lines(stream)
    assert (line["logger"], line["message"]) == ("opentelemetry.sdk", "the collector is away")
