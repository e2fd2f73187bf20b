"""The runtime's own log: text or JSON lines on stderr, written by a thread of its own. Knows no Triton.

A message about one request begins with "request %s: "; its id is then a field of the JSON line. No line holds a prompt
or an answer.
"""

from __future__ import annotations

import atexit
import logging
import queue
import sys
from dataclasses import asdict
from logging.handlers import QueueHandler, QueueListener
from typing import TextIO

from pythonjsonlogger.json import JsonFormatter

from dgemma_runtime.deferred import Deferred
from dgemma_runtime.events import Finished
from dgemma_runtime.observer import Observer
from dgemma_runtime.requests import LiveRequest

_RUNTIME, _TRACES = "dgemma_runtime", "opentelemetry"
_ABOUT_A_REQUEST = "request %s: "
_log = logging.getLogger(__name__)


class RuntimeLog:
    """From now on the loggers of runtime and OpenTelemetry put their records into a queue.

    A thread writes them to `stream` (stderr), so that no other one waits for whoever reads the log. After `close` they
    are written at once.
    """

    def __init__(self, level: str, log_format: str, stream: TextIO | None = None) -> None:
        records: queue.SimpleQueue[logging.LogRecord] = queue.SimpleQueue()
        self._output = logging.StreamHandler(stream or sys.stderr)
        self._output.setFormatter(_json_formatter() if log_format == "json" else _text_formatter())
        self._loggers = [logging.getLogger(name) for name in (_RUNTIME, _TRACES)]
        for logger, least in zip(self._loggers, (level, "WARNING"), strict=True):
            logger.handlers = [_RecordHandler(records)]
            logger.setLevel(least)
        self._listener = QueueListener(records, self._output)
        self._listener.start()
        self._closed = False
        atexit.register(self.close)

    def close(self) -> None:
        """Write what is still in the queue."""
        if not self._closed:
            self._closed = True
            for logger in self._loggers:
                logger.handlers = [self._output]
            self._listener.stop()
            atexit.unregister(self.close)


class _RecordHandler(QueueHandler):
    """Takes the request's id from messages about one before the message is put together."""

    def prepare(self, record: logging.LogRecord) -> logging.LogRecord:
        if str(record.msg).startswith(_ABOUT_A_REQUEST) and isinstance(record.args, tuple):
            record.request_id = record.args[0]
        prepared: logging.LogRecord = super().prepare(record)
        return prepared


def _text_formatter() -> logging.Formatter:
    return logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")


def _json_formatter() -> logging.Formatter:
    """`time` (UTC), `level`, `logger`, `message`, then what the record has besides."""
    names = {"levelname": "level", "name": "logger"}
    fields = "{levelname}{name}{message}"
    return JsonFormatter(fields, style="{", rename_fields=names, timestamp="time")


class LogObserver(Observer):
    """One line when a request is accepted (DEBUG), refused, preempted (DEBUG) and at its end.

    A line takes longer than an engine thread should be kept, so `deferred` writes the one of every request.
    """

    def __init__(self, deferred: Deferred) -> None:
        self._deferred = deferred

    def refused(self, request_id: str, kind: str) -> None:
        _log.info("request %s: refused, %s", request_id or "-", kind, extra={"error": kind})

    def tokenized(self, request_id: str, tokens: int) -> None:
        _log.debug("request %s: %d prompt tokens, and none asked for", request_id, tokens)

    def submitted(self, request: LiveRequest) -> None:
        tokens = len(request.prompt_ids)
        figures = {"prompt_tokens": tokens, "max_tokens": request.max_tokens}
        _log.debug("request %s: accepted, %d prompt tokens", request.request_id, tokens, extra=figures)

    def preempted(self, request: LiveRequest) -> None:
        _log.debug("request %s: preempted, its pages went to another one", request.request_id)

    def finished(self, request: LiveRequest, event: Finished) -> None:
        level = logging.ERROR if event.reason == "error" else logging.INFO
        if _log.isEnabledFor(level):
            self._deferred.call(lambda: _write_end(level, request.request_id, event))


def _write_end(level: int, request_id: str, event: Finished) -> None:
    figures = event.statistics
    _log.log(
        level,
        "request %s: finished (%s), %d tokens in %d canvases and %d steps, %.1f ms of which %.1f in the queue%s",
        request_id,
        event.reason,
        figures.num_output_tokens,
        figures.canvases,
        figures.denoising_steps,
        figures.total_ms,
        figures.queue_ms,
        f"; {event.error}" if event.error else "",
        extra={"reason": event.reason, **asdict(figures)},
    )
