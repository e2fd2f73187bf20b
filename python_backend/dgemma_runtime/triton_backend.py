"""The adapter between Triton's Python backend and the runtime's service. Knows tensors by `tensors.py`, no engine.

Four threads beside the engine's: Triton's own calls `execute`, which only enqueues; the *writer* sends responses, so
that the engine thread never waits for Triton; the *watcher* asks Triton which requests were cancelled and, when the
engine has failed, withdraws the model; the watchdog (`watchdog.py`) sees that the engine thread gets on.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import uuid
from collections.abc import Sequence
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from dgemma_runtime.assembly import Application, PreparedRequest
from dgemma_runtime.errors import DGemmaError, EngineError, InvalidRequest, Overloaded
from dgemma_runtime.events import Commit, Event, Finished, Prefill, Preview
from dgemma_runtime.observability import Observability
from dgemma_runtime.outbox import Lane, Outbox
from dgemma_runtime.process_settings import ProcessSettings
from dgemma_runtime.service import SHUTDOWN
from dgemma_runtime.tensors import Arrays, commit_outputs, finished_outputs, prefill_outputs, preview_outputs
from dgemma_runtime.tracing import called_with
from dgemma_runtime.triton_features import check_triton
from dgemma_runtime.watchdog import Watchdog

_log = logging.getLogger(__name__)
_WATCH_S, _LONGEST_WATCH_S = 0.02, 0.25
_WATCH_PER_REQUEST_S = 0.003  # asking costs about 60 us per request, be it waiting or running: 2% of a core
_IDLE_WATCH_S = 1.0
_GRACE_S = 5.0  # for requests at `finalize`; Triton has waited for them before, up to its own exit timeout


class TritonBackend:
    """What Triton's stub calls: `initialize`, `execute`, `is_ready` (from 26.02 on), `finalize`."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the engine; Triton shows the message of what is raised as the reason why the model did not load."""
        settings: ProcessSettings | None = None
        try:
            settings = ProcessSettings.from_environment(os.environ)
            check_triton(pb_utils, np.__version__)
            self._watching = Observability(settings)
            self._application = self._open(settings)
            self._settings = settings
        except DGemmaError as error:
            if settings is not None:
                settings.report_failure(str(error))
            raise pb_utils.TritonModelException(f"{type(error).__name__}: {error}") from None
        self._model_name = args["model_name"]
        self._watching.publish(pb_utils.MetricFamily, self._application, args["model_name"], args["model_version"])
        self._server = os.getppid()
        self._live: dict[int, _Reply] = {}  # by id(); taken out by the writer when the last response is sent
        self._outbox: Outbox[_Reply] = Outbox()
        self._wake, self._stopping = threading.Event(), False
        self._drainer: threading.Thread | None = None
        self._threads = [
            threading.Thread(target=self._write, name="writer", daemon=True),
            threading.Thread(target=self._watch, name="watcher", daemon=True),
        ]
        for thread in self._threads:
            thread.start()
        application = self._application
        self._watchdog = Watchdog(application.service, application.engine, settings.step_timeout_s, settings.beat)
        self._watchdog.start()

    def execute(self, requests: Sequence[Any]) -> None:
        """Enqueue; every response goes through the request's sender, later."""
        for request in requests:
            reply = _Reply(request)
            self._live[id(reply)] = reply
            try:
                self._submit(request, reply)
            except Exception as error:  # noqa: BLE001 - an exception here would hang the client
                self._outbox.put(reply, error)

    def is_ready(self) -> bool:
        """Asked by Triton for the model's readiness, where it knows this function."""
        return self._application.service.healthy

    def finalize(self) -> None:
        """Let what is running end for a moment, then end it; every client has its last response when this returns."""
        if self._application.service.failure is None:  # else every request has its end, and the engine may be stuck
            self._stop(_GRACE_S)
            if self._drainer is not None:
                self._drainer.join()
        self._stopping = True
        self._wake.set()
        self._outbox.close()
        for thread in self._threads:
            thread.join()
        self._watching.close()

    def _open(self, settings: ProcessSettings) -> Application:
        try:
            return Application.open(settings, self._watching.observer)
        except BaseException:
            self._watching.close()
            raise

    def _submit(self, request: Any, reply: _Reply) -> None:
        tensors: Arrays = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
        values = request.parameters()
        try:
            prepared = self._application.prepare(tensors, values, reply.request_id, request.timeout())
        except Exception as error:
            self._watching.observer.refused(reply.request_id, type(error).__name__)
            raise
        reply.prepared = prepared
        parameters = prepared.request.parameters

        def sink(event: Event) -> None:
            if parameters.stream or isinstance(event, Finished):
                self._outbox.put(reply, event)

        with called_with(values):
            self._application.service.submit(prepared.request, sink, lambda: reply.cancelled)
        self._wake.set()

    def _write(self) -> None:
        while (item := self._outbox.take()) is not None:
            reply, content = item
            final = isinstance(content, Finished | Exception)
            try:
                reply.send(content)
            except Exception:  # noqa: BLE001 - one request's fault must not end the others
                _log.exception("request %s: a response could not be sent", reply.request_id)
                reply.cancelled = True
            if final:
                reply.close()
                del self._live[id(reply)]
                self._wake.set()
            del item, reply  # Triton unloads a model only when nothing refers to its requests any more

    def _watch(self) -> None:
        service = self._application.service
        while not self._stopping:
            if self._live:
                time.sleep(min(max(_WATCH_S, _WATCH_PER_REQUEST_S * len(self._live)), _LONGEST_WATCH_S))
            else:
                self._wake.wait(_IDLE_WATCH_S)
            self._wake.clear()
            if os.getppid() != self._server:  # Triton was killed; without this its requests would run on for nobody
                os._exit(1)
            for reply in list(self._live.values()):
                reply.poll()
                del reply
            if service.failure is not None and not self._live:
                self._withdraw(service.failure)
                return
            if self._drainer is None and (grace_s := self._settings.drain_request()) is not None:
                self._drainer = threading.Thread(target=self._drain, args=(grace_s,), name="drainer", daemon=True)
                self._drainer.start()

    def _drain(self, grace_s: float) -> None:
        self._stop(grace_s)
        while self._live:
            time.sleep(_WATCH_S)
        self._settings.drained()

    def _stop(self, grace_s: float) -> None:
        self._watchdog.expect_end()
        self._application.service.stop(grace_s)

    def _withdraw(self, failure: str) -> None:
        """Make the model not ready, as far as this Triton can; new requests get the error in any case."""
        self._settings.report_failure(failure)
        try:
            pb_utils.unload_model(self._model_name)  # asynchronous: it calls `finalize` later
        except Exception as error:  # noqa: BLE001 - Triton raises its own type
            _log.critical(
                "%s; Triton did not unload the model (%s): where it has no is_ready either, its readiness stays 200. "
                "Start Triton with --model-control-mode=explicit --load-model=%s, and restart it now",
                *(failure, error, self._model_name),
            )
        else:
            _log.critical("%s; the model was unloaded", failure)


