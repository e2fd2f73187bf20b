"""The first process of a container over stand-ins: order of start and stop, ends nobody asked for, orphans."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

FAKE = Path(__file__).with_name("fake_process.py")
# As process 1 would: a process of its own, because it waits for every child that there is.
DRIVER = """
import json, sys
from pathlib import Path
from dgemma_nim.commands import Programs
from dgemma_nim.configuration import resolve
from dgemma_nim.log import Log
from dgemma_nim.supervisor import Plan, Supervisor
given = json.loads(sys.argv[1])
programs = Programs(tuple(given["front_end"]), tuple(given["server"]), ("unused",))
plan = Plan(given["prepare"], Path(given["result"]), programs, given["environment"], given["child_environment"])
configuration = resolve(given["arguments"], {}).configuration
sys.exit(Supervisor(configuration, plan, Log(configuration.log_format)).run())
"""
PREPARE = """
import json, os, sys, time
from pathlib import Path
time.sleep(float(sys.argv[2]))
status = int(sys.argv[3])
if not status:
    Path(sys.argv[1]).write_text(json.dumps({"engine": "/engine", "profile": "p", "max_model_len": 77}))
sys.exit(status)
"""


class Container:
    """One supervisor with stand-ins for its children."""

    def __init__(self, folder: Path) -> None:
        self.log, self._result = folder / "log", folder / "result"
        self.log.touch()
        self.process: subprocess.Popen[str] | None = None

    def start(
        self,
        front_end: str = "serve",
        server: str = "serve",
        prepare: tuple[float, int] = (0.0, 0),
        arguments: tuple[str, ...] = ("--drain-s", "2"),
    ) -> subprocess.Popen[str]:
        fake = [sys.executable, str(FAKE)]
        given = {
            "front_end": [*fake, "front", str(self.log), front_end],
            "server": [*fake, "triton", str(self.log), server],
            "prepare": [sys.executable, "-c", PREPARE, str(self._result), *map(str, prepare)],
            "result": str(self._result),
            "environment": dict(os.environ),
            "child_environment": dict(os.environ),
            "arguments": list(arguments),
        }
        command = [sys.executable, "-c", DRIVER, json.dumps(given)]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        return self.process

    def lines(self) -> list[str]:
        return self.log.read_text().splitlines()

    def wait_for(self, line: str) -> None:
        self.until(lambda: line in self.lines())

    def until(self, condition: Callable[[], bool]) -> None:
        end = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < end, self.lines()
            time.sleep(0.02)

    def end(self) -> tuple[int, str]:
        """Status and what was said."""
        assert self.process is not None
        _, said = self.process.communicate(timeout=60)
        return self.process.returncode, said


@pytest.fixture
def container(tmp_path: Path) -> Iterator[Container]:
    made = Container(tmp_path)
    yield made
    if made.process is not None and made.process.poll() is None:
        made.process.kill()
        made.process.communicate()


def test_front_end_first_then_triton_and_the_other_way_round_down(container: Container) -> None:
    process = container.start(prepare=(0.5, 0))
    container.wait_for("start front")
    assert container.lines() == ["start front"]
    container.wait_for("start triton")
    process.send_signal(signal.SIGTERM)
    status, said = container.end()
    assert status == 0
    assert container.lines() == ["start front", "start triton", "term front", "end front", "term triton", "end triton"]
    assert "--max-model-len 77" in said
    assert said.splitlines()[-1] == "nim-serve: stopped"


@pytest.mark.parametrize(
    ("which", "name", "other"), [("front_end", "dgemma-openai", "triton"), ("server", "dgemma-server", "front")]
)
def test_where_one_ends_the_container_ends(which: str, name: str, other: str, container: Container) -> None:
    container.start(**{which: "exit-3"})  # type: ignore[arg-type]
    status, said = container.end()
    assert status == 1
    assert f"error: {name} ended with status 3; the container stops" in said
    assert f"end {other}" in container.lines()


def test_a_failed_build_ends_it(container: Container) -> None:
    container.start(prepare=(0.3, 2))
    status, said = container.end()
    assert status == 1
    assert "preparing the engine ended with status 2" in said
    assert container.lines() == ["start front", "term front", "end front"]


def test_a_signal_while_building_ends_the_build(container: Container) -> None:
    process = container.start(prepare=(60, 0))
    container.wait_for("start front")
    process.send_signal(signal.SIGINT)
    status, _ = container.end()
    assert status == 0
    assert container.lines() == ["start front", "term front", "end front"]


def test_download_only_serves_nothing(container: Container) -> None:
    container.start(arguments=("--download-only",))
    status, said = container.end()
    assert status == 0
    assert container.lines() == []
    assert "NIM_ENGINE_MODEL_DOWNLOAD_ONLY" in said


def test_a_second_signal_does_not_wait(container: Container) -> None:
    process = container.start(front_end="slow", arguments=("--drain-s", "50"))
    container.wait_for("start triton")
    process.send_signal(signal.SIGTERM)
    container.wait_for("term front")
    process.send_signal(signal.SIGTERM)
    container.until(lambda: container.lines().count("term front") == 2)
    assert container.end()[0] == 0


def test_what_does_not_stop_is_killed_in_the_end(container: Container) -> None:
    process = container.start(front_end="stubborn", arguments=("--drain-s", "50"))
    container.wait_for("start triton")
    process.send_signal(signal.SIGTERM)
    container.wait_for("term front")
    process.send_signal(signal.SIGTERM)
    status, _ = container.end()
    assert status == 0
    assert "end front" not in container.lines()
    assert "end triton" in container.lines()


def test_processes_of_nobody_are_collected() -> None:
    """A process that others left behind comes to process 1, here to the one that asked for it."""
    code = """
import ctypes, os, subprocess, sys, time
from dgemma_nim.log import Log
from dgemma_nim.processes import Processes
ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER
processes = Processes(Log())
child = processes.start("x", [sys.executable, sys.argv[1], "x", os.devnull, "orphan"], os.environ)
end = time.monotonic() + 60
while time.monotonic() < end:
    processes.reap()
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        break
    time.sleep(0.05)
else:
    sys.exit("a process is left")
sys.exit(0 if child.status == 0 else 1)
"""
    subprocess.run([sys.executable, "-c", code, str(FAKE)], check=True, timeout=90, stderr=subprocess.PIPE)


def test_json_logs_are_objects_line_by_line(container: Container) -> None:
    process = container.start(arguments=("--log-format", "json"))
    container.wait_for("start triton")
    process.send_signal(signal.SIGTERM)
    _, said = container.end()
    records = [json.loads(line) for line in said.splitlines()]
    assert {"message": "an object already"} in records
    assert any(each.get("logger") == "dgemma-server" and each["message"] == "triton says something" for each in records)
    assert all("message" in each for each in records)


def test_a_command_that_is_not_there_is_one_line(container: Container, tmp_path: Path) -> None:
    code = DRIVER.replace('tuple(given["front_end"])', '("/nowhere/dgemma-openai",)')
    given: dict[str, object] = {
        "front_end": [],
        "server": [],
        "prepare": [],
        "result": str(tmp_path / "x"),
        "arguments": [],
    }
    given |= {"environment": {}, "child_environment": {}}
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(given)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1
    assert "error:" in done.stderr
    assert "/nowhere/dgemma-openai" in done.stderr
    assert "Traceback" not in done.stderr
