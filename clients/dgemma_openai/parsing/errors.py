"""The one error of reading a request's messages and tools. Knows no HTTP."""

from __future__ import annotations


class Unsupported(Exception):
    """Something in a request that cannot be honoured; `param` is its path: `messages[2].content[0].type`."""

    def __init__(self, param: str, message: str) -> None:
        super().__init__(f"{param}: {message}")
        self.param = param
        self.message = message
