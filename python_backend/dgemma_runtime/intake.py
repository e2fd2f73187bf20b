"""Makes an accepted request of what a client asks for, or refuses it. Knows tokens and lengths; no queue, no engine."""

from __future__ import annotations

import secrets
import time
import uuid
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from dgemma_runtime.codec import Codec
from dgemma_runtime.contract import Int32Array, ModelSpec
from dgemma_runtime.detokenizer import OutputText
from dgemma_runtime.drafting.hole import Hole, HoleText
from dgemma_runtime.drafting.request_drafts import RequestDrafts
from dgemma_runtime.drafting.template import TemplateText, lay_out_template
from dgemma_runtime.errors import InvalidRequest
from dgemma_runtime.events import Finished, Sink
from dgemma_runtime.prefix import PageKeys
from dgemma_runtime.requests import GenerationRequest, LiveRequest, Timeline, as_token_ids
from dgemma_runtime.statistics import unqueued

MakeKeys = Callable[[str], PageKeys | None]


class Intake:
    """Checks requests. `max_model_len` is in tokens, prompt and output together; `make_keys` takes a cache salt."""

    def __init__(self, codec: Codec, model: ModelSpec, max_model_len: int, make_keys: MakeKeys) -> None:
        self._codec, self._max_model_len = codec, max_model_len
        self._vocab_size, self._canvas_length = model.vocab_size, model.canvas_length
        self._make_keys = make_keys

    def accept(
        self, request: GenerationRequest, sink: Sink, is_cancelled: Callable[[], bool], timeline: Timeline
    ) -> LiveRequest:
        """Raises InvalidRequest."""
        parameters = request.parameters
        prompt_ids = self.prompt_ids(request)
        for end_id in parameters.end_ids:
            if end_id >= self._vocab_size:
                raise InvalidRequest("end_id", f"must be from 0 to {self._vocab_size - 1}, got {end_id}")
        max_tokens = self._max_tokens(request.prompt_field, len(prompt_ids), parameters.max_tokens)
        drafts, output, max_tokens = self._output(request, max_tokens)
        if drafts.hole is not None:
            parameters = replace(parameters, drafter="off")  # its canvas is not the next one of prompt and output
        return LiveRequest(
            request_id=request.request_id or uuid.uuid4().hex,
            prompt_ids=prompt_ids,
            parameters=parameters,
            seed=secrets.randbits(64) if parameters.seed is None else parameters.seed,
            max_tokens=max_tokens,
            output=output,
            sink=sink,
            is_cancelled=is_cancelled,
            timeline=timeline,
            keys=self._make_keys(parameters.cache_salt),
            drafts=drafts,
        )

    def tokenized(self, request: GenerationRequest, submitted: int) -> Finished:
        """The answer to a request with `max_tokens` 0, of any length; raises InvalidRequest."""
        given = {request.draft_field: request.draft, "template": request.template, "suffix": request.suffix}
        for field, value in given.items():
            if value is not None and len(value):
                raise InvalidRequest(field, "is of no use where max_tokens 0 asks for no output; leave out one of them")
        tokens = len(self.prompt_ids(request))
        return Finished("length", "", np.empty(0, np.int32), unqueued(tokens, time.monotonic_ns() - submitted))

    def prompt_ids(self, request: GenerationRequest) -> Int32Array:
        """Checked, whatever the length; raises InvalidRequest."""
        prompt, field = request.prompt, request.prompt_field
        if isinstance(prompt, str):
            if not prompt:
                raise InvalidRequest(field, "is empty; send at least one character")
            return self._codec.encode(prompt, field)
        return self._checked_ids(prompt, field)

    def _checked_ids(self, prompt: Int32Array, field: str) -> Int32Array:
        if prompt.size == 0:
            raise InvalidRequest(field, "is empty; send at least one token id")
        if not np.issubdtype(prompt.dtype, np.integer):
            raise InvalidRequest(field, f"must be integers, got {prompt.dtype}")
        outside = prompt[(prompt < 0) | (prompt >= self._vocab_size)]
        if outside.size:
            last = self._vocab_size - 1
            raise InvalidRequest(field, f"token ids must be from 0 to {last}, got {outside.flat[0]}")
        return as_token_ids(prompt)

    def _draft_ids(self, request: GenerationRequest, max_tokens: int) -> Int32Array | None:
        """Checked; None where the client sent none."""
        draft = request.draft
        if draft is None:
            return None
        field = request.draft_field
        if request.parameters.drafter != "auto":
            raise InvalidRequest(field, f"excludes drafter {request.parameters.drafter!r}; leave drafter out")
        ids = self._checked_ids(self._codec.encode_part(draft, field) if isinstance(draft, str) else draft, field)
        if len(ids) > max_tokens:
            raise InvalidRequest(
                field, f"has {len(ids)} tokens, the output may have {max_tokens}; shorten it or raise max_tokens"
            )
        return ids

    def _output(self, request: GenerationRequest, max_tokens: int) -> tuple[RequestDrafts, OutputText, int]:
        """What is known of the output beforehand, its text to be, and its most tokens."""
        codec, parameters = self._codec, request.parameters
        ends, skip = parameters.end_ids, parameters.skip_special_tokens
        if request.template:
            if parameters.stop:
                raise InvalidRequest("stop", "cannot be together with template, whose output ends where it is full")
            pins = lay_out_template(request.template, codec, max_tokens, skip)
            return RequestDrafts(literals=pins), TemplateText(codec, pins, ends, skip), len(pins.pinned)
        if request.suffix is not None:
            hole = Hole.of(self._suffix_ids(request), max_tokens, self._canvas_length)
            return RequestDrafts(hole=hole), HoleText(codec, hole, ends, parameters.stop, skip), hole.most_tokens
        output = OutputText(codec, max_tokens, ends, parameters.stop, skip)
        return RequestDrafts(self._draft_ids(request, max_tokens)), output, max_tokens

    def _suffix_ids(self, request: GenerationRequest) -> Int32Array:
        if request.parameters.drafter not in ("auto", "off"):
            message = f"cannot be together with drafter {request.parameters.drafter!r}: its canvas starts from noise"
            raise InvalidRequest("suffix", message + "; leave drafter out")
        assert request.suffix is not None
        if not request.suffix:
            raise InvalidRequest("suffix", "is empty; leave it out")
        return self._codec.encode_part(request.suffix, "suffix")

    def _max_tokens(self, field: str, prompt_tokens: int, asked: int | None) -> int:
        context = f"this model's maximum context length is {self._max_model_len} tokens"
        left = self._max_model_len - prompt_tokens
        if left < 1:
            raise InvalidRequest(
                field,
                f"{context}, the prompt has {prompt_tokens}; shorten it by at least {1 - left} to leave room for one "
                "(the limit is the server's max_model_len)",
            )
        if asked is not None and asked > left:
            raise InvalidRequest(
                "max_tokens",
                f"{context}, but the prompt has {prompt_tokens} and max_tokens asks for {asked} more "
                f"({prompt_tokens + asked} together); ask for at most {left} "
                f"(available tokens: {left}; the limit is the server's max_model_len)",  # agents look for these words
            )
        return left if asked is None else asked
