"""Tells Triton's metrics endpoint what was counted, from a thread of its own. Knows of Triton only its family class.

A call to Triton crosses to another process and back, whatever it carries. So changes are summed and sent in rounds, and
a histogram is sent as counters: the cost is then the same at any load, where Triton's own histograms take a call per
observation.
"""

from __future__ import annotations

import itertools
import logging
import threading
from typing import Any

from dgemma_runtime.contract import EngineLimits
from dgemma_runtime.metric_families import FAMILIES, Family, help_text
from dgemma_runtime.metrics import Metrics, Series, gauges
from dgemma_runtime.service import Service

_log = logging.getLogger(__name__)
_GAUGES_S = 0.25  # routers choose by them
_COUNTERS_EVERY = 4  # rounds of gauges
_STOP_S = 2.0


class MetricsPublisher:
    """Publishes from `start` until `stop`; what was counted before, as by the warm-up, is left out.

    `family_class` is Triton's `MetricFamily`. Counters go on from where an earlier model process in the same Triton
    left them, if it crashed; one that ended properly took its families along.
    """

    def __init__(
        self, family_class: Any, metrics: Metrics, service: Service, limits: EngineLimits, model: str, version: str
    ) -> None:
        self._family_class = family_class
        self._metrics, self._service, self._limits = metrics, service, limits
        self._labels = {"model": model, "version": version}
        self._families: dict[str, Any] = {}  # by published name
        self._series: dict[Series, Any] = {}
        self._label_names: dict[str, str] = {}
        self._sent: dict[Series, float] = {}
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="metrics", daemon=True)

    def start(self) -> None:
        """Register every family and start; raises what Triton raises where it has no metrics."""
        for family in FAMILIES:
            for name in family.published:
                self._register(family, name)
        self._sent = self._metrics.counters(self._service.statistics())
        for series in self._sent:
            self._metric(series)
        self._publish(counters=False)
        self._thread.start()

    def stop(self) -> None:
        """Send the last numbers and take the families back; Triton keeps those that nobody takes back."""
        self._stopping.set()
        self._thread.join(_STOP_S)
        if self._thread.is_alive():
            _log.error("the metrics' thread did not end; Triton keeps the last numbers")
            return
        self._series.clear()  # before their families
        self._families.clear()

    def _register(self, family: Family, name: str) -> None:
        kind = self._family_class.GAUGE if family.kind == "gauge" else self._family_class.COUNTER
        self._families[name] = self._family_class(name=name, description=help_text(family), kind=kind)
        self._label_names[name] = "le" if name.endswith("_bucket") else family.label

    def _metric(self, series: Series) -> Any:
        if series not in self._series:
            name, value = series
            labels = {"model_name": self._labels["model"]} if name.startswith("vllm:") else dict(self._labels)
            if label := self._label_names[name]:
                labels[label] = value
            self._series[series] = self._families[name].Metric(labels=labels)
        return self._series[series]

    def _run(self) -> None:
        for round_ in itertools.count(1):
            ending = self._stopping.wait(_GAUGES_S)
            try:
                self._publish(counters=ending or round_ % _COUNTERS_EVERY == 0)
            except Exception:  # noqa: BLE001 - Triton's own type; the next round sends what this one did not
                _log.exception("metrics could not be published")
            if ending:
                return

    def _publish(self, counters: bool) -> None:
        service = self._service
        statistics = service.statistics()
        for series, value in (self._metrics.counters(statistics) if counters else {}).items():
            sent = self._sent.get(series, 0.0)
            if value > sent:  # a time that is a difference of two clocks may step back by a hair
                self._metric(series).increment(value - sent)
                self._sent[series] = value
        for series, value in gauges(statistics, self._limits, service.max_model_len, service.healthy).items():
            if value != self._sent.get(series):
                self._metric(series).set(value)
                self._sent[series] = value
