"""What a denoiser answered, as lines of a file that belong to that denoiser. Knows no engine and no network."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from dgemma_runtime.contract import ModelSpec
from dgemma_runtime.errors import ConfigurationError


@dataclass(frozen=True)
class Record:
    """One answer of the denoiser; every canvas is whole, what follows its end token included."""

    group: str
    prompt: list[int]
    canvases: list[list[int]]
    steps: list[int]  # that each canvas took
    denoiser_sha256: str  # of its checkpoint, as in the manifests of its engines


def read_records(path: Path, denoiser: ModelSpec, denoiser_sha256: str) -> list[Record]:
    """What this denoiser answered; raises ConfigurationError naming line, field and value of what it did not."""
    if not path.is_file():
        raise ConfigurationError(f"{path}: not found; make it with `python -m dgemma_build.drafter.data`")
    records = []
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                records.append(_record(json.loads(line), denoiser, denoiser_sha256))
            except ValueError as error:
                raise ConfigurationError(
                    f"{path}: line {number} is no record of this denoiser: {error}; make the file with "
                    "`python -m dgemma_build.drafter.data` and an engine of this checkpoint"
                ) from None
    if not records:
        raise ConfigurationError(f"{path}: holds no record; make it with `python -m dgemma_build.drafter.data`")
    return records


def _record(raw: Any, denoiser: ModelSpec, denoiser_sha256: str) -> Record:
    """Raises ValueError naming the field that is not as it must be."""
    if not isinstance(raw, dict):
        raise ValueError("it is not a JSON object")
    names = [field.name for field in fields(Record)]
    if differing := sorted(raw.keys() ^ set(names)):
        raise ValueError(f"{differing[0]} is {'missing' if differing[0] in names else 'unknown'}")
    record, length = Record(**raw), denoiser.canvas_length
    if record.denoiser_sha256 != denoiser_sha256:
        raise ValueError(
            f"denoiser_sha256 is {str(record.denoiser_sha256)[:12]}…, the denoiser's {denoiser_sha256[:12]}…"
        )
    if not isinstance(record.group, str):
        raise ValueError(f"group is {_short(record.group)}, expected a text")
    _check_ids("prompt", record.prompt, denoiser.vocab_size)
    if not isinstance(record.canvases, list) or not record.canvases:
        raise ValueError(f"canvases is {_short(record.canvases)}, expected a list of canvases")
    for index, canvas in enumerate(record.canvases):
        _check_ids(f"canvases[{index}]", canvas, denoiser.vocab_size)
        if len(canvas) != length:
            raise ValueError(f"canvases[{index}] has {len(canvas)} tokens, a canvas of the denoiser {length}")
    steps = record.steps
    if not isinstance(steps, list) or not all(type(count) is int and count > 0 for count in steps):
        raise ValueError(f"steps is {_short(steps)}, expected a list of whole numbers above 0")
    if len(steps) != len(record.canvases):
        raise ValueError(f"steps has {len(steps)} numbers for {len(record.canvases)} canvases")
    return record


def _check_ids(name: str, ids: Any, vocab_size: int) -> None:
    if not isinstance(ids, list) or not ids:
        raise ValueError(f"{name} is {_short(ids)}, expected a list of token ids")
    for index, token in enumerate(ids):
        if type(token) is not int or not 0 <= token < vocab_size:
            raise ValueError(f"{name}[{index}] is {_short(token)}, expected a token id from 0 to {vocab_size - 1}")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 20 else f"{text[:14]}…"


def write_records(path: Path, records: Iterable[Record], total: int, console: Console) -> None:
    """Under `path` when all are there."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w") as file:
        for record in track(records, "asking the denoiser", total, console=console, disable=not console.is_terminal):
            file.write(json.dumps(asdict(record)) + "\n")
    temporary.replace(path)
