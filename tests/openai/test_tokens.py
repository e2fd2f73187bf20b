"""/tokenize and /detokenize: what the server is asked, and what is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tests.openai.conftest import front, in_turns

from dgemma_client.errors import InvalidRequest
from dgemma_client.mock import delta, final

pytestmark = pytest.mark.asyncio
THREE = [delta("<bos>Once", (2, 7, 8)), final(output_tokens=0, steps=0)]


async def test_a_text_is_only_tokenized() -> None:
    async with front(in_turns(THREE)) as api:
        answer = await api.post("/tokenize", {"prompt": "Once"})
        asked = api.asked()
    assert answer.json() == {"tokens": [2, 7, 8], "count": 3, "max_model_len": 4096}
    assert (asked["text_input"], asked["max_tokens"], asked["exclude_input_in_output"]) == ("Once", 0, False)


async def test_a_chat_goes_through_the_template() -> None:
    body = {
        "messages": [{"role": "user", "content": "hi"}],
        "add_generation_prompt": False,
        "chat_template_kwargs": {"enable_thinking": True, "x": 1},
        "tools": [{"type": "function", "function": {"name": "f", "description": "d"}}],
    }
    async with front(in_turns(THREE)) as api:
        assert (await api.post("/tokenize", body)).json()["count"] == 3
        chat = json.loads(api.asked()["messages"])
    assert chat["enable_thinking"] is True
    assert chat["chat_template_kwargs"] == {"x": 1}
    assert chat["add_generation_prompt"] is False
    assert chat["tools"][0]["function"]["name"] == "f"


async def test_ids_are_only_written_out() -> None:
    async with front(in_turns(THREE)) as api:
        answer = await api.post("/detokenize", {"tokens": [2, 7, 8]})
        assert api.asked()["input_ids"] == (2, 7, 8)
        assert api.asked()["skip_special_tokens"] is False
    assert answer.json() == {"prompt": "<bos>Once"}


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("/tokenize", {}, 400, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": [{"role": "user", "content": "a"}]}, 400, "prompt"),
        ("/tokenize", {"prompt": "a", "tools": []}, 400, "tools"),
        ("/tokenize", {"prompt": "a", "add_generation_prompt": True}, 400, "add_generation_prompt"),
        ("/tokenize", {"prompt": "a", "add_special_tokens": False}, 400, "add_special_tokens"),
        ("/tokenize", {"prompt": "a", "return_token_strs": True}, 400, "return_token_strs"),
        ("/tokenize", {"prompt": "a", "model": "other"}, 404, "model"),
        ("/tokenize", {"prompt": "a", "foo": 1}, 400, "foo"),
        ("/detokenize", {"tokens": []}, 400, "tokens"),
        ("/detokenize", {"tokens": [2**31]}, 400, "tokens[0]"),
        ("/detokenize", {"tokens": [1, "a"]}, 400, "tokens[1]"),
        ("/detokenize", {}, 400, "tokens"),
    ],
    ids=str,
)
async def test_what_cannot_be_honoured_is_refused(path: str, body: dict[str, Any], status: int, param: str) -> None:
    async with front() as api:
        found = await api.refusal(path, body)
        assert api.triton.requests == []
    assert found[:2] == (status, param)


async def test_the_server_s_refusal_has_the_field_s_own_name() -> None:
    async with front(in_turns([InvalidRequest("input_ids: 9 is not a token of this model")])) as api:
        found = await api.refusal("/detokenize", {"tokens": [9]})
    assert found == (400, "tokens", None, "tokens: 9 is not a token of this model")
