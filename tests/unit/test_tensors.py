"""The tensor table, the model's config.pbtxt beside it, and a request's arrays on their way to a generation."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from google.protobuf import text_format  # type: ignore[import-untyped]
from tritonclient.grpc import model_config_pb2

from dgemma_runtime.errors import InvalidRequest
from dgemma_runtime.events import Commit, Finished, Prefill, Preview
from dgemma_runtime.parameters import SUPPORTED, UNSUPPORTED, default_parameters
from dgemma_runtime.statistics import DraftStatistics, RequestStatistics
from dgemma_runtime.tensors import (
    INPUTS,
    NUMPY_TYPES,
    OUTPUTS,
    Chat,
    OutputOptions,
    ParsedRequest,
    TensorSpec,
    commit_outputs,
    finished_outputs,
    parse_request,
    prefill_outputs,
    preview_outputs,
)

CONFIG = Path(__file__).resolve().parents[2] / "model_repository/diffusion_gemma/config.pbtxt"
DEFAULTS = default_parameters({"eos_token_id": 1})
SPECS = {spec.name: spec for spec in INPUTS}


def arrays(values: Mapping[str, Any]) -> dict[str, np.ndarray[Any, Any]]:
    """Of shape [1] or [n], typed as the table says; arrays as they are."""
    made = {}
    for name, value in values.items():
        if not isinstance(value, np.ndarray):
            value = np.array(value if isinstance(value, list) else [value], NUMPY_TYPES[SPECS[name].datatype])
        made[name] = value
    return made


def parse(request_parameters: str = "", **values: Any) -> ParsedRequest:
    return parse_request(arrays({"text_input": b"hi"} | values), request_parameters, DEFAULTS)


# ---------------------------------------------------------------- the table


def test_config_and_table_agree() -> None:
    config = text_format.Parse(CONFIG.read_text(), model_config_pb2.ModelConfig())
    kserve = {"TYPE_STRING": "BYTES"} | {f"TYPE_{name}": name for name in NUMPY_TYPES}
    for tensors, specs in ((config.input, INPUTS), (config.output, OUTPUTS)):
        found = [(t.name, kserve[model_config_pb2.DataType.Name(t.data_type)], list(t.dims)) for t in tensors]
        assert found == [(spec.name, spec.datatype, [-1] if spec.many else [1]) for spec in specs]
    assert all(tensor.optional for tensor in config.input)
    assert config.model_transaction_policy.decoupled
    assert config.max_batch_size == 0
    assert [(group.count, group.kind) for group in config.instance_group] == [
        (1, model_config_pb2.ModelInstanceGroup.KIND_CPU)
    ]


def test_every_parameter_tensor_is_known_to_the_parameters() -> None:
    names = {spec.name for spec in INPUTS if spec.group not in ("prompt", "draft", "vllm")}
    known = {*SUPPORTED, *UNSUPPORTED, *OutputOptions.__dataclass_fields__}
    assert names <= known
    assert set(SUPPORTED) - {"stop"} <= names  # `stop` is the JSON name of `stop_words`


# ---------------------------------------------------------------- values


@pytest.mark.parametrize("shape", [(1,), (1, 1)])
@pytest.mark.parametrize(
    "spec", [s for s in INPUTS if not s.many and s.group in ("diffusion", "scheduling")], ids=lambda s: s.name
)
def test_scalars_come_in_one_or_two_dimensions(spec: TensorSpec, shape: tuple[int, ...]) -> None:
    special = {"drafter": b"off", "draft_verification": b"halves", "cache_salt": b"x", "t_min": 0.2, "t_max": 0.9}
    value = special.get(spec.name, 1)
    given: dict[str, Any] = {spec.name: np.array([value], NUMPY_TYPES[spec.datatype]).reshape(shape)}
    parsed = parse(**given)
    found = getattr(parsed.parameters, spec.name)
    assert found == (value.decode() if isinstance(value, bytes) else value)
    assert type(found) is {"FP32": float, "BYTES": str}.get(spec.datatype, int)


@pytest.mark.parametrize("shape", [(2,), (2, 1), (1, 1, 1), (0,), ()])
def test_scalars_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(InvalidRequest, match=r"max_tokens: must have the shape \[1\] or \[1, 1\], got"):
        parse(max_tokens=np.ones(shape, np.int32))


@pytest.mark.parametrize("shape", [(2,), (1, 2)])
def test_lists_come_in_one_or_two_dimensions(shape: tuple[int, ...]) -> None:
    stop = np.array([b"a", "é".encode()], object).reshape(shape)
    assert parse(stop_words=stop).parameters.stop == ("a", "é")
    ids = parse_request({"input_ids": np.array([5, 6], np.int32).reshape(shape)}, "", DEFAULTS).prompt
    assert isinstance(ids, np.ndarray)
    assert ids.tolist() == [5, 6]
    with pytest.raises(InvalidRequest, match=r"stop_words: must have the shape \[n\] or \[1, n\]"):
        parse(stop_words=stop.reshape(2, 1))


def test_a_number_means_the_same_as_tensor_and_as_json() -> None:
    for name, value in (("entropy_bound", 0.1), ("confidence_threshold", 0.005), ("temperature", 0.7)):
        as_json = parse(sampling_parameters=json.dumps({name: value}).encode())
        given: dict[str, Any] = {name: value}
        assert parse(**given).parameters == as_json.parameters


def test_another_type_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="max_tokens: must be INT32, got numpy int64"):
        parse(max_tokens=np.array([1]))


def test_an_unknown_tensor_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="foo: is not an input of this model; known are text_input"):
        parse(foo=np.array([1]))


@pytest.mark.parametrize("name", ["text_input", "stop_words", "messages", "sampling_parameters"])
def test_invalid_utf8_is_refused(name: str) -> None:
    with pytest.raises(InvalidRequest, match=f"{name}: is not valid UTF-8 .byte 0xff at position 2 of 3"):
        parse_request(arrays({name: b"ab\xff"}), "", DEFAULTS)


# ---------------------------------------------------------------- prompt


def test_a_prompt_is_exactly_one_of_three() -> None:
    for given in ([], ["text_input", "messages"], ["text_input", "input_ids", "messages"]):
        tensors = {name: {"input_ids": 5}.get(name, b"[]") for name in given}
        with pytest.raises(InvalidRequest, match="give exactly one of text_input, input_ids, messages; got"):
            parse_request(arrays(tensors), "", DEFAULTS)


def test_messages_are_a_list_or_an_object_with_tools() -> None:
    chat = [{"role": "user", "content": "hi"}]
    as_list = parse_request(arrays({"messages": json.dumps(chat).encode()}), "", DEFAULTS)
    assert as_list.prompt == Chat(chat)
    whole = {"messages": chat, "tools": [{"name": "f"}], "enable_thinking": True}
    as_object = parse_request(arrays({"messages": json.dumps(whole).encode()}), "", DEFAULTS)
    assert as_object.prompt == Chat(chat, [{"name": "f"}], variables={"enable_thinking": True})


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"add_generation_prompt": False}, {"add_generation_prompt": False}),
        ({"continue_final_message": True}, {"add_generation_prompt": False, "continue_final_message": True}),
        ({"continue_final_message": False}, {}),
        ({"chat_template_kwargs": {"enable_thinking": True}}, {"variables": {"enable_thinking": True}}),
        (
            {"chat_template_kwargs": {"a": [1]}, "enable_thinking": False},
            {"variables": {"a": [1], "enable_thinking": 0}},
        ),
        ({"chat_template_kwargs": {}}, {}),
    ],
)
def test_how_messages_are_rendered(keys: dict[str, Any], expected: dict[str, Any]) -> None:
    text = json.dumps({"messages": [], **keys})
    assert parse_request(arrays({"messages": text.encode()}), "", DEFAULTS).prompt == Chat([], **expected)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not valid JSON"),
        ("[" * 100_000, "is not valid JSON"),
        ("3", "must be a JSON list of messages"),
        ("{}", "must be a JSON list of messages"),
        ('{"messages": [], "tool": []}', "unknown key 'tool'; known are messages, tools, enable_thinking, add_gen"),
        ('{"messages": {}}', 'the values of "messages" and "tools" must be lists'),
        ('{"messages": [], "enable_thinking": 1}', '"enable_thinking" must be true or false, got 1'),
        (
            '{"messages": [], "add_generation_prompt": "no"}',
            "\"add_generation_prompt\" must be true or false, got 'no'",
        ),
        ('{"messages": [], "continue_final_message": 1}', '"continue_final_message" must be true or false, got 1'),
        (
            '{"messages": [], "continue_final_message": true, "add_generation_prompt": true}',
            '"continue_final_message" and "add_generation_prompt" exclude each other',
        ),
        ('{"messages": [], "chat_template_kwargs": []}', '"chat_template_kwargs" must be an object, got list'),
        ('{"messages": [], "chat_template_kwargs": {"tools": []}}', '"tools" in chat_template_kwargs has a place of'),
        (
            '{"messages": [], "enable_thinking": true, "chat_template_kwargs": {"enable_thinking": true}}',
            '"enable_thinking" in chat_template_kwargs has a place of its own; give it once',
        ),
        (
            '{"messages": [], "chat_template_kwargs": {"enable_thinking": "yes"}}',
            "\"enable_thinking\" must be true or false, got 'yes'",
        ),
    ],
)
def test_bad_messages_are_refused(text: str, message: str) -> None:
    with pytest.raises(InvalidRequest, match=f"messages: {message}"):
        parse_request(arrays({"messages": text.encode()}), "", DEFAULTS)


# ---------------------------------------------------------------- JSON parameters


# ---------------------------------------------------------------- drafts


def test_what_is_known_of_the_output_comes_through() -> None:
    assert parse(draft_text="é".encode()).draft == "é"
    assert parse(template=b'["a", 3]').template == ("a", 3)
    assert parse(suffix=b"\n}").suffix == "\n}"
    nothing = parse()
    assert (nothing.draft, nothing.template, nothing.suffix) == (None, (), None)
    for shape in ((2,), (1, 2)):
        found = parse(draft_ids=np.array([5, 6], np.int32).reshape(shape)).draft
        assert isinstance(found, np.ndarray)
        assert found.tolist() == [5, 6]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"draft_text": b"a", "draft_ids": [1]}, "draft_ids: cannot be together with draft_text; give at most one of"),
        ({"draft_text": b"a", "template": b"[1]"}, "template: cannot be together with draft_text"),
        ({"suffix": b"a", "template": b"[1]"}, "suffix: cannot be together with template"),
        ({"suffix": b"a", "draft_ids": [1]}, "suffix: cannot be together with draft_ids"),
        ({"template": b"nonsense"}, "template: is not valid JSON"),
        ({"template": b'["a"]'}, "template: has no hole"),
        ({"sampling_parameters": b'{"suffix": "a"}'}, "suffix: is not a known parameter"),
    ],
)
def test_drafts_that_contradict_each_other_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest, match=f"^{message}"):
        parse(**given)


@pytest.mark.parametrize("source", ["sampling_parameters", "request parameters"])
class TestJsonParameters:
    """Of the `sampling_parameters` tensor, and of Triton's own request parameters."""

    @staticmethod
    def parse(source: str, text: str, **tensors: Any) -> ParsedRequest:
        if source == "request parameters":
            return parse(text, **tensors)
        return parse(sampling_parameters=text.encode(), **tensors)

    def test_they_are_parameters(self, source: str) -> None:
        parsed = self.parse(source, '{"max_tokens": 5, "stop": ["x"], "temperature": 0.5}')
        assert (parsed.parameters.max_tokens, parsed.parameters.stop) == (5, ("x",))
        assert parsed.parameters.t_min == parsed.parameters.t_max == 0.5

    def test_numbers_may_be_strings(self, source: str) -> None:
        parsed = self.parse(source, '{"max_tokens": "5", "temperature": "0", "stream": "true", "top_p": "1.0"}')
        assert self.parse(source, '{"priority": "-5"}').parameters.priority == -5
        assert (parsed.parameters.max_tokens, parsed.parameters.greedy, parsed.parameters.stream) == (5, True, True)

    def test_texts_stay_texts(self, source: str) -> None:
        assert self.parse(source, '{"stop": "5"}').parameters.stop == ("5",)
        assert self.parse(source, '{"cache_salt": "5"}').parameters.cache_salt == "5"
        assert self.parse(source, '{"cache_salt": "true"}').parameters.cache_salt == "true"

    def test_unknown_names_are_refused(self, source: str) -> None:
        with pytest.raises(InvalidRequest, match="temprature: is not a known parameter; known are"):
            self.parse(source, '{"temprature": 1}')

    def test_a_prompt_is_no_parameter(self, source: str) -> None:
        with pytest.raises(InvalidRequest, match="text_input: is not a known parameter"):
            self.parse(source, '{"text_input": "a"}')

    def test_what_is_not_supported_is_refused(self, source: str) -> None:
        with pytest.raises(InvalidRequest, match="top_k: is not supported, got 5"):
            self.parse(source, '{"top_k": "5"}')

    def test_a_parameter_is_given_once(self, source: str) -> None:
        with pytest.raises(InvalidRequest, match=f"max_tokens: is given twice, the second time in {source}"):
            self.parse(source, '{"max_tokens": 5}', max_tokens=5)

    @pytest.mark.parametrize("text", ["nonsense", "[1]", "3", "{'a': 1}"])
    def test_it_is_a_json_object(self, source: str, text: str) -> None:
        with pytest.raises(InvalidRequest, match=f"{source}: (is not valid JSON|must be a JSON object)"):
            self.parse(source, text)

    @pytest.mark.parametrize("text", ['{"temperature": NaN}', '{"temperature": -1}', '{"seed": 1e999}'])
    def test_values_are_checked(self, source: str, text: str) -> None:
        with pytest.raises(InvalidRequest, match=r"(temperature|seed): must be"):
            self.parse(source, text)

    def test_special_tokens_are_kept_on_request(self, source: str) -> None:
        assert self.parse(source, "{}").parameters.skip_special_tokens
        assert not self.parse(source, '{"skip_special_tokens": false}').parameters.skip_special_tokens
        assert not self.parse(source, '{"skip_special_tokens": "False"}').parameters.skip_special_tokens
        assert not parse(skip_special_tokens=False).parameters.skip_special_tokens
        with pytest.raises(InvalidRequest, match="skip_special_tokens: must be true or false, got 0"):
            self.parse(source, '{"skip_special_tokens": 0}')
        with pytest.raises(InvalidRequest, match="skip_special_tokens: is given twice"):
            self.parse(source, '{"skip_special_tokens": true}', skip_special_tokens=True)

    def test_output_options_too(self, source: str) -> None:
        assert not self.parse(source, '{"return_finish_reason": "false"}').options.return_finish_reason
        with pytest.raises(InvalidRequest, match="return_finish_reason: must be true or false, got 3"):
            self.parse(source, '{"return_finish_reason": 3}')


