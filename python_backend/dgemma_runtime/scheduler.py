"""Who joins, who goes, and what the engine does next. Pure data: knows no engine, no thread, no clock and no text.

A tick encodes chunks first and denoises then, so a request whose last missing tokens are encoded takes its canvas's
first step in the same tick. Every running canvas takes one step per tick; canvases that ended are committed beside
those steps, in the same pass. Prompts share a budget of tokens per tick, chunk by chunk in turns, and chunks that do
not complete a prompt share the engine's time with running canvases (`spent`). Chunks are cut at fixed places of a
sequence, whatever else is running, so that a request's numbers do not depend on its company.

A request gets the pages of all its known tokens when it is admitted, and those of each canvas when that is committed.
Where none are left, the running request that is least important and came last loses its own and waits again.
"""

from __future__ import annotations

import bisect
import math
from collections import deque
from dataclasses import dataclass, field

from dgemma_runtime.contract import EngineLimits, ModelSpec
from dgemma_runtime.errors import InvalidRequest, Overloaded
from dgemma_runtime.pages import PagePool, PageRules, PageTable
from dgemma_runtime.prefix import Match, PageKeys, find_prefix
from dgemma_runtime.requests import LiveRequest
from dgemma_runtime.settings import RuntimeSettings


@dataclass(frozen=True)
class EncodeChunk:
    """The first `tokens` of the request's uncached tokens; pages for them are there."""

    request: LiveRequest
    tokens: int
    completes: bool  # they are all


@dataclass(frozen=True)
class Preempted:
    """A request that waits again."""

    request: LiveRequest
    slot: int | None  # that the engine is to release; None where it never had a canvas there


@dataclass(frozen=True)
class Plan:
    """One tick, in the order in which it is to be done."""

    preempted: tuple[Preempted, ...]
    admitted: tuple[LiveRequest, ...]
    encode: tuple[EncodeChunk, ...]
    commit: tuple[LiveRequest, ...]  # their uncached tokens are the canvas that ended in their slot
    denoise: tuple[LiveRequest, ...]  # all their known tokens are cached once `encode` ran


@dataclass
class _Draft:
    """A plan in the making."""

    preempted: list[Preempted] = field(default_factory=list)
    admitted: list[LiveRequest] = field(default_factory=list)
    commit: list[LiveRequest] = field(default_factory=list)


