"""The page's pure functions, called in Chromium: events cut anywhere, changes between previews, the command."""

from __future__ import annotations

import json
import random
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest
from playwright.sync_api import Browser, Page
from tests.openai.playground.conftest import Visit, running_site

from dgemma_openai.settings import Settings

pytestmark = pytest.mark.debian
STREAM = (
    '\ufeff: keep-alive\n\ndata: {"text":"häßlich 🙂"}\n\n'
    "event: named\r\nid: 4\r\ndata: two\r\ndata:lines\r\n\r\n"
    "data\rdata:  spaces \r\r: end\n\nretry: 5\ndata: [DONE]\n\ndata: unfinished"
)
EVENTS = ['{"text":"häßlich 🙂"}', "two\nlines", "\n spaces ", "[DONE]"]


@pytest.fixture(scope="module")
def page(browser: Browser) -> Iterator[Page]:
    with running_site(None, Settings()) as site:
        page = browser.new_page()
        opened = Visit(page, site.url)
        opened.listen()
        page.goto(f"{site.url}/", wait_until="networkidle")
        yield page
        page.close()
        opened.check()


def call(page: Page, module: str, script: str, argument: Any = None) -> Any:
    """The value of `script`, a function of the module and of `argument`."""
    body = f"async (argument) => ({script})(await import('/playground/{module}.js'), argument)"
    return page.evaluate(body, argument)


READ = """(module, [bytes, cuts]) => {
  const read = (cut) => {
    const reader = new module.EventReader();
    return cut.flatMap(([from, to]) => reader.feed(new Uint8Array(bytes.slice(from, to))));
  };
  return cuts.map(read);
}"""


def test_events_are_the_same_wherever_the_bytes_are_cut(page: Page) -> None:
    content = list(STREAM.encode())
    size = len(content)
    cuts = [[[0, cut], [cut, size]] for cut in range(size + 1)]
    cuts.append([[at, at + 1] for at in range(size)])
    cuts += [[[at, min(at + step, size)] for at in range(0, size, step)] for step in (2, 3, 7)]

    found = call(page, "sse", READ, [content, cuts])

    assert all(each == EVENTS for each in found)


AGES = """(module, texts) => {
  let picture = null;
  return texts.map((text) => module.spans(picture = module.step(picture, text)).map(({ text, age }) => [text, age]));
}"""


@pytest.mark.parametrize(
    ("texts", "last"),
    [
        (["a b"], [["a b", 0]]),
        (["a b", "a b", "a b", "a b"], [["a b", 2]]),
        (["a b c", "a x c"], [["a ", 1], ["x", 0], [" c", 1]]),
        (["a b c", "z a b c"], [["z ", 0], ["a b c", 1]]),
        (["a b", "a b", "a c", "a c"], [["a ", 2], ["c", 1]]),
        (["one", ""], []),
        (["", "äé日本 🙂"], [["äé日本 🙂", 0]]),
        (["12\n34", "12\n54"], [["12\n", 1], ["5", 0], ["4", 1]]),
    ],
)
def test_what_changed_is_told_from_what_stayed(page: Page, texts: list[str], last: list[Any]) -> None:
    pictures = call(page, "diff", AGES, texts)

    assert pictures[-1] == last
    assert ["".join(text for text, _ in picture) for picture in pictures] == texts


def test_an_alignment_keeps_order_and_is_the_longest(page: Page) -> None:
    random_ = random.Random(1)
    pairs = [[[random_.choice("abc") for _ in range(random_.randrange(9))] for _ in range(2)] for _ in range(300)]
    found = call(page, "diff", "(module, pairs) => pairs.map(([a, b]) => module.align(a, b))", pairs)

    for (before, after), indices in zip(pairs, found, strict=True):
        kept = [(index, after[at]) for at, index in enumerate(indices) if index >= 0]
        assert all(before[index] == piece for index, piece in kept)
        assert [index for index, _ in kept] == sorted({index for index, _ in kept})
        assert len(kept) == _longest(before, after)


def _longest(before: list[str], after: list[str]) -> int:
    row = [0] * (len(after) + 1)
    for piece in before:
        above = row[:]
        for at, other in enumerate(after):
            row[at + 1] = above[at] + 1 if piece == other else max(above[at + 1], row[at])
    return row[-1]


def test_the_command_says_the_same_to_a_shell(page: Page) -> None:
    messages = [{"role": "user", "content": "it's \"$HOME\" `date` \\n\nnew line 🙂 '; echo"}]
    script = """(module, messages) => {
      const body = module.chatBody("m", messages, [["seed", module.number("18446744073709551615")],
        ["temperature", module.number("'; warm")]]);
      return [body, module.asCurl(body, true)];
    }"""
    body, command = call(page, "api", script, messages)
    printed = subprocess.run(
        ["sh", "-c", command.replace("curl", "printf '%s\\0'", 1)],
        capture_output=True,
        check=True,
        env={"API_KEY": "K", "PATH": "/usr/bin:/bin"},
    )
    words = printed.stdout.decode().split("\0")

    assert words[-2] == body
    assert "Authorization: Bearer K" in words
    assert json.loads(body)["messages"] == messages
    assert json.loads(body)["seed"] == 2**64 - 1
    assert json.loads(body)["temperature"] == "'; warm"


@pytest.mark.parametrize(
    ("text", "value"),
    [("1", 1), ("-0.5", -0.5), ("2e-3", 0.002), ("01", "01"), ("1,5", "1,5"), ("NaN", "NaN"), ("1.", "1.")],
)
def test_only_numbers_go_as_numbers(page: Page, text: str, value: float | str) -> None:
    assert json.loads(call(page, "api", "(module, text) => module.number(text)", text)) == value
