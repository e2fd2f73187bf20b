"""From arrays to a prepared request: what is echoed, and that a long prompt is encoded only once."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from dgemma_runtime.assembly import Application
from dgemma_runtime.chat import ChatTemplate
from dgemma_runtime.codec import Codec
from dgemma_runtime.contract import Int32Array
from dgemma_runtime.errors import InvalidRequest
from dgemma_runtime.testing import Recorder, scripted_engine, tiny_codec
from dgemma_runtime.watchdog import WatchedEngine

if TYPE_CHECKING:
    from tests.unit.conftest import Start

CODEC = tiny_codec()
IDS = CODEC.encode("a<turn|>b")
CHAT = json.dumps([{"role": "user", "content": "a<turn|>b"}])


@pytest.fixture
def application(start: Start) -> Application:
    engine = WatchedEngine(scripted_engine({"go": "x"}))
    template = ChatTemplate("{{ messages[0].content }}", {})
    return Application(start(engine), template, 8, engine.limits, engine)


def tensors(**values: Any) -> dict[str, Any]:
    made = {"exclude_input_in_output": np.array([False])}
    for name, value in values.items():
        made[name] = np.array([value.encode()], object) if isinstance(value, str) else np.atleast_1d(value)
    return made


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ({"text_input": "a<turn|>b"}, "a<turn|>b"),
        ({"messages": CHAT}, "a<turn|>b"),
        ({"input_ids": IDS}, "ab"),
        ({"input_ids": IDS, "skip_special_tokens": np.array([False])}, "<bos>a<turn|>b"),
    ],
    ids=["text", "chat", "ids", "ids with special tokens"],
)
def test_a_prompt_that_is_echoed_is_encoded_once(
    application: Application, monkeypatch: pytest.MonkeyPatch, prompt: dict[str, Any], text: str
) -> None:
    encoded: list[str] = []
    encode = Codec.encode

    def counting(self: Codec, text: str, field: str = "text_input") -> Int32Array:
        encoded.append(text)
        return encode(self, text, field)

    monkeypatch.setattr(Codec, "encode", counting)
    prepared = application.prepare(tensors(**prompt), '{"max_tokens": 1}', "id")
    recorder = Recorder()
    application.service.submit(prepared.request, recorder)
    assert recorder.finished().statistics.num_input_tokens == len(IDS)
    assert len(encoded) == ("input_ids" not in prompt)
    assert (prepared.echoed_text, prepared.echoed_ids.tolist()) == (text, IDS.tolist())


@pytest.mark.parametrize("name", ["text_input", "messages", "input_ids"])
def test_errors_name_the_input_that_the_prompt_came_as(application: Application, name: str) -> None:
    prompt = {"text_input": "a" * 300, "messages": CHAT.replace("b", "b" * 300), "input_ids": np.zeros(300, np.int32)}
    for echo in (True, False):
        given = tensors(**{name: prompt[name]}) | {"exclude_input_in_output": np.array([not echo])}
        prepared = application.prepare(given, "", "id")
        with pytest.raises(InvalidRequest, match="maximum context length is 256 tokens") as caught:
            application.service.submit(prepared.request, Recorder())
        assert caught.value.field == name
