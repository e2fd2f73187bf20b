"""Drives transformers' DiffusionGemma as the oracle: loading, shared randomness, traces. Knows no engine.

`generate` itself runs; only its two random calls are replaced by noise that the caller supplies, and what passes
through one denoising step is written down. Needs torch and transformers, so nothing on the serving path imports it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from unittest import mock

import numpy as np
import numpy.typing as npt
import torch
from transformers import DiffusionGemmaForBlockDiffusion
from transformers.models.diffusion_gemma.generation_diffusion_gemma import (
    EntropyBoundSampler,
    LinearTemperatureScheduleLogitsProcessor,
)

Int32Array = npt.NDArray[np.int32]
Float32Array = npt.NDArray[np.float32]
BoolArray = npt.NDArray[np.bool_]
Model = Any  # DiffusionGemmaForBlockDiffusion; transformers is untyped here


class Noise(Protocol):
    """Randomness of one canvas; `dgemma_runtime.noise.CanvasNoise` is the documented one."""

    def initial(self) -> Int32Array: ...

    def uniforms(self, step: int) -> Float32Array: ...

    def renoise(self, step: int) -> Int32Array: ...


NoiseFactory = Callable[[int, int, int, int], Noise]  # seed, canvas_index, canvas_length, vocab_size


def load_oracle(directory: Path, attention: str = "sdpa", experts: str = "eager", threads: int | None = None) -> Model:
    """The checkpoint in fp32 and evaluation mode; raises ValueError where keys are missing, unexpected or misshapen.

    attention: `sdpa` or `eager`; experts: `eager`, `batched_mm` or `grouped_mm`; threads: of the whole process.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    loaded: Any = DiffusionGemmaForBlockDiffusion.from_pretrained(
        directory,
        dtype=torch.float32,
        attn_implementation=attention,
        experts_implementation=experts,
        output_loading_info=True,
    )
    model, report = loaded
    if wrong := {kind: sorted(keys) for kind, keys in report.items() if keys}:
        raise ValueError(f"{directory}: not the weights of its config: {wrong}")
    return model.eval()


# ---------------------------------------------------------------- shared randomness


class _Draws:
    """Replaces the two random calls of one `generate`, and remembers the last draw of each kind."""

    def __init__(self, model: Model, seeds: Sequence[int], noise: NoiseFactory) -> None:
        self._seeds, self._noise = seeds, noise
        self._canvas_length: int = model.config.canvas_length
        self._vocab_size: int = model.config.text_config.vocab_size
        self._canvases: list[Noise] = []
        self.canvas_index = -1
        self.step = 0
        self.uniforms = np.zeros(0, np.float32)  # [B * canvas_length]
        self.sampled = np.zeros(0, np.int64)  # [B * canvas_length]
        self.sample_margins = np.zeros(0)  # [B * canvas_length]

    def start_canvas(self) -> None:
        self.canvas_index += 1
        self.step = -1
        sizes = (self.canvas_index, self._canvas_length, self._vocab_size)
        self._canvases = [self._noise(seed, *sizes) for seed in self._seeds]

    def multinomial(self, probabilities: torch.Tensor, num_samples: int = 1) -> torch.Tensor:
        """Stands for `torch.multinomial`: the first id, in vocabulary order, whose cumulated probability exceeds u."""
        if num_samples != 1 or probabilities.shape[0] != len(self._seeds) * self._canvas_length:
            raise ValueError(f"unexpected draw of {num_samples} from {tuple(probabilities.shape)}")
        self.step += 1
        self.uniforms = np.concatenate([canvas.uniforms(self.step) for canvas in self._canvases])
        edges = probabilities.double().cumsum(-1).numpy()
        u = self.uniforms.astype(np.float64)[:, None]
        ids = np.minimum((edges <= u).sum(-1), edges.shape[-1] - 1)
        rows = np.arange(len(ids))
        above = edges[rows, ids] - u[:, 0]
        below = u[:, 0] - np.where(ids > 0, edges[rows, ids - 1], -np.inf)
        self.sampled, self.sample_margins = ids, np.minimum(above, below)
        return torch.from_numpy(ids)[:, None]

    def initialize_canvas(self, sampler: Any, batch_size: int, device: torch.device) -> torch.Tensor:
        """Stands for `torch.randint` in the sampler: the first canvas, then what renoises it."""
        if batch_size != len(self._seeds):
            raise ValueError(f"{len(self._seeds)} seeds for a batch of {batch_size}")
        first = self.step < 0
        rows = [canvas.initial() if first else canvas.renoise(self.step) for canvas in self._canvases]
        return torch.from_numpy(np.stack(rows).astype(np.int64)).to(device)


