"""The parameters of one generation: names, ranges, defaults, and what is refused. Knows no transport and no engine."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from dgemma_runtime.errors import CheckpointError, InvalidRequest

MAX_SEED = 2**64 - 1
MAX_STOP_STRINGS, MAX_STOP_CHARACTERS = 64, 1024
MAX_SALT_CHARACTERS = 256
ADAPTIVE_STOPPING_OFF = -1  # as `stability_threshold` of a request: every canvas takes max_denoising_steps steps

# What the reference falls back to where a checkpoint's generation config leaves a value out
# (transformers 5.23, DiffusionGemmaGenerationConfig._get_default_generation_params).
REFERENCE_DEFAULTS: Mapping[str, float] = {
    "max_denoising_steps": 48,
    "entropy_bound": 0.1,
    "t_min": 0.4,
    "t_max": 0.8,
    "stability_threshold": 1,
    "confidence_threshold": 0.005,
}


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, both included."""

    low: int | float
    high: int | float
    whole: bool

    def __str__(self) -> str:
        if self.whole:
            return f"an integer from {int(self.low)} to {int(self.high)}"
        return f"a number from {self.low:g} to {self.high:g}"


RANGES: Mapping[str, Range] = {
    "max_tokens": Range(0, 2**31 - 1, whole=True),  # 0: the prompt's own tokens, nothing is generated
    "seed": Range(0, MAX_SEED, whole=True),
    "max_denoising_steps": Range(1, 1024, whole=True),
    "entropy_bound": Range(1e-9, 1e6, whole=False),  # nats
    "t_min": Range(1e-6, 100, whole=False),
    "t_max": Range(1e-6, 100, whole=False),
    "temperature": Range(1e-6, 100, whole=False),  # or 0, see `parse_parameters`
    "stability_threshold": Range(0, 1024, whole=True),  # steps
    "confidence_threshold": Range(1e-9, 1e3, whole=False),  # nats
    "priority": Range(-1000, 1000, whole=True),
    "deadline_ms": Range(1, 2**31 - 1, whole=True),  # milliseconds
    "draft_confidence": Range(0, 1, whole=False),
}
# Who may propose a canvas: whoever has something; nobody; matches in prompt and output; the drafter network.
DRAFTERS = ("auto", "off", "lookup", "model")
# How a draft is shown to the denoiser: as it is; or twice in one pass, each time without every second of its tokens.
VERIFICATIONS = ("direct", "halves")