def test_a_request_s_timeout_is_its_deadline_where_it_names_none() -> None:
    def deadline_ms(timeout_us: int, **values: Any) -> int | None:
        tensors = arrays({"text_input": b"hi"} | values)
        return parse_request(tensors, "", DEFAULTS, timeout_us).parameters.deadline_ms

    assert [deadline_ms(timeout_us) for timeout_us in (0, 1, 1000, 1001, 250_000)] == [None, 1, 1, 2, 250]
    assert deadline_ms(2**64 - 1) == 2**31 - 1
    assert deadline_ms(5_000, deadline_ms=70) == 70
    assert deadline_ms(5_000, sampling_parameters=b'{"deadline_ms": 70}') == 70


def test_what_triton_sets_for_itself_is_let_through() -> None:
    assert parse('{"triton_enable_empty_final_response": true}') == parse()
    assert parse(sampling_parameters=b"") == parse()


# ---------------------------------------------------------------- outputs

_FIGURES: dict[str, Any] = {figure.name: number for number, figure in enumerate(fields(RequestStatistics))}
STATISTICS = RequestStatistics(**_FIGURES | {"drafts": (DraftStatistics("lookup", 1, 9, 8, 0.5),)})
FINISHED = Finished("stop", "abc", np.array([1, 2, 3], np.int32), STATISTICS, stop_reason="zzz")


