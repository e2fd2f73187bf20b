"""What the programs that start servers do when they are told to stop. Knows no server."""

from __future__ import annotations

import signal
import sys


def exit_on_sigterm() -> None:
    """SIGTERM ends the program as Ctrl-C does: what it started is stopped first."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
