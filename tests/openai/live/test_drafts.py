"""What a client knows of the answer, told by openai-python and by editors, answered by the demo model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from openai import OpenAI

if TYPE_CHECKING:
    from tests.openai.live.conftest import Service

RECORD = "Convert to JSON:\nname: Ada\ncity: Lima"
ANSWER = '{"name": "Ada", "city": "Lima"}'
PROMPT = f"<bos><|turn>user\n{RECORD}<turn|>\n<|turn>model\n"
CHAT: Any = [{"role": "user", "content": RECORD}]


@pytest.fixture
def client(demo: Service) -> Iterator[OpenAI]:
    with OpenAI(base_url=demo.v1, api_key="none", max_retries=0, timeout=60) as client:
        yield client


@pytest.mark.parametrize("stream", [False, True])
def test_a_predicted_output_is_counted(client: OpenAI, demo: Service, stream: bool) -> None:
    plain = client.chat.completions.create(model=demo.model, messages=CHAT, seed=1)
    prediction: Any = {"type": "content", "content": ANSWER}
    if stream:
        options: Any = {"stream": True, "stream_options": {"include_usage": True}}
        chunks = list(client.chat.completions.create(model=demo.model, messages=CHAT, prediction=prediction, **options))
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        usage = chunks[-1].usage
    else:
        answer = client.chat.completions.create(model=demo.model, messages=CHAT, prediction=prediction)
        text, usage = answer.choices[0].message.content or "", answer.usage
    assert text == plain.choices[0].message.content == ANSWER
    assert usage is not None
    details = usage.completion_tokens_details
    assert details is not None
    assert details.accepted_prediction_tokens == usage.completion_tokens - 1  # the end of the turn was not predicted
    assert details.rejected_prediction_tokens == 0


def test_a_suffix_and_a_template(client: OpenAI, demo: Service) -> None:
    suffix = '", "city": "Lima"}'
    answer = client.completions.create(model=demo.model, prompt=PROMPT + '{"name": "', suffix=suffix, seed=1)
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("Ada", "stop")
    template: Any = {"template": ["1234\n", 4, "\n", 4, "\n4312"]}
    puzzle = "Solve this 4x4 sudoku:\n123_\n_421\n2__3\n4312"
    prompt = PROMPT.replace(RECORD, puzzle)
    answer = client.completions.create(model=demo.model, prompt=prompt, seed=1, extra_body=template)
    assert answer.choices[0].text == "1234\n3421\n2143\n4312"


@pytest.mark.parametrize("stream", [False, True])
def test_an_editor_s_fill_in_the_middle(demo: Service, stream: bool) -> None:
    asked = {"prompt": PROMPT + '{"name": "Ada", "', "suffix": '": "Lima"}'}
    body = {"model": demo.model, **asked, "seed": 1, "stream": stream}
    answer = httpx.post(f"{demo.v1}/fim/completions", json=body)
    assert answer.status_code == 200
    if stream:
        events = [line.removeprefix("data: ") for line in answer.text.splitlines() if line.startswith("data: {")]
        choices = [json.loads(event)["choices"][0] for event in events]
        found = ["".join(choice["text"] for choice in choices)]
        found.append("".join(choice["delta"]["content"] for choice in choices))
    else:
        (choice,) = answer.json()["choices"]
        found = [choice["text"], choice["message"]["content"]]
    assert found == ["city"] * 2


def test_a_cursor_where_the_file_begins(demo: Service) -> None:
    body = {"model": demo.model, "prompt": "", "suffix": '": "Lima"}', "seed": 1, "max_tokens": 20}
    answer = httpx.post(f"{demo.v1}/fim/completions", json=body).json()
    assert answer["usage"]["prompt_tokens"] == 1
    assert answer["choices"][0]["finish_reason"] == "stop"


EDIT = [{"role": "user", "content": "<|code_to_edit|>\nx = 1<|cursor|>\n<|/code_to_edit|>"}]


def test_an_editor_s_edit_is_the_code_alone(service: Service) -> None:
    answer = httpx.post(f"{service.v1}/edit/completions", json={"model": service.model, "messages": EDIT}).json()
    assert answer["object"] == "edit.completion"
    (choice,) = answer["choices"]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("    x = 2", "stop")


def test_an_editor_s_code_is_a_draft(demo: Service) -> None:
    """The demo's skills are no edits; it pads its canvas."""
    body = {"model": demo.model, "messages": EDIT, "seed": 1, "max_tokens": 64}
    answer = httpx.post(f"{demo.v1}/edit/completions", json=body).json()
    assert not any(mark in answer["choices"][0]["message"]["content"] for mark in ("```", "<|"))
    details = answer["usage"]["completion_tokens_details"]
    assert details["accepted_prediction_tokens"] + details["rejected_prediction_tokens"] > 0
