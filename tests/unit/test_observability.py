"""Log, metrics and traces as one: what is opened is closed, and serving goes on without what cannot be had."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dgemma_runtime.assembly import Application
from dgemma_runtime.engines.scripted_directory import ScriptFile, write_scripted
from dgemma_runtime.errors import ConfigurationError
from dgemma_runtime.events import Finished
from dgemma_runtime.observability import Observability
from dgemma_runtime.process_settings import ProcessSettings
from dgemma_runtime.testing import EOS, Recorder, tiny_codec, tiny_tokenizer


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in ("dgemma_runtime", "opentelemetry")]
    before = [(logger.handlers, logger.level) for logger in loggers]
    threads = set(threading.enumerate())
    yield
    for logger, (handlers, level) in zip(loggers, before, strict=True):
        logger.handlers, logger.level = handlers, level
    assert set(threading.enumerate()) == threads


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    tiny_tokenizer().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<bos>", "eos_token": "<eos>"}')
    answers = [(tiny_codec().encode("one").tolist(), [*tiny_codec().encode("reply").tolist()[1:], EOS])]
    script = ScriptFile([EOS], answers, tiny_codec().encode("fail").tolist())
    write_scripted(tmp_path, script, tiny_tokenizer().get_vocab_size(), canvas_length=8)
    return tmp_path


def test_serving_works_where_triton_takes_no_metrics(engine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Refusing:
        COUNTER, GAUGE = "counter", "gauge"

        def __init__(self, **values: Any) -> None:
            raise RuntimeError("no metrics here")

    settings = ProcessSettings(engine)
    watching = Observability(settings)
    application = Application.open(settings, watching.observer)
    watching.publish(Refusing, application, "m", "1")
    recorder = Recorder()
    prepared = application.prepare({"text_input": np.array([b"one"], object)}, "", "r-1")
    application.service.submit(prepared.request, recorder)
    last = recorder.finished()
    application.service.stop()
    watching.close()
    assert (type(last), last.text) == (Finished, "reply")
    log = capsys.readouterr().err
    assert "Triton took no metrics (no metrics here)" in log
    assert "request r-1: finished (stop)" in log


def test_spans_that_cannot_be_had_end_the_start(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "carrier pigeon")
    with pytest.raises(ConfigurationError, match="carrier pigeon"):
        Observability(ProcessSettings(engine, traces=True))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"log_format": "xml"}, "log_format must be text or json, got 'xml'"),
        ({"traces": "yes"}, "traces must be true or false, got 'yes'"),
        ({"warm_up": 1}, "warm_up must be true or false, got 1"),
        ({"log_formt": "json"}, "did you mean log_format?"),
    ],
)
def test_odd_settings_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError) as error:
        ProcessSettings.from_mapping({"engine": "somewhere", **values})
    assert message in str(error.value)


def test_settings_survive_the_environment() -> None:
    settings = ProcessSettings(Path("somewhere"), log_format="json", log_level="DEBUG", traces=True)
    assert ProcessSettings.from_environment({"DGEMMA_SETTINGS": settings.to_json()}) == settings
