"""What a precision costs: skills, distributions and steps of one engine beside another's of the demo checkpoint.

Distributions are compared step by step on canvases that the reference engine leads: both see the same ids, and each
conditions itself on its own previous step.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Protocol

import numpy as np
import onnx
from onnx import TensorProto, helper

from dgemma_build.bench.inprocess import run_requests, running_service
from dgemma_build.demo.skills import SKILLS, held_out_set
from dgemma_build.demo.tokenizer import render_turn
from dgemma_build.emulation import EmulatedBackend, OnnxFunction
from dgemma_runtime.canvas import Canvas
from dgemma_runtime.codec import Codec
from dgemma_runtime.contract import (
    DenoiseResult,
    DenoiseRow,
    EncodeRow,
    Engine,
    EngineLimits,
    Float32Array,
    Int32Array,
    Manifest,
    SequencePages,
    file_sha256,
)
from dgemma_runtime.engines.onnxruntime import MODEL_FILE, OnnxRuntimeEngine
from dgemma_runtime.engines.ort_rows import Rows
from dgemma_runtime.engines.tensorrt import TensorRtEngine
from dgemma_runtime.noise import CanvasNoise
from dgemma_runtime.parameters import GenerationParameters, default_parameters
from dgemma_runtime.service import GenerationRequest

_PROBABILITIES = "probabilities"  # the value of the graph, see `head.py`
_PAGE, _PAGES, _MAX_TOKENS = 64, 16, 512


@dataclass(frozen=True)
class Skills:
    """Held-out answers of one engine."""

    right: dict[str, int]  # by skill
    of: int  # examples of each skill
    steps_per_canvas: float

    @property
    def percent(self) -> float:
        """Over all skills."""
        return 100 * sum(self.right.values()) / (self.of * len(self.right))


@dataclass(frozen=True)
class Distributions:
    """One engine's distributions beside the reference's, over all positions of all steps."""

    mean_kl: float  # nats, of the reference's from the other's
    largest_kl: float  # nats, mean over the positions of one step
    argmax_agreement: float  # share of positions


def measure_skills(directory: Path, count: int, threads: int = 2) -> Skills:
    """`count` held-out prompts of every skill, seeds 0, 1, ..."""
    right: dict[str, int] = {}
    steps = canvases = 0
    with running_service(directory, threads=threads) as service:
        for skill, tools in SKILLS.items():
            examples = held_out_set(skill, count)
            requests = [
                GenerationRequest(
                    render_turn(example.prompt), replace(service.defaults, seed=seed, max_tokens=_MAX_TOKENS)
                )
                for seed, example in enumerate(examples)
            ]
            ended = [outcome.result() for outcome in run_requests(service, requests)]
            right[skill] = sum(
                tools.check(example.prompt, end.text) for example, end in zip(examples, ended, strict=True)
            )
            steps += sum(end.statistics.denoising_steps for end in ended)
            canvases += sum(end.statistics.canvases for end in ended)
    return Skills(right, count, steps / canvases)


def compare_distributions(reference: Path, other: Path, count: int) -> Distributions:
    """On the first canvas of the answers to `count` held-out prompts of every skill."""
    codec, defaults = Codec.load(reference), default_parameters(Manifest.load(reference).generation_defaults)
    prompts = [codec.encode(render_turn(e.prompt)) for skill in SKILLS for e in held_out_set(skill, count)]
    with TemporaryDirectory() as folder:
        engines = [_revealing(path, Path(folder) / str(i)) for i, path in enumerate((reference, other))]
        divergences: list[float] = []
        agreements: list[float] = []
        for seed, prompt in enumerate(prompts):
            _lead(engines[0], engines[1], prompt, replace(defaults, seed=seed), divergences, agreements)
        for engine in engines:
            engine.close()
    return Distributions(float(np.mean(divergences)), max(divergences), float(np.mean(agreements)))


def _lead(
    reference: Revealing,
    other: Revealing,
    prompt: Int32Array,
    parameters: GenerationParameters,
    divergences: list[float],
    agreements: list[float],
) -> None:
    """One canvas behind a prompt; adds a figure per step."""
    spec = reference.manifest.model
    pages = SequencePages(*(np.arange(_PAGES, dtype=np.int32) for _ in range(2)))
    canvas = Canvas(parameters, CanvasNoise(parameters.seed or 0, 0, spec.canvas_length, spec.vocab_size))
    for engine in (reference, other):
        longest = engine.limits.max_encode_tokens
        for start in range(0, len(prompt), longest):
            engine.encode([EncodeRow(prompt[start : start + longest], start, pages)])
    ended = False
    while not ended:
        row = canvas.row(0, len(prompt), pages)
        (led, p), (result, q) = (engine.reveal(row) for engine in (reference, other))
        positive = p > 0
        ratio = np.log(p, where=positive, out=np.zeros_like(p)) - np.log(np.maximum(q, np.finfo(np.float32).tiny))
        divergences.append(float(np.where(positive, p * ratio, 0).sum(axis=-1).mean()))
        agreements.append(float((led.argmax_ids == result.argmax_ids).mean()))
        ended = canvas.advance(led.argmax_ids[0], led.sampled_ids[0], led.entropies[0])
    for engine in (reference, other):
        engine.release(0)


class Revealing(Engine, Protocol):
    """An engine that gives the distributions of one canvas too."""

    def reveal(self, row: DenoiseRow) -> tuple[DenoiseResult, Float32Array]:
        """The step, and the probabilities [canvas_length, vocab]."""
        ...


class _OnnxRuntime(OnnxRuntimeEngine):
    def __init__(self, directory: Path, limits: EngineLimits) -> None:
        super().__init__(directory, limits, threads=1)
        self._found: Float32Array | None = None

    def reveal(self, row: DenoiseRow) -> tuple[DenoiseResult, Float32Array]:
        result = self.denoise([row])
        assert self._found is not None
        return result, self._found

    def _call(self, rows: Rows, count: int, length: int, canvases: int) -> None:
        binding = self._bound(rows, count, length, canvases)
        binding.bind_output(_PROBABILITIES, "cpu")
        super()._call(rows, count, length, canvases)
        self._found = binding.get_outputs()[-1].numpy()


class _Emulated(TensorRtEngine):
    def __init__(self, directory: Path, limits: EngineLimits) -> None:
        function = OnnxFunction(directory, threads=1, reveal=(_PROBABILITIES,))
        super().__init__(directory, limits, *function.on_host())
        self._function = function

    def reveal(self, row: DenoiseRow) -> tuple[DenoiseResult, Float32Array]:
        result = self.denoise([row])
        return result, self._function.revealed[_PROBABILITIES]


def _revealing(directory: Path, target: Path) -> Revealing:
    """An engine over a copy of a directory whose graph has the probabilities as an output."""
    shutil.copytree(directory, target)
    manifest = Manifest.load(target, verify_hashes=False)
    longest = manifest.max_encode_tokens or _MAX_TOKENS
    limits = EngineLimits(1, longest, _PAGE, _PAGES, _PAGES)
    if manifest.target == EmulatedBackend.target:
        return _Emulated(target, limits)
    model = onnx.load(target / MODEL_FILE, load_external_data=False)
    model.graph.output.append(helper.make_tensor_value_info(_PROBABILITIES, TensorProto.FLOAT, None))
    onnx.save(model, target / MODEL_FILE)
    replace(manifest, files=manifest.files | {MODEL_FILE: file_sha256(target / MODEL_FILE)}).save(target)
    return _OnnxRuntime(target, limits)
