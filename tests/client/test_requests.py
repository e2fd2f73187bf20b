"""What goes onto the wire: tensors of a call, refusals before anything is sent, and what comes back malformed."""

from __future__ import annotations

import json
import struct
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tritonclient.grpc import service_pb2

from dgemma_client import InvalidRequest, Parameters, ServerError
from dgemma_client.requests import Prompt, build
from dgemma_client.tensors import INPUTS, LISTS, OUTPUTS, decode, encode, pack_texts, unpack

TEXT = st.text(st.characters(exclude_categories=["Cs"]))


def inputs(parameters: dict[str, Any], **prompt: Any) -> dict[str, Any]:
    request = build("m", "id", Prompt(**(prompt or {"text": "hi"})), cast(Parameters, parameters), previews=False)
    encode("m", "id", request.inputs)
    return dict(request.inputs)


def test_the_client_and_the_server_have_the_same_table() -> None:
    from dgemma_runtime import tensors as server

    inputs = {spec.name: spec for spec in server.INPUTS}
    outputs = {spec.name: spec for spec in server.OUTPUTS}
    assert {name: inputs[name].datatype for name in INPUTS} == INPUTS
    assert {name: outputs[name].datatype for name in OUTPUTS} == OUTPUTS
    assert {name for name in INPUTS if inputs[name].many} == LISTS


def test_every_parameter_is_a_tensor() -> None:
    assert Parameters.__annotations__.keys() < INPUTS.keys()
    assert INPUTS.keys() > LISTS


def test_a_call_becomes_tensors() -> None:
    assert inputs({"max_tokens": 5, "stop_words": ["a", "b"], "seed": 2**64 - 1}) == {
        "text_input": ("hi",),
        "max_tokens": (5,),
        "stop_words": ("a", "b"),
        "seed": (2**64 - 1,),
        "stream": (True,),
        "stream_previews": (False,),
        "return_finish_reason": (True,),
        "return_num_input_tokens": (True,),
        "return_num_output_tokens": (True,),
    }


def test_one_stop_word_and_json_parameters() -> None:
    sent = inputs({"stop_words": "end", "sampling_parameters": {"n": 1}})
    assert sent["stop_words"] == ("end",)
    assert sent["sampling_parameters"] == ('{"n": 1}',)


def test_a_chat_is_json_with_its_characters() -> None:
    sent = inputs({}, messages=[{"role": "user", "content": "é\n"}])
    assert sent["messages"] == ('{"messages": [{"role": "user", "content": "é\\n"}]}',)
    assert "text_input" not in sent


def test_what_else_the_chat_template_takes() -> None:
    chat = {"messages": [{"role": "user", "content": "x"}], "tools": [{"name": "f"}], "enable_thinking": True}
    assert json.loads(inputs({}, **chat)["messages"][0]) == chat
    for name in ("tools", "enable_thinking"):
        with pytest.raises(InvalidRequest, match=f"{name}: only the chat template knows it"):
            inputs({}, text="x", **{name: chat[name]})


def test_how_a_chat_is_rendered() -> None:
    messages = [{"role": "assistant", "content": "x"}]
    options = {"continue_final_message": True, "chat_template_kwargs": {"style": [1]}}
    sent = json.loads(inputs({}, messages=messages, enable_thinking=True, chat=options)["messages"][0])
    assert sent == {"messages": messages, "enable_thinking": True, **options}
    assert json.loads(inputs({}, messages=messages, chat={})["messages"][0]) == {"messages": messages}
    with pytest.raises(InvalidRequest, match=r"chat: only the chat template knows it"):
        inputs({}, text="x", chat=options)
    with pytest.raises(InvalidRequest, match=r"chat: 'tools' is not an option of a chat; known are add_gen") as caught:
        inputs({}, messages=messages, chat={"tools": []})
    assert caught.value.field == "chat"
    with pytest.raises(InvalidRequest, match="messages: not JSON"):
        inputs({}, messages=messages, chat={"chat_template_kwargs": {"x": object()}})


def test_options_of_the_output_are_parameters() -> None:
    sent = inputs({"skip_special_tokens": False, "exclude_input_in_output": False})
    assert (sent["skip_special_tokens"], sent["exclude_input_in_output"]) == ((False,), (False,))
    with pytest.raises(InvalidRequest, match="skip_special_tokens: 0 is int; give True or False"):
        inputs({"skip_special_tokens": 0})


