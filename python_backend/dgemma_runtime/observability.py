"""Log, metrics and traces of one model process, from start to end. Knows each of them by its class, and no request."""

from __future__ import annotations

import logging
from typing import Any

from dgemma_runtime.assembly import Application
from dgemma_runtime.deferred import Deferred
from dgemma_runtime.logs import LogObserver, RuntimeLog
from dgemma_runtime.metrics import Metrics
from dgemma_runtime.metrics_publisher import MetricsPublisher
from dgemma_runtime.observer import Observer
from dgemma_runtime.observers import Observers
from dgemma_runtime.process_settings import ProcessSettings
from dgemma_runtime.tracing import TraceObserver

_log = logging.getLogger(__name__)
_CLOSE_S = 1.0


class Observability:
    """`observer` is for the service. Raises ConfigurationError where traces are wanted and cannot be had."""

    def __init__(self, settings: ProcessSettings) -> None:
        self._log = RuntimeLog(settings.log_level, settings.log_format)
        self._metrics = Metrics()
        self._publisher: MetricsPublisher | None = None
        self._traces: TraceObserver | None = None
        self._deferred = Deferred("after-work")
        watching: list[Observer] = [self._metrics, LogObserver(self._deferred)]
        if settings.traces:
            try:
                self._traces = TraceObserver.open(self._deferred)
            except BaseException:
                self.close()
                raise
            watching.append(self._traces)
        self.observer: Observer = Observers(watching)

    def publish(self, family_class: Any, application: Application, model: str, version: str) -> None:
        """Start to fill Triton's metrics endpoint; `family_class` is its `MetricFamily`. Serving works without it."""
        publisher = MetricsPublisher(
            family_class, self._metrics, application.service, application.limits, model, version
        )
        try:
            publisher.start()
        except Exception as error:  # noqa: BLE001 - Triton's own type
            _log.warning("Triton took no metrics (%s); the metrics endpoint has only Triton's own", error)
            return
        self._publisher = publisher

    def close(self) -> None:
        """At the model's end, after the service's."""
        if self._publisher is not None:
            self._publisher.stop()
        self._deferred.close(_CLOSE_S)
        if self._traces is not None:
            self._traces.close()
        self._log.close()
