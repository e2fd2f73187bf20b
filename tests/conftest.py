"""Settings of every test run. Knows no test."""

from __future__ import annotations

from hypothesis import settings

# No deadline: on two busy cores a slow example says nothing of the code. pytest-timeout bounds every test.
settings.register_profile("project", deadline=None)
settings.load_profile("project")
