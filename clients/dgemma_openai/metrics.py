"""What the front end counts, and the page that shows it together with the server's own metrics. Knows no route."""

from __future__ import annotations

import httpx
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_FETCH_S = 2.0


class Metrics:
    """One registry per application, so that two in one process do not mix."""

    def __init__(self, server_url: str | None) -> None:
        self._server_url = server_url
        self._http = httpx.AsyncClient(timeout=_FETCH_S)
        self._registry = registry = CollectorRegistry()
        prefix = "dgemma_openai"
        self.requests = Counter(
            f"{prefix}_requests", "Requests that were answered.", ("endpoint", "status"), registry=registry
        )
        self.seconds = Histogram(
            f"{prefix}_request_seconds",
            "From request to end of answer.",
            ("endpoint",),
            buckets=_SECONDS,
            registry=registry,
        )
        self.live = Gauge(f"{prefix}_live_requests", "Requests under way.", registry=registry)
        self.failures = Counter(
            f"{prefix}_stream_failures", "Streams that ended with an error event.", ("code",), registry=registry
        )
        self.server_reachable = Gauge(
            f"{prefix}_server_metrics_up",
            "Whether the server's metrics were at hand in this scrape.",
            registry=registry,
        )

    async def page(self) -> bytes:
        """Prometheus' text format; without the server's part where it does not answer."""
        server = await self._server_page()
        self.server_reachable.set(server is not None)
        return generate_latest(self._registry) + (server or b"")

    async def close(self) -> None:
        await self._http.aclose()

    async def _server_page(self) -> bytes | None:
        if self._server_url is None:
            return None
        try:
            answer = await self._http.get(self._server_url)
            return answer.content if answer.status_code == 200 else None
        except httpx.HTTPError:
            return None
