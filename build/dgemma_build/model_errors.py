"""Deliberate errors in the oracle: each is a mistake an exporter could make, and the gate must notice every one.

An error is a context manager over a loaded oracle model; while it is open the model computes something else. Not
renormalising the expert weights is missing on purpose: the norm behind the experts takes their common scale out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn
from transformers.models.diffusion_gemma.generation_diffusion_gemma import LinearTemperatureScheduleLogitsProcessor

from dgemma_build.oracle import GenerationTrace, Model, NoiseFactory, trace_generation

ModelError = Callable[[Model], AbstractContextManager[None]]


def revealing_run(model: Model, noise: NoiseFactory) -> GenerationTrace:
    """What the gate is given to notice errors by: a context longer than the window, a canvas, its commit, another."""
    text = model.config.text_config
    prompt = np.random.default_rng(5).integers(0, text.vocab_size, text.sliding_window + 9)
    return trace_generation(
        model,
        prompt.tolist(),
        5,
        noise,
        max_new_tokens=2 * model.config.canvas_length,
        max_denoising_steps=3,
        stability_threshold=None,
        eos_token_id=None,
    )


def _text_stacks(model: Model) -> tuple[Any, Any]:
    return model.model.encoder.language_model, model.model.decoder


def _layers(model: Model) -> list[Any]:
    """Every layer module, the encoder's and the decoder's; their weights are tied, the modules are not."""
    return [layer for stack in _text_stacks(model) for layer in stack.layers]


def _patched(changes: Callable[[Model], list[tuple[Any, str, Any]]]) -> ModelError:
    """An error that replaces attributes: (object, name, value), undone afterwards."""

    @contextmanager
    def error(model: Model) -> Iterator[None]:
        with ExitStack() as stack:
            for target, name, value in changes(model):
                stack.enter_context(_attribute(target, name, value))
            yield

    return error


@contextmanager
def _attribute(target: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(target, name)
    setattr(target, name, value)
    try:
        yield
    finally:
        setattr(target, name, before)


def _window(by: int) -> ModelError:
    def changes(model: Model) -> list[tuple[Any, str, Any]]:
        config = model.config.text_config
        size = config.sliding_window + by
        sliding = [layer.self_attn for layer in _layers(model) if layer.self_attn.is_sliding]
        return [(config, "sliding_window", size), *((attention, "sliding_window", size) for attention in sliding)]

    return _patched(changes)


def _swapped_scalars(model: Model) -> list[tuple[Any, str, Any]]:
    encoder, decoder = _text_stacks(model)
    pairs = list(zip(encoder.layers, decoder.layers, strict=True))
    changes = [(first, "layer_scalar", second.layer_scalar) for first, second in pairs]
    return changes + [(second, "layer_scalar", first.layer_scalar) for first, second in pairs]


def _gelu(part: str) -> ModelError:
    def changes(model: Model) -> list[tuple[Any, str, Any]]:
        modules = [getattr(layer, part) for layer in _layers(model)] if part != "self_conditioning" else []
        modules = modules or [model.model.decoder.self_conditioning]
        return [(module, "act_fn", nn.GELU()) for module in modules]

    return _patched(changes)


def _norm_left_out(path: str) -> ModelError:
    """`path` is an attribute path inside of a layer, or of the decoder where it starts with a dot."""
    *parents, name = path.lstrip(".").split(".")

    def changes(model: Model) -> list[tuple[Any, str, Any]]:
        modules = _layers(model) if not path.startswith(".") else [model.model.decoder]
        for parent in parents:
            modules = [getattr(module, parent) for module in modules]
        return [(module, name, nn.Identity()) for module in modules]

    return _patched(changes)


def _weight_left_out(path: str) -> ModelError:
    """The parameter at `path` inside of a layer counts as ones; decoder and encoder share it."""
    *parents, name = path.split(".")

    def changes(model: Model) -> list[tuple[Any, str, Any]]:
        modules = _layers(model)
        for parent in parents:
            modules = [getattr(module, parent) for module in modules]
        return [(module, name, nn.Parameter(torch.ones_like(getattr(module, name)))) for module in modules]

    return _patched(changes)


def _frequencies(scale: float) -> ModelError:
    """Rotates the full layers as if the frequencies were `scale` times themselves."""

    def changes(model: Model) -> list[tuple[Any, str, Any]]:
        ropes = [stack.rotary_emb for stack in _text_stacks(model)]
        name = "full_attention_inv_freq"
        return [(rope, name, getattr(rope, name) * scale) for rope in ropes]

    return _patched(changes)


def _softcap_too_high(model: Model) -> list[tuple[Any, str, Any]]:
    return [(model, "final_logit_softcapping", model.final_logit_softcapping * 1.01)]


def _expert_routing(change: Callable[[Tensor, Tensor], Tensor]) -> ModelError:
    """Replaces the weights of the chosen experts by change(probabilities, weights), [tokens, top_k]."""

    @contextmanager
    def error(model: Model) -> Iterator[None]:
        def hook(module: Any, args: Any, output: Any) -> Any:
            probabilities, weights, index = output
            return probabilities, change(probabilities.gather(-1, index), weights), index

        hooks = [layer.router.register_forward_hook(hook) for layer in _layers(model)]
        try:
            yield
        finally:
            for handle in hooks:
                handle.remove()

    return error


@contextmanager
def _per_position_window(model: Model) -> Iterator[None]:
    """Sliding decoder layers mask the context per canvas position, as a causal window would."""
    decoder, window = model.model.decoder, model.config.text_config.sliding_window

    def masks(inputs_embeds: Tensor, past_key_values: Any, **_: Any) -> dict[str, Tensor | None]:
        length = inputs_embeds.shape[1]
        position = past_key_values.get_seq_length()
        held = min(position, window - 1)
        keys = torch.arange(position - held, position + length)
        queries = torch.arange(position, position + length)
        near = (queries[:, None] - keys[None, :] < window) | (keys >= position)[None, :]
        return {"full_attention": None, "sliding_attention": near[None, None]}

    with mock.patch.object(decoder, "create_diffusion_decoder_attention_mask", masks):
        yield


@contextmanager
def _untempered_soft(model: Model) -> Iterator[None]:
    """Self-conditioning reads the logits before the temperature."""
    original = model._denoising_step

    def step(**kwargs: Any) -> Any:
        given, left = kwargs["self_conditioning_logits"], kwargs["cur_step"]
        if given is not None:
            before = kwargs["logits_processor"](None, torch.ones(()), cur_step=torch.tensor(left + 1))
            kwargs["self_conditioning_logits"] = given / before
        return original(**kwargs)

    with mock.patch.object(model, "_denoising_step", step):
        yield


@contextmanager
def _temperature_one_step_late(model: Model) -> Iterator[None]:
    original = LinearTemperatureScheduleLogitsProcessor.__call__

    def late(self: Any, input_ids: Any, scores: Tensor, cur_step: Any) -> Any:
        # The step's own temperature is handed to the engine, so what it computes must not follow the wrong one.
        return original(self, input_ids, scores, cur_step if scores.dim() == 0 else cur_step - 1)

    with mock.patch.object(LinearTemperatureScheduleLogitsProcessor, "__call__", late):
        yield


@contextmanager
def _values_from_normed_keys(model: Model) -> Iterator[None]:
    """Full layers take V after the keys' norm weight instead of before."""

    def hook(module: Any, args: Any) -> Any:
        return (args[0] * module.key_weight,)

    full = [layer.self_attn for layer in _layers(model) if not layer.self_attn.is_sliding]
    handles = []
    for attention in full:
        attention.v_norm.key_weight = attention.k_norm.weight
        handles.append(attention.v_norm.register_forward_pre_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _first_expert_only(chosen: Tensor, weights: Tensor) -> Tensor:
    return torch.cat((weights[:, :-1], torch.zeros_like(weights[:, -1:])), -1)


MODEL_ERRORS: dict[str, ModelError] = {
    "window one longer": _window(+1),
    "window one shorter": _window(-1),
    "window per canvas position": _per_position_window,
    "encoder and decoder scalars swapped": _patched(_swapped_scalars),
    "erf GELU in the dense MLP": _gelu("mlp"),
    "erf GELU in the experts": _gelu("experts"),
    "erf GELU in self-conditioning": _gelu("self_conditioning"),
    **{
        f"{name} left out": _norm_left_out(name)
        for name in (
            "input_layernorm",
            "post_attention_layernorm",
            "pre_feedforward_layernorm",
            "pre_feedforward_layernorm_2",
            "post_feedforward_layernorm",
            "post_feedforward_layernorm_1",
            "post_feedforward_layernorm_2",
            "router.norm",
            "self_attn.q_norm",
            "self_attn.k_norm",
            "self_attn.v_norm",
        )
    },
    "final norm left out": _norm_left_out(".norm"),
    "self-conditioning pre_norm left out": _norm_left_out(".self_conditioning.pre_norm"),
    "self-conditioning post_norm left out": _norm_left_out(".self_conditioning.post_norm"),
    "router scale left out": _weight_left_out("router.scale"),
    "per_expert_scale left out": _weight_left_out("router.per_expert_scale"),
    "one expert too few": _expert_routing(_first_expert_only),
    "full layers rotated 1% too fast": _frequencies(1.01),
    "full layers not rotated": _frequencies(0.0),
    "values of full layers from the weighted keys": _values_from_normed_keys,
    "softcap 1% too high": _patched(
        lambda model: [(model, "final_logit_softcapping", model.final_logit_softcapping * 1.01)]
    ),
    "self-conditioning from untempered logits": _untempered_soft,
    "temperature one step late": _temperature_one_step_late,
}
