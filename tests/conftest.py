"""Settings of every test run. Knows no test."""

from __future__ import annotations

import signal

from hypothesis import settings

# No deadline: on two busy cores a slow example says nothing of the code. pytest-timeout bounds every test.
settings.register_profile("project", deadline=None)
settings.load_profile("project")

# A shell ignores SIGINT for what it starts with `&`, processes inherit that, and then no test could press Ctrl-C.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
