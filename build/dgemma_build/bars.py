"""A long build on a terminal: one bar per stage. Knows no build."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)


class Bars:
    """A `dgemma_build.progress.Progress` on a console; bars vanish when they end, what was said stays."""

    def __init__(self, console: Console) -> None:
        columns = (DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
        text = TextColumn("{task.description}", markup=False)
        self._bars = Progress(
            SpinnerColumn(),
            text,
            BarColumn(),
            *columns,
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._console = console
        self._task: TaskID | None = None

    def __enter__(self) -> Bars:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def stage(self, text: str, total_bytes: int = 0) -> None:
        if self._task is not None:
            self._bars.remove_task(self._task)
        self._task = self._bars.add_task(text, total=total_bytes or None)

    def advance(self, nbytes: int) -> None:
        assert self._task is not None, "a stage comes first"
        self._bars.advance(self._task, nbytes)

    def say(self, text: str) -> None:
        self._console.print(text, highlight=False)