# What this runtime cannot do, with the values that ask for nothing: those are let through, anything else is refused.
UNSUPPORTED: Mapping[str, tuple[object, ...]] = {
    "min_tokens": (0,),
    "top_k": (0, -1),
    "top_p": (1,),
    "min_p": (0,),
    "repetition_penalty": (1,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "length_penalty": (1,),
    "bad_words": ("", [], [""]),
    "logit_bias": ({},),
    "return_log_probs": (False,),
    "logprobs": (False, 0),
    "prompt_logprobs": (False, 0),
    "guided_decoding_guide_type": ("",),
    "guided_decoding_guide": ("",),
    "n": (1,),
    "best_of": (1,),
    "beam_width": (1,),
    "use_beam_search": (False,),
}
SUPPORTED = (
    *("max_tokens", "end_id", "stop", "stop_words", "temperature", "seed", "max_denoising_steps", "entropy_bound"),
    *("t_min", "t_max", "stability_threshold", "confidence_threshold", "stream", "stream_previews"),
    *("priority", "deadline_ms", "cache_salt", "skip_special_tokens"),
    *("drafter", "draft_confidence", "draft_verification"),
)


@dataclass(frozen=True)
class GenerationParameters:
    """One request's parameters, in range by construction; raises InvalidRequest naming the field otherwise."""

    end_ids: tuple[int, ...]  # any of them ends the output
    max_denoising_steps: int
    entropy_bound: float  # nats
    t_min: float
    t_max: float
    stability_threshold: int | None  # steps; adaptive stopping needs this and the next one, else steps are fixed
    confidence_threshold: float | None  # nats
    max_tokens: int | None = None  # None: what the context leaves
    stop: tuple[str, ...] = ()
    greedy: bool = False  # accepted positions take their argmax instead of their sample
    seed: int | None = None  # None: drawn when the request is submitted
    stream: bool = False
    stream_previews: bool = False
    priority: int = 0  # lower ones are admitted first and preempted last
    deadline_ms: int | None = None  # from submission; the request then ends with what it has
    cache_salt: str = ""  # only requests with the same one share cached prefixes
    skip_special_tokens: bool = True  # they have no text in the output
    drafter: str = "auto"  # of DRAFTERS
    draft_confidence: float | None = None  # positions of a draft that are less certain start as noise; None: by drafter
    draft_verification: str = "direct"  # of VERIFICATIONS

    def __post_init__(self) -> None:
        for name in ("max_denoising_steps", "entropy_bound", "t_min", "t_max"):
            _number(name, getattr(self, name))
        for name in ("max_tokens", "seed", "stability_threshold", "confidence_threshold", "priority", "deadline_ms"):
            if (value := getattr(self, name)) is not None:
                _number(name, value)
        if self.t_min > self.t_max:
            raise InvalidRequest("t_min", f"must be at most t_max, got t_min {self.t_min:g} > t_max {self.t_max:g}")
        _check_stop(self.stop)
        _check_salt(self.cache_salt)
        if self.stream_previews and not self.stream:
            raise InvalidRequest("stream_previews", "needs stream=true; without it only the final text is sent")


def default_parameters(generation_config: Mapping[str, Any]) -> GenerationParameters:
    """The defaults of a checkpoint's generation_config.json; raises CheckpointError when they are out of range.

    Its `max_new_tokens` is not inherited: without `max_tokens` a request may fill the context.
    """
    sampler = generation_config.get("sampler_config") or {}
    if not isinstance(sampler, Mapping):
        raise CheckpointError(f"generation_config.json: sampler_config is {sampler!r}, expected an object")
    given = {**generation_config, "entropy_bound": sampler.get("entropy_bound")}
    values: dict[str, Any] = {
        name: default if given.get(name) is None else given[name] for name, default in REFERENCE_DEFAULTS.items()
    }
    end = generation_config.get("eos_token_id")
    try:
        return GenerationParameters(end_ids=() if end is None else _end_ids(end), **values)
    except InvalidRequest as error:
        raise CheckpointError(f"generation_config.json: {error}") from None


def parse_parameters(values: Mapping[str, object], defaults: GenerationParameters) -> GenerationParameters:
    """A request's named values over the checkpoint's defaults. None means not given.

    `temperature` is a flat schedule (t_min = t_max = temperature). 0 is greedy: accepted positions take their argmax,
    entropies still come from the default schedule. `stability_threshold` -1 turns adaptive stopping off. `end_id`
    replaces the checkpoint's end ids, -1 leaves none. Unknown names and what the runtime cannot do raise
    InvalidRequest, except for values that ask for nothing (top_k 0 or -1, top_p 1, penalties 1/0/0).
    """
    given = {
        name: value.tolist() if isinstance(value, np.ndarray) else value
        for name, value in values.items()
        if value is not None
    }
    _refuse(given)
    changes: dict[str, Any] = {}
    for name in RANGES:
        if name in given and name not in ("temperature", "stability_threshold"):  # these have a value outside of theirs
            changes[name] = _number(name, given[name])
    if "stability_threshold" in given:
        changes |= _adaptive_stopping(given["stability_threshold"], defaults)
    if "temperature" in given:
        changes |= _flat_temperature(given)
    if "end_id" in given:
        changes["end_ids"] = () if _same(given["end_id"], -1) else _end_ids(given["end_id"])
    if "stop" in given and "stop_words" in given:
        raise InvalidRequest("stop_words", "is another name of stop; give one of the two")
    for name in ("stop", "stop_words"):
        if name in given:
            changes["stop"] = _strings(name, given[name])
    if "cache_salt" in given:
        changes["cache_salt"] = _string("cache_salt", given["cache_salt"])
    for name, choices in (("drafter", DRAFTERS), ("draft_verification", VERIFICATIONS)):
        if name in given:
            changes[name] = _choice(name, given[name], choices)
    for name in ("stream", "stream_previews", "skip_special_tokens"):
        if name in given:
            changes[name] = _boolean(name, given[name])
    return replace(defaults, **changes)


# ---------------------------------------------------------------- single values


def _refuse(given: Mapping[str, object]) -> None:
    for name, value in given.items():
        if name in UNSUPPORTED:
            neutral = UNSUPPORTED[name]
            if not any(_same(value, other) for other in neutral):
                allowed = " or ".join(repr(other) for other in neutral)
                hint = "; for greedy decoding use temperature 0" if name == "top_k" else ""
                message = f"is not supported, got {_shown(value)}; leave it out or send {allowed}{hint}"
                raise InvalidRequest(name, message)
        elif name not in SUPPORTED:
            known = ", ".join(sorted(SUPPORTED))
            raise InvalidRequest(name, f"is not a known parameter; known are {known}")


def _flat_temperature(given: Mapping[str, object]) -> dict[str, Any]:
    for other in ("t_min", "t_max"):
        if other in given:
            raise InvalidRequest("temperature", f"sets a flat schedule and excludes {other}; give one of the two")
    if _same(given["temperature"], 0):
        return {"greedy": True}
    value = _number("temperature", given["temperature"], also="0 (greedy)")
    return {"t_min": value, "t_max": value}


def _adaptive_stopping(value: object, defaults: GenerationParameters) -> dict[str, Any]:
    if _same(value, ADAPTIVE_STOPPING_OFF):
        return {"stability_threshold": None}
    return {"stability_threshold": _number("stability_threshold", value, also=f"{ADAPTIVE_STOPPING_OFF} (off)")}


def _number(name: str, value: Any, also: str = "") -> float:
    """`value` as int or float if it lies in the range of `name`; raises InvalidRequest."""
    allowed = RANGES[name]
    kinds = (int, np.integer) if allowed.whole else (int, float, np.integer, np.floating)
    if isinstance(value, kinds) and not isinstance(value, bool) and allowed.low <= value <= allowed.high:
        return int(value) if allowed.whole else float(value)
    expected = f"{allowed} or {also}" if also else str(allowed)
    raise InvalidRequest(name, f"must be {expected}, got {_shown(value)}")


def _boolean(name: str, value: object) -> bool:
    if isinstance(value, bool | np.bool_):
        return bool(value)
    raise InvalidRequest(name, f"must be true or false, got {_shown(value)}")


def _end_ids(value: object) -> tuple[int, ...]:
    items: Sequence[Any] = value if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    for item in items:
        if not isinstance(item, int | np.integer) or isinstance(item, bool) or not 0 <= item < 2**31:
            raise InvalidRequest("end_id", f"must be a token id or a list of them, or -1 for none, got {_shown(value)}")
    return tuple(int(item) for item in items)


def _string(name: str, value: object) -> str:
    if isinstance(value, str):
        return value
    raise InvalidRequest(name, f"must be a string, got {_shown(value)}")


def _choice(name: str, value: object, choices: tuple[str, ...]) -> str:
    if isinstance(value, str) and value in choices:
        return value
    raise InvalidRequest(name, f"must be one of {', '.join(choices)}, got {_shown(value)}")


def _strings(name: str, value: object) -> tuple[str, ...]:
    items = [value] if isinstance(value, str) else value
    if not isinstance(items, Sequence) or not all(isinstance(item, str) for item in items):
        raise InvalidRequest(name, f"must be a string or a list of strings, got {_shown(value)}")
    return tuple(items)


def _check_stop(stop: tuple[str, ...]) -> None:
    if len(stop) > MAX_STOP_STRINGS:
        raise InvalidRequest("stop", f"must be at most {MAX_STOP_STRINGS} strings, got {len(stop)}")
    for item in stop:
        if not 1 <= len(item) <= MAX_STOP_CHARACTERS:
            message = f"each string must have 1 to {MAX_STOP_CHARACTERS} characters, got one of {len(item)}"
            raise InvalidRequest("stop", message)


def _check_salt(salt: str) -> None:
    if len(salt) > MAX_SALT_CHARACTERS:
        message = f"must have at most {MAX_SALT_CHARACTERS} characters, got {len(salt)}; send its hash"
        raise InvalidRequest("cache_salt", message)
    try:
        salt.encode()
    except UnicodeEncodeError as error:
        message = f"is not valid Unicode: a lone surrogate at character {error.start}; leave it out"
        raise InvalidRequest("cache_salt", message) from None


def _same(value: object, other: object) -> bool:
    """Equal, and not merely because Python counts True as 1."""
    if isinstance(value, bool | np.bool_) != isinstance(other, bool):
        return False
    if isinstance(value, float | np.floating) and math.isnan(value):
        return False
    if isinstance(value, Sequence) and not isinstance(value, str):
        return isinstance(other, list) and list(value) == other
    return bool(value == other)


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
