"""The model's tensors at Triton's edge: names and types as data, a request's arrays to a generation, events to arrays.

Knows the request's parameters by name only (`parameters.py` decides on values), no Triton module and no thread.

Sources of names and shapes: the TensorRT-LLM ensemble, Triton's vLLM backend; `messages`, the diffusion group,
`stream_previews` and the outputs from `denoising_steps` on are this project's own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from dgemma_runtime.drafting.template import Template, parse_template
from dgemma_runtime.errors import InvalidRequest
from dgemma_runtime.events import Commit, Finished, Prefill, Preview
from dgemma_runtime.parameters import RANGES, UNSUPPORTED, GenerationParameters, parse_parameters

Array = npt.NDArray[Any]
Arrays = Mapping[str, Array]  # tensor name -> array

NUMPY_TYPES: Mapping[str, type[np.generic]] = {
    "BYTES": np.object_,
    "BOOL": np.bool_,
    "INT32": np.int32,
    "UINT64": np.uint64,
    "FP32": np.float32,
}


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of the model; of one element, shape [1], unless `many`: then [n]."""

    name: str
    datatype: str  # of KServe v2
    group: str
    many: bool = False


INPUTS: tuple[TensorSpec, ...] = (
    TensorSpec("text_input", "BYTES", "prompt"),
    TensorSpec("input_ids", "INT32", "prompt", many=True),
    TensorSpec("messages", "BYTES", "prompt"),  # JSON: a chat, or {"messages": [...], "tools": [...], ...}
    TensorSpec("max_tokens", "INT32", "length"),
    TensorSpec("min_tokens", "INT32", "length"),
    TensorSpec("end_id", "INT32", "length"),
    TensorSpec("stop_words", "BYTES", "length", many=True),
    TensorSpec("bad_words", "BYTES", "length", many=True),
    TensorSpec("temperature", "FP32", "sampling"),
    TensorSpec("top_k", "INT32", "sampling"),
    TensorSpec("top_p", "FP32", "sampling"),
    TensorSpec("seed", "UINT64", "sampling"),
    TensorSpec("repetition_penalty", "FP32", "sampling"),
    TensorSpec("presence_penalty", "FP32", "sampling"),
    TensorSpec("frequency_penalty", "FP32", "sampling"),
    TensorSpec("max_denoising_steps", "INT32", "diffusion"),
    TensorSpec("entropy_bound", "FP32", "diffusion"),
    TensorSpec("t_min", "FP32", "diffusion"),
    TensorSpec("t_max", "FP32", "diffusion"),
    TensorSpec("stability_threshold", "INT32", "diffusion"),
    TensorSpec("confidence_threshold", "FP32", "diffusion"),
    TensorSpec("drafter", "BYTES", "diffusion"),
    TensorSpec("draft_confidence", "FP32", "diffusion"),
    TensorSpec("draft_verification", "BYTES", "diffusion"),
    TensorSpec("draft_text", "BYTES", "draft"),  # of the whole output
    TensorSpec("draft_ids", "INT32", "draft", many=True),
    TensorSpec("template", "BYTES", "draft"),  # JSON list: literal texts, and holes as numbers of tokens
    TensorSpec("suffix", "BYTES", "draft"),  # what comes behind the output
    TensorSpec("priority", "INT32", "scheduling"),
    TensorSpec("deadline_ms", "INT32", "scheduling"),
    TensorSpec("cache_salt", "BYTES", "scheduling"),
    TensorSpec("stream", "BOOL", "output"),
    TensorSpec("stream_previews", "BOOL", "output"),
    TensorSpec("skip_special_tokens", "BOOL", "output"),
    TensorSpec("exclude_input_in_output", "BOOL", "output"),
    TensorSpec("return_log_probs", "BOOL", "output"),
    TensorSpec("return_num_input_tokens", "BOOL", "output"),
    TensorSpec("return_num_output_tokens", "BOOL", "output"),
    TensorSpec("return_finish_reason", "BOOL", "output"),
    TensorSpec("guided_decoding_guide_type", "BYTES", "structure"),
    TensorSpec("guided_decoding_guide", "BYTES", "structure"),
    TensorSpec("sampling_parameters", "BYTES", "vllm"),  # JSON object of any of the parameters above
)
OUTPUTS: tuple[TensorSpec, ...] = (
    TensorSpec("text_output", "BYTES", "text"),
    TensorSpec("output_ids", "INT32", "text", many=True),
    TensorSpec("sequence_index", "INT32", "text"),
    TensorSpec("finish_reason", "BYTES", "end"),
    TensorSpec("num_input_tokens", "INT32", "end"),
    TensorSpec("num_output_tokens", "INT32", "end"),
    TensorSpec("denoising_steps", "INT32", "end"),
    TensorSpec("statistics", "BYTES", "end"),  # JSON object, the fields of RequestStatistics and `stop_reason`
    TensorSpec("prefilled_tokens", "INT32", "prefill"),  # of num_input_tokens
    TensorSpec("preview_output", "BYTES", "canvas"),
    TensorSpec("canvas_index", "INT32", "canvas"),
    TensorSpec("canvas_steps", "INT32", "canvas"),  # denoising steps that this canvas has taken
)
_INPUT_SPECS = {spec.name: spec for spec in INPUTS}
_OUTPUT_SPECS = {spec.name: spec for spec in OUTPUTS}
_PROMPTS = tuple(spec.name for spec in INPUTS if spec.group == "prompt")
_DRAFTS = tuple(spec.name for spec in INPUTS if spec.group == "draft")
_THINKING = "enable_thinking"  # may also be among the chat_template_kwargs, where vLLM's clients have it
_CHAT_KEYS = (
    *("messages", "tools", _THINKING, "add_generation_prompt", "continue_final_message", "chat_template_kwargs"),
)
_TEXT_PARAMETERS = {"stop"} | {spec.name for spec in INPUTS if spec.datatype == "BYTES"}
_RESERVED_PREFIX = "triton_"  # request parameters that Triton's front ends set for themselves
_NOT_FOR_THE_MODEL = {"id", "traceparent", "tracestate"}  # the request's id (of `/generate`), and headers forwarded