@pytest.mark.parametrize(
    "prompt",
    [
        {"text": None},
        {"text": "a", "input_ids": [1]},
        {"text": "a", "messages": []},
        {"input_ids": [1], "messages": []},
    ],
)
def test_exactly_one_prompt(prompt: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest, match="exactly one of prompt, input_ids and messages") as caught:
        inputs({}, **prompt)
    assert caught.value.field == "prompt"


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"max_token": 1}, r"max_token: not a parameter; did you mean max_tokens\?"),
        ({"zzz": 1}, "zzz: not a parameter; known are max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens: 1.5 is float; give a whole number"),
        ({"max_tokens": True}, "max_tokens: True is bool"),
        ({"max_tokens": 2**31}, f"max_tokens: {2**31} is outside of -{2**31} to {2**31 - 1}"),
        ({"seed": -1}, "seed: -1 is outside of 0"),
        ({"temperature": "hot"}, "temperature: 'hot' is str; give a number"),
        ({"temperature": 1e300}, "temperature: 1e.300 is outside"),
        ({"stop_words": ["a", 3]}, "stop_words: 3 is int; give text"),
        ({"stop_words": "\ud800"}, r"stop_words: not valid Unicode at character 0"),
        ({"sampling_parameters": {"a": float("nan")}}, "sampling_parameters: not JSON"),
        ({"sampling_parameters": {"a": object()}}, "sampling_parameters: not JSON"),
    ],
)
def test_what_no_tensor_can_hold_is_refused_by_name(parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message) as caught:
        inputs(parameters)
    assert caught.value.field == next(iter(parameters))


def test_a_lone_surrogate_in_a_prompt_is_refused() -> None:
    with pytest.raises(InvalidRequest, match=r"text_input: not valid Unicode at character 2"):
        inputs({}, text="ab\udc80")
    with pytest.raises(InvalidRequest, match=r"messages: not valid Unicode"):
        inputs({}, messages=[{"role": "user", "content": "\udc80"}])


def test_values_out_of_a_model_s_range_are_for_the_server_to_judge() -> None:
    assert inputs({"temperature": float("nan"), "max_tokens": -3})["max_tokens"] == (-3,)


@given(st.lists(TEXT, max_size=4))
def test_texts_survive_the_wire(texts: list[str]) -> None:
    assert unpack("stop_words", "BYTES", [len(texts)], pack_texts("stop_words", tuple(texts))) == tuple(texts)


@given(st.lists(st.integers(-(2**31), 2**31 - 1), max_size=8))
def test_token_ids_survive_the_wire(ids: list[int]) -> None:
    message = encode("m", "", {"input_ids": tuple(ids)})
    (raw,) = message.raw_input_contents
    assert unpack("input_ids", "INT32", list(message.inputs[0].shape), raw) == tuple(ids)


def test_numbers_of_numpy_are_numbers() -> None:
    assert inputs({"max_tokens": np.int64(3), "temperature": np.float32(0.5)}, input_ids=np.arange(3))["input_ids"]


@pytest.mark.parametrize(
    ("name", "datatype", "shape", "raw", "message"),
    [
        ("text_output", "BYTES", [1], struct.pack("<I", 2) + b"\xff\xfe", "not valid UTF-8"),
        ("text_output", "BYTES", [1], struct.pack("<I", 9) + b"ab", "goes past the end"),
        ("text_output", "BYTES", [1], b"\x01", "malformed"),
        ("text_output", "BYTES", [2], struct.pack("<I", 1) + b"a", r"1 elements for the shape \[2\]"),
        ("output_ids", "INT32", [2], b"\0" * 7, "malformed"),
        ("output_ids", "INT64", [1], b"\0" * 8, "is INT64; expected INT32"),
        ("other", "FP16", [1], b"\0\0", "data type FP16"),
    ],
)
def test_malformed_outputs_are_named(name: str, datatype: str, shape: list[int], raw: bytes, message: str) -> None:
    with pytest.raises(ServerError, match=f"output {name}.*{message}"):
        unpack(name, datatype, shape, raw)


def test_outputs_without_contents_are_an_error() -> None:
    response = service_pb2.ModelInferResponse()
    response.outputs.add(name="text_output", datatype="BYTES", shape=[1])
    with pytest.raises(ServerError, match="1 outputs came with 0 contents"):
        decode(response)
