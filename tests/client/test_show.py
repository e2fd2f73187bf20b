"""The demo's driver and the picture, against a gRPC server that knows the answers."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest
from rich.console import Console
from tokenizers import Tokenizer, decoders, models

from dgemma_build.demo import show as demo
from dgemma_build.demo.skills import SKILLS, is_held_out, sudoku_template
from dgemma_client import Preview
from dgemma_client.fake_triton import FakeTriton, Handler, Item
from dgemma_client.live import SETTLED_AFTER
from dgemma_client.mock import delta, final, preview
from dgemma_client.picture import chosen, draw, frames
from dgemma_client.requests import InferRequest
from dgemma_runtime.contract import LayerSpec, Manifest, ModelSpec
from dgemma_runtime.noise import CanvasNoise

PUZZLE = next(example.prompt for example in demo.examples() if example.skill == demo.PINNED)
ANSWERS = {example.prompt: example.answer for example in demo.examples()}


def knowing(change: Callable[[str, str], str] = lambda prompt, answer: answer) -> Handler:
    """A server that answers each of the demo's prompts, after `change(prompt, answer)`."""

    def handler(request: InferRequest) -> Iterator[Item]:
        if "template" in request.inputs:
            assert "6x6" in str(request.inputs["messages"][0])
            assert tuple(json.loads(str(request.inputs["template"][0]))) == sudoku_template(PUZZLE)
        (message,) = json.loads(str(request.inputs["messages"][0]))["messages"]
        answer = change(message["content"], ANSWERS[message["content"]])
        half = len(answer) // 2
        yield from (preview("?" * len(answer)), preview(answer[:half] + "?" * (len(answer) - half), 0, 2))
        yield from (delta(answer[:half], [1, 2]), preview(answer[half:-1] + "?", 1, 1), delta(answer[half:], [3]))
        yield final(input_tokens=9, output_tokens=len(answer), steps=4, canvases=2)

    return handler


async def run(handler: Handler, terminal: bool = False, picture: demo.Picture | None = None) -> tuple[int, str]:
    screen = io.StringIO()
    async with FakeTriton(handler) as server:
        console = Console(file=screen, width=100, force_terminal=terminal)
        return await demo.show(server.url, console, picture), screen.getvalue()


def test_every_skill_has_a_held_out_example_that_is_always_the_same() -> None:
    assert [example.skill for example in demo.examples()] == list(SKILLS)
    assert all(is_held_out(example.prompt) for example in demo.examples())
    assert demo.examples() == demo.examples()
    assert set(demo.REQUIRED) <= SKILLS.keys()


@pytest.mark.asyncio
async def test_right_answers_are_exit_code_0_with_a_line_per_step() -> None:
    code, text = await run(knowing())
    assert code == 0
    assert "All 6 required answers are right." in text
    lines = text.splitlines()
    solution = ANSWERS[next(prompt for prompt in ANSWERS if "6x6" in prompt)]
    assert f"canvas 1 step  1  {'?' * len(solution)}" in lines
    assert f"canvas 1 step  2  {solution[:20]}{'?' * 21}".replace("\n", "↵") in lines
    assert lines.count("right") == len(SKILLS) + 1
    assert "\x1b" not in text
    for skill in (*SKILLS, "pinned"):
        assert any(re.match(rf" *{skill} +right +\d", line) for line in lines)


@pytest.mark.asyncio
async def test_one_wrong_answer_is_exit_code_1_and_named() -> None:
    def flip(prompt: str, answer: str) -> str:
        return answer[:-1] + "9" if "6x6" in prompt else answer

    code, text = await run(knowing(flip))
    assert code == 1
    assert "WRONG, a right answer is" in text
    assert "The demo failed: wrong answers for sudoku6, pinned." in text


@pytest.mark.asyncio
async def test_a_terminal_sees_the_canvas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "PACE_S", 0.03)
    code, text = await run(knowing(), terminal=True)
    assert code == 0
    assert "canvas 1, step 2" in text
    assert "canvas 2, step 1" in text


@pytest.mark.asyncio
async def test_the_picture_is_a_document_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "images" / "canvas.svg"
    code, _ = await run(knowing(), picture=demo.Picture(path, "x·y"))
    assert code == 0
    svg = path.read_text()
    assert ElementTree.fromstring(svg).tag.endswith("svg")
    assert "@font-face" not in svg
    shown = "".join(ElementTree.fromstring(svg).itertext()).replace("\xa0", " ")
    for expected in (
        "prompt",
        "noise",
        "x·y",
        "step 1",
        "settled",
        "41 tokens in 4 denoising steps: 10.2 tokens per forward pass",
    ):
        assert expected in shown


def test_no_server_is_one_line_and_exit_code_1(unused_tcp_port: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert demo.main(["--url", f"127.0.0.1:{unused_tcp_port}", "--wait", "0.2"]) == 1
    assert capsys.readouterr().err.startswith("The demo failed: DeadlineExceeded: diffusion_gemma is not ready")


def test_no_engine_is_one_line_and_exit_code_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert demo.main(["--engine", str(tmp_path / "none")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("The demo failed: ")
    assert str(tmp_path / "none") in error


def test_the_noise_is_the_runtime_s_with_dots_for_what_is_no_text(tmp_path: Path) -> None:
    vocabulary = {"<unk>": 0, "a": 1, "▁b": 2, "<0x0A>": 3}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.add_special_tokens(["<unk>"])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text("{}")
    model = ModelSpec(4, 8, 16, 8, 64, (LayerSpec("full_attention", 1, 8),))
    Manifest(model, "c", "0", "onnxruntime", "1", "cpu", "fp32", "fp32", "0", 64, 0, {}, {}).save(tmp_path)
    ids = CanvasNoise(demo.SEED, 0, 16, 4).initial()
    assert demo.noise_of(tmp_path) == "".join(["·", "a", " b", "·"][token] for token in ids)


def test_frames_follow_the_first_canvas_and_end_with_the_answer() -> None:
    previews = [Preview("a?", 0, 1), Preview("a?", 0, 2), Preview("ab", 0, 3), Preview("zz", 1, 1)]
    made = frames("noise", previews, "abc")
    assert [frame.step for frame in made] == [0, 1, 3, 4], "the noise, the steps that changed something, the answer"
    assert ["".join(span.text for span in frame.spans) for frame in made] == ["noise", "a?", "ab", "abc"]
    assert made[-1].spans[0].age == SETTLED_AFTER


@pytest.mark.parametrize(("steps", "count", "expected"), [(3, 5, [0, 1, 2, 3, 4]), (9, 4, [0, 3, 7, 10])])
def test_frames_are_chosen_evenly(steps: int, count: int, expected: list[int]) -> None:
    made = frames("?", [Preview(str(step), 0, step) for step in range(1, steps + 1)], "x")
    assert [frame.step for frame in chosen(made, count)] == expected


def test_a_picture_shows_every_frame_at_its_full_height() -> None:
    made = frames("?", [Preview("a long line that is wrapped several times over\n" * 3, 0, 1)], "done")
    svg = draw("p", made, "caption")
    shown = "".join(ElementTree.fromstring(svg).itertext()).replace("\xa0", " ")
    assert shown.count("long") == 3
