"""Prompts of the shipped checkpoint: the runtime renders, encodes and decodes as transformers does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from dgemma_runtime.chat import ChatTemplate
from dgemma_runtime.codec import Codec
from dgemma_runtime.detokenizer import OutputText

CHECKPOINT = Path(__file__).parents[2] / "build" / "checkpoints" / "demo"
CODEC = Codec.load(CHECKPOINT)
LOUD = [token for token in range(19) if token not in CODEC.silent_ids]
CALL = {"type": "function", "function": {"name": "näme", "arguments": {"a": 1}}}
TOOL = {"type": "function", "function": {"name": "näme", "parameters": {"type": "object", "properties": {"a<b": {}}}}}
CONVERSATIONS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "hello"}],
    [{"role": "system", "content": " be brief "}, {"role": "user", "content": "naïve 你好 👍\n\n<x>"}],
    [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}],
    [{"role": "user", "content": [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]}],
    [{"role": "user", "content": "a"}, {"role": "assistant", "content": " b \n", "reasoning": "hm"}],
    [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "3"},
    ],
]
TRIMMING = """{{ bos_token }}{% for message in messages %}<|turn>{{ message.role }}
{% if message.thinking %}<|channel>{{ message.thinking }}<channel|>{% endif %}
{%- if 'content' in message %}{{ message.content | trim }}{% else %}nothing{% endif %}<turn|>
{% endfor %}{% if add_generation_prompt %}<|turn>model
{% endif %}{{ style }}"""


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return PreTrainedTokenizerFast.from_pretrained(CHECKPOINT)


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize(
    "options", [{}, {"enable_thinking": True}, {"tools": [TOOL]}, {"add_generation_prompt": False}, {"style": "x"}]
)
def test_rendering_and_token_ids(tokenizer: Any, conversation: Any, options: dict[str, Any]) -> None:
    text = ChatTemplate.load(CHECKPOINT).render(conversation, **options)
    expected = {"add_generation_prompt": True} | options
    assert text == tokenizer.apply_chat_template(conversation, tokenize=False, **expected)
    ids = tokenizer.apply_chat_template(conversation, tokenize=True, return_dict=False, **expected)
    assert Codec.load(CHECKPOINT).encode(text).tolist() == ids


@pytest.mark.parametrize("source", [None, TRIMMING], ids=["the checkpoint's", "one that trims"])
@pytest.mark.parametrize("options", [{}, {"add_generation_prompt": True}, {"style": " plain"}])
@pytest.mark.parametrize("conversation", [talk for talk in CONVERSATIONS if isinstance(talk[0]["content"], str)])
def test_keys_and_variables(tokenizer: Any, conversation: Any, options: dict[str, Any], source: str | None) -> None:
    template = ChatTemplate.load(CHECKPOINT) if source is None else ChatTemplate(source, {"bos_token": "<bos>"})
    options = {"add_generation_prompt": False, **options}
    expected = tokenizer.apply_chat_template(conversation, tokenize=False, chat_template=source, **options)
    assert template.render(conversation, **options) == expected


WORDS = st.text(st.sampled_from("ab <|>\n\té€{}%"), min_size=1, max_size=12).filter(str.strip)


@pytest.mark.parametrize("source", [None, TRIMMING], ids=["the checkpoint's", "one that trims"])
@given(texts=st.lists(WORDS, min_size=1, max_size=3), in_parts=st.booleans())
def test_an_open_end(tokenizer: Any, source: str | None, texts: list[str], in_parts: bool) -> None:
    template = ChatTemplate.load(CHECKPOINT) if source is None else ChatTemplate(source, {"bos_token": "<bos>"})
    talk: list[dict[str, Any]] = [
        {"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)
    ]
    if in_parts and source is None:
        talk[-1]["content"] = [{"type": "text", "text": text} for text in texts]
    options: dict[str, Any] = {"add_generation_prompt": False, "continue_final_message": True}
    expected = tokenizer.apply_chat_template(talk, tokenize=False, chat_template=source, **options)
    assert template.render(talk, **options) == expected


@given(
    st.lists(st.one_of(st.text("ab the你€👍 \n<|>", max_size=6), st.sampled_from(LOUD)), min_size=1), st.integers(1, 9)
)
def test_decoding_with_special_tokens(tokenizer: Any, parts: list[str | int], length: int) -> None:
    codec = CODEC
    found: list[int] = []
    for part in parts:
        found += [part] if isinstance(part, int) else codec.encode(part).tolist()[1:]
    ids = np.array(found, np.int32)
    output = OutputText(codec, max(len(ids), 1), skip_special_tokens=False)
    for start in range(0, len(ids), length):
        output.commit(ids[start : start + length])
    assert output.text == tokenizer.decode(found, skip_special_tokens=False) == codec.decode(ids, False)


def test_decoding(tokenizer: Any) -> None:
    codec = Codec.load(CHECKPOINT)
    text = '{"key": 1}\n| a | b |\n naïve 你好 👍🏽 '
    ids = codec.encode(text)
    output = OutputText(codec, max_tokens=len(ids) + 1)
    output.commit(np.append(ids, 1).astype(np.int32))
    assert output.text == tokenizer.decode(ids, skip_special_tokens=True) == text
