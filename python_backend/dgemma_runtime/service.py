"""The engine thread: schedule, run, postprocess. Owns every live request; knows no transport and no engine library."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable

from dgemma_runtime.canvas import Canvas
from dgemma_runtime.codec import Codec
from dgemma_runtime.contract import CommitRow, DenoiseResult, EncodeRow, Engine
from dgemma_runtime.drafting.drafting import Drafting
from dgemma_runtime.drafting.step import denoise_step
from dgemma_runtime.errors import DGemmaError, EngineError, EngineMemoryError, Overloaded
from dgemma_runtime.events import Commit, Event, Finished, FinishReason, Prefill, Preview, Sink
from dgemma_runtime.intake import Intake
from dgemma_runtime.observer import Observer
from dgemma_runtime.parameters import GenerationParameters
from dgemma_runtime.requests import GenerationRequest, LiveRequest, Timeline
from dgemma_runtime.scheduler import Plan, Preempted, Scheduler
from dgemma_runtime.settings import RuntimeSettings
from dgemma_runtime.statistics import ServiceStatistics, Stopwatch

__all__ = ["Commit", "Event", "Finished", "GenerationRequest", "Preview", "Service", "Sink"]

_log = logging.getLogger(__name__)
SHUTDOWN = "the server is shutting down"  # the error of requests that its end has ended
_STUCK_S = 30.0  # how long `stop` waits for an engine call to return before it gives the thread up
_LONGEST_HINT_S = 60


class Service:
    """Serves requests with one engine. `submit`, `cancel` and `stop` may be called from any thread.

    Every accepted request gets exactly one Finished, always last, on success, error, cancel and shutdown. Sinks are
    called on the engine thread and must return quickly.
    """

    def __init__(
        self,
        engine: Engine,
        codec: Codec,
        settings: RuntimeSettings,
        defaults: GenerationParameters,
        observer: Observer | None = None,
    ) -> None:
        self.codec = codec
        self.defaults = defaults
        self.max_model_len = settings.context_length(engine.manifest)  # tokens, prompt and output together
        self.failure: str | None = None
        self._engine, self._model = engine, engine.manifest.model
        self._scheduler = Scheduler(self._model, engine.limits, settings)
        self.intake = Intake(codec, self._model, self.max_model_len, self._scheduler.make_keys)
        self._observer = observer or Observer()
        self._changed = threading.Condition()  # guards the scheduler, `finished` of requests, and these two
        self._draining = self._aborting = False
        self._thread: threading.Thread | None = None
        self._ticks = self._canvas_steps = self._encoded_tokens = 0
        self._engine_time, self._busy_time = Stopwatch(), Stopwatch()
        self._drafting = Drafting(engine, self._engine_time, self._observer, codec.piece)
        self._admissions: deque[int] = deque(maxlen=32)  # moments of the last ones

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

    def submit(self, request: GenerationRequest, sink: Sink, is_cancelled: Callable[[], bool] = lambda: False) -> str:
        """Queue a request and return its id. `is_cancelled` is polled on the engine thread, once per tick.

        With `max_tokens` 0 nothing is queued: the sink gets its Finished before this returns, on this thread.
        Raises InvalidRequest, Overloaded, or EngineError when the engine has failed; then the sink is never called.
        """
        try:
            self._check_accepting()
            self._drafting.check(request.parameters)
            timeline = Timeline(time.monotonic_ns(), self._engine_time.read_ns())
            if request.parameters.max_tokens == 0:
                sink(answer := self.intake.tokenized(request, timeline.submitted))
                self._observer.tokenized(request.request_id, answer.statistics.num_input_tokens)
                return request.request_id
            live = self.intake.accept(request, sink, is_cancelled, timeline)
            with self._changed:
                self._check_accepting()
                self._add(live)
                self._observer.submitted(live)
                self._changed.notify()
        except DGemmaError as error:
            self._observer.refused(request.request_id, type(error).__name__)
            raise
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
            scheduler = self._scheduler
            full, sliding = scheduler.full_pages, scheduler.sliding_pages
            return ServiceStatistics(
                ticks=self._ticks,
                canvas_steps=self._canvas_steps,
                encoded_tokens=self._encoded_tokens,
                engine_ms=engine_ns / 1e6,
                host_ms=host_ns / 1e6,
                requests_waiting=scheduler.waiting,
                requests_running=scheduler.running,
                full_pages_used=full.used,
                sliding_pages_used=sliding.used,
                full_pages_idle=full.idle,
                sliding_pages_idle=sliding.idle,
                prefix_queries=scheduler.prefix_queries,
                prefix_hits=scheduler.prefix_hits,
                evictions=full.evictions + sliding.evictions,
                preemptions=scheduler.preemptions,
            )

    def _check_accepting(self) -> None:
        if self.failure is not None:
            raise EngineError(self.failure)
        if self._draining:
            raise Overloaded(f"{SHUTDOWN}; try again on another one, or when it is back")
        if self._thread is None:
            raise EngineError("the service was not started")

    def _add(self, request: LiveRequest) -> None:
        try:
            self._scheduler.add(request)
        except Overloaded as error:
            raise Overloaded(f"{error}; try again in about {self._retry_after_s()} s") from None

    def _retry_after_s(self) -> int:
        """Until a place in the queue may be free: the time between the last admissions, and at least a second."""
        if len(self._admissions) < 2:
            return 1
        between_s = (time.monotonic_ns() - self._admissions[0]) / 1e9 / len(self._admissions)
        return min(max(1, math.ceil(between_s)), _LONGEST_HINT_S)

    # ------------------------------------------------------------ engine thread

    def _main(self) -> None:
        try:
            while self._wait_for_work():
                with self._busy_time.running():
                    self._tick()
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

    def _tick(self) -> None:
        self._ticks += 1
        self._drop_ended()
        plan = self._schedule()
        try:
            prefill_ns = self._encode(plan)
            result, denoise_ns = self._denoise(plan)
        except EngineMemoryError as error:
            self._make_room(plan, error)
            return
        with self._changed:
            self._scheduler.spent(plan, prefill_ns, denoise_ns)
        for chunk in plan.encode:
            request, length = chunk.request, len(chunk.request.prompt_ids)
            if request.parameters.stream_previews and request.cached_tokens < length:
                self._send(request, Prefill(request.cached_tokens, length))
        if result is not None:
            self._postprocess(plan, result)

    def _drop_ended(self) -> None:
        """End what was cancelled, or is over its deadline."""
        with self._changed:
            live = self._scheduler.live()
        now = time.monotonic_ns()
        for request in live:
            try:
                cancelled = request.cancel_requested or request.is_cancelled()
            except Exception:  # noqa: BLE001 - a transport's fault must not end the loop
                _log.exception("request %s: is_cancelled failed, the request is cancelled", request.request_id)
                cancelled = True
            if cancelled:
                self._finish(request, "cancelled")
            elif request.deadline is not None and now >= request.deadline:
                self._finish(request, "deadline")

    def _schedule(self) -> Plan:
        with self._changed:
            plan = self._scheduler.plan()
        for preempted in plan.preempted:
            self._preempted(preempted)
        for request in plan.admitted:
            now = time.monotonic_ns()
            request.timeline.admitted = request.timeline.admitted or now
            self._admissions.append(now)
            self._observer.admitted(request)
        return plan

    def _preempted(self, preempted: Preempted) -> None:
        if preempted.slot is not None:
            self._engine.release(preempted.slot)
        self._observer.preempted(preempted.request)

    def _encode(self, plan: Plan) -> int:
        """Prefill; returns its time in nanoseconds."""
        if not plan.encode:
            return 0
        rows = []
        for chunk in plan.encode:
            request = chunk.request
            rows.append(EncodeRow(request.uncached[: chunk.tokens], request.cached_tokens, request.page_view))
        started = time.monotonic_ns()
        with self._engine_time.running():
            self._engine.encode(rows)
        ended = time.monotonic_ns()
        for chunk in plan.encode:
            self._encoded(chunk.request, chunk.tokens, exact=self._scheduler.is_own_chunk(chunk.request, chunk.tokens))
            self._observer.prefilled(chunk.request, chunk.tokens, started, ended)
        return ended - started

    def _encoded(self, request: LiveRequest, tokens: int, exact: bool = False) -> None:
        self._encoded_tokens += tokens
        with self._changed:  # publishes pages and gives some back
            request.encoded(tokens, exact)

    def _denoise(self, plan: Plan) -> tuple[DenoiseResult | None, int]:
        """One step of the canvases, commits beside it, and its time in nanoseconds."""
        if not plan.denoise and not plan.commit:
            return None, 0
        self._start_canvases([request for request in plan.denoise if request.canvas is None])
        commits = [CommitRow(r.slot, r.uncached, r.cached_tokens, r.page_view) for r in plan.commit]
        for request in plan.denoise:
            request.laid_out = True
        started = time.monotonic_ns()
        with self._engine_time.running():
            result = denoise_step(self._engine, plan.denoise, commits, self._scheduler)
        ended = time.monotonic_ns()
        canvases = len(plan.denoise)
        self._canvas_steps += canvases
        assert result.argmax_ids.shape == (canvases, self._model.canvas_length)
        self._observer.stepped(canvases, len(commits), started, ended)
        for request in plan.commit:
            self._encoded(request, len(request.uncached))
            self._observer.encoded(request, started, ended)
        return result, ended - started

    def _start_canvases(self, requests: list[LiveRequest]) -> None:
        now = time.monotonic_ns()
        for request in requests:
            request.timeline.prefilled = request.timeline.prefilled or now
            request.timeline.canvas_started = now
        self._drafting.propose(requests)
        for request in requests:
            request.start_canvas(self._model.canvas_length, self._model.vocab_size)

    def _make_room(self, plan: Plan, error: EngineMemoryError) -> None:
        """An engine call did not count: the tick's canvases start again, without slots that are lent if there were any,
        else with one request less; the last one fails.
        """
        _log.warning("%s; %d requests are running", error, self._scheduler.running)
        chunks = [chunk.request for chunk in plan.encode]
        for request in {id(request): request for request in (*plan.commit, *plan.denoise)}.values():
            if request.laid_out and not request.finished:
                self._engine.release(request.slot)
                request.restart_canvas()
        with self._changed:
            for request in (*chunks, *plan.commit):
                if len(request.uncached) and not request.finished:
                    self._scheduler.encode_again(request)
            if self._scheduler.stop_lending():
                return
            preempted = self._scheduler.preempt_last() if self._scheduler.running > 1 else None
        if preempted is not None:
            self._preempted(preempted)
            return
        for request in (*chunks, *plan.commit, *plan.denoise):
            self._finish(request, "error", str(error))

    def _postprocess(self, plan: Plan, result: DenoiseResult) -> None:
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
        now = time.monotonic_ns()
        line = request.timeline
        commit = Commit(emitted.text, emitted.token_ids, request.canvas_index, canvas.step)
        self._observer.committed(request, canvas.step, len(emitted.token_ids), line.canvas_started, now)
        line.first_commit, line.last_commit = line.first_commit or now, now
        self._drafting.ended(request, canvas, len(emitted.token_ids))
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
        output = request.output
        statistics = request.statistics(time.monotonic_ns(), self._engine_time.read_ns())
        stop_reason = output.stop_reason if reason == "stop" else None
        event = Finished(reason, output.text, output.token_ids, statistics, error, stop_reason)
        self._observer.finished(request, event)
        try:
            request.sink(event)
        except Exception:  # noqa: BLE001 - a transport's fault must not end the loop
            _log.exception("request %s: its sink failed on the last event", request.request_id)
        if not failed and request.laid_out:
            self._engine.release(request.slot)

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
