"""From a call's arguments to the tensors of one request. Knows no connection; the server judges the values."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

from dgemma_client.errors import InvalidRequest
from dgemma_client.tensors import INPUTS, LISTS, Values

Message = Mapping[str, object]  # {"role": "user", "content": "..."} and whatever else the chat template reads


class Parameters(TypedDict, total=False):
    """Keyword arguments of a generation; each is the Triton tensor of the same name, defaults are the server's."""

    max_tokens: int
    min_tokens: int
    end_id: int
    stop_words: str | Sequence[str]
    bad_words: str | Sequence[str]
    temperature: float
    top_k: int
    top_p: float
    seed: int
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    max_denoising_steps: int
    entropy_bound: float
    t_min: float
    t_max: float
    stability_threshold: int
    confidence_threshold: float
    drafter: str
    draft_confidence: float
    draft_verification: str
    draft_text: str
    draft_ids: Sequence[int]
    template: Sequence[str | int]  # literal texts, and holes as numbers of tokens
    suffix: str
    priority: int
    deadline_ms: int
    cache_salt: str
    skip_special_tokens: bool
    exclude_input_in_output: bool
    guided_decoding_guide_type: str
    guided_decoding_guide: str
    sampling_parameters: Mapping[str, Any]


class ChatOptions(TypedDict, total=False):
    """What else the server does with `messages`, beside the arguments of their own."""

    add_generation_prompt: bool  # a turn of the model is opened behind the last message; the default
    continue_final_message: bool  # the last message is left open instead
    chat_template_kwargs: Mapping[str, Any]  # further variables of the checkpoint's template


@dataclass(frozen=True)
class InferRequest:
    """One request as a transport sends it."""

    model: str
    request_id: str
    inputs: Mapping[str, Values]  # tensor name -> elements


@dataclass(frozen=True)
class Prompt:
    """What to continue: exactly one of raw text, token ids, or a chat for the checkpoint's template."""

    text: str | None = None
    input_ids: Sequence[int] | None = None
    messages: Sequence[Message] | None = None
    tools: Sequence[Mapping[str, object]] | None = None
    enable_thinking: bool = False
    chat: ChatOptions | None = None

    def tensors(self) -> dict[str, Values]:
        given = {
            "text_input": None if self.text is None else (self.text,),
            "input_ids": None if self.input_ids is None else tuple(self.input_ids),
            "messages": None if self.messages is None else (_json("messages", self._chat(self.messages)),),
        }
        tensors: dict[str, Values] = {name: values for name, values in given.items() if values is not None}
        if len(tensors) != 1:
            found = " and ".join(tensors) or "none of them"
            raise InvalidRequest(f"prompt: got {found}; give exactly one of prompt, input_ids and messages")
        for name in ("tools", "enable_thinking", "chat"):
            if getattr(self, name) and self.messages is None:
                raise InvalidRequest(f"{name}: only the chat template knows it; give the prompt as messages")
        return tensors

    def _chat(self, messages: Sequence[Message]) -> dict[str, Any]:
        options = self.chat or {}
        if unknown := set(options) - set(ChatOptions.__annotations__):
            known = ", ".join(ChatOptions.__annotations__)
            raise InvalidRequest(f"chat: {min(unknown)!r} is not an option of a chat; known are {known}")
        chat: dict[str, Any] = {"messages": list(messages), **options}
        if self.tools is not None:
            chat["tools"] = list(self.tools)
        if self.enable_thinking:
            chat["enable_thinking"] = True
        return chat


def build(model: str, request_id: str, prompt: Prompt, parameters: Parameters, previews: bool) -> InferRequest:
    """The request; raises InvalidRequest for an unknown parameter or for not exactly one prompt."""
    inputs = prompt.tensors()
    for name, value in parameters.items():
        if name not in Parameters.__annotations__:
            close = difflib.get_close_matches(name, Parameters.__annotations__, n=1)
            hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(Parameters.__annotations__)}"
            raise InvalidRequest(f"{name}: not a parameter; {hint}")
        inputs[name] = _elements(name, value)
    inputs["stream"] = (True,)
    inputs["stream_previews"] = (previews,)
    for name in ("return_finish_reason", "return_num_input_tokens", "return_num_output_tokens"):
        inputs[name] = (True,)
    assert inputs.keys() <= INPUTS.keys()
    return InferRequest(model, request_id, inputs)


def _elements(name: str, value: Any) -> Values:
    if name in ("sampling_parameters", "template"):
        return (_json(name, value),)
    if name in LISTS and not isinstance(value, str):
        return tuple(value)
    return (value,)


def _json(name: str, value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidRequest(f"{name}: not JSON ({error}); give plain lists, dicts, text and finite numbers") from None
