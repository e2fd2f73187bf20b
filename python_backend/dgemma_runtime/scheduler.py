"""Who joins, and what the engine does next. Pure data: knows no engine, no thread, no clock and no text.

A tick encodes first and denoises then, so a request whose last missing tokens are encoded takes its canvas's first
step in the same tick. Every running canvas takes one step per tick. Committed canvases are encoded at once; prompts
share a budget of tokens per tick, chunk by chunk in turns. Chunks are cut at fixed places of a prompt, whatever else
is running, so that a request's numbers do not depend on its company.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from dgemma_runtime.contract import EngineLimits, ModelSpec
from dgemma_runtime.errors import InvalidRequest, Overloaded
from dgemma_runtime.pages import PagePool, PageRules, PageTable
from dgemma_runtime.requests import LiveRequest


@dataclass(frozen=True)
class EncodeChunk:
    """The first `tokens` of the request's uncached tokens; pages for them are there."""

    request: LiveRequest
    tokens: int


@dataclass(frozen=True)
class Plan:
    """One tick."""

    admitted: tuple[LiveRequest, ...]
    encode: tuple[EncodeChunk, ...]  # run first
    denoise: tuple[LiveRequest, ...]  # all their known tokens are cached once `encode` ran


class Scheduler:
    """Requests waiting and running, their slots and pages. First come, first admitted; nobody is overtaken."""

    def __init__(
        self, model: ModelSpec, limits: EngineLimits, prefill_chunk: int, prefill_budget: int, queue_size: int
    ) -> None:
        assert 1 <= prefill_chunk <= min(prefill_budget, limits.max_encode_tokens)
        assert model.canvas_length <= limits.max_encode_tokens
        self._canvas_length = model.canvas_length
        self._prefill_chunk, self._prefill_budget, self._queue_size = prefill_chunk, prefill_budget, queue_size
        self._rules = PageRules.of(limits, model.sliding_window)
        self.full_pages, self.sliding_pages = PagePool(limits.full_pages), PagePool(limits.sliding_pages)
        self._free_slots = list(range(limits.max_batch_size - 1, -1, -1))
        self._waiting: deque[LiveRequest] = deque()
        self._running: list[LiveRequest] = []  # in the order of admission
        self._prefilling: deque[LiveRequest] = deque()  # whose turn is next

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def running(self) -> int:
        return len(self._running)

    def live(self) -> list[LiveRequest]:
        """All requests, running ones first."""
        return [*self._running, *self._waiting]

    def add(self, request: LiveRequest) -> None:
        """Queue a request. Raises InvalidRequest when it can never fit, Overloaded when the queue is full."""
        cached = self._most_cached(request)
        need = self._rules.need(cached)
        if need.full > self.full_pages.num_pages or need.sliding > self.sliding_pages.num_pages:
            raise InvalidRequest(
                "max_tokens",
                f"{len(request.prompt_ids)} prompt tokens and {request.max_tokens} output tokens need {need.full} "
                f"pages of {self._rules.page_size} tokens (and {need.sliding} for the sliding layers), the cache has "
                f"{self.full_pages.num_pages} (and {self.sliding_pages.num_pages}); ask for fewer tokens",
            )
        if len(self._waiting) >= self._queue_size:
            raise Overloaded(f"{len(self._waiting)} requests are waiting and the queue is full; try again later")
        self._waiting.append(request)

    def plan(self) -> Plan:
        """The next tick; admits requests and takes the pages the tick writes to."""
        admitted = self._admit()
        chunks = [EncodeChunk(r, len(r.uncached)) for r in self._running if r.canvas_index and len(r.uncached)]
        chunks += self._prefill_chunks()
        for chunk in chunks:
            assert chunk.request.pages is not None
            chunk.request.pages.extend(chunk.request.cached_tokens + chunk.tokens)
        encoded = {id(chunk.request): chunk.tokens for chunk in chunks}
        denoise = tuple(r for r in self._running if len(r.uncached) == encoded.get(id(r), 0))
        return Plan(tuple(admitted), tuple(chunks), denoise)

    def remove(self, request: LiveRequest) -> None:
        """Forget a request in any state; its slot and pages are free again."""
        if request.pages is None:
            self._waiting.remove(request)
            return
        self._running.remove(request)
        if request in self._prefilling:
            self._prefilling.remove(request)
        request.pages.release()
        self._free_slots.append(request.slot)

    def _most_cached(self, request: LiveRequest) -> int:
        """Tokens in the cache at most: the prompt and every canvas but the last, which is never encoded."""
        canvases = -(-request.max_tokens // self._canvas_length)
        return len(request.prompt_ids) + (canvases - 1) * self._canvas_length

    def _admit(self) -> list[LiveRequest]:
        admitted = []
        while self._waiting and self._free_slots:
            request = self._waiting[0]
            need = self._rules.need(self._most_cached(request))
            if need.full > self.full_pages.unreserved or need.sliding > self.sliding_pages.unreserved:
                break
            self._waiting.popleft()
            request.slot = self._free_slots.pop()
            request.pages = PageTable(self.full_pages, self.sliding_pages, self._rules, need)
            self._running.append(request)
            self._prefilling.append(request)
            admitted.append(request)
        return admitted

    def _prefill_chunks(self) -> list[EncodeChunk]:
        chunks: list[EncodeChunk] = []
        budget = self._prefill_budget
        for _ in range(len(self._prefilling)):
            request = self._prefilling[0]
            tokens = min(len(request.uncached), self._prefill_chunk)
            if tokens > budget:
                break
            budget -= tokens
            self._prefilling.popleft()
            if tokens < len(request.uncached):
                self._prefilling.append(request)
            chunks.append(EncodeChunk(request, tokens))
        return chunks
