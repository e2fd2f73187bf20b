"""The engine thread: schedule, run, postprocess. Owns every live request; knows no transport and no engine library."""

from __future__ import annotations

import logging
import secrets
import threading
import time
import uuid
from collections.abc import Callable

import numpy as np

from dgemma_runtime.canvas import Canvas
from dgemma_runtime.codec import Codec
from dgemma_runtime.contract import DenoiseResult, EncodeRow, Engine, Int32Array
from dgemma_runtime.detokenizer import OutputText
from dgemma_runtime.errors import DGemmaError, EngineError, InvalidRequest, Overloaded
from dgemma_runtime.events import Commit, Event, Finished, FinishReason, Preview, Sink
from dgemma_runtime.parameters import GenerationParameters
from dgemma_runtime.requests import GenerationRequest, LiveRequest, Timeline, as_token_ids
from dgemma_runtime.scheduler import Plan, Scheduler
from dgemma_runtime.settings import RuntimeSettings
from dgemma_runtime.statistics import ServiceStatistics, Stopwatch

__all__ = ["Commit", "Event", "Finished", "GenerationRequest", "Preview", "Service", "Sink"]

_log = logging.getLogger(__name__)
SHUTDOWN = "the server is shutting down"  # the error of requests that its end has ended
_STUCK_S = 30.0  # how long `stop` waits for an engine call to return before it gives the thread up


def _never() -> bool:
    return False


