"""The page in Chromium, on a scripted server: what it sends, stops and keeps, and what it tells of refusals."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable

import pytest
from playwright.sync_api import expect
from tests.openai.playground.conftest import ENDED, Site, Visit, ask, asked, canvas, wait_until

from dgemma_client.errors import InvalidRequest, ServerError
from dgemma_client.mock import delta, preview, reply
from dgemma_openai.settings import ApiKey

pytestmark = pytest.mark.debian
Start = Callable[..., Site]
Open = Callable[..., Visit]
STORED = "JSON.stringify([Object.entries(localStorage), Object.entries(sessionStorage), document.cookie])"


def test_parameters_are_sent_as_typed_and_empty_ones_are_not(start: Start, visit: Open) -> None:
    site = start()
    page = visit(site.url).page
    ask(page, "first")
    page.wait_for_selector(ENDED)
    plain = asked(site)
    given = {
        "Max tokens": "77",
        "Seed": "18446744073709551615",  # more digits than a number of JavaScript keeps
        "Temperature": "0.5",
        "Max steps": "9",
        "Entropy bound": "1e-3",
        "Stability": "-1",
        "Confidence": "0.25",
        "System prompt": "Be brief.",
        "Stop at": "END\n\\n\\n",
    }
    for label, value in given.items():
        page.get_by_label(label, exact=True).fill(value)
    page.get_by_label("Thinking").check()
    ask(page, "second")
    expect(page.locator(ENDED)).to_have_count(2)
    inputs = site.triton.requests[-1].inputs
    full = asked(site)

    assert not {"max_tokens", "seed", "temperature", "stop_words", "entropy_bound"} & plain.keys()
    assert (full["max_tokens"], full["seed"], full["max_denoising_steps"]) == (77, 2**64 - 1, 9)
    assert (full["temperature"], full["entropy_bound"]) == (0.5, 1e-3)
    assert (full["stability_threshold"], full["confidence_threshold"]) == (-1, 0.25)
    assert tuple(inputs["stop_words"]) == ("END", "\n\n")
    chat = json.loads(full["messages"])
    assert chat["enable_thinking"] is True
    assert [message["content"] for message in chat["messages"]] == ["Be brief.", "first", "Hello world", "second"]


def test_stop_ends_the_answer_on_the_server(start: Start, visit: Open) -> None:
    site = start(lambda request: iter([delta("begun"), preview("more", 1, 1), 60.0]))
    page = visit(site.url).page
    ask(page, "go")
    expect(page.locator("[data-part=committed]")).to_have_text("begun")
    page.get_by_role("button", name="Stop").click()

    expect(page.locator(".problem")).to_have_text("Stopped.")
    expect(page.get_by_role("button", name="Send")).to_be_visible()
    wait_until(lambda: len(site.triton.cancelled) == 1)
    assert canvas(page) == []
    ask(page, "again")
    expect(page.locator("article")).to_have_count(2)
    expect(page.get_by_role("button", name="Stop")).to_be_visible()
    page.keyboard.press("Escape")
    wait_until(lambda: len(site.triton.cancelled) == 2)
    assert '"begun"' in asked(site)["messages"]


def test_a_refusal_is_shown_in_the_servers_words(start: Start, visit: Open) -> None:
    page = visit(start().url, refusals=(400,)).page
    page.get_by_label("Temperature").fill("warm")
    ask(page, "hello")

    problem = page.locator(".problem")
    expect(problem).to_contain_text("400: temperature: ")
    expect(problem).to_contain_text("warm")
    expect(page.locator("#prompt")).to_have_value("hello")
    page.get_by_label("Temperature").fill("")
    page.press("#prompt", "Enter")
    expect(page.locator("[data-part=committed]").last).to_have_text("Hello world")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ServerError("the engine has failed"), "the engine has failed"),
        (InvalidRequest("seed: is odd"), "seed: is odd"),
    ],
)
def test_an_error_in_the_middle_leaves_what_has_come(error: Exception, words: str, start: Start, visit: Open) -> None:
    page = visit(start(lambda request: iter([delta("so far"), preview("and", 1, 1), error])).url).page
    ask(page, "go")

    expect(page.locator(".problem")).to_contain_text(words)
    expect(page.locator("[data-part=committed]")).to_have_text("so far")
    expect(page.locator("[type=range]")).to_be_visible()


def test_tools_that_are_no_json_are_for_the_server_to_refuse(start: Start, visit: Open) -> None:
    page = visit(start().url, refusals=(400,)).page
    page.get_by_label("Tools").fill('[], "n": 2')
    ask(page, "hi")

    expect(page.locator(".problem")).to_contain_text("400: tools: ")


def test_a_key_is_asked_for_and_stays_in_the_tab(start: Start, visit: Open) -> None:
    secret = "dg-5f0c-only-here"
    site = start(api_keys=(ApiKey(hashlib.sha256(secret.encode()).digest(), "ada"),))
    opened = visit(site.url, refusals=(401,))
    page = opened.page

    expect(page.locator("#notice")).to_contain_text("401: no API key")
    expect(page.get_by_label("API key")).to_be_focused()
    page.keyboard.type("wrong")
    page.keyboard.press("Enter")
    expect(page.locator("#notice")).to_contain_text("the API key is not known here")
    page.get_by_label("API key").fill(secret)
    page.keyboard.press("Enter")
    expect(page.locator("#notice")).to_have_text("")
    expect(page.locator("#context")).to_have_text("4,096 tokens of context")
    ask(page, "hi")
    page.wait_for_selector(ENDED)

    page.reload()
    expect(page.locator("#context")).to_have_text("4,096 tokens of context")
    local, session, cookie = page.evaluate(f"JSON.parse({STORED})")
    assert (local, cookie) == ([], "")
    assert session == [["dgemma-api-key", secret]]
    assert not any(secret in url for url in opened.requests)
    page.get_by_role("button", name="As curl").click()
    command = page.locator("#curl").input_value()
    assert "Bearer $API_KEY" in command
    assert secret not in command
    page.get_by_role("button", name="Close").click()
    page.get_by_label("API key").fill("")
    page.get_by_label("API key").blur()
    expect(page.locator("#notice")).to_contain_text("401")
    assert page.evaluate(f"JSON.parse({STORED})") == [[], [], ""]


def test_a_server_that_does_not_answer_is_told_of(start: Start, visit: Open) -> None:
    site = start()
    opened = visit(site.url)
    opened.page.route("**/v1/**", lambda route: route.abort())
    ask(opened.page, "hi")
    expect(opened.page.locator(".problem")).to_contain_text("The server does not answer")
    assert all("ERR_FAILED" in text for text in opened.complaints)
    opened.complaints.clear()


def test_a_model_that_was_not_there_is_asked_for_again(start: Start, visit: Open) -> None:
    site = start(reply("ready"), served_model_names=("small", "other"))
    site.triton.failure = ServerError("starting")
    page = visit(site.url, refusals=(500,)).page
    expect(page.locator("#notice")).to_contain_text("starting")
    site.triton.failure = None
    ask(page, "hi")

    expect(page.locator("[data-part=committed]")).to_have_text("ready")
    expect(page.locator("#notice")).to_have_text("")
    assert page.locator("#model option").all_inner_texts() == ["small", "other"]


def test_a_new_chat_forgets_the_old_one(start: Start, visit: Open) -> None:
    site = start()
    page = visit(site.url).page
    ask(page, "first")
    page.wait_for_selector(ENDED)
    page.get_by_role("button", name="New chat").click()
    expect(page.locator("article")).to_have_count(0)
    page.get_by_role("button", name="Convert to JSON").click()
    expect(page.locator("#prompt")).to_have_value("Convert to JSON:\nname: Ada\ncity: Lima")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("age: 36")
    page.keyboard.press("Enter")
    page.wait_for_selector(ENDED)

    assert "first" not in asked(site)["messages"]
    assert "city: Lima\\nage: 36" in asked(site)["messages"]
