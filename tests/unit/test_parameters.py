"""Parameters: defaults of the checkpoint, ranges, what is refused by name."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest

from dgemma_runtime.errors import CheckpointError, InvalidRequest
from dgemma_runtime.parameters import (
    RANGES,
    SUPPORTED,
    UNSUPPORTED,
    GenerationParameters,
    default_parameters,
    parse_parameters,
)

CONFIG = {
    "max_new_tokens": 256,
    "max_denoising_steps": 20,
    "sampler_config": {"entropy_bound": 0.3, "_cls_name": "EntropyBoundSamplerConfig"},
    "t_min": 0.2,
    "t_max": 0.9,
    "stability_threshold": 2,
    "confidence_threshold": 0.01,
    "eos_token_id": [1, 5],
    "transformers_version": "5.23.0",
}
DEFAULTS = default_parameters(CONFIG)


def test_defaults_come_from_the_checkpoint() -> None:
    expected = GenerationParameters(
        end_ids=(1, 5),
        max_denoising_steps=20,
        entropy_bound=0.3,
        t_min=0.2,
        t_max=0.9,
        stability_threshold=2,
        confidence_threshold=0.01,
    )
    assert expected == DEFAULTS
    assert parse_parameters({}, DEFAULTS) == DEFAULTS
    assert DEFAULTS.max_tokens is None, "the checkpoint's max_new_tokens is no limit of a server"


def test_what_a_checkpoint_leaves_out_is_the_reference_s() -> None:
    parameters = default_parameters({"eos_token_id": 7, "t_min": None})
    assert parameters.end_ids == (7,)
    assert (parameters.max_denoising_steps, parameters.entropy_bound) == (48, 0.1)
    assert (parameters.t_min, parameters.t_max) == (0.4, 0.8)
    assert default_parameters({}).end_ids == ()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_denoising_steps": 0}, "max_denoising_steps"),
        ({"t_min": 3.0}, "t_min"),
        ({"eos_token_id": "x"}, "end_id"),
        ({"sampler_config": 3}, "sampler_config"),
        ({"confidence_threshold": math.nan}, "confidence_threshold"),
    ],
)
def test_a_checkpoint_with_odd_defaults_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=rf"generation_config.json.*{message}"):
        default_parameters(CONFIG | change)


@pytest.mark.parametrize("name", sorted(RANGES))
def test_both_ends_of_a_range_are_in_it(name: str) -> None:
    allowed = RANGES[name]
    kind = int if allowed.whole else float
    schedules: dict[str, dict[str, object]] = {"t_min": {"t_max": 100}, "t_max": {"t_min": 1e-6}}
    excluded = schedules.get(name, {})
    ends: list[object] = [kind(allowed.low), kind(allowed.high)]
    for value in ends:
        parse_parameters({**excluded, name: value}, DEFAULTS)
    odd: list[object] = [kind(allowed.high) + kind(1), -1001, math.nan, math.inf, -math.inf, "5", True, [1], {}]
    if allowed.whole:
        odd.append(1.5)
    for value in odd:
        with pytest.raises(InvalidRequest) as caught:
            parse_parameters({**excluded, name: value}, DEFAULTS)
        assert caught.value.field == name
        assert str(allowed) in str(caught.value)
        assert "got" in str(caught.value)


def test_ranges_read_as_they_were_written() -> None:
    assert str(RANGES["seed"]) == f"an integer from 0 to {2**64 - 1}"
    assert str(RANGES["deadline_ms"]) == "an integer from 1 to 2147483647"
    assert str(RANGES["entropy_bound"]) == "a number from 1e-09 to 1e+06"


def test_zero_is_in_range_only_where_it_has_a_meaning() -> None:
    assert parse_parameters({"seed": 0, "stability_threshold": 0, "temperature": 0, "max_tokens": 0}, DEFAULTS).greedy
    for name in ("max_denoising_steps", "entropy_bound", "t_min", "t_max", "confidence_threshold"):
        with pytest.raises(InvalidRequest, match=name):
            parse_parameters({name: 0}, DEFAULTS)


def test_temperature_is_a_flat_schedule() -> None:
    parameters = parse_parameters({"temperature": 0.5}, DEFAULTS)
    assert (parameters.t_min, parameters.t_max, parameters.greedy) == (0.5, 0.5, False)


def test_temperature_zero_is_greedy_with_the_checkpoint_s_schedule() -> None:
    for zero in (0, 0.0, np.float32(0)):
        parameters = parse_parameters({"temperature": zero}, DEFAULTS)
        assert (parameters.t_min, parameters.t_max, parameters.greedy) == (0.2, 0.9, True)


def test_temperature_excludes_a_schedule() -> None:
    with pytest.raises(InvalidRequest, match=r"temperature: .*excludes t_max"):
        parse_parameters({"temperature": 0.5, "t_max": 0.9}, DEFAULTS)


def test_t_min_may_not_exceed_t_max() -> None:
    with pytest.raises(InvalidRequest, match=r"t_min: must be at most t_max, got t_min 0.95 > t_max 0.9"):
        parse_parameters({"t_min": 0.95}, DEFAULTS)


def test_adaptive_stopping_can_be_turned_off() -> None:
    assert parse_parameters({"stability_threshold": -1}, DEFAULTS).stability_threshold is None


def test_end_id_replaces_the_checkpoint_s() -> None:
    assert parse_parameters({"end_id": 9}, DEFAULTS).end_ids == (9,)
    assert parse_parameters({"end_id": [9, 10]}, DEFAULTS).end_ids == (9, 10)
    assert parse_parameters({"end_id": np.array([9, 10], np.int32)}, DEFAULTS).end_ids == (9, 10)
    assert parse_parameters({"end_id": -1}, DEFAULTS).end_ids == ()
    for odd in (-2, "x", 1.0, True, 2**31, [1, -1]):
        with pytest.raises(InvalidRequest, match="end_id"):
            parse_parameters({"end_id": odd}, DEFAULTS)


@pytest.mark.parametrize("name", ["stop", "stop_words"])
def test_stop_strings(name: str) -> None:
    assert parse_parameters({name: "END"}, DEFAULTS).stop == ("END",)
    assert parse_parameters({name: ["a", "bc"]}, DEFAULTS).stop == ("a", "bc")
    assert parse_parameters({name: []}, DEFAULTS).stop == ()
    for odd in ("", ["a", ""], [1], 3, ["x"] * 65, "x" * 1025):
        with pytest.raises(InvalidRequest, match="stop"):
            parse_parameters({name: odd}, DEFAULTS)


def test_stop_and_its_other_name_exclude_each_other() -> None:
    with pytest.raises(InvalidRequest, match="another name of stop"):
        parse_parameters({"stop": "a", "stop_words": "b"}, DEFAULTS)


def test_scheduling() -> None:
    parameters = parse_parameters({"priority": -3, "deadline_ms": 250, "cache_salt": "tenant é"}, DEFAULTS)
    assert (parameters.priority, parameters.deadline_ms, parameters.cache_salt) == (-3, 250, "tenant é")
    assert (DEFAULTS.priority, DEFAULTS.deadline_ms, DEFAULTS.cache_salt) == (0, None, "")
    assert parse_parameters({"priority": np.int32(0), "cache_salt": ""}, DEFAULTS) == DEFAULTS


def test_a_cache_salt_is_a_short_string() -> None:
    assert parse_parameters({"cache_salt": "é" * 256}, DEFAULTS).cache_salt == "é" * 256
    with pytest.raises(InvalidRequest, match="cache_salt: must have at most 256 characters, got 257; send its hash"):
        parse_parameters({"cache_salt": "x" * 257}, DEFAULTS)
    with pytest.raises(InvalidRequest, match="cache_salt: is not valid Unicode: a lone surrogate at character 2"):
        parse_parameters({"cache_salt": "ab\ud800"}, DEFAULTS)
    for odd in (5, True, ["x"], b"x"):
        with pytest.raises(InvalidRequest, match="cache_salt: must be a string, got"):
            parse_parameters({"cache_salt": odd}, DEFAULTS)


def test_streams() -> None:
    assert parse_parameters({"stream": True, "stream_previews": True}, DEFAULTS).stream_previews
    with pytest.raises(InvalidRequest, match="stream_previews: needs stream=true"):
        parse_parameters({"stream_previews": True}, DEFAULTS)
    for odd in (1, 0, "true"):
        with pytest.raises(InvalidRequest, match="stream: must be true or false"):
            parse_parameters({"stream": odd}, DEFAULTS)


@pytest.mark.parametrize("name", sorted(UNSUPPORTED))
def test_what_asks_for_nothing_is_let_through(name: str) -> None:
    for value in UNSUPPORTED[name]:
        assert parse_parameters({name: value}, DEFAULTS) == DEFAULTS
    assert parse_parameters({name: None}, DEFAULTS) == DEFAULTS


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("min_tokens", 1),
        ("top_k", 1),
        ("top_k", 50),
        ("top_k", math.nan),
        ("top_p", 0.9),
        ("top_p", math.nan),
        ("top_p", True),
        ("repetition_penalty", 1.1),
        ("presence_penalty", 0.5),
        ("frequency_penalty", -0.5),
        ("bad_words", ["x"]),
        ("bad_words", "x"),
        ("return_log_probs", True),
        ("logprobs", 5),
        ("guided_decoding_guide_type", "json"),
        ("guided_decoding_guide", "{}"),
        ("n", 2),
        ("logit_bias", {"5": 1}),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(InvalidRequest, match=rf"^{name}: is not supported, got") as caught:
        parse_parameters({name: value}, DEFAULTS)
    assert caught.value.field == name


def test_unknown_names_are_refused_with_the_known_ones() -> None:
    with pytest.raises(InvalidRequest, match=r"^maxtokens: is not a known parameter.*max_tokens") as caught:
        parse_parameters({"maxtokens": 5}, DEFAULTS)
    assert all(name in str(caught.value) for name in SUPPORTED)


def test_json_and_numpy_values_mean_the_same() -> None:
    parsed = parse_parameters(json.loads('{"max_tokens": 7, "t_min": 0.25, "top_p": 1.0, "n": null}'), DEFAULTS)
    values = {"max_tokens": np.int32(7), "t_min": np.float64(0.25), "top_p": np.float32(1)}
    assert parsed == parse_parameters(values, DEFAULTS)
    assert type(parsed.max_tokens) is int


def test_long_values_are_cut_in_messages() -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_parameters({"max_tokens": "9" * 10_000}, DEFAULTS)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("drafter", "on", "drafter: must be one of auto, off, lookup, model, got 'on'"),
        ("drafter", True, "drafter: must be one of auto, off, lookup, model, got True"),
        ("draft_verification", "both", "draft_verification: must be one of direct, halves, got 'both'"),
        ("draft_confidence", 1.1, "draft_confidence: must be a number from 0 to 1, got 1.1"),
    ],
)
def test_drafting_that_there_is_not_is_refused(name: str, value: object, expected: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_parameters({name: value}, DEFAULTS)
    assert str(caught.value) == expected
