"""Requests to a real Triton server over gRPC and HTTP: responses, options, streaming, and every kind of bad input."""

from __future__ import annotations

import json
import threading
import time
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from dgemma_runtime.tensors import INPUTS, OUTPUTS
from dgemma_runtime.testing import tiny_codec

if TYPE_CHECKING:
    from tests.server.conftest import Answer, Caller

CHAT = json.dumps([{"role": "user", "content": "short"}])
LONG_CHAT = json.dumps([{"role": "user", "content": "a" * 5000}])
SURROGATE_CHAT = json.dumps([{"role": "user", "content": "\ud800"}])
LONG_ANSWER = "one canvas here, and another one; then the end"


# ---------------------------------------------------------------- one response


def test_metadata_names_the_table_s_tensors(caller: Caller) -> None:
    with caller.http_connection() as connection:
        connection.request("GET", "/v2/models/diffusion_gemma")
        metadata = json.loads(connection.getresponse().read())
    found = [(tensor["name"], tensor["datatype"]) for tensor in metadata["inputs"]]
    assert found == [(spec.name, spec.datatype) for spec in INPUTS]
    assert [tensor["name"] for tensor in metadata["outputs"]] == [spec.name for spec in OUTPUTS]


def test_one_response_has_everything(caller: Caller) -> None:
    answer = caller.infer(text_input="long")
    assert answer.error is None
    assert len(answer.responses) == answer.last_flags == 1
    last = answer.last
    statistics = json.loads(last.pop("statistics"))
    ids = last.pop("output_ids")
    assert len(ids) == len(tiny_codec().encode(LONG_ANSWER))  # which has a start token, and this an end token
    assert last == {
        "text_output": LONG_ANSWER,
        "sequence_index": [0],
        "finish_reason": "stop",
        "num_input_tokens": [5],
        "num_output_tokens": [len(ids)],
        "denoising_steps": [12],
    }
    assert (statistics["canvases"], statistics["denoising_steps"]) == (3, 12)
    assert statistics["total_ms"] > statistics["engine_ms"] > 12 * 4


def test_generate_over_http(caller: Caller) -> None:
    status, text = caller.post("generate", {"text_input": "long", "seed": 2**64 - 1, "stop_words": ["nothing", "x"]})
    body = json.loads(text)
    assert (status, body["text_output"], body["finish_reason"]) == (200, LONG_ANSWER, "stop")


def test_prompts_of_all_kinds_are_the_same_prompt(caller: Caller) -> None:
    ids = tiny_codec().encode("short")
    for prompt in ({"text_input": "short"}, {"messages": CHAT}, {"input_ids": ids}):
        answer = caller.infer(**prompt)
        assert (answer.text, answer.last["num_input_tokens"]) == ("a reply", [len(ids)])


def test_stop_words_and_max_tokens(caller: Caller) -> None:
    assert caller.infer(text_input="long", stop_words=["zzz", ", and"]).text == "one canvas here"
    assert caller.infer(text_input="short", sampling_parameters='{"stop": "\\ud800"}').text == "a reply", "never found"
    answer = caller.infer(text_input="long", max_tokens=20)
    assert (len(answer.output_ids), answer.last["finish_reason"]) == (20, "length")


def test_parameters_as_json_and_as_request_parameters(caller: Caller) -> None:
    as_json = caller.infer(text_input="long", sampling_parameters='{"max_tokens": "7", "top_p": "1"}')
    as_request_parameters = caller.infer(text_input="long", parameters={"max_tokens": 7})
    as_tensor = caller.infer(text_input="long", max_tokens=7)
    status, text = caller.post("generate", {"text_input": "long", "parameters": {"max_tokens": 7}})
    assert as_json.text == as_request_parameters.text == as_tensor.text == LONG_ANSWER[:7]
    assert (status, json.loads(text)["text_output"]) == (200, LONG_ANSWER[:7])


def test_outputs_on_request_only(caller: Caller) -> None:
    assert list(caller.infer(text_input="short", outputs=["text_output"]).last) == ["text_output"]
    quiet = {"return_finish_reason": False, "return_num_input_tokens": False, "return_num_output_tokens": False}
    left_out = {"finish_reason", "num_input_tokens", "num_output_tokens"}
    assert left_out.isdisjoint(caller.infer(text_input="short", **quiet).last)