class _Reply(Lane):
    """The responses of one request. Sent by the writer, asked about by the watcher, never both at once."""

    def __init__(self, request: Any) -> None:
        super().__init__()
        self.request_id: str = request.request_id() or uuid.uuid4().hex
        self.prepared: PreparedRequest | None = None  # None until it was understood
        self.cancelled = False
        self._sender = request.get_response_sender()
        self._wanted = set(request.requested_output_names())
        self._echo = True  # the prompt is still to come, if it was asked for
        self._lock = threading.Lock()

    def poll(self) -> None:
        """Ask Triton whether the client has gone; a sender must not be asked after its last response."""
        with self._lock:
            if self._sender is not None and not self.cancelled:
                self.cancelled = self._sender.is_cancelled()

    def close(self) -> None:
        with self._lock:
            self._sender = None

    def send(self, content: Event | Exception) -> None:
        """One response; Finished and exceptions make it the last one."""
        if isinstance(content, Exception):
            self._send_error(content)
        elif isinstance(content, Prefill):
            self._send(prefill_outputs(content))
        elif isinstance(content, Preview):
            self._send(preview_outputs(content))
        elif isinstance(content, Commit):
            self._send(commit_outputs(content, *self._echoed()))
        elif content.reason == "error":
            code = "UNAVAILABLE" if content.error == SHUTDOWN else "INTERNAL"
            self._send_last(pb_utils.InferenceResponse(error=_error(content.error or "", code)))
        else:
            self._send_finished(content)

    def _send_finished(self, content: Finished) -> None:
        assert self.prepared is not None
        text, ids = self._echoed()  # of a stream, where no canvas has brought it
        if not self.prepared.request.parameters.stream:
            text, ids = text + content.text, np.concatenate([ids, content.token_ids])
        self._send_last(self._response(finished_outputs(content, self.prepared.options, text, ids)))

    def _echoed(self) -> tuple[str, Any]:
        """The prompt, the first time only."""
        assert self.prepared is not None
        if not self._echo:
            return "", np.empty(0, np.int32)
        self._echo = False
        return self.prepared.echoed_text, self.prepared.echoed_ids

    def _send_error(self, error: Exception) -> None:
        if isinstance(error, InvalidRequest):
            response = _error(str(error), "INVALID_ARG")
        elif isinstance(error, Overloaded | EngineError):  # it was not accepted: another server may, or this one later
            response = _error(str(error), "UNAVAILABLE")
        elif isinstance(error, DGemmaError):
            response = _error(str(error), "INTERNAL")
        else:
            _log.error("request %r failed", self.request_id, exc_info=error)
            response = _error(f"internal error; the server's log has it under the request id {self.request_id!r}")
        self._send_last(pb_utils.InferenceResponse(error=response))

    def _response(self, outputs: Arrays) -> Any:
        return pb_utils.InferenceResponse(
            [pb_utils.Tensor(name, array) for name, array in outputs.items() if name in self._wanted]
        )

    def _send(self, outputs: Arrays) -> None:
        if not self._wanted.isdisjoint(outputs):
            self._sender.send(self._response(outputs))

    def _send_last(self, response: Any) -> None:
        with self._lock:
            self._sender.send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
            self._sender = None


def _error(message: str, code: str = "INTERNAL") -> Any:
    return pb_utils.TritonError(message, getattr(pb_utils.TritonError, code))
