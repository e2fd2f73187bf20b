"""The page in Chromium, on a scripted server: what is shown of an answer, and to whom."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import pytest
from playwright.sync_api import expect
from tests.openai.playground.conftest import ENDED, Script, Site, Visit, ask, canvas, figures

from dgemma_client.mock import delta, final, prefill, preview, reply
from dgemma_client.requests import InferRequest

pytestmark = pytest.mark.debian
Start = Callable[..., Site]
Open = Callable[..., Visit]
TOOLS = '[{"type": "function", "function": {"name": "weather"}}]'


def test_a_canvas_is_shown_being_refined_and_then_as_text(start: Start, visit: Open) -> None:
    script = Script(
        [prefill(128, 512)],
        [preview("red cat sat", 0, 1)],
        [preview("the cat sat", 0, 2)],
        [preview("the cat ran", 0, 3)],
        [delta("the cat ran"), preview(" far", 1, 1)],
        [delta(" away"), final(input_tokens=512, output_tokens=9, steps=4, canvases=2, prefix_tokens=128)],
    )
    page = visit(start(script).url).page
    ask(page, "tell")
    state, committed = page.locator("article .state"), page.locator("[data-part=committed]")

    script.go_on()
    expect(state).to_have_text("reading the prompt: 128 of 512 tokens")
    expect(page.locator("progress")).to_have_js_property("position", 0.25)
    script.go_on()
    expect(state).to_have_text("canvas 1, step 1")
    expect(page.locator("progress")).to_be_hidden()
    expect(page.locator(".canvas")).to_have_text("red cat sat")
    assert canvas(page) == [("red cat sat", "age0")]
    script.go_on()
    expect(page.locator(".canvas")).to_have_text("the cat sat")
    assert canvas(page) == [("the", "age0"), (" cat sat", "age1")]
    script.go_on()
    expect(page.locator(".canvas")).to_have_text("the cat ran")
    assert canvas(page) == [("the", "age1"), (" cat ", "age2"), ("ran", "age0")]
    expect(committed).to_have_text("")
    script.go_on()
    expect(committed).to_have_text("the cat ran")
    expect(page.locator(".canvas")).to_have_text(" far")
    script.go_on()
    expect(committed).to_have_text("the cat ran away")
    told = figures(page)

    assert canvas(page) == []
    assert told["Prompt"] == "512 tokens, 128 of them cached"
    assert (told["Answer"], told["Steps"], told["Canvases"], told["Steps per canvas"]) == ("9 tokens", "4", "2", "2")
    assert told["Ended by"] == "stop"
    assert told["Speed"].endswith(" tokens/s")
    assert told["First canvas"].endswith(" ms")


def test_the_steps_can_be_looked_at_afterwards(start: Start, visit: Open) -> None:
    def handler(request: InferRequest) -> Iterator[Any]:
        yield from (preview("one tow", 0, 1), preview("one two", 0, 2), delta("one two"))
        yield from (preview(" thee", 1, 1), delta(" three"), final())

    page = visit(start(handler).url).page
    ask(page, "count")
    page.wait_for_selector(ENDED)
    slider, past, committed = page.locator("[type=range]"), page.locator("[data-part=past]"), page.locator(".text span")

    expect(slider).to_have_value("3")
    expect(committed.first).to_have_text("one two three")
    slider.focus()
    page.keyboard.press("ArrowLeft")
    expect(page.locator("[data-part=position]")).to_have_text("canvas 2, step 1")
    expect(past).to_have_text("one two")
    assert canvas(page) == [(" thee", "age0")]
    page.keyboard.press("Home")
    expect(slider).to_have_attribute("aria-valuetext", "canvas 1, step 1")
    expect(past).to_have_text("")
    assert canvas(page) == [("one tow", "age0")]
    page.get_by_role("button", name="Replay").click()
    expect(slider).to_have_value("3")
    expect(past).to_have_text("")
    assert canvas(page) == []


def test_markup_stays_text(start: Start, visit: Open) -> None:
    evil = "<img src=x onerror=\"document.title='taken'\"><script>alert(1)</script>&amp;"
    thought = f"<|channel>thought\n{evil}<channel|>{evil}"

    def handler(request: InferRequest) -> Iterator[Any]:
        yield from (preview(evil, 0, 1), 0.3, delta(thought), preview(evil, 1, 1))
        yield from (delta(f'<|tool_call>call:weather{{a:<|"|>{evil}<|"|>}}<tool_call|>'), final())

    page = visit(start(handler).url).page
    page.get_by_label("Tools").fill(TOOLS)
    ask(page, evil)
    expect(page.locator(".canvas")).to_have_text(evil)
    page.wait_for_selector(ENDED)

    expect(page.locator(".question")).to_have_text(evil)
    expect(page.locator("[data-part=committed]")).to_have_text(evil)
    page.locator("article summary").click()
    expect(page.locator("[data-part=reasoning]")).to_have_text(evil)
    assert page.locator("#log img, #log script").count() == 0
    assert page.title() == "DiffusionGemma"


def test_thinking_is_folded_and_calls_are_cards(start: Start, visit: Open) -> None:
    text = '<|channel>thought\nhm, rain?<channel|>Let me see.<|tool_call>call:weather{city:<|"|>Lima<|"|>}<tool_call|>'
    page = visit(start(lambda request: iter([delta(text), final()])).url).page
    page.get_by_label("Tools").fill(TOOLS)
    ask(page, "weather?")
    page.wait_for_selector(ENDED)

    expect(page.locator("[data-part=reasoning]")).to_be_hidden()
    page.get_by_text("Thinking").last.click()
    expect(page.locator("[data-part=reasoning]")).to_have_text("hm, rain?")
    expect(page.locator("[data-part=committed]")).to_have_text("Let me see.")
    expect(page.locator(".call h3")).to_have_text("calls weather")
    expect(page.locator(".call pre")).to_have_text('{"city": "Lima"}')


def test_a_fast_engine_can_be_watched_and_its_speed_is_not_the_displays(start: Start, visit: Open) -> None:
    def handler(request: InferRequest) -> Iterator[Any]:
        yield from (preview(f"step {number}", 0, number) for number in range(1, 21))
        yield from (delta("step 20"), final(output_tokens=20, steps=20))

    page = visit(start(handler).url).page
    page.evaluate("""() => {
      window.pictures = new Set();
      new MutationObserver(() => window.pictures.add(document.querySelector(".canvas").textContent))
        .observe(document.querySelector("#log"), { childList: true, subtree: true });
    }""")
    ask(page, "go")
    told = figures(page)

    assert page.evaluate("[...window.pictures].filter(Boolean)") == [f"step {number}" for number in range(1, 21)]
    assert float(told["In all"].removesuffix(" ms").replace(",", "")) < 20 * 80  # which is what showing it took


def test_a_long_answer_is_followed_unless_the_reader_looks_elsewhere(start: Start, visit: Open) -> None:
    script = Script([delta("one\n" * 100)], [delta("two\n" * 100)], [delta("three\n" * 100), final()])
    page = visit(start(script).url).page
    ask(page, "go")
    below = "() => document.documentElement.scrollHeight - innerHeight - scrollY < 2"
    for word in ("one", "two"):
        script.go_on()
        expect(page.locator("[data-part=committed]")).to_contain_text(word)
        page.wait_for_function(below)
    page.evaluate("scrollTo(0, 500)")
    page.wait_for_function("() => scrollY === 500")
    script.go_on()
    page.wait_for_selector(ENDED)

    assert page.evaluate("scrollY") == 500


@pytest.mark.parametrize("width", [360, 800, 1400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_sticks_out_and_all_text_can_be_read(width: int, scheme: str, start: Start, visit: Open) -> None:
    def handler(request: InferRequest) -> Iterator[Any]:
        yield from (preview("old word", 0, 1), preview("new word", 0, 2), preview("new word!", 0, 3))
        yield from (delta("x" * 500), final())

    page = visit(start(handler).url, viewport={"width": width, "height": 700}, color_scheme=scheme).page
    ask(page, "y" * 300)
    page.wait_for_selector(ENDED)
    page.locator("[type=range]").focus()
    page.keyboard.press("ArrowLeft")

    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert [name for _, name in canvas(page)] == ["age1", "age2", "age0"]
    poor = page.evaluate(CONTRAST)
    assert poor == []


# The elements whose own text has less than 4.5:1 against what is behind it, as WCAG counts.
CONTRAST = """() => {
  const rgba = (text) => text.match(/[\\d.]+/g).map(Number);
  const light = (color) => {
    const [r, g, b] = color.slice(0, 3).map((v) => (v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (element) => {
    for (let each = element; each; each = each.parentElement) {
      const color = rgba(getComputedStyle(each).backgroundColor);
      if (color[3] !== 0) return color;
    }
    return [255, 255, 255];
  };
  const own = (element) => [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
  return [...document.body.querySelectorAll("*")].filter((element) => own(element) && element.checkVisibility())
    .map((element) => {
      const [a, b] = [light(rgba(getComputedStyle(element).color)), light(behind(element))];
      return [element.tagName + "." + element.className, (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05)];
    }).filter(([, ratio]) => ratio < 4.5);
}"""


def test_controls_have_names_and_canvases_are_not_read_out(start: Start, visit: Open) -> None:
    page = visit(start(reply("done")).url).page
    ask(page, "go")
    page.wait_for_selector(ENDED)
    nameless = page.evaluate(
        "() => [...document.querySelectorAll('input, textarea, select')]"
        ".filter(e => !e.labels?.length && !e.ariaLabel).map(e => e.outerHTML)"
    )

    assert nameless == []
    expect(page.locator(".canvas")).to_have_attribute("aria-hidden", "true")
    live = page.locator("article [aria-live]")
    expect(live).to_have_count(1)
    expect(live).to_have_text("done")


def test_little_motion_is_kept_to(start: Start, visit: Open) -> None:
    def handler(request: InferRequest) -> Iterator[Any]:
        for number in range(1, 31):
            yield from (preview(f"step {number}", 0, number), 0.05)
        yield from (delta("done"), final())

    page = visit(start(handler).url, reduced_motion="reduce").page
    page.evaluate("""() => {
      window.pictures = [];
      new MutationObserver(() => {
        const text = document.querySelector(".canvas").textContent;
        if (text && text !== window.pictures.at(-1)?.text) window.pictures.push({ text, at: performance.now() });
      }).observe(document.querySelector("#log"), { childList: true, subtree: true });
    }""")
    ask(page, "go")
    page.wait_for_selector(ENDED)

    times = [picture["at"] for picture in page.evaluate("window.pictures")]
    assert len(times) >= 2
    assert min(later - earlier for earlier, later in pairwise(times)) > 450  # ms
    page.get_by_label("Denoising step").press("Home")
    expect(page.locator(".canvas")).to_have_text("step 1")