DEADLINES: list[dict[str, Any]] = [
    {"deadline_ms": 150},
    {"sampling_parameters": '{"deadline_ms": "150"}'},
    {"parameters": {"deadline_ms": 150}},
    {"timeout_us": 150_000},
    {"timeout_us": 60_000_000, "deadline_ms": 150},
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("deadline", DEADLINES, ids=["tensor", "json", "parameter", "triton", "both"])
def test_a_deadline_ends_the_answer_as_it_is(caller: Caller, deadline: dict[str, Any], stream: bool) -> None:
    started = time.monotonic()
    answer = caller.infer(text_input="forever", stream=stream, **deadline)
    assert time.monotonic() - started < 3, "without it, 4096 tokens take longer"
    assert (answer.error, answer.last_flags) == (None, 1)
    assert answer.last["finish_reason"] == "deadline"
    assert len(answer.output_ids) == answer.last["num_output_tokens"][0]
    assert ("and so on " * 500).startswith(answer.text)
    assert 0 < len(answer.text) < 3000


def test_a_deadline_that_is_met_changes_nothing(caller: Caller) -> None:
    answer = caller.infer(text_input="long", deadline_ms=30_000, priority=-1000, cache_salt="é" * 256)
    assert (answer.text, answer.last["finish_reason"]) == (LONG_ANSWER, "stop")
    status, text = caller.post("generate", {"text_input": "long", "deadline_ms": 30_000, "priority": 1000})
    assert (status, json.loads(text)["text_output"]) == (200, LONG_ANSWER)


def test_triton_s_own_timeout_over_http_is_refused(caller: Caller) -> None:
    """HTTP's `generate` hands it to the model as any other parameter; it must not be ignored."""
    status, text = caller.post("generate", {"text_input": "long", "timeout": 150_000})
    assert (status, "timeout: is not a known parameter" in text, "deadline_ms" in text) == (400, True, True)


@pytest.mark.parametrize("stream", [False, True])
def test_the_prompt_in_front_of_the_output(caller: Caller, stream: bool) -> None:
    plain = caller.infer(text_input="long", stream=stream)
    echoed = caller.infer(text_input="long", stream=stream, exclude_input_in_output=False)
    assert echoed.text == "long" + LONG_ANSWER
    assert len(echoed.output_ids) == 5 + len(plain.output_ids)
    chat = caller.infer(messages=CHAT, stream=stream, exclude_input_in_output=False)
    assert chat.text == "short" + "a reply"


# ---------------------------------------------------------------- streams


def test_a_response_per_canvas(caller: Caller) -> None:
    answer = caller.infer(text_input="long", stream=True)
    assert answer.last_flags == 1
    assert answer.text == LONG_ANSWER
    canvases, last = answer.responses[:-1], answer.last
    assert [(canvas["canvas_index"], canvas["canvas_steps"]) for canvas in canvases] == [([i], [4]) for i in range(3)]
    assert all(len(canvas["output_ids"]) == 16 for canvas in canvases[:-1])
    assert (last["text_output"], last["output_ids"], last["finish_reason"]) == ("", [], "stop")
    assert last["num_output_tokens"] == [len(answer.output_ids)]


def test_a_canvas_arrives_before_the_next_is_denoised(caller: Caller) -> None:
    times = caller.infer(text_input="long", stream=True).times[:3]
    gaps = [after - before for before, after in pairwise(times)]
    assert min(gaps) > 4 * 0.004 * 0.5  # four steps and a commit lie between two canvases


def test_previews_come_on_request_only(caller: Caller) -> None:
    answer = caller.infer(text_input="long", stream=True, stream_previews=True, seed=1)
    previews = [response for response in answer.responses if "preview_output" in response]
    assert [(p["canvas_index"], p["canvas_steps"]) for p in previews] == [
        ([canvas], [step]) for canvas in range(3) for step in (1, 2, 3)
    ]
    assert all(set(p) == {"preview_output", "canvas_index", "canvas_steps"} for p in previews)
    assert [LONG_ANSWER.startswith(p["preview_output"]) for p in previews[:3]] == [False, False, True]
    assert answer.text == LONG_ANSWER
    assert not any("preview_output" in r for r in caller.infer(text_input="long", stream=True).responses)


def test_generate_stream_over_http(caller: Caller) -> None:
    events = caller.events({"text_input": "long", "stream": True})
    assert "".join(event["text_output"] for event in events) == LONG_ANSWER
    assert ["finish_reason" in event for event in events] == [False, False, False, True]
    (alone,) = caller.events({"text_input": "long"})
    assert alone["text_output"] == LONG_ANSWER


def test_concurrent_streams(caller: Caller) -> None:
    answers: dict[int, Answer] = {}

    def one(number: int) -> None:
        answers[number] = caller.infer(text_input=("long", "short")[number % 2], stream=number % 3 > 0)

    threads = [threading.Thread(target=one, args=(number,)) for number in range(20)]  # more than slots
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [answers[n].text for n in range(20)] == [LONG_ANSWER, "a reply"] * 10
    assert all(answer.last_flags == 1 and answer.error is None for answer in answers.values())


# ---------------------------------------------------------------- bad input

BAD: list[tuple[dict[str, Any], str]] = [
    ({}, "give exactly one of text_input, input_ids, messages; got none of them"),
    ({"text_input": "a", "input_ids": [3]}, "give exactly one of .* got text_input and input_ids"),
    ({"text_input": "a", "messages": CHAT}, "give exactly one of"),
    ({"text_input": ""}, "text_input: is empty"),
    ({"input_ids": []}, "input_ids: is empty"),
    ({"input_ids": [-1]}, "input_ids: token ids must be from 0 to 363, got -1"),
    ({"input_ids": [5, 364]}, "input_ids: token ids must be from 0 to 363, got 364"),
    ({"text_input": "a" * 5000}, "maximum context length is 4096 tokens, the prompt has 5001"),
    ({"text_input": "a", "max_tokens": 4095}, "maximum context length is 4096 tokens, .* ask for at most 4094"),
    ({"text_input": b"ab\xff"}, "text_input: is not valid UTF-8"),
    ({"text_input": "a", "stop_words": [b"\xc3"]}, "stop_words: is not valid UTF-8"),
    ({"messages": "{"}, "messages: is not valid JSON"),
    ({"messages": "[]"}, "messages: is empty"),
    ({"messages": '[{"content": "a"}]'}, "messages: "),
    ({"messages": LONG_CHAT}, "messages: this model's maximum context length is 4096 tokens, the prompt has 50"),
    ({"messages": SURROGATE_CHAT}, "messages: is not valid Unicode"),
    ({"messages": SURROGATE_CHAT, "exclude_input_in_output": False}, "messages: is not valid Unicode"),
    ({"messages": '[{"role": "robot", "content": "a"}]'}, "messages: the chat template refused them .*no robots"),
    ({"text_input": "a", "max_tokens": -5}, "max_tokens: must be an integer from 0 to .* got -5"),
    ({"text_input": "a", "temperature": float("nan")}, "temperature: must be .*got nan"),
    ({"text_input": "a", "temperature": float("inf")}, "temperature: must be .*got inf"),
    ({"text_input": "a", "entropy_bound": -1.0}, "entropy_bound: must be"),
    ({"text_input": "a", "max_denoising_steps": 2_000_000_000}, "max_denoising_steps: must be"),
    ({"text_input": "a", "t_min": 0.9, "t_max": 0.1}, "t_min: must be at most t_max"),
    ({"text_input": "a", "end_id": 999}, "end_id: must be from 0 to 363, got 999"),
    ({"text_input": "a", "top_k": 40}, "top_k: is not supported, got 40"),
    ({"text_input": "a", "top_p": 0.9}, "top_p: is not supported, got 0.9"),
    ({"text_input": "a", "min_tokens": 3}, "min_tokens: is not supported"),
    ({"text_input": "a", "repetition_penalty": 1.1}, "repetition_penalty: is not supported, got 1.1"),
    ({"text_input": "a", "bad_words": ["x"]}, "bad_words: is not supported"),
    ({"text_input": "a", "return_log_probs": True}, "return_log_probs: is not supported"),
    ({"text_input": "a", "guided_decoding_guide_type": "json"}, "guided_decoding_guide_type: is not supported"),
    ({"text_input": "a", "drafter": "on"}, "drafter: must be one of auto, off, lookup, model, got 'on'"),
    ({"text_input": "a", "priority": 1001}, "priority: must be an integer from -1000 to 1000, got 1001"),
    ({"text_input": "a", "priority": -1001}, "priority: must be an integer from -1000 to 1000, got -1001"),
    ({"text_input": "a", "sampling_parameters": '{"priority": "high"}'}, "priority: must be an integer .*, got 'high'"),
    ({"text_input": "a", "sampling_parameters": '{"priority": 1.5}'}, "priority: must be an integer .*, got 1.5"),
    ({"text_input": "a", "sampling_parameters": '{"priority": true}'}, "priority: must be an integer .*, got True"),
    ({"text_input": "a", "sampling_parameters": '{"priority": 1}', "priority": 1}, "priority: is given twice"),
    ({"text_input": "a", "deadline_ms": 0}, "deadline_ms: must be an integer from 1 to 2147483647, got 0"),
    ({"text_input": "a", "deadline_ms": -5}, "deadline_ms: must be an integer from 1 to 2147483647, got -5"),
    ({"text_input": "a", "parameters": {"deadline_ms": 2**31}}, "deadline_ms: must be .*, got 2147483648"),
    ({"text_input": "a", "parameters": {"deadline_ms": "soon"}}, "deadline_ms: must be .*, got 'soon'"),
    ({"text_input": "a", "sampling_parameters": '{"deadline_ms": NaN}'}, "deadline_ms: must be .*, got nan"),
    ({"text_input": "a", "parameters": {"deadline_ms": 5}, "deadline_ms": 5}, "deadline_ms: is given twice"),
    ({"text_input": "a", "cache_salt": "x" * 257}, "cache_salt: must have at most 256 characters, got 257"),
    ({"text_input": "a", "cache_salt": b"\xff"}, "cache_salt: is not valid UTF-8"),
    ({"text_input": "a", "sampling_parameters": '{"cache_salt": 5}'}, "cache_salt: must be a string, got 5"),
    ({"text_input": "a", "sampling_parameters": '{"cache_salt": "\\ud800"}'}, "cache_salt: is not valid Unicode"),
    ({"text_input": "a", "parameters": {"cache_salt": "a"}, "cache_salt": "b"}, "cache_salt: is given twice"),
    ({"text_input": "a", "sampling_parameters": '{"priority": null}', "deadline_ms": 0}, "deadline_ms: must be"),
    ({"text_input": "a", "stream_previews": True}, "stream_previews: needs stream=true"),
    ({"text_input": "a", "sampling_parameters": "[]"}, "sampling_parameters: must be a JSON object"),
    ({"text_input": "a", "sampling_parameters": '{"tmperature": 1}'}, "tmperature: is not a known parameter"),
    ({"text_input": "a", "sampling_parameters": '{"seed": 1}', "seed": 2}, "seed: is given twice"),
    ({"text_input": "a", "parameters": {"foo": 1}}, "foo: is not a known parameter"),
]


@pytest.mark.parametrize(("request_", "message"), BAD, ids=[m[:40] for _, m in BAD])
def test_bad_input_is_refused_with_one_error(caller: Caller, request_: dict[str, Any], message: str) -> None:
    answer = caller.infer(**request_)
    assert answer.error is not None
    assert not answer.responses
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(answer.error)
    assert "Traceback" not in answer.error
    assert ".py" not in answer.error
    assert caller.infer(text_input="short").text == "a reply"


REFUSED_BY_TRITON: list[tuple[dict[str, Any], str]] = [
    (
        {"text_input": np.array([[b"a"]], object)},
        r"shape for input 'text_input'.*Expected \[1\], got \[1,1\]",
    ),
    ({"text_input": "a", "max_tokens": np.array([1])}, "max_tokens.*INT64.*INT32"),
    ({"text_input": "a", "deadline_ms": np.array([1])}, "deadline_ms.*INT64.*INT32"),
    ({"text_input": "a", "priority": np.array([b"high"], object)}, "priority.*BYTES.*INT32"),
    ({"text_input": "a", "cache_salt": np.array([7], np.int32)}, "cache_salt.*INT32.*BYTES"),
    ({"text_input": "a", "cache_salt": np.array([b"a", b"b"], object)}, r"cache_salt.*Expected \[1\], got \[2\]"),
    ({"text_input": "a", "foo": np.array([1])}, "unexpected inference input 'foo'"),
    ({"text_input": "a", "outputs": ["cum_log_probs"]}, "unexpected inference output 'cum_log_probs'"),
]


@pytest.mark.parametrize(("request_", "message"), REFUSED_BY_TRITON, ids=[m[:40] for _, m in REFUSED_BY_TRITON])
def test_what_triton_itself_refuses(caller: Caller, request_: dict[str, Any], message: str) -> None:
    answer = caller.infer(**request_)
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(answer.error)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"text_input": ""}, "text_input: is empty"),
        ({"text_input": "a", "foo": 1}, "foo: is not a known parameter"),
        ({"text_input": "a", "temperature": -1}, "temperature: must be"),
        ({"text_input": "a", "deadline_ms": 0}, "deadline_ms: must be"),
        ({"text_input": "a", "priority": 5000}, "priority: must be"),
        ({"text_input": "a", "cache_salt": "x" * 257}, "cache_salt: must have at most 256 characters"),
        (b'{"text_input": "\xff"}', "text_input: is not valid UTF-8"),
    ],
)
def test_bad_input_over_http_is_a_400(caller: Caller, body: dict[str, Any] | bytes, message: str) -> None:
    status, text = caller.post("generate", body)
    assert (status, message in json.loads(text)["error"]) == (400, True)
    assert json.loads(caller.post("generate", {"text_input": "short"})[1])["text_output"] == "a reply"


def test_what_is_no_json_is_refused(caller: Caller) -> None:
    status, text = caller.post("generate", b"nonsense")
    assert (status, "failed to parse the request JSON" in text) == (500, True)  # Triton's own answer
    assert json.loads(caller.post("generate", {"text_input": "short"})[1])["text_output"] == "a reply"


def test_a_refused_stream_over_http_is_a_400_with_an_event(caller: Caller) -> None:
    status, text = caller.post("generate_stream", {"text_input": "a", "top_k": 3, "stream": True})
    assert status == 400
    assert json.loads(text.removeprefix("data: "))["error"].startswith("top_k: is not supported")
