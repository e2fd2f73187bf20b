"""Several observers as one: all are told, and one that fails harms nobody."""

from __future__ import annotations

import inspect
import logging
from typing import Any

import pytest

from dgemma_runtime.observer import Observer
from dgemma_runtime.observers import Observers

HOOKS = [name for name, _ in inspect.getmembers(Observer, inspect.isfunction) if not name.startswith("_")]


class Listening(Observer):
    """Keeps every call."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[Any, ...]]] = []

    def __getattribute__(self, name: str) -> Any:
        if name in HOOKS:
            return lambda *arguments: self.calls.append((name, arguments))
        return super().__getattribute__(name)


class Failing(Listening):
    """Fails whenever a canvas is committed."""

    def __getattribute__(self, name: str) -> Any:
        if name == "committed":
            raise RuntimeError("no memory for this")
        return super().__getattribute__(name)


def arguments_of(hook: str) -> list[int]:
    return list(range(len(inspect.signature(getattr(Observer, hook)).parameters) - 1))


@pytest.mark.parametrize("hook", HOOKS)
def test_every_hook_reaches_all(hook: str) -> None:
    first, second = Listening(), Listening()
    getattr(Observers([first, second]), hook)(*arguments_of(hook))
    assert first.calls == second.calls == [(hook, tuple(arguments_of(hook)))]


def test_one_that_fails_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    failing, other = Failing(), Listening()
    observers = Observers([failing, other])
    with caplog.at_level(logging.ERROR):
        for hook in ("submitted", "committed", "finished"):
            getattr(observers, hook)(*arguments_of(hook))
    assert [name for name, _ in other.calls] == ["submitted", "committed", "finished"]
    assert [name for name, _ in failing.calls] == ["submitted"]
    assert "Failing failed at committed" in caplog.text