@contextmanager
def shared_randomness(model: Model, seeds: Sequence[int], noise: NoiseFactory) -> Iterator[_Draws]:
    """While open, `model.generate` (uncompiled, one call) draws row i's randomness from `noise(seeds[i], ...)`."""
    draws = _Draws(model, seeds, noise)
    prepare = model._prepare_denoiser_inputs

    def prepare_denoiser_inputs(*args: Any, **kwargs: Any) -> Any:
        draws.start_canvas()
        return prepare(*args, **kwargs)

    def initialize(sampler: Any, batch_size: int, device: torch.device) -> torch.Tensor:
        return draws.initialize_canvas(sampler, batch_size, device)

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(model, "_prepare_denoiser_inputs", prepare_denoiser_inputs))
        stack.enter_context(mock.patch.object(torch, "multinomial", draws.multinomial))
        stack.enter_context(mock.patch.object(EntropyBoundSampler, "initialize_canvas", initialize))
        yield draws


def generate(
    model: Model, prompts: Sequence[Sequence[int]], seeds: Sequence[int], noise: NoiseFactory, **options: Any
) -> Int32Array:
    """What `generate` emits after the prompts, [B, canvases * canvas_length]; prompts have one length.

    options: fields of the generation config, e.g. `max_new_tokens`, `max_denoising_steps`, `confidence_threshold`.
    """
    ids = torch.tensor(np.array(prompts, dtype=np.int64))
    with shared_randomness(model, seeds, noise), generation_defaults(model, options) as rest:
        out = model.generate(ids, disable_compile=True, **rest)
    return np.asarray(out.sequences[:, ids.shape[1] :].numpy(), dtype=np.int32)


