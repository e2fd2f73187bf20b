"""A child process for tests of the supervisor: NAME LOG [BEHAVIOUR], then words that do not count.

Notes its start, SIGTERM and its end as lines in LOG. Behaviours: serve, exit-N after a moment, stubborn, slow, orphan.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType

name, log = sys.argv[1], Path(sys.argv[2])
behaviour = sys.argv[3] if len(sys.argv) > 3 else "serve"
terms = 0


def note(text: str) -> None:
    with log.open("a") as file:
        file.write(f"{text} {name}\n")


def on_term(number: int, frame: FrameType | None) -> None:
    global terms
    terms += 1
    note("term")


signal.signal(signal.SIGTERM, on_term)
note("start")
print(f"{name} says something", file=sys.stderr, flush=True)
print('{"message": "an object already"}', file=sys.stderr, flush=True)
if behaviour.startswith("exit-"):
    time.sleep(0.5)
    sys.exit(int(behaviour.removeprefix("exit-")))
if behaviour == "orphan":
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(0.3)"], start_new_session=True)
    os._exit(0)
end = time.monotonic() + 60
while time.monotonic() < end:
    time.sleep(0.02)
    if terms and behaviour != "stubborn" and (behaviour != "slow" or terms > 1):
        break
time.sleep(0.2)
note("end")