class Service:
    """Serves requests with one engine. `submit`, `cancel` and `stop` may be called from any thread.

    Every accepted request gets exactly one Finished, always last, on success, error, cancel and shutdown. Sinks are
    called on the engine thread and must return quickly.
    """

    def __init__(self, engine: Engine, codec: Codec, settings: RuntimeSettings, defaults: GenerationParameters) -> None:
        self.codec = codec
        self.defaults = defaults
        self.max_model_len = settings.context_length(engine.manifest)  # tokens, prompt and output together
        self.failure: str | None = None
        self._engine, self._model = engine, engine.manifest.model
        chunk = min(settings.prefill_chunk, engine.limits.max_encode_tokens)
        self._scheduler = Scheduler(self._model, engine.limits, chunk, settings.prefill_budget, settings.queue_size)
        self._changed = threading.Condition()  # guards the scheduler, `finished` of requests, and these two
        self._draining = self._aborting = False
        self._thread: threading.Thread | None = None
        self._ticks = self._canvas_steps = self._encoded_tokens = 0
        self._engine_time, self._busy_time = Stopwatch(), Stopwatch()

    # ------------------------------------------------------------ any thread

    @property
    def healthy(self) -> bool:
        """Takes requests and its engine thread is alive."""
        alive = self._thread is not None and self._thread.is_alive()
        return alive and self.failure is None and not self._draining

    def start(self) -> None:
        """Start the engine thread."""
        assert self._thread is None
        self._thread = threading.Thread(target=self._main, name="engine", daemon=True)
        self._thread.start()

    def submit(self, request: GenerationRequest, sink: Sink, is_cancelled: Callable[[], bool] = _never) -> str:
        """Queue a request and return its id. `is_cancelled` is polled on the engine thread, once per tick.

        Raises InvalidRequest, Overloaded, or EngineError when the engine has failed; then the sink is never called.
        """
        self._check_accepting()
        live = self._accept(request, sink, is_cancelled)
        with self._changed:
            self._check_accepting()
            self._scheduler.add(live)
            self._changed.notify()
        return live.request_id

    def cancel(self, request_id: str) -> bool:
        """End the live requests of this id at the next step; whether there was one."""
        with self._changed:
            found = [request for request in self._scheduler.live() if request.request_id == request_id]
            for request in found:
                request.cancel_requested = True
        return bool(found)

    def stop(self, grace_s: float = 0.0) -> None:
        """Refuse new requests, let the accepted ones end for `grace_s` seconds, end the rest, close the engine."""
        with self._changed:
            self._draining = True
            self._changed.notify()
        if self._thread is None:
            self._thread = threading.Thread(target=self._main, name="engine", daemon=True)
            self._thread.start()  # so that accepted requests end and the engine is closed on its own thread
        self._thread.join(grace_s)
        with self._changed:
            self._aborting = True
        self._thread.join(_STUCK_S)
        if self._thread.is_alive():
            self._fail(EngineError(f"an engine call did not return within {_STUCK_S:g} s of the shutdown"))

    def fail(self, reason: str) -> None:
        """End every live request with an error, from a thread that has seen the engine's be stuck or gone."""
        self._fail(EngineError(reason))

    def statistics(self) -> ServiceStatistics:
        """Counters since the start; a snapshot."""
        engine_ns = self._engine_time.read_ns()  # before the time it is a part of
        host_ns = self._busy_time.read_ns() - engine_ns
        with self._changed:
            return ServiceStatistics(
                ticks=self._ticks,
                canvas_steps=self._canvas_steps,
                encoded_tokens=self._encoded_tokens,
                engine_ms=engine_ns / 1e6,
                host_ms=host_ns / 1e6,
                requests_waiting=self._scheduler.waiting,
                requests_running=self._scheduler.running,
                full_pages_used=self._scheduler.full_pages.used,
                sliding_pages_used=self._scheduler.sliding_pages.used,
            )

    def _check_accepting(self) -> None:
        if self.failure is not None:
            raise EngineError(self.failure)
        if self._draining:
            raise Overloaded(SHUTDOWN)
        if self._thread is None:
            raise EngineError("the service was not started")

    def _accept(self, request: GenerationRequest, sink: Sink, is_cancelled: Callable[[], bool]) -> LiveRequest:
        timeline = Timeline(time.monotonic_ns(), self._engine_time.read_ns())
        parameters = request.parameters
        prompt_ids = self._prompt_ids(request)
        for end_id in parameters.end_ids:
            if end_id >= self._model.vocab_size:
                raise InvalidRequest("end_id", f"must be from 0 to {self._model.vocab_size - 1}, got {end_id}")
        max_tokens = self._max_tokens(request.prompt_field, len(prompt_ids), parameters.max_tokens)
        return LiveRequest(
            request_id=request.request_id or uuid.uuid4().hex,
            prompt_ids=prompt_ids,
            parameters=parameters,
            seed=secrets.randbits(64) if parameters.seed is None else parameters.seed,
            max_tokens=max_tokens,
            output=OutputText(self.codec, max_tokens, parameters.end_ids, parameters.stop),
            sink=sink,
            is_cancelled=is_cancelled,
            timeline=timeline,
        )

    def _prompt_ids(self, request: GenerationRequest) -> Int32Array:
        prompt, field = request.prompt, request.prompt_field
        if isinstance(prompt, str):
            if not prompt:
                raise InvalidRequest(field, "is empty; send at least one character")
            return self.codec.encode(prompt, field)
        if prompt.size == 0:
            raise InvalidRequest(field, "is empty; send at least one token id")
        if not np.issubdtype(prompt.dtype, np.integer):
            raise InvalidRequest(field, f"must be integers, got {prompt.dtype}")
        outside = prompt[(prompt < 0) | (prompt >= self._model.vocab_size)]
        if outside.size:
            last = self._model.vocab_size - 1
            raise InvalidRequest(field, f"token ids must be from 0 to {last}, got {outside.flat[0]}")
        return as_token_ids(prompt)

    def _max_tokens(self, field: str, prompt_tokens: int, asked: int | None) -> int:
        context = f"this model's maximum context length is {self.max_model_len} tokens"
        left = self.max_model_len - prompt_tokens
        if left < 1:
            raise InvalidRequest(
                field,
                f"{context}, the prompt has {prompt_tokens}; shorten it by at least {1 - left} to leave room for one",
            )
        if asked is not None and asked > left:
            raise InvalidRequest(
                "max_tokens",
                f"{context}, but the prompt has {prompt_tokens} and max_tokens asks for {asked} more "
                f"({prompt_tokens + asked} together); ask for at most {left}",
            )
        return left if asked is None else asked

    # ------------------------------------------------------------ engine thread

    def _main(self) -> None:
        try:
            while self._wait_for_work():
                with self._busy_time.running():
                    self._drop_cancelled()
                    plan = self._schedule()
                    result = self._execute(plan)
                    self._postprocess(plan, result)
            for request in self._scheduler.live():  # nothing is added any more
                self._finish(request, "error", SHUTDOWN)
        except BaseException as error:  # noqa: BLE001 - whatever ends this thread, nobody may wait for it for ever
            self._fail(error)
        finally:
            self._close()

    def _wait_for_work(self) -> bool:
        """Blocks while nothing is live; False when the thread is to end."""
        with self._changed:
            while not (self._aborting or self._draining or self._scheduler.waiting or self._scheduler.running):
                self._changed.wait()
            return not self._aborting and bool(self._scheduler.waiting or self._scheduler.running)

    def _drop_cancelled(self) -> None:
        with self._changed:
            live = self._scheduler.live()
        for request in live:
            try:
                cancelled = request.cancel_requested or request.is_cancelled()
            except Exception:  # noqa: BLE001 - a transport's fault must not end the loop
                _log.exception("request %s: is_cancelled failed, the request is cancelled", request.request_id)
                cancelled = True
            if cancelled:
                self._finish(request, "cancelled")

    def _schedule(self) -> Plan:
        with self._changed:
            plan = self._scheduler.plan()
        for request in plan.admitted:
            request.timeline.admitted = time.monotonic_ns()
        self._ticks += 1
        return plan

    def _execute(self, plan: Plan) -> DenoiseResult | None:
        """The two engine calls of a tick."""
        if plan.encode:
            rows = []
            for chunk in plan.encode:
                request = chunk.request
                assert request.pages is not None
                rows.append(EncodeRow(request.uncached[: chunk.tokens], request.cached_tokens, request.pages.view))
                self._encoded_tokens += chunk.tokens
            with self._engine_time.running():
                self._engine.encode(rows)
            with self._changed:  # gives pages back
                for chunk in plan.encode:
                    chunk.request.encoded(chunk.tokens)
        if not plan.denoise:
            return None
        denoise_rows = []
        for request in plan.denoise:
            canvas = request.canvas or self._start_canvas(request)
            assert request.pages is not None
            denoise_rows.append(canvas.row(request.slot, request.cached_tokens, request.pages.view))
        with self._engine_time.running():
            result = self._engine.denoise(denoise_rows)
        self._canvas_steps += len(denoise_rows)
        assert result.argmax_ids.shape == (len(denoise_rows), self._model.canvas_length)
        return result

    def _start_canvas(self, request: LiveRequest) -> Canvas:
        if request.canvas_index == 0:
            request.timeline.prefilled = time.monotonic_ns()
        return request.start_canvas(self._model.canvas_length, self._model.vocab_size)

    def _postprocess(self, plan: Plan, result: DenoiseResult | None) -> None:
        if result is None:
            return
        for row, request in enumerate(plan.denoise):
            canvas = request.canvas
            assert canvas is not None
            request.denoising_steps += 1
            try:
                done = canvas.advance(result.argmax_ids[row], result.sampled_ids[row], result.entropies[row])
            except EngineError as error:  # of this row only
                _log.error("request %s: %s", request.request_id, error)
                self._finish(request, "error", str(error))
                continue
            if done:
                self._commit(request, canvas)
            elif request.parameters.stream_previews:
                text = request.output.preview(canvas.argmax_ids)
                self._send(request, Preview(text, request.canvas_index, canvas.step, canvas.argmax_ids))

    def _commit(self, request: LiveRequest, canvas: Canvas) -> None:
        emitted = request.output.commit(canvas.argmax_ids)
        request.timeline.first_commit = request.timeline.first_commit or time.monotonic_ns()
        self._engine.release(request.slot)
        commit = Commit(emitted.text, emitted.token_ids, request.canvas_index, canvas.step)
        request.end_canvas(canvas.argmax_ids)
        if not self._send(request, commit):
            return
        if emitted.reason is not None:
            self._finish(request, emitted.reason)

    def _send(self, request: LiveRequest, event: Event) -> bool:
        """False when the request is over, be it because its sink failed."""
        if request.finished:
            return False
        try:
            request.sink(event)
        except Exception:  # noqa: BLE001 - a transport's fault must not end the loop
            _log.exception("request %s: its sink failed, the request is cancelled", request.request_id)
            self._finish(request, "cancelled")
            return False
        return True

    def _finish(self, request: LiveRequest, reason: FinishReason, error: str | None = None) -> None:
        with self._changed:
            if request.finished:
                return
            request.finished = True
            failed = self.failure is not None
            if not failed:
                self._scheduler.remove(request)
        if not failed and request.canvas is not None:
            self._engine.release(request.slot)
        output = request.output
        statistics = request.statistics(time.monotonic_ns(), self._engine_time.read_ns())
        try:
            request.sink(Finished(reason, output.text, output.token_ids, statistics, error))
        except Exception:  # noqa: BLE001 - a transport's fault must not end the loop
            _log.exception("request %s: its sink failed on the last event", request.request_id)

    def _fail(self, error: BaseException) -> None:
        """End every request with the error. The engine is only closed after that, the scheduler not used again."""
        text = str(error) if isinstance(error, DGemmaError) else f"{type(error).__name__}: {error}"
        _log.critical("the engine thread ends: %s", text, exc_info=error)
        with self._changed:
            self.failure = f"the engine failed: {text}"
            live = self._scheduler.live()
        for request in live:
            self._finish(request, "error", self.failure)

    def _close(self) -> None:
        try:
            self._engine.close()
        except Exception:  # noqa: BLE001 - nobody is left to tell
            _log.exception("the engine did not close")
