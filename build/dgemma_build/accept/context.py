"""Rows about long contexts: what a step costs over them, and long prompts against the oracle."""

from __future__ import annotations

import time
from dataclasses import asdict

import numpy as np

from dgemma_build.accept.generations import Case, near_ties, request_of, trace_case
from dgemma_build.accept.table import Result, Row, Setting
from dgemma_build.bench import context
from dgemma_build.bench.__main__ import ROOT, THREADS
from dgemma_build.bench.inprocess import run_requests, running_service
from dgemma_build.bench.report import Environment
from dgemma_build.oracle import Model

FLAT_BAR = 2.0  # rest of a step, greatest over least: long contexts leave the caches to nothing else
LINEAR_BAR = 1.5  # attention per token, greatest over least, where the scores have outgrown the processor's caches
LINEAR_FROM = 16_384  # tokens


def _step_over_context(setting: Setting) -> Result:
    points = context.measure(setting.engine("demo"), context.CONTEXTS, lambda text: None)
    per_token = [point.attention_ms / point.context for point in points if point.context >= LINEAR_FROM]
    rest = [point.rest_ms for point in points]
    linear, flat = max(per_token) / min(per_token), max(rest) / min(rest)
    context.write(points, Environment.here(THREADS), ROOT / "benchmarks")
    figure = (
        f"attention per token within {linear:.2f}x, rest {min(rest):.1f} to {max(rest):.1f} ms, "
        f"{points[-1].step_ms:.0f} ms a step at {points[-1].context:,}"
    )
    passed = linear <= LINEAR_BAR and flat <= FLAT_BAR
    return Result(figure, passed, {"points": [asdict(point) for point in points]})


def long_case(model: Model, tokens: int, seed: int) -> Case:
    """Two canvases of four steps behind random tokens."""
    prompt = np.random.default_rng(seed).integers(0, model.config.text_config.vocab_size, tokens)
    return Case(tuple(prompt.tolist()), seed, canvases=2, adaptive=False, max_denoising_steps=4)


def long_prompt(tokens: int) -> Row:
    """Prefill in chunks here, at once there; seeds are tried until a run has no near tie."""

    def measure(setting: Setting) -> Result:
        model = setting.oracle("demo")
        for seed in range(4):
            case = long_case(model, tokens, seed)
            started = time.perf_counter()
            trace = trace_case(model, case)
            theirs_s = time.perf_counter() - started
            if not near_ties(trace):
                break
        with running_service(setting.engine("demo"), threads=1, max_model_len=tokens + 256) as service:
            request = request_of(case, service.defaults, model.config.canvas_length)
            started = time.perf_counter()
            got = run_requests(service, [request])[0].result().token_ids
            ours_s = time.perf_counter() - started
        equal = int((got == trace.output_ids).sum())
        figure = f"{equal} of {len(got)} tokens equal; {ours_s:.0f} s, transformers {theirs_s:.0f} s, one thread each"
        details = {"seed": seed, "near_ties": near_ties(trace), "ours_s": ours_s, "theirs_s": theirs_s}
        return Result(figure, equal == len(trace.output_ids) and not near_ties(trace), details)

    return Row(f"a prompt of {tokens:,} tokens against the oracle, demo", "token-exact", measure, quick=False)


ROWS: tuple[Row, ...] = (
    Row(
        "denoising step over contexts of 1,024 to 262,144 tokens, demo",
        f"full layers' attention linear (per token within {LINEAR_BAR:g}x from {LINEAR_FROM:,} on), "
        f"the rest flat (within {FLAT_BAR:g}x)",
        _step_over_context,
        quick=False,
    ),
    long_prompt(8192),  # CI has a test of it
    long_prompt(32_768),
)