@dataclass(frozen=True)
class OutputOptions:
    """Which outputs the client wants; the names are those of the inputs."""

    exclude_input_in_output: bool = True
    return_finish_reason: bool = True
    return_num_input_tokens: bool = True
    return_num_output_tokens: bool = True


@dataclass(frozen=True)
class Chat:
    """The `messages` input: what the checkpoint's template is rendered with."""

    messages: list[Any]
    tools: list[Any] | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    variables: Mapping[str, Any] = field(default_factory=dict)  # of the template, `enable_thinking` among them


@dataclass(frozen=True)
class ParsedRequest:
    """A request as the runtime understands it; `prompt` is text, token ids [n] int32, or a chat."""

    prompt: str | npt.NDArray[np.int32] | Chat
    parameters: GenerationParameters
    options: OutputOptions
    draft: str | npt.NDArray[np.int32] | None = None  # text, or token ids [n] int32
    template: Template = ()  # (): none
    suffix: str | None = None


def parse_request(
    tensors: Arrays, request_parameters: str, defaults: GenerationParameters, timeout_us: int = 0
) -> ParsedRequest:
    """From the tensors of a request and Triton's own `parameters` of it (a JSON object, or "").

    A parameter may be a tensor, a key of the `sampling_parameters` tensor, or one of Triton's request parameters (what
    `/generate` makes of keys that are not tensors), but not two of them. `timeout_us` is the timeout that KServe's
    requests may have (0: none), the deadline where `deadline_ms` is not given. Raises InvalidRequest naming the input.
    """
    given: dict[str, Any] = {}
    for name, array in tensors.items():
        if name not in _INPUT_SPECS:
            raise InvalidRequest(name, f"is not an input of this model; known are {', '.join(_INPUT_SPECS)}")
        given[name] = _value(_INPUT_SPECS[name], array)
    prompt = _prompt({name: given.pop(name) for name in _PROMPTS if name in given})
    drafts = _drafts({name: given.pop(name) for name in _DRAFTS if name in given})
    if (text := given.pop("sampling_parameters", "")) != "":
        _merge(given, "sampling_parameters", text)
    if request_parameters:
        _merge(given, "request parameters", request_parameters)
    options = _options(given)
    if timeout_us:
        deadline_ms = min(-(-timeout_us // 1000), int(RANGES["deadline_ms"].high))
        defaults = replace(defaults, deadline_ms=deadline_ms)
    return ParsedRequest(prompt, parse_parameters(given, defaults), options, **drafts)


# ---------------------------------------------------------------- single tensors


def _value(spec: TensorSpec, array: Array) -> Any:
    """The tensor as text, number, boolean, list of texts, or ids [n] int32."""
    expected = NUMPY_TYPES[spec.datatype]
    if array.dtype != expected:
        raise InvalidRequest(spec.name, f"must be {spec.datatype}, got numpy {array.dtype}")
    if array.ndim not in (1, 2) or (array.ndim == 2 and array.shape[0] != 1) or (not spec.many and array.size != 1):
        wanted = "[n] or [1, n]" if spec.many else "[1] or [1, 1]"
        raise InvalidRequest(spec.name, f"must have the shape {wanted}, got {list(array.shape)}")
    flat = array.reshape(-1)
    if spec.datatype == "BYTES":
        texts = [_text(spec.name, item) for item in flat]
        return texts if spec.many else texts[0]
    if spec.many:
        return flat
    # The shortest decimal of an FP32 value is what the client wrote: 0.1 here, 0.1 in JSON, the same tokens from both.
    return float(str(flat[0])) if spec.datatype == "FP32" else flat[0].item()


def _text(name: str, item: object) -> str:
    if isinstance(item, str):
        return item
    if not isinstance(item, bytes):
        raise InvalidRequest(name, f"must be BYTES, got {type(item).__name__}")
    try:
        return item.decode()
    except UnicodeDecodeError as error:
        message = f"is not valid UTF-8 (byte 0x{item[error.start]:02x} at position {error.start} of {len(item)})"
        raise InvalidRequest(name, message) from None


def _prompt(given: Mapping[str, Any]) -> str | npt.NDArray[np.int32] | Chat:
    if len(given) != 1:
        found = " and ".join(given) if given else "none of them"
        message = f"give exactly one of {', '.join(_PROMPTS)}; got {found}"
        raise InvalidRequest(next(iter(given), "text_input"), message)
    ((name, value),) = given.items()
    if name == "messages":
        return _chat(value)
    prompt: str | npt.NDArray[np.int32] = value
    return prompt


def _drafts(given: Mapping[str, Any]) -> dict[str, Any]:
    """Of the ParsedRequest. A draft is of the whole output, so it says nothing of holes, whose place it cannot know."""
    if len(given) > 1:
        first, second, *_ = given
        raise InvalidRequest(second, f"cannot be together with {first}; give at most one of {', '.join(_DRAFTS)}")
    fields = {"draft_text": "draft", "draft_ids": "draft"}
    return {
        fields.get(name, name): parse_template(value) if name == "template" else value for name, value in given.items()
    }


def _chat(text: str) -> Chat:
    value = _json("messages", text)
    if isinstance(value, list):
        return Chat(value)
    if not isinstance(value, dict) or "messages" not in value:
        raise InvalidRequest("messages", 'must be a JSON list of messages, or an object with the key "messages"')
    if unknown := set(value) - set(_CHAT_KEYS):
        raise InvalidRequest("messages", f"unknown key {min(unknown)!r}; known are {', '.join(_CHAT_KEYS)}")
    messages, tools = value["messages"], value.get("tools")
    if not isinstance(messages, list) or not isinstance(tools, list | None):
        raise InvalidRequest("messages", 'the values of "messages" and "tools" must be lists')
    open_end = _flag(value, "continue_final_message", default=False)
    prompt = _flag(value, "add_generation_prompt", default=not open_end)
    if open_end and prompt:
        message = '"continue_final_message" and "add_generation_prompt" exclude each other; set one of them only'
        raise InvalidRequest("messages", message)
    return Chat(messages, tools, prompt, open_end, _template_variables(value))


def _template_variables(value: Mapping[str, Any]) -> dict[str, Any]:
    variables = value.get("chat_template_kwargs", {})
    if not isinstance(variables, dict):
        raise InvalidRequest("messages", f'"chat_template_kwargs" must be an object, got {type(variables).__name__}')
    for name in _CHAT_KEYS:
        if name in variables and (name != _THINKING or name in value):
            message = f'"{name}" in chat_template_kwargs has a place of its own; give it once, beside "messages"'
            raise InvalidRequest("messages", message)
    given = {_THINKING: value[_THINKING]} if _THINKING in value else {}
    variables = {**variables, **given}
    if _THINKING in variables:
        _flag(variables, _THINKING, default=False)
    return variables


def _flag(values: Mapping[str, Any], name: str, default: bool) -> bool:
    value = values.get(name, default)
    if not isinstance(value, bool):
        raise InvalidRequest("messages", f'"{name}" must be true or false, got {value!r}')
    return value


def _merge(given: dict[str, Any], source: str, text: str) -> None:
    """Add the entries of a JSON object; numbers and booleans may be written as strings, as vLLM's clients do."""
    values = _json(source, text)
    if not isinstance(values, dict):
        raise InvalidRequest(source, f"must be a JSON object, got {type(values).__name__}")
    for name, value in values.items():
        if name.startswith(_RESERVED_PREFIX) or name in _NOT_FOR_THE_MODEL:
            continue
        if name in given:
            raise InvalidRequest(name, f"is given twice, the second time in {source}; give it once")
        given[name] = _unquoted(name, value)


def _unquoted(name: str, value: Any) -> Any:
    known = name in RANGES or name in UNSUPPORTED or name in _INPUT_SPECS
    if not isinstance(value, str) or not known or name in _TEXT_PARAMETERS:
        return value
    if value.lower() in ("true", "false"):
        return value.lower() == "true"
    for kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            continue
    return value


def _json(name: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(name, f"is not valid JSON ({error})") from None


def _options(given: dict[str, Any]) -> OutputOptions:
    """Takes the output options out of `given`."""
    values = {}
    for name in OutputOptions.__dataclass_fields__:
        if name in given:
            value = given.pop(name)
            if not isinstance(value, bool):
                raise InvalidRequest(name, f"must be true or false, got {value!r}")
            values[name] = value
    return OutputOptions(**values)


# ---------------------------------------------------------------- outputs


def prefill_outputs(event: Prefill) -> dict[str, Array]:
    """While a long prompt is encoded."""
    return _arrays({"prefilled_tokens": event.cached_tokens, "num_input_tokens": event.num_input_tokens})


def preview_outputs(event: Preview) -> dict[str, Array]:
    return _arrays({"preview_output": event.text, "canvas_index": event.canvas_index, "canvas_steps": event.step})


def commit_outputs(event: Commit, text_before: str = "", ids_before: npt.ArrayLike = ()) -> dict[str, Array]:
    """Of one canvas; `text_before` and `ids_before` [n] are the prompt, where the client wants it in the output."""
    return _arrays(
        {
            "text_output": text_before + event.text,
            "output_ids": np.concatenate([np.asarray(ids_before, np.int32), event.token_ids]),
            "sequence_index": 0,
            "canvas_index": event.canvas_index,
            "canvas_steps": event.steps,
        }
    )


def finished_outputs(event: Finished, options: OutputOptions, text: str, ids: npt.ArrayLike) -> dict[str, Array]:
    """Of the last response: `text` and `ids` [n] are what has not been sent yet."""
    statistics = event.statistics
    values: dict[str, Any] = {
        "text_output": text,
        "output_ids": ids,
        "sequence_index": 0,
        "denoising_steps": statistics.denoising_steps,
        "statistics": json.dumps({**asdict(statistics), "stop_reason": event.stop_reason}),
    }
    if options.return_finish_reason:
        values["finish_reason"] = event.reason
    if options.return_num_input_tokens:
        values["num_input_tokens"] = statistics.num_input_tokens
    if options.return_num_output_tokens:
        values["num_output_tokens"] = statistics.num_output_tokens
    return _arrays(values)


def _arrays(values: Mapping[str, Any]) -> dict[str, Array]:
    """As arrays [1], or [n] where the output is `many`."""
    arrays: dict[str, Array] = {}
    for name, value in values.items():
        spec = _OUTPUT_SPECS[name]
        content = value.encode() if spec.datatype == "BYTES" else value
        arrays[name] = np.array(content if spec.many else [content], NUMPY_TYPES[spec.datatype])
    return arrays
