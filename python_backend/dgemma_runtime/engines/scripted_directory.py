"""A scripted engine from an engine directory, so that server tests need no model. Knows the format of script.json.

`write_scripted` makes such a directory beside a tokenizer's files; nothing else makes one, and `dgemma-build` has no
such backend, so a server runs a script only where someone wrote one on purpose.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from dgemma_runtime.contract import MANIFEST_FILE, EngineLimits, Int32Array, Manifest, file_sha256
from dgemma_runtime.engines.scripted import ChaoticEngine, Script, ScriptedCanvas, ScriptedEngine, scripted_manifest
from dgemma_runtime.errors import EngineError, ManifestError

SCRIPT_FILE = "script.json"
_HANG_S = 3600.0


@dataclass(frozen=True)
class ScriptFile:
    """What is answered to which prompt. An answer that has run out starts again; it should have an end token."""

    default_answer: list[int]
    answers: list[tuple[list[int], list[int]]] = field(default_factory=list)  # ids of whole prompt, answer
    failing_prompt: list[int] = field(default_factory=list)  # the engine fails on prompts that begin so; empty: on none
    hanging_prompt: list[int] = field(default_factory=list)  # the engine does not return on prompts that begin so
    steps: int = 4  # denoising steps per canvas
    delay_s: float = 0.0  # per engine call
    chaotic: bool = False  # no answers: every token depends on everything that a model's would depend on

    def script(self, canvas_length: int) -> Script:
        """From a context to its next canvas of `canvas_length` tokens."""
        answers = [(np.array(p, np.int32), np.array(a, np.int32)) for p, a in self.answers]
        failing, hanging = (np.array(ids, np.int32) for ids in (self.failing_prompt, self.hanging_prompt))

        def script(context: Int32Array) -> ScriptedCanvas:
            if len(failing) and np.array_equal(context[: len(failing)], failing):
                raise EngineError("scripted failure")
            if len(hanging) and np.array_equal(context[: len(hanging)], hanging):
                time.sleep(_HANG_S)
            for prompt, answer in answers:
                if np.array_equal(context[: len(prompt)], prompt):
                    return ScriptedCanvas(_canvas(answer, len(context) - len(prompt), canvas_length), self.steps)
            return ScriptedCanvas(_canvas(np.array(self.default_answer, np.int32), 0, canvas_length), self.steps)

        return script


def _canvas(answer: Int32Array, start: int, length: int) -> Int32Array:
    """`length` tokens of the endlessly repeated answer, from `start` on."""
    canvas: Int32Array = answer[np.arange(start, start + length) % len(answer)]
    return canvas


def write_scripted(directory: Path, script: ScriptFile, vocab_size: int, **manifest: Any) -> None:
    """Write script.json and the manifest; `manifest` goes to `scripted_manifest`. Other files there are listed too."""
    (directory / SCRIPT_FILE).write_text(json.dumps(asdict(script)))
    files = {file.name: file_sha256(file) for file in sorted(directory.iterdir()) if file.name != MANIFEST_FILE}
    replace(scripted_manifest(vocab_size, **manifest), files=files).save(directory)


def open_scripted(directory: Path, limits: EngineLimits) -> ScriptedEngine:
    """Raises ManifestError for a script that cannot be read."""
    manifest = Manifest.load(directory)
    try:
        script = ScriptFile(**json.loads((directory / SCRIPT_FILE).read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise ManifestError(f"{directory / SCRIPT_FILE}: not a script ({error})") from None
    if script.chaotic:
        return ChaoticEngine(manifest, limits, script.delay_s)
    return ScriptedEngine(manifest, limits, script.script(manifest.model.canvas_length), delay_s=script.delay_s)
