"""The container's log where several threads write into it."""

from __future__ import annotations

import json
import subprocess
import sys

# As in the container: unbuffered, so that a line written in two pieces can be cut in two.
WRITERS = """
import json, threading
from dgemma_nim.log import Log
log = Log("json")
line = json.dumps({"message": "relayed"})
threads = [
    threading.Thread(target=lambda: [log.relay(line, "child") for _ in range(2000)]),
    threading.Thread(target=lambda: [log.say("said") for _ in range(2000)]),
]
for thread in threads: thread.start()
for thread in threads: thread.join()
"""


def test_lines_of_several_threads_stay_lines() -> None:
    done = subprocess.run([sys.executable, "-u", "-c", WRITERS], capture_output=True, text=True, check=True)
    records = [json.loads(line) for line in done.stderr.splitlines()]
    assert sorted(record["message"] for record in records) == ["relayed"] * 2000 + ["said"] * 2000
