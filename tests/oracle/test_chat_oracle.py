"""Prompts of the shipped checkpoint: the runtime renders, encodes and decodes as transformers does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from dgemma_runtime.chat import ChatTemplate
from dgemma_runtime.codec import Codec
from dgemma_runtime.detokenizer import OutputText

CHECKPOINT = Path(__file__).parents[2] / "build" / "checkpoints" / "demo"
TOOL = {"type": "function", "function": {"name": "näme", "parameters": {"type": "object", "properties": {"a<b": {}}}}}
CONVERSATIONS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "hello"}],
    [{"role": "system", "content": " be brief "}, {"role": "user", "content": "naïve 你好 👍\n\n<x>"}],
    [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}],
    [{"role": "user", "content": [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]}],
]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return PreTrainedTokenizerFast.from_pretrained(CHECKPOINT)


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize(
    "options", [{}, {"enable_thinking": True}, {"tools": [TOOL]}, {"add_generation_prompt": False}]
)
def test_rendering_and_token_ids(tokenizer: Any, conversation: Any, options: dict[str, Any]) -> None:
    text = ChatTemplate.load(CHECKPOINT).render(conversation, **options)
    expected = {"add_generation_prompt": True} | options
    assert text == tokenizer.apply_chat_template(conversation, tokenize=False, **expected)
    ids = tokenizer.apply_chat_template(conversation, tokenize=True, return_dict=False, **expected)
    assert Codec.load(CHECKPOINT).encode(text).tolist() == ids


def test_decoding(tokenizer: Any) -> None:
    codec = Codec.load(CHECKPOINT)
    text = '{"key": 1}\n| a | b |\n naïve 你好 👍🏽 '
    ids = codec.encode(text)
    output = OutputText(codec, max_tokens=len(ids) + 1)
    output.commit(np.append(ids, 1).astype(np.int32))
    assert output.text == tokenizer.decode(ids, skip_special_tokens=True) == text
