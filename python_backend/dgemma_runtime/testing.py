"""For tests of whatever serves with this package: a small tokenizer, a sink that waits, a service on a script."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from dgemma_runtime.codec import Codec
from dgemma_runtime.contract import CommitRow, DenoiseResult, DenoiseRow, Engine, Int32Array
from dgemma_runtime.engines.scripted import ScriptedEngine, answer_script, scripted_manifest
from dgemma_runtime.events import Commit, Event, Finished, Preview
from dgemma_runtime.parameters import default_parameters, parse_parameters
from dgemma_runtime.requests import GenerationRequest
from dgemma_runtime.service import Service
from dgemma_runtime.settings import RuntimeSettings, plan_limits

PAD, EOS, BOS, UNK, TURN_START, TURN_END = range(6)
_SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>", "<|turn>", "<turn|>")
_MERGES = (("t", "h"), ("th", "e"), ("s", "t"), ("o", "p"), ("st", "op"), ("e", "r"))


def tiny_tokenizer() -> Tokenizer:
    """Of Gemma's kind: special tokens, the 256 bytes, printable ASCII and a few longer pieces; 364 tokens."""
    characters = ["▁", "\n", *(chr(code) for code in range(33, 127))]
    pieces = [*_SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *characters, *(a + b for a, b in _MERGES)]
    vocabulary = {piece: id_ for id_, piece in enumerate(pieces)}
    model = models.BPE(vocabulary, list(_MERGES), unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "isolated")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in _SPECIAL])
    return tokenizer


def tiny_codec() -> Codec:
    return Codec(tiny_tokenizer(), "<bos>")


class Recorder:
    """A sink that keeps every event and can be waited for."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self._changed = threading.Condition()

    def __call__(self, event: Event) -> None:
        with self._changed:
            self.events.append(event)
            self._changed.notify_all()

    def finished(self, timeout_s: float = 20.0) -> Finished:
        """The Finished event, once it came; raises TimeoutError."""
        self.wait_for(Finished, timeout_s)
        last = self.events[-1]
        assert isinstance(last, Finished)
        return last

    def wait_for(self, kind: type[Event], timeout_s: float = 20.0) -> None:
        """Until an event of this kind came."""
        with self._changed:
            if not self._changed.wait_for(lambda: any(isinstance(e, kind) for e in self.events), timeout_s):
                raise TimeoutError(f"no {kind.__name__} within {timeout_s:g} s, only {self.events}")

    @property
    def kinds(self) -> list[str]:
        """The events' class names."""
        return [type(event).__name__ for event in self.events]

    @property
    def commits(self) -> list[Commit]:
        return [event for event in self.events if isinstance(event, Commit)]

    @property
    def previews(self) -> list[Preview]:
        return [event for event in self.events if isinstance(event, Preview)]


def scripted_engine(
    answers: Mapping[str, str | Int32Array],
    *,
    steps: int = 2,
    canvas_length: int = 8,
    max_model_len: int = 256,
    settings: RuntimeSettings | None = None,
    fail_on: Mapping[str, int] | None = None,
    delay_s: float = 0.0,
    most_canvases: int | None = None,
) -> ScriptedEngine:
    """An engine that answers prompts (text) with texts, each followed by <eos>, or with token ids as they are."""
    codec = tiny_codec()
    pairs = [(codec.encode(prompt), _answer_ids(codec, answer)) for prompt, answer in answers.items()]
    vocab_size = tiny_tokenizer().get_vocab_size()
    manifest = scripted_manifest(vocab_size, canvas_length, sliding_window=13, max_model_len=max_model_len)
    script = answer_script(pairs, canvas_length, steps)
    limits = plan_limits(manifest, settings or small_settings())
    return ScriptedEngine(manifest, limits, script, fail_on, delay_s, most_canvases)


def small_settings(**changes: Any) -> RuntimeSettings:
    """Settings with short chunks and pages."""
    small: dict[str, Any] = {"max_batch_size": 4, "prefill_chunk": 16, "prefill_budget": 32, "page_size": 5}
    return RuntimeSettings(**small | changes)


def start_service(engine: Engine, settings: RuntimeSettings | None = None) -> Service:
    """A started service with the tiny tokenizer and the reference's defaults."""
    defaults = default_parameters({"eos_token_id": EOS})
    service = Service(engine, tiny_codec(), settings or small_settings(), defaults)
    service.start()
    return service


def submit(service: Service, prompt: str | Int32Array, *, sink: Recorder | None = None, **values: object) -> Recorder:
    """Ask a service; `values` are request parameters."""
    recorder = sink or Recorder()
    service.submit(GenerationRequest(prompt, parse_parameters(values, service.defaults)), recorder)
    return recorder


class Gate(ScriptedEngine):
    """Waits for `permits` before each denoising call, so that a test can act between two."""

    permits: threading.Semaphore
    entered: threading.Semaphore

    def denoise(self, rows: Sequence[DenoiseRow], commits: Sequence[CommitRow] = ()) -> DenoiseResult:
        if rows:
            self.entered.release()
            assert self.permits.acquire(timeout=20)
        return super().denoise(rows, commits)


def gated(answers: dict[str, str], **options: int) -> Gate:
    """As `scripted_engine`, with no permit yet."""
    engine = scripted_engine(answers, **options)  # type: ignore[arg-type]
    engine.__class__ = Gate
    assert isinstance(engine, Gate)
    engine.permits, engine.entered = threading.Semaphore(0), threading.Semaphore(0)
    return engine


def _answer_ids(codec: Codec, answer: str | Int32Array) -> Int32Array:
    if isinstance(answer, str):
        return np.append(codec.encode(answer)[1:], EOS).astype(np.int32)  # without <bos>
    return answer