def test_every_output_has_the_type_and_shape_of_the_table() -> None:
    events = {
        **finished_outputs(FINISHED, OutputOptions(), "abc", [1, 2, 3]),
        **commit_outputs(Commit("é", np.array([4], np.int32), 1, 6), "before ", [8, 9]),
        **preview_outputs(Preview("x", 1, 2, np.array([4], np.int32))),
        **prefill_outputs(Prefill(512, 4096)),
    }
    assert {spec.name for spec in OUTPUTS} == set(events)
    for spec in OUTPUTS:
        assert events[spec.name].dtype == NUMPY_TYPES[spec.datatype]
        assert events[spec.name].ndim == 1
        assert spec.many or events[spec.name].shape == (1,)
    assert events["text_output"][0] == "before é".encode()
    assert events["output_ids"].tolist() == [8, 9, 4]
    told = json.loads(json.dumps({**asdict(STATISTICS), "stop_reason": "zzz"}))
    assert json.loads(events["statistics"][0]) == told
    assert told["drafts"][0]["accepted_tokens"] == 8
    assert (events["prefilled_tokens"].tolist(), events["num_input_tokens"].tolist()) == ([512], [4096])


def test_output_options_leave_outputs_out() -> None:
    options = OutputOptions(True, False, False, False)
    found = finished_outputs(FINISHED, options, "", [])
    assert set(found) == {"text_output", "output_ids", "sequence_index", "denoising_steps", "statistics"}


def test_any_prompt_can_be_echoed() -> None:
    for prompt in ({"text_input": b"a"}, {"input_ids": 5}, {"messages": b"[]"}):
        tensors = arrays({**prompt, "exclude_input_in_output": False})
        assert not parse_request(tensors, "", DEFAULTS).options.exclude_input_in_output
