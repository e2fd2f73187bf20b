"""The page on a real Triton with the demo checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from playwright.sync_api import expect
from tests.openai.playground.conftest import Visit, ask, figures

from dgemma_build.demo.skills import SKILLS, held_out_set
from dgemma_build.engine import BuildRequest, build_engine
from dgemma_build.front_end import running_front_end
from dgemma_runtime.server import running_server

pytestmark = pytest.mark.debian
CHECKPOINT = Path(__file__).parents[3] / "build/checkpoints/demo"
TABLE = held_out_set("table", 1)[0]


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    engine = tmp_path_factory.mktemp("engines") / "demo"
    build_engine(BuildRequest(CHECKPOINT, engine))
    with running_server(engine) as triton, running_front_end(triton.grpc_url) as front:
        yield front.url


def test_a_question_is_answered_canvas_by_canvas(url: str, visit: Callable[..., Visit]) -> None:
    page = visit(url).page
    page.evaluate("""() => {
      window.pictures = new Set();
      new MutationObserver(() => window.pictures.add(document.querySelector(".canvas").textContent))
        .observe(document.querySelector("#log"), { childList: true, subtree: true });
    }""")
    page.get_by_label("Seed").fill("7")
    ask(page, TABLE.prompt)
    told = figures(page)
    answer = page.locator("[data-part=committed]").text_content() or ""
    steps = int(page.get_by_label("Denoising step").get_attribute("max") or 0)

    expect(page.locator("#context")).to_have_text("262,144 tokens of context")
    assert SKILLS["table"].check(TABLE.prompt, answer)
    assert told["Ended by"] == "stop"
    assert int(told["Canvases"]) == 2
    assert 0 < steps <= int(told["Steps"])
    assert page.evaluate("window.pictures.size") > 1


def test_a_refusal_comes_from_the_model_server(url: str, visit: Callable[..., Visit]) -> None:
    page = visit(url, refusals=(400,)).page
    page.get_by_label("Max tokens").fill("999999")
    ask(page, "hi")

    expect(page.locator(".problem")).to_contain_text("400: max_completion_tokens: ")
