"""Drafts, templates and suffixes: what goes onto the wire, what comes back, and the command's options for them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.client.test_cli import run

from dgemma_client import Client, DraftStatistics, InvalidRequest, MockTransport, ServerError
from dgemma_client.fake_triton import FakeTriton
from dgemma_client.mock import delta, final
from dgemma_client.requests import InferRequest
from dgemma_client.terminal import summary

pytestmark = pytest.mark.asyncio

DRAFTS = [
    {"drafter": "client", "canvases": 1, "drafted_tokens": 9, "accepted_tokens": 7, "steps_saved": 2.5},
    {"drafter": "lookup", "canvases": 2, "drafted_tokens": 128, "accepted_tokens": 0, "steps_saved": -1},
]


def answer(request: InferRequest) -> Iterator[Any]:
    yield delta("x = 1", [1, 2, 3])
    yield final(output_tokens=3, drafts=DRAFTS, hole_tokens=3, suffix_tokens=8)


async def ask(**parameters: Any) -> dict[str, Any]:
    transport = MockTransport(answer)
    async with Client(transport=transport) as client:
        await client.generate("hi", **parameters)
    return dict(transport.requests[0].inputs)


async def test_what_is_known_of_the_output_becomes_tensors() -> None:
    assert (await ask(draft_text="é", drafter="auto"))["draft_text"] == ("é",)
    assert (await ask(draft_ids=[5, 6]))["draft_ids"] == (5, 6)
    assert (await ask(template=["é: ", 3, "\n"]))["template"] == ('["é: ", 3, "\\n"]',)
    assert (await ask(suffix="}"))["suffix"] == ("}",)
    sent = await ask(draft_confidence=0.25, draft_verification="halves")
    assert (sent["draft_confidence"], sent["draft_verification"]) == ((0.25,), ("halves",))
    assert not {"draft_text", "draft_ids", "template", "suffix"} & sent.keys()


async def test_what_no_tensor_can_hold_is_refused_before_it_is_sent() -> None:
    deep: list[Any] = []
    for _ in range(5000):
        deep = [deep]
    for name, value in (
        *(("draft_text", 3), ("draft_ids", ["a"]), ("suffix", b"x")),
        *(("template", [{1}]), ("template", deep)),
    ):
        with pytest.raises(InvalidRequest, match=f"^{name}: "):
            await ask(**{name: value})


async def test_what_came_of_drafts_is_told() -> None:
    async with Client(transport=MockTransport(answer)) as client:
        statistics = (await client.generate("hi")).statistics
    assert statistics.drafts == (DraftStatistics("client", 1, 9, 7, 2.5), DraftStatistics("lookup", 2, 128, 0, -1))
    assert (statistics.hole_tokens, statistics.suffix_tokens) == (3, 8)
    assert ", drafts of client: 7 of 9 tokens kept, 2.5 steps saved, drafts of lookup: 0 of 128" in summary(statistics)
    assert summary(statistics).endswith(", a hole of 3 tokens")


async def test_a_server_without_drafts_is_understood() -> None:
    async with Client(transport=MockTransport(lambda request: [final()])) as client:
        statistics = (await client.generate("hi")).statistics
    assert (statistics.drafts, statistics.hole_tokens, statistics.suffix_tokens) == ((), None, None)
    assert "draft" not in summary(statistics)


@pytest.mark.parametrize(
    ("figures", "message"),
    [
        ({"drafts": 3}, "has drafts 3; expected a list of objects"),
        ({"drafts": [3]}, "expected a list of objects"),
        ({"drafts": [{"drafter": "client"}]}, "has canvases None"),
        ({"hole_tokens": "x"}, "has hole_tokens 'x'"),
    ],
)
async def test_figures_that_are_none_are_an_error(figures: dict[str, Any], message: str) -> None:
    async with Client(transport=MockTransport(lambda request: [final(**figures)])) as client:
        with pytest.raises(ServerError, match=message):
            await client.generate("hi")


async def test_options_of_the_command(tmp_path: Path) -> None:
    draft, template = tmp_path / "draft.txt", tmp_path / "template.json"
    draft.write_bytes("é\r\n".encode())
    template.write_text('["a: ", 3]')
    async with FakeTriton(answer) as server:
        code, out, err = await run(server.url, "generate", "hi", "--draft", str(draft), "--drafter", "auto")
        assert (code, out) == (0, "x = 1\n")
        assert "7 of 9 tokens kept" in err
        assert (await run(server.url, "generate", "hi", "--template", str(template)))[0] == 0
        assert (await run(server.url, "generate", "hi", "--raw", "--suffix", "}"))[0] == 0
        drafted, filled, before = (request.inputs for request in server.requests)
    assert (drafted["draft_text"], drafted["drafter"]) == (("é\r\n",), ("auto",))
    assert json.loads(str(filled["template"][0])) == ["a: ", 3]
    assert before["suffix"] == ("}",)


@pytest.mark.parametrize(
    ("option", "content", "message"),
    [
        ("--draft", None, "No such file"),
        ("--draft", b"\xff", "codec can't decode"),
        ("--template", b"[1", "not JSON"),
        ("--template", b"[" * 100_000, "give a JSON list of texts and numbers"),
        ("--template", b'{"a": 1}', "give a JSON list of texts and numbers"),
    ],
)
async def test_files_that_cannot_be_are_refused(
    tmp_path: Path, option: str, content: bytes | None, message: str
) -> None:
    path = tmp_path / "f"
    if content is not None:
        path.write_bytes(content)
    code, out, err = await run("127.0.0.1:1", "generate", "hi", option, str(path))
    assert (code, out) == (2, "")
    assert option in err
    assert message in err
