"""`make demo` itself: the demo checkpoint, a real Triton server, streamed and checked answers."""

from __future__ import annotations

import re
import signal
import subprocess
import sys

import psutil

from dgemma_build.accept.table import Setting

SKILLS = ("sudoku4", "sudoku6", "json", "table", "infill")


def command(setting: Setting) -> list[str]:
    return [sys.executable, "-m", "dgemma_build.demo.show", "--engine", str(setting.engine("demo"))]


def test_the_demo_answers_and_checks_every_skill(setting: Setting) -> None:
    done = subprocess.run(command(setting), capture_output=True, text=True, timeout=120)

    assert done.returncode == 0, done.stdout + done.stderr
    assert "All 6 required answers are right." in done.stdout
    for skill in SKILLS:
        assert len(re.findall(rf"(?m)^ *{skill} ", done.stdout)) == 2, "once for its canvases, once in the table"
    assert "sudoku6, clues pinned" in done.stdout
    assert re.search(r"(?m)^ *pinned +right ", done.stdout)
    assert "canvas 2 step  1" in done.stdout, "one answer is longer than a canvas"
    assert done.stdout.rstrip().endswith("Triton has stopped.")


def test_a_terminated_demo_leaves_no_server(setting: Setting) -> None:
    with subprocess.Popen(command(setting), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        while not process.stdout.readline().startswith(SKILLS[0]):
            pass
        started = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGTERM)
        process.stdout.read()

    assert process.returncode == 128 + signal.SIGTERM
    assert len(started) >= 2, "Triton and its model's process"
    _, alive = psutil.wait_procs(started, timeout=10)
    assert alive == []
