"""Lines for whoever runs the container, as text or as one JSON object each. Knows nothing of what is said."""

from __future__ import annotations

import json
import sys
from datetime import UTC, datetime
from typing import TextIO


class Log:
    """Writes to stderr; `source` names who speaks."""

    def __init__(self, log_format: str = "text", stream: TextIO | None = None) -> None:
        self._json, self._stream = log_format == "json", stream

    @property
    def wraps_children(self) -> bool:
        """Whether lines of other processes have to pass through here to be objects."""
        return self._json

    def say(self, text: str, level: str = "INFO", source: str = "nim-serve") -> None:
        if self._json:
            now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
            line = json.dumps({"time": now, "level": level, "logger": source, "message": text})
        else:
            line = f"{source}: {text}"
        self._write(line)

    def relay(self, line: str, source: str) -> None:
        """A line of another process: one that is an object already stays as it is."""
        if line.startswith("{") and _is_object(line):
            self._write(line)
        elif line.strip():
            self.say(line.rstrip(), "ERROR" if "error:" in line else "INFO", source)

    def _write(self, line: str) -> None:
        """In one piece: children's threads write too, and `print` sends the end of a line by itself."""
        stream = self._stream or sys.stderr
        stream.write(line + "\n")
        stream.flush()


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False
