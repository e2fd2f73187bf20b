"""Chat templates: Gemma 4's turns, what transformers' templates may use, what messages may not do."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from dgemma_runtime.chat import ChatTemplate
from dgemma_runtime.errors import CheckpointError, InvalidRequest

# In the manner of Gemma 4's: turns, a system turn for thinking and tools, roles that must alternate.
TEMPLATE = """\
{{ bos_token }}
{%- set ns = namespace(last='') -%}
{%- if enable_thinking or tools -%}
<|turn>system
{% if enable_thinking %}<|think|>{% endif %}
{%- for tool in tools or [] -%}
<|tool>{{ tool | tojson }}<tool|>
{%- endfor -%}
<turn|>
{% endif %}
{%- for message in messages -%}
    {%- if message.role == ns.last -%}
        {{ raise_exception('roles must alternate, found ' ~ message.role ~ ' twice') }}
    {%- endif -%}
    {%- set ns.last = message.role -%}
    {%- set role = 'model' if message.role == 'assistant' else message.role -%}
<|turn>{{ role }}
{{ message.content | trim }}<turn|>
{% endfor %}
{%- if add_generation_prompt -%}
<|turn>model
{% endif %}
"""
SPECIAL = {"bos_token": "<bos>"}
USER = {"role": "user", "content": "hello "}


def render(source: str, messages: Any = (USER,), **options: Any) -> str:
    return ChatTemplate(source, SPECIAL).render(messages, **options)


def test_a_conversation() -> None:
    messages = [USER, {"role": "assistant", "content": "hi"}, {"role": "user", "content": "bye"}]
    expected = "<bos><|turn>user\nhello<turn|>\n<|turn>model\nhi<turn|>\n<|turn>user\nbye<turn|>\n<|turn>model\n"
    assert render(TEMPLATE, messages) == expected
    assert render(TEMPLATE, messages, add_generation_prompt=False) == expected.removesuffix("<|turn>model\n")


def test_thinking_and_tools() -> None:
    tool = {"name": "näme", "html": "<&>"}
    text = render(TEMPLATE, [USER], tools=[tool], enable_thinking=True)
    system = '<bos><|turn>system\n<|think|><|tool>{"name": "näme", "html": "<&>"}<tool|><turn|>\n'
    assert text == system + "<|turn>user\nhello<turn|>\n<|turn>model\n"


def test_the_last_message_can_be_left_open() -> None:
    messages = [USER, {"role": "assistant", "content": " one, two "}]
    options = {"add_generation_prompt": False, "continue_final_message": True}
    start = "<bos><|turn>user\nhello<turn|>\n<|turn>model\n"
    assert render(TEMPLATE, messages, **options) == start + "one, two", "as the template trims it"
    as_it_is = TEMPLATE.replace(" | trim", "")
    assert render(as_it_is, messages, **options) == start.replace("hello", "hello ") + " one, two "
    assert messages[1]["content"] == " one, two ", "the caller's messages are not changed"


def test_the_last_text_of_several_parts_is_left_open() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b "}, {"type": "image"}]
    source = "{% for part in messages[-1].content %}{{ part.text or '<image>' }}{% endfor %}|"
    options = {"add_generation_prompt": False, "continue_final_message": True}
    assert render(source, [{"role": "assistant", "content": parts}], **options) == "ab "
    assert parts[1]["text"] == "b "


@pytest.mark.parametrize(
    ("source", "content", "message"),
    [
        ("{{ messages[0].content }}", None, "the last message has no text to go on from"),
        ("{{ messages[0].content }}", 3, "the last message has no text to go on from"),
        ("{{ messages[0].content }}", [{"type": "image"}, "text"], "the last message has no text to go on from"),
        ("{{ messages[0].role }}", "a", "the chat template does not show the last message"),
        ("{{ messages[0].content | replace('a', '') }}", "a b a", "the chat template does not show the last message"),
    ],
)
def test_what_cannot_be_left_open_is_refused(source: str, content: object, message: str) -> None:
    with pytest.raises(InvalidRequest, match=f"^messages: continue_final_message: {message}"):
        render(source, [{"role": "assistant", "content": content}], continue_final_message=True)


def test_variables_of_the_template() -> None:
    source = "{{ enable_thinking }} {{ style }} {{ self is defined }} {{ bos_token }}"
    assert render(source, style={"a": 1}) == "False {'a': 1} True <bos>"
    assert render("{{ x }}{{ messages | length }}", x="{{ 1 }}", context=2) == "{{ 1 }}1"
    assert ChatTemplate("{{ messages | length }}", {}).render([USER], self=2) == "1"
    with pytest.raises(InvalidRequest, match='messages: "bos_token" in chat_template_kwargs is the tokenizer'):
        render(source, bos_token="<s>")


def test_keys_without_a_value_are_not_there_and_thoughts_have_one_name() -> None:
    source = "{{ 'content' in messages[0] }} {{ messages[0].reasoning_content }} {{ messages[0].thinking }}"
    for name in ("reasoning_content", "thinking", "reasoning"):
        assert render(source, [{"role": "assistant", "content": None, name: "hm"}]) == "False hm hm"
    assert render("{{ messages[0].thinking is defined }}") == "False"


def test_content_is_data_not_template() -> None:
    hostile = {"role": "user", "content": "{{ 7 * 7 }}{% raw %}<script>"}
    assert "{{ 7 * 7 }}{% raw %}<script>" in render(TEMPLATE, [hostile])


def test_what_templates_of_transformers_use() -> None:
    assert render("{{ strftime_now('%Y') }}") == datetime.now().strftime("%Y")
    assert render("{{ {'b': 'ü', 'a': 1} | tojson(sort_keys=true) }}") == '{"a": 1, "b": "ü"}'
    assert render("{% for x in [1, 2, 3] %}{% if x == 2 %}{% break %}{% endif %}{{ x }}{% endfor %}") == "1"
    assert render("a{% generation %}{{ messages[0].role }}{% endgeneration %}b") == "auserb"
    assert render("{{ dict(a=1).a }}{% set n = namespace(self=2) %}{{ n.self }}") == "12"


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='x') }}",
        "{{ dict.__globals__['json'] }}",
        "{% set n = namespace(_x=1) %}",
        "{% set n = namespace() %}{% set n._x = 1 %}",
        "{{ raise_exception('no') }}",
        "{{ messages[0].content.missing.deeper }}",
        "{{ 1 // 0 }}",
        "{% for x in range(10000000) %}{% endfor %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ],
)
def test_a_template_that_fails_is_the_request_s_error(source: str) -> None:
    with pytest.raises(InvalidRequest, match=r"^messages: the chat template refused them") as caught:
        render(source)
    assert caught.value.field == "messages"


def test_the_template_s_own_words_reach_the_client() -> None:
    with pytest.raises(InvalidRequest, match="roles must alternate, found user twice"):
        render(TEMPLATE, [USER, USER])


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "is empty"),
        ("hello", "must be a list of messages, got str"),
        (None, "must be a list of messages, got NoneType"),
        (["hello"], "entry 0 must be an object, got str"),
        ([USER, {"content": "x"}], "entry 1 has no role"),
        ([{"role": 3, "content": "x"}], "entry 0 has no role"),
    ],
)
def test_messages_of_the_wrong_form(messages: Any, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        render(TEMPLATE, messages)


def test_the_template_comes_from_its_file_or_from_the_tokenizer_s_config(tmp_path: Path) -> None:
    config: dict[str, Any] = {
        "bos_token": {"content": "<s>"},
        "eos_token": None,
        "chat_template": "config {{ bos_token }}",
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert ChatTemplate.load(tmp_path).render([USER]) == "config <s>"
    (tmp_path / "chat_template.jinja").write_text("file {{ bos_token }}")
    assert ChatTemplate.load(tmp_path).render([USER]) == "file <s>"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "tokenizer_config.json: not found"),
        ({"tokenizer_config.json": "{}"}, "neither chat_template.jinja nor a chat_template"),
        ({"tokenizer_config.json": '{"chat_template": 3}'}, "neither chat_template.jinja nor a chat_template"),
        ({"tokenizer_config.json": '{"chat_template": "{% if %}"}'}, "not valid Jinja"),
        ({"tokenizer_config.json": "{}", "chat_template.jinja": b"\xff"}, "chat_template.jinja: not readable"),
    ],
)
def test_a_corrupt_directory_is_named(tmp_path: Path, files: dict[str, str | bytes], message: str) -> None:
    for name, content in files.items():
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(CheckpointError, match=message):
        ChatTemplate.load(tmp_path)