class Scheduler:
    """Requests waiting and running, their slots and pages. The most important first, then first come, first served."""

    def __init__(self, model: ModelSpec, limits: EngineLimits, settings: RuntimeSettings) -> None:
        self._chunk = min(settings.prefill_chunk, limits.max_encode_tokens)
        assert model.canvas_length <= limits.max_encode_tokens
        self._canvas_length = model.canvas_length
        self._settings = settings
        self._rules = PageRules.of(limits, model.sliding_window)
        self._grid = math.lcm(self._chunk, limits.page_size)  # where prefixes end that seeded requests may use
        self.full_pages, self.sliding_pages = PagePool(limits.full_pages), PagePool(limits.sliding_pages)
        self.prefix_queries = self.prefix_hits = self.preemptions = 0
        self._num_slots = self._most_running = limits.max_batch_size
        self._lends = True
        self._lent_pages = 0  # in this tick
        self._free_slots = list(range(self._num_slots - 1, -1, -1))
        self._waiting: list[LiveRequest] = []  # sorted by `_rank`
        self._running: list[LiveRequest] = []  # in the order of admission
        self._prefilling: deque[LiveRequest] = deque()  # whose turn is next
        self._arrivals = 0
        self._debt_ns = 0.0  # what prefill owes to running canvases

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def running(self) -> int:
        return len(self._running)

    def live(self) -> list[LiveRequest]:
        """All requests, running ones first."""
        return [*self._running, *self._waiting]

    def make_keys(self, salt: str) -> PageKeys | None:
        """For a new request; None where no prefixes are cached. On any thread."""
        return PageKeys(self._rules.page_size, salt) if self._settings.prefix_cache else None

    # ------------------------------------------------------------ requests

    def add(self, request: LiveRequest) -> None:
        """Queue a request. Raises InvalidRequest when it can never fit, Overloaded when the queue is full."""
        need = self._rules.need(self._most_cached(request))
        if need.full > self.full_pages.num_pages or need.sliding > self.sliding_pages.num_pages:
            raise InvalidRequest(
                "max_tokens",
                f"{len(request.prompt_ids)} prompt tokens and {request.max_tokens} output tokens need {need.full} "
                f"pages of {self._rules.page_size} tokens (and {need.sliding} for the sliding layers), the cache has "
                f"{self.full_pages.num_pages} (and {self.sliding_pages.num_pages}); ask for fewer tokens",
            )
        if len(self._waiting) >= self._settings.queue_size:
            raise Overloaded(f"the queue is full: {len(self._waiting)} requests are waiting (queue_size)")
        request.arrival = self._arrivals
        self._arrivals += 1
        bisect.insort(self._waiting, request, key=_rank)

    def remove(self, request: LiveRequest) -> None:
        """Forget a request in any state; its slot and pages are free again."""
        if request.pages is None:
            self._waiting.remove(request)
            return
        self._leave(request)
        self._most_running = min(self._most_running + 1, self._num_slots)
        self._lends = True

    def preempt_last(self) -> Preempted:
        """Take slot and pages from the running request that is least important and came last, and queue it again.

        For want of other memory than pages: until a request ends, no more may run than are left.
        """
        preempted = self._preempt(max(self._running, key=_rank))
        self._most_running = len(self._running)
        return preempted

    def encode_again(self, request: LiveRequest) -> None:
        """What a plan was to encode of this running request was not encoded."""
        if request not in self._prefilling:
            self._prefilling.append(request)

    def lend_slot(self, tokens: int) -> int | None:
        """A slot that no request has, to lay out a context of so many tokens again, until `give_back` in this tick.

        None where no more may run, or pages for one more sequence of this context are not left: see `_room`.
        """
        taken = self._num_slots - len(self._free_slots)
        pages = self._rules.pages(tokens + self._canvas_length)
        if not self._lends or taken >= self._most_running or self._lent_pages + pages > self._room:
            return None
        self._lent_pages += pages
        return self._free_slots.pop()

    def stop_lending(self) -> bool:
        """Until a request ends, for want of memory; False where no slot was lent in this tick."""
        if not self._lent_pages:
            return False
        self._lends = False
        return True

    def give_back(self, slot: int) -> None:
        self._free_slots.append(slot)

    # ------------------------------------------------------------ ticks

    def plan(self) -> Plan:
        """The next tick; admits requests and takes the pages the tick writes to."""
        self._lent_pages = 0
        draft = _Draft()
        self._plan_commits(draft)
        self._admit(draft)
        canvases = [r for r in self._running if len(r.uncached) == 0]
        chunks = self._prefill_chunks(alone=not canvases and not draft.commit)
        for chunk in chunks:
            assert chunk.request.pages is not None
            chunk.request.pages.extend(chunk.request.cached_tokens + chunk.tokens)
        canvases += [chunk.request for chunk in chunks if chunk.completes]
        return Plan(tuple(draft.preempted), tuple(draft.admitted), tuple(chunks), tuple(draft.commit), tuple(canvases))

    def spent(self, plan: Plan, prefill_ns: int, denoise_ns: int) -> None:
        """How long the engine took for a plan: a long prompt's next chunk waits until canvases had their share."""
        if not plan.denoise and not plan.commit:
            self._debt_ns = 0.0
            return
        share = self._settings.prefill_share
        if not all(chunk.completes for chunk in plan.encode):
            self._debt_ns += prefill_ns * (1 - share)
        self._debt_ns = max(self._debt_ns - denoise_ns * share, 0.0)

    def is_own_chunk(self, request: LiveRequest, tokens: int) -> bool:
        """Whether the request's next `tokens` are one whole chunk of its prompt."""
        start = request.cached_tokens
        return start % self._chunk == 0 and tokens == self._chunk and start + tokens <= len(request.prompt_ids)

    def _plan_commits(self, draft: _Draft) -> None:
        for request in sorted((r for r in self._running if r.laid_out and len(r.uncached)), key=_rank):
            if request.pages is None:  # lost them to a more important one just now
                continue
            end = len(request.tokens)
            while request.pages.missing(end) > self._room:
                victim = max(self._running, key=_rank)
                draft.preempted.append(self._preempt(victim))
                if victim is request:
                    break
            else:
                request.pages.extend(end)
                draft.commit.append(request)

    def _admit(self, draft: _Draft) -> None:
        while self._waiting:
            request = self._waiting[0]
            while not self._fits(request):
                last = max(self._running, key=_rank, default=None)
                if last is None or last.parameters.priority <= request.parameters.priority or last in draft.commit:
                    return
                draft.preempted.append(self._preempt(last))
            self._waiting.pop(0)
            self._start(request, self._find(request))
            draft.admitted.append(request)

    @property
    def _room(self) -> int:
        """Full pages that running sequences may hold besides those they do.

        A shared page counts for each of them, as an engine lays out every sequence's whole context for its calls, and
        was given memory for as many as there are pages.
        """
        return self.full_pages.num_pages - self.full_pages.holds

    def _fits(self, request: LiveRequest) -> bool:
        """A slot, pages for what is known and for one more canvas."""
        if len(self._running) >= self._most_running:
            return False
        most = self._most_cached(request)
        full = self._rules.pages(min(len(request.tokens) + self._canvas_length, most))
        return full <= self._room and self._rules.need(most).sliding <= self.sliding_pages.unreserved

    def _start(self, request: LiveRequest, match: Match) -> None:
        need, size = self._rules.need(self._most_cached(request)), self._rules.page_size
        request.slot = self._free_slots.pop()
        request.pages = PageTable(self.full_pages, self.sliding_pages, self._rules, need, match.prefix)
        request.pages.take(len(request.tokens))
        found = match.prefix.pages * size
        request.cached_tokens = found
        request.exact_tokens = found if match.prefix.exact and found % self._chunk == 0 else 0
        step = self._grid if request.is_exact else size
        for tokens in (match.full_pages * size, len(request.prompt_ids)):
            # A sequence that parts from another one, or goes on, after these tokens will look for the window there.
            request.pages.keep_window(tokens // step * step // size)
        if request.prefix_tokens is None:
            request.prefix_tokens = found
            self.prefix_queries += len(request.prompt_ids) if request.keys else 0
            self.prefix_hits += found
        self._running.append(request)
        if len(request.uncached):
            self._prefilling.append(request)

    def _find(self, request: LiveRequest) -> Match:
        keys = request.keys.keys if request.keys else []
        grid = self._grid if request.is_exact else 0
        return find_prefix(self.full_pages, self.sliding_pages, self._rules, keys, grid)

    def _prefill_chunks(self, alone: bool) -> list[EncodeChunk]:
        chunks: list[EncodeChunk] = []
        budget = self._settings.prefill_budget
        for _ in range(len(self._prefilling)):
            request = self._prefilling[0]
            tokens = self._next_chunk(request)
            chunk = EncodeChunk(request, tokens, completes=tokens == len(request.uncached))
            due = chunk.completes or alone or self._debt_ns < 1
            if due and tokens > budget:
                break
            self._prefilling.popleft()
            if not chunk.completes:
                self._prefilling.append(request)
            if due:
                budget -= tokens
                chunks.append(chunk)
        return chunks

    def _next_chunk(self, request: LiveRequest) -> int:
        """Tokens up to the next place where a sequence is cut: multiples of the chunk, the prompt's end, canvases."""
        start, prompt = request.cached_tokens, len(request.prompt_ids)
        if start < prompt:
            return min(self._chunk - start % self._chunk, prompt - start)
        return self._canvas_length - (start - prompt) % self._canvas_length

    # ------------------------------------------------------------ leaving

    def _preempt(self, request: LiveRequest) -> Preempted:
        slot = request.slot if request.laid_out else None
        self._leave(request)
        request.preempted()
        bisect.insort(self._waiting, request, key=_rank)
        self.preemptions += 1
        return Preempted(request, slot)

    def _leave(self, request: LiveRequest) -> None:
        assert request.pages is not None
        self._running.remove(request)
        if request in self._prefilling:
            self._prefilling.remove(request)
        request.pages.release()
        self._free_slots.append(request.slot)

    def _most_cached(self, request: LiveRequest) -> int:
        """Tokens in the cache at most: the prompt and every canvas but the last, which is never encoded."""
        canvases = -(-request.max_tokens // self._canvas_length)
        return len(request.prompt_ids) + (canvases - 1) * self._canvas_length


def _rank(request: LiveRequest) -> tuple[int, int]:
    """The most important first, then the oldest."""
    return request.parameters.priority, request.arrival
