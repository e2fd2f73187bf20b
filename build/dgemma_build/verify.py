"""The parity report of an engine directory: the teacher-forced gate over generations of the oracle."""

from __future__ import annotations

from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from dgemma_build.checkpoint import Checkpoint
from dgemma_build.engine_probe import OnnxRuntimeProbe
from dgemma_build.gate import GateReport, Tolerance, check_generation
from dgemma_build.oracle import load_oracle, trace_generation
from dgemma_runtime.contract import Manifest
from dgemma_runtime.errors import ConfigurationError, ManifestError
from dgemma_runtime.noise import CanvasNoise

_CANVASES = 2
_STEPS = 6


def verify_engine(checkpoint_directory: Path, engine_directory: Path) -> dict[str, Any]:
    """Run the gate on prompts below and above the sliding window; the result is plain data for JSON.

    Raises ManifestError when the engine was not built from this checkpoint.
    """
    manifest = Manifest.load(engine_directory)
    checkpoint = Checkpoint(checkpoint_directory)
    if (digest := checkpoint.sha256()) != manifest.checkpoint_sha256:
        raise ManifestError(
            f"{engine_directory}: built from checkpoint {manifest.checkpoint_sha256[:12]}…, "
            f"{checkpoint_directory} is {digest[:12]}…; build the engine again"
        )
    if manifest.backend != "onnxruntime":
        raise ConfigurationError(f"{engine_directory}: verify runs onnxruntime engines, this one is {manifest.backend}")
    oracle = load_oracle(checkpoint_directory)
    window = checkpoint.config.spec.sliding_window
    probe = OnnxRuntimeProbe(engine_directory, max_tokens=2 * window + 1024)
    rng = np.random.default_rng(0)
    report, contexts = GateReport(), (max(window // 3, 1), window - 1, window, window + 1, 2 * window + 7)
    for seed, length in enumerate(contexts):
        prompt = rng.integers(0, checkpoint.config.spec.vocab_size, length)
        trace = trace_generation(
            oracle,
            prompt.tolist(),
            seed,
            CanvasNoise,
            max_new_tokens=_CANVASES * checkpoint.config.spec.canvas_length,
            max_denoising_steps=_STEPS,
            stability_threshold=None,
            eos_token_id=None,
        )
        report.add(check_generation(trace, probe, encode_chunk=max(window // 2, 1)))
    return {
        "passed": report.passed,
        "checkpoint": manifest.checkpoint,
        "checkpoint_sha256": manifest.checkpoint_sha256,
        "onnx_sha256": manifest.onnx_sha256,
        "backend": manifest.backend,
        "backend_version": manifest.backend_version,
        "precision": manifest.precision,
        "oracle": f"transformers {version('transformers')}, torch {version('torch')}, float32",
        "context_lengths": contexts,
        "tolerance": asdict(Tolerance()),
        **asdict(report),
    }
