"""How a prompt may open the answer, and what of the answer is then thinking or a call."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tests.openai.conftest import front

from dgemma_client.mock import Handler, Item, delta, final
from dgemma_client.requests import InferRequest

pytestmark = pytest.mark.asyncio
USER = {"role": "user", "content": "How warm is it?"}
CALL = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
CALLED = [USER, {"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "tool_call_id": "call_1", "content": "9"}]
TOOLS = [{"type": "function", "function": {"name": "weather"}}]
OPEN_THOUGHT = "<|turn>model\n<|tool_response>9<tool_response|><|channel>thought\n"


def _rendered(prompt: str, answer: str) -> Handler:
    """Answers with the rendered prompt where nothing is to be generated."""

    def handler(request: InferRequest) -> Iterator[Item]:
        yield delta(prompt if request.inputs.get("max_tokens") == (0,) else answer)
        yield final()

    return handler


async def test_a_thought_that_the_template_leaves_open_behind_a_result_is_reasoning() -> None:
    handler = _rendered(OPEN_THOUGHT, "cold then<channel|>Cold.")
    async with front(handler) as api:
        answer = (await api.chat(messages=CALLED, tools=TOOLS, reasoning_effort="high")).json()
    message = answer["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == ("cold then", "Cold.")


async def test_without_thinking_the_prompt_is_not_looked_at() -> None:
    async with front(_rendered(OPEN_THOUGHT, "Cold.")) as api:
        answer = (await api.chat(messages=CALLED, tools=TOOLS)).json()
        assert len(api.triton.requests) == 1
    assert answer["choices"][0]["message"]["content"] == "Cold."


async def test_a_thought_that_is_to_be_gone_on_with_is_reasoning() -> None:
    prompt = "<|turn>model\n<|channel>thought\nIt may"
    messages = [USER, {"role": "assistant", "content": "It may"}]
    async with front(_rendered(prompt, " be cold<channel|>Cold.")) as api:
        answer = (await api.chat(messages=messages, continue_final_message=True)).json()
    message = answer["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == (" be cold", "Cold.")


async def test_a_demanded_call_is_begun_by_the_prompt() -> None:
    async with front(_rendered("<|turn>model\n", "days:3}<tool_call|>")) as api:
        answer = (await api.chat(messages=[USER], tools=TOOLS, tool_choice="required")).json()
        assert api.triton.requests[1].inputs["text_input"] == ("<|turn>model\n<|tool_call>call:weather{",)
    (call,) = answer["choices"][0]["message"]["tool_calls"]
    assert (call["function"]["name"], call["function"]["arguments"]) == ("weather", '{"days": 3}')
    assert answer["choices"][0]["finish_reason"] == "tool_calls"


async def test_an_answer_that_ignores_the_end_is_plain_text_to_its_last_token() -> None:
    async with front(_rendered("", "one<turn|>two")) as api:
        answer = (await api.chat(messages=[USER], ignore_eos=True, max_tokens=9)).json()
        assert api.triton.requests[0].inputs["skip_special_tokens"] == (True,)
    assert answer["choices"][0]["message"]["content"] == "one<turn|>two"
