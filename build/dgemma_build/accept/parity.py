"""Rows about the model's numbers: the teacher-forced gate, deliberate errors, whole generations."""

from __future__ import annotations

import numpy as np
from tokenizers import Tokenizer

from dgemma_build.accept.generations import Case, Comparison, compare_generations, request_of
from dgemma_build.accept.table import NAMES, Result, Row, Setting
from dgemma_build.bench.inprocess import run_requests, running_service
from dgemma_build.demo.skills import SKILLS, held_out_set
from dgemma_build.demo.tokenizer import render_turn
from dgemma_build.emulation import EmulatedProbe
from dgemma_build.engine_probe import OnnxRuntimeProbe, Probe
from dgemma_build.gate import GateReport, check_generation
from dgemma_build.model_errors import MODEL_ERRORS, revealing_run
from dgemma_build.oracle import trace_generation
from dgemma_runtime.noise import CanvasNoise


def gate(name: str, graph: str = "onnxruntime") -> Row:
    """Every step of whole generations, contexts below and above the window."""

    def measure(setting: Setting) -> Result:
        model = setting.oracle(name)
        window = model.config.text_config.sliding_window
        probe = _probe(setting, name, graph, 8 * window)
        contexts = (1, window // 2, window - 1, window, window + 1, 3 * window + 2)
        report = GateReport()
        for seed, length in enumerate(contexts[::2] if setting.quick else contexts):
            prompt = np.random.default_rng(seed).integers(0, model.config.text_config.vocab_size, length)
            length = 2 * model.config.canvas_length
            run = trace_generation(model, prompt.tolist(), seed, CanvasNoise, max_new_tokens=length, eos_token_id=None)
            report.add(check_generation(run, probe))
        figure = (
            f"{report.steps} steps: {report.argmax_differences} argmax differ, entropy {report.entropy:.1e}, "
            f"K and V {report.cache:.1e}, soft {report.soft:.1e}"
        )
        return Result(figure, report.passed, vars(report))

    whose = "graph" if graph == "onnxruntime" else "TensorRT's graph and engine, emulated in fp32,"
    return Row(f"{whose} against the oracle, {name}", "argmax equal; 1e-4 each", measure)


def _probe(setting: Setting, name: str, graph: str, max_tokens: int) -> Probe:
    if graph == "onnxruntime":
        return OnnxRuntimeProbe(setting.engine(name), max_tokens=max_tokens, threads=1)
    return EmulatedProbe(setting.emulated(name, "fp32", "fp32"), max_tokens=max_tokens, threads=1)


def _errors(setting: Setting) -> Result:
    caught: dict[str, list[str]] = {}
    for name in NAMES:
        model = setting.oracle(name)
        probe = OnnxRuntimeProbe(setting.engine(name), threads=1)
        for error, introduce in MODEL_ERRORS.items():
            with introduce(model):
                wrong = revealing_run(model, CanvasNoise)
            if not check_generation(wrong, probe, stop_at_first=True).passed:
                caught.setdefault(error, []).append(name)
    missed = [error for error in MODEL_ERRORS if error not in caught]
    on = ", ".join(f"{name} {sum(name in names for names in caught.values())}" for name in NAMES)
    figure = f"{len(MODEL_ERRORS) - len(missed)} of {len(MODEL_ERRORS)} ({on})"
    return Result(figure, not missed, {"missed": missed, "caught_on": caught})


def cases_for(setting: Setting, name: str, adaptive: bool) -> list[Case]:
    """Held-out prompts of the demo's skills; random prompts below, at and above the window elsewhere."""
    count = 6 if setting.quick else 18
    if name == "demo":
        tokenizer = Tokenizer.from_file(str(setting.checkpoint(name) / "tokenizer.json"))
        examples = [example for skill in SKILLS for example in held_out_set(skill, 1 + count // 4)]
        steps = None if adaptive else 8
        texts = [tuple(tokenizer.encode(render_turn(example.prompt)).ids) for example in examples]
        return [Case(prompt, seed, 3, adaptive, steps, ends=True) for seed, prompt in enumerate(texts)]
    text = setting.oracle(name).config.text_config
    cases = []
    for seed in range(count):
        length = (text.sliding_window // 2, text.sliding_window, 3 * text.sliding_window)[seed % 3]
        prompt = np.random.default_rng(seed).integers(0, text.vocab_size, length)
        cases.append(Case(tuple(prompt.tolist()), seed, 2 + seed % 2, adaptive))
    return cases


def whole_generations(name: str) -> Row:
    """Token by token against `generate`; differences count unless at a near tie, which is then named."""

    def measure(setting: Setting) -> Result:
        model = setting.oracle(name)
        comparisons: list[Comparison] = []
        with running_service(setting.engine(name), threads=1) as service:
            for adaptive in (True, False):
                comparisons += compare_generations(model, service, cases_for(setting, name, adaptive))
        comfortable = [item for item in comparisons if item.comfortable]
        tied = [item for item in comparisons if not item.comfortable]
        failed = [item for item in comparisons if item.failed]
        figure = (
            f"{len(comfortable) - len(failed)} of {len(comfortable)} exact without a near tie, "
            f"{sum(item.equal for item in tied)} of {len(tied)} with one"
        )
        return Result(figure, bool(comfortable) and not failed, {"runs": [item.describe() for item in comparisons]})

    return Row(f"whole generations against generate, {name}", "token-exact but at named near ties", measure)


def _company(setting: Setting) -> Result:
    different = total = 0
    for name in NAMES:
        model = setting.oracle(name)
        with running_service(setting.engine(name), max_batch_size=3, threads=1) as service:
            cases = cases_for(setting, name, adaptive=True)
            requests = [request_of(case, service.defaults, model.config.canvas_length) for case in cases]
            alone = [run_requests(service, [request])[0].result().token_ids for request in requests]
            busy = [item.result().token_ids for item in run_requests(service, requests, stagger_s=0.01)]
        total += len(requests)
        different += sum(not np.array_equal(one, other) for one, other in zip(alone, busy, strict=True))
    return Result(f"{total - different} of {total} requests identical", different == 0)


ROWS: tuple[Row, ...] = (
    *(gate(name) for name in NAMES),
    *(gate(name, "tensorrt") for name in NAMES),
    Row("deliberate model errors caught by the gate", "all", _errors),
    *(whole_generations(name) for name in NAMES),
    Row("a request alone, and joining and leaving a busy batch", "identical tokens", _company),
)