@contextmanager
def generation_defaults(model: Model, options: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Makes options that are None hold: `generate` would put the defaults back in their place.

    Yields the options that can be passed to `generate`; fixed steps are `stability_threshold=None`.
    """
    removed = {name for name, value in options.items() if value is None}
    config_class = type(model.generation_config)
    defaults = {k: v for k, v in config_class._get_default_generation_params().items() if k not in removed}
    with ExitStack() as stack:
        stack.enter_context(
            mock.patch.object(config_class, "_get_default_generation_params", staticmethod(lambda: defaults))
        )
        for name in removed:
            stack.enter_context(mock.patch.object(model.generation_config, name, None))
        yield {name: value for name, value in options.items() if name not in removed}


# ---------------------------------------------------------------- traces


@dataclass(frozen=True)
class Margins:
    """How far one step is from turning out otherwise; small values are near ties."""

    argmax: float  # gap of the two highest tempered logits, least over the canvas
    sample: float  # distance of u to the edges of its cumulated probability, least over accepted positions
    acceptance: float  # nats, of the cumulated entropies to the bound and between the last in and the first out
    confidence: float  # nats, of the mean entropy to the confidence threshold; inf with fixed steps
    routing: float  # gap of the router probabilities of the last expert in and the first out, least over tokens


@dataclass(frozen=True)
class StepTrace:
    """One denoising step of the oracle."""

    step: int  # counts up from 0
    temperature: float
    canvas_ids: Int32Array  # [canvas_length], what the step was given
    soft: Float32Array  # [canvas_length, hidden], what the step was given; zeros at step 0
    uniforms: Float32Array  # [canvas_length]
    argmax_ids: Int32Array  # [canvas_length]
    sampled_ids: Int32Array  # [canvas_length]
    sample_margins: Float32Array  # [canvas_length]
    argmax_margins: Float32Array  # [canvas_length]
    entropies: Float32Array  # [canvas_length], nats
    accepted: BoolArray  # [canvas_length]
    next_soft: Float32Array  # [canvas_length, hidden], what the next step gets
    finished: bool
    margins: Margins


@dataclass(frozen=True)
class CanvasTrace:
    """One canvas: what was encoded in front of it, the cache then, and its steps."""

    canvas_index: int
    position: int  # tokens in the cache
    encoded_ids: Int32Array  # [n], encoded just before this canvas
    keys: tuple[Float32Array, ...]  # per layer [held, kv_heads, head_dim]; sliding layers hold window - 1 at most
    values: tuple[Float32Array, ...]
    steps: tuple[StepTrace, ...]

    @property
    def output_ids(self) -> Int32Array:
        """[canvas_length]: the canvas as emitted, before anything is cut."""
        return self.steps[-1].argmax_ids


@dataclass(frozen=True)
class GenerationTrace:
    """One request through the oracle."""

    seed: int
    prompt_ids: Int32Array  # [n]
    output_ids: Int32Array  # [canvases * canvas_length], padding after the end as `generate` returns it
    canvases: tuple[CanvasTrace, ...]

    def near_ties(self, below: float) -> list[str]:
        """Names of the decisions that matter to the output and whose margin is below `below`."""
        return [
            f"canvas {canvas.canvas_index} step {step.step}: {name} margin {vars(step.margins)[name]:.1e}"
            for canvas in self.canvases
            for step in canvas.steps
            for name in _decisions(step, last=step is canvas.steps[-1])
            if vars(step.margins)[name] < below
        ]


def _decisions(step: StepTrace, last: bool) -> tuple[str, ...]:
    """Which margins of a step count: the last one emits its argmax, the others go on with accepted samples.

    With fixed steps nothing depends on the argmax of any other step.
    """
    adaptive = np.isfinite(step.margins.confidence)
    if last:
        return ("argmax", "confidence")
    return ("sample", "acceptance", "confidence", *(("argmax",) if adaptive else ()))


class _Recorder:
    """Observes one `generate` of one row."""

    def __init__(self, model: Model, draws: _Draws) -> None:
        self._model, self._draws = model, draws
        self._routing = np.inf
        self._encoded: tuple[Int32Array, int, list[Float32Array], list[Float32Array]] | None = None
        self._steps: list[StepTrace] = []
        self.canvases: list[CanvasTrace] = []

    def after_encode(self, module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        self.finish_canvas()
        layers = output.past_key_values.layers

        def rows(tensors: list[torch.Tensor]) -> list[Float32Array]:
            return [tensor[0].transpose(0, 1).numpy().copy() for tensor in tensors]

        self._encoded = (
            kwargs["input_ids"][0].numpy().astype(np.int32),
            int(output.past_key_values.get_seq_length()),
            rows([layer.keys for layer in layers]),
            rows([layer.values for layer in layers]),
        )

    def after_router(self, module: Any, args: Any, output: Any) -> None:
        ordered = output[0].sort(-1, descending=True).values
        k = module.config.top_k_experts
        if k < ordered.shape[-1]:
            self._routing = min(self._routing, float((ordered[:, k - 1] - ordered[:, k]).min()))

    def step(self, original: Callable[..., Any], kwargs: dict[str, Any]) -> Any:
        self._routing = np.inf
        canvas_ids = kwargs["current_canvas"][0].numpy().astype(np.int32)
        given = kwargs["self_conditioning_logits"]
        result = original(**kwargs)
        logits, finished = result[2][0], bool(result[3][0])
        criteria = kwargs["diffusion_stopping_criteria"]
        accepted = kwargs["sampler"].accepted_token_mask[0].numpy().copy()
        distribution: Any = torch.distributions.Categorical(logits=logits)
        entropies: torch.Tensor = distribution.entropy()
        highest = logits.topk(2, -1).values
        draws, processors = self._draws, kwargs["logits_processor"]
        margins = Margins(
            argmax=float((highest[:, 0] - highest[:, 1]).min()),
            sample=float(draws.sample_margins[accepted].min()),
            acceptance=_acceptance_margin(entropies.numpy(), kwargs["sampler"].entropy_bound),
            confidence=np.inf if criteria is None else abs(float(entropies.mean()) - criteria.confidence_threshold),
            routing=self._routing,
        )
        self._steps.append(
            StepTrace(
                step=draws.step,
                temperature=_temperature(processors, kwargs["cur_step"]),
                canvas_ids=canvas_ids,
                soft=self._soft(None if given is None else given[0], len(canvas_ids)),
                uniforms=draws.uniforms.copy(),
                argmax_ids=logits.argmax(-1).numpy().astype(np.int32),
                sampled_ids=draws.sampled.astype(np.int32),
                sample_margins=draws.sample_margins.astype(np.float32),
                argmax_margins=(highest[:, 0] - highest[:, 1]).numpy(),
                entropies=entropies.numpy(),
                accepted=accepted,
                next_soft=self._soft(logits, len(canvas_ids)),
                finished=finished,
                margins=margins,
            )
        )
        return result

    def _soft(self, logits: torch.Tensor | None, length: int) -> Float32Array:
        embedding = self._model.model.decoder.embed_tokens
        if logits is None:
            return np.zeros((length, embedding.weight.shape[1]), np.float32)
        soft = logits.softmax(-1, dtype=torch.float32) @ embedding.weight * embedding.embed_scale
        return np.asarray(soft.numpy())

    def finish_canvas(self) -> None:
        if self._encoded is None:
            return
        ids, position, keys, values = self._encoded
        index = len(self.canvases)
        self.canvases.append(CanvasTrace(index, position, ids, tuple(keys), tuple(values), tuple(self._steps)))
        self._steps = []


def _temperature(processors: Any, steps_left: int) -> float:
    """Of the step; the processor gets its step as an int32 tensor, so it computes in single precision."""
    schedule = next(p for p in processors if isinstance(p, LinearTemperatureScheduleLogitsProcessor))
    share = torch.tensor(steps_left, dtype=torch.int32) / schedule.max_denoising_steps
    return float(schedule.t_min + (schedule.t_max - schedule.t_min) * share)


def _acceptance_margin(entropies: Float32Array, bound: float) -> float:
    ordered = np.sort(entropies.astype(np.float64))
    before = np.cumsum(ordered) - ordered
    count = int((before <= bound).sum())
    margins = [float(bound - before[count - 1])]
    if count < len(ordered):
        margins += [float(before[count] - bound), float(ordered[count] - ordered[count - 1])]
    return min(margins)


@torch.no_grad()
def trace_generation(
    model: Model, prompt: Sequence[int], seed: int, noise: NoiseFactory, **options: Any
) -> GenerationTrace:
    """Run `generate` on one prompt with shared randomness and write down every step; options as for `generate`."""
    ids = torch.tensor([list(prompt)])
    with ExitStack() as stack:
        draws = stack.enter_context(shared_randomness(model, [seed], noise))
        recorder = _Recorder(model, draws)
        original = model._denoising_step

        def denoising_step(**kwargs: Any) -> Any:
            return recorder.step(original, kwargs)

        stack.enter_context(mock.patch.object(model, "_denoising_step", denoising_step))
        hooks = [model.model.encoder.register_forward_hook(recorder.after_encode, with_kwargs=True)]
        hooks += [layer.router.register_forward_hook(recorder.after_router) for layer in model.model.decoder.layers]
        for hook in hooks:
            stack.callback(hook.remove)
        rest = stack.enter_context(generation_defaults(model, options))
        out = model.generate(ids, disable_compile=True, **rest).sequences[0, ids.shape[1] :]
        recorder.finish_canvas()
    return GenerationTrace(
        seed=seed,
        prompt_ids=np.asarray(prompt, dtype=np.int32),
        output_ids=np.asarray(out.numpy(), dtype=np.int32),
        canvases=tuple(recorder.canvases),
    )
