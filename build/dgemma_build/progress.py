"""How a long build tells what it is doing. Knows no terminal."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Stages of known or unknown size, and what should stay on the screen."""

    def stage(self, text: str, total_bytes: int = 0) -> None:
        """A new stage begins; 0 where its size is not known."""
        ...

    def advance(self, nbytes: int) -> None:
        """So much more of the present stage is done."""
        ...

    def say(self, text: str) -> None:
        """An estimate or a result."""
        ...


class Silent:
    """Says nothing."""

    def stage(self, text: str, total_bytes: int = 0) -> None: ...

    def advance(self, nbytes: int) -> None: ...

    def say(self, text: str) -> None: ...
