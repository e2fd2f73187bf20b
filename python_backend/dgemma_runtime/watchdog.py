"""Watches the engine thread from another one: a call that overruns, a thread that is gone. Knows no engine, no Triton.

engine = WatchedEngine(open_engine(...))
service = Service(engine, ...)
Watchdog(service, engine, step_timeout_s=120.0, beat=heartbeat).start()
"""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from dgemma_runtime.contract import CommitRow, DenoiseResult, DenoiseRow, DraftResult, DraftRow, EncodeRow, Engine
from dgemma_runtime.service import Service

_log = logging.getLogger(__name__)
_CHECK_S = 0.25
_FIRST_CALL_FACTOR = 10  # a library may still compile or lay out memory in its first call of a kind
END_WITHIN_S = 5  # from a failure to the end of the process: last responses, unloading


@dataclass(frozen=True)
class RunningCall:
    """An engine call that has not returned."""

    kind: str  # encode, denoise, draft, release
    rows: int
    seconds: float
    is_first: bool  # none of this kind has returned before


class WatchedEngine:
    """The given engine, and what it is doing right now. One thread calls it, any may ask."""

    def __init__(self, engine: Engine) -> None:
        self.manifest, self.limits, self.drafter = engine.manifest, engine.limits, engine.drafter
        self._engine = engine
        self._call: tuple[str, int, float] | None = None  # kind, rows, start on the monotonic clock
        self._returned: set[str] = set()

    def running_call(self) -> RunningCall | None:
        """None between calls."""
        if (call := self._call) is None:
            return None
        kind, rows, started = call
        return RunningCall(kind, rows, time.monotonic() - started, kind not in self._returned)

    def encode(self, rows: Sequence[EncodeRow]) -> None:
        with self._running("encode", len(rows)):
            self._engine.encode(rows)

    def denoise(self, rows: Sequence[DenoiseRow], commits: Sequence[CommitRow] = ()) -> DenoiseResult:
        with self._running("denoise", len(rows) + len(commits)):
            return self._engine.denoise(rows, commits)

    def draft(self, rows: Sequence[DraftRow]) -> DraftResult:
        with self._running("draft", len(rows)):
            return self._engine.draft(rows)

    def release(self, slot: int) -> None:
        with self._running("release", 1):
            self._engine.release(slot)

    def close(self) -> None:
        self._engine.close()

    @contextmanager
    def _running(self, kind: str, rows: int) -> Iterator[None]:
        self._call = (kind, rows, time.monotonic())
        try:
            yield
        finally:
            self._returned.add(kind)
            self._call = None


class Watchdog:
    """A thread that fails the service when its engine overruns or its thread is gone, and ends the process soon after.

    It has a thread to itself, so that neither the engine nor the transport can hold it up. `beat` is called with every
    round: whoever watches this process from outside sees that Python still runs in it.
    """

    def __init__(
        self,
        service: Service,
        engine: WatchedEngine,
        step_timeout_s: float,
        beat: Callable[[], None],
        end_process: Callable[[int], object] = signal.alarm,
    ) -> None:
        self._service, self._engine, self._beat = service, engine, beat
        self._step_timeout_s = step_timeout_s
        self._end_process = end_process
        self._stopping = threading.Event()
        self._end_expected = False
        self._thread = threading.Thread(target=self._main, name="watchdog", daemon=True)

    def start(self) -> None:
        """From when the model is ready on; a slow start has its own time limit."""
        self._thread.start()

    def expect_end(self) -> None:
        """The service is about to be stopped on purpose: its thread may end. Calls are watched all the same."""
        self._end_expected = True

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join()

    def _main(self) -> None:
        failed = False
        while not self._stopping.wait(_CHECK_S):
            self._beat()
            if failed:
                continue
            if self._service.failure is None and (complaint := self.complaint()):
                self._service.fail(complaint)
            if failed := self._service.failure is not None:
                _log.critical("this process ends within %d s", END_WITHIN_S)
                # By the kernel: it also ends a process whose Python or whose library hangs on its way out.
                self._end_process(END_WITHIN_S)

    def complaint(self) -> str | None:
        """What is wrong with the engine thread, None while nothing is."""
        if (call := self._engine.running_call()) is not None:
            limit_s = self._step_timeout_s * (_FIRST_CALL_FACTOR if call.is_first else 1)
            if call.seconds > limit_s:
                rows = f"{call.rows} row{'s' if call.rows != 1 else ''}"
                return (
                    f"a call of the engine ({call.kind}, {rows}) has not returned after {call.seconds:.1f} s; if it "
                    f"needs so long on this machine, raise step_timeout_s ({self._step_timeout_s:g}) or lower "
                    "prefill_budget"
                )
        if not self._service.healthy and not self._end_expected:
            return "its thread has ended by itself"
        return None
