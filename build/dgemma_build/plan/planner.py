"""What fits on a GPU and how fast a step can be: a model, options and cards in, a plan out. Knows no output format."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import product

from dgemma_build.checkpoint import TextConfig
from dgemma_build.plan.cards import GIGA, Card
from dgemma_build.plan.floor import StepFloor, step_work
from dgemma_build.plan.kv import KvSizes
from dgemma_build.plan.options import PRECISIONS, WEIGHT_BITS, PlanOptions
from dgemma_build.plan.runtime_memory import runtime_memory
from dgemma_build.plan.scratch import Scratch, scratch_bytes
from dgemma_build.plan.weights import PlannedWeight, bytes_by_part, planned_weights
from dgemma_runtime.errors import ConfigurationError
from dgemma_runtime.memory_formulas import DeviceMemory, largest

CONTEXTS = (8_192, 65_536, 262_144)  # tokens
_MOST_SEQUENCES = 4096
_CONTEXT_STEP = 256  # tokens; what a shorter context is rounded down to


@dataclass(frozen=True)
class ContextPlan:
    """One GPU, one recipe, one context length."""

    context: int  # tokens, prompt and output together
    sequences: int  # that fit at once; 0: none
    kv_bytes: int  # of one sequence, in pages and laid out
    runtime: DeviceMemory  # of as many sequences as fit, or one
    scratch: Scratch  # for as many canvases, or for `max_batch_size`
    missing_bytes: int  # for one sequence; 0 where it fits
    remedies: tuple[str, ...]  # each of which alone makes it fit
    step_one: StepFloor  # one canvas
    step_all: StepFloor | None  # a canvas of every sequence that fits


@dataclass(frozen=True)
class CardPlan:
    """One GPU and one recipe."""

    card: Card
    options: PlanOptions
    parts: dict[str, int]  # bytes of weights by part
    reserve_bytes: int
    contexts: tuple[ContextPlan, ...]

    @property
    def weights_bytes(self) -> int:
        return sum(self.parts.values())


@dataclass(frozen=True)
class Model:
    """A named config, with its graph's weights by precision."""

    name: str
    config: TextConfig
    _weights: dict[tuple[str, int], list[PlannedWeight]] = field(default_factory=dict, compare=False)

    def weights(self, options: PlanOptions) -> list[PlannedWeight]:
        """Of the graph in the options' precision."""
        key = (options.precision, options.int4_group_size)
        if key not in self._weights:
            self._weights[key] = planned_weights(self.config, options)
        return self._weights[key]

    @property
    def elements(self) -> int:
        """Weights in the graph."""
        return sum(weight.values for weight in self.weights(PlanOptions()))

    def kv(self, options: PlanOptions) -> KvSizes:
        return KvSizes.of(self.config.spec, options.kv)

    def runtime(self, options: PlanOptions, sequences: int, context: int) -> DeviceMemory:
        return runtime_memory(self.config.spec, options, sequences, context)

    def sequence_bytes(self, options: PlanOptions, context: int) -> int:
        """Keys and values of one sequence of `context` tokens, in pages and laid out for its canvas."""
        one = self.runtime(options, 1, context)
        return one.pages + one.rows


def context_lengths(model: Model, max_model_len: int | None) -> tuple[int, ...]:
    """8k, 64k and 256k as far as the limit goes, and the limit; raises ConfigurationError for one out of range."""
    spec = model.config.spec
    limit = spec.max_position_embeddings if max_model_len is None else max_model_len
    if not spec.canvas_length < limit <= spec.max_position_embeddings:
        raise ConfigurationError(
            f"--max-model-len {limit}: must be more than one canvas ({spec.canvas_length} tokens) and at most the "
            f"model's {spec.max_position_embeddings}"
        )
    return (*(length for length in CONTEXTS if length < limit), limit)


def make_plan(model: Model, options: Sequence[PlanOptions], cards: Sequence[Card]) -> list[CardPlan]:
    """A plan of every card with every recipe."""
    return [_card_plan(model, recipe, card) for card in cards for recipe in options]


def _card_plan(model: Model, options: PlanOptions, card: Card) -> CardPlan:
    parts = bytes_by_part(model.weights(options))
    lengths = context_lengths(model, options.max_model_len)
    contexts = tuple(_context_plan(model, options, card, length) for length in lengths)
    return CardPlan(card, options, parts, _reserve(options), contexts)


def _context_plan(model: Model, options: PlanOptions, card: Card, context: int) -> ContextPlan:
    weights = model.weights(options)
    count = sequences_that_fit(model, options, card.memory_bytes, context)
    batch = options.max_batch_size or max(count, 1)

    def step(canvases: int) -> StepFloor:
        return step_work(model.config, weights, options, canvases, context).floor(card)

    return ContextPlan(
        context=context,
        sequences=count,
        kv_bytes=model.sequence_bytes(options, context),
        runtime=model.runtime(options, max(count, 1), context),
        scratch=scratch_bytes(model.config, options, batch, context),
        missing_bytes=max(0, memory_needed(model, options, 1, context) - card.memory_bytes),
        remedies=() if count else tuple(_remedies(model, options, card, context)),
        step_one=step(1),
        step_all=step(count) if count else None,
    )


def _reserve(options: PlanOptions) -> int:
    return round(options.reserve_gb * GIGA)


def memory_needed(model: Model, options: PlanOptions, sequences: int, context: int) -> int:
    """Bytes on the GPU for that many sequences; the scratch is for `max_batch_size` canvases, or for them all."""
    weights = sum(bytes_by_part(model.weights(options)).values())
    scratch = scratch_bytes(model.config, options, options.max_batch_size or sequences, context).total
    return weights + _reserve(options) + scratch + model.runtime(options, sequences, context).total


def sequences_that_fit(model: Model, options: PlanOptions, memory_bytes: int, context: int) -> int:
    """How many sequences of `context` tokens run at once, at most `max_batch_size`."""
    most = options.max_batch_size or _MOST_SEQUENCES
    return _most(most, lambda count: memory_needed(model, options, count, context) <= memory_bytes)


def _most(most: int, holds: Callable[[int], bool]) -> int:
    """The largest number up to `most` for which `holds`, which only ever turns false; or 0."""
    return largest(most, lambda count: count == 0 or holds(count)) or 0


# ---------------------------------------------------------------- what would help


def _remedies(model: Model, options: PlanOptions, card: Card, context: int) -> list[str]:
    """What makes one sequence fit: every single change that does, else the fewest that do together."""

    def fits(changed: PlanOptions, length: int = context) -> bool:
        return memory_needed(model, changed, 1, length) <= card.memory_bytes

    helping = [words for words, changed in _variants(options, card) if fits(changed)]
    found = [words[0] for words in helping if len(words) == 1] or [" ".join(words) for words in helping[:1]]
    if options.max_batch_size:
        batch = _most(options.max_batch_size - 1, lambda count: fits(replace(options, max_batch_size=count)))
        found += [f"--max-batch-size {batch}"] if batch else []
    shorter = _CONTEXT_STEP * _most(context // _CONTEXT_STEP, lambda count: fits(options, count * _CONTEXT_STEP))
    if shorter > model.config.spec.canvas_length:
        found.append(f"--max-model-len {shorter}")
    return found or ["no option here helps; take a GPU with more memory"]


def _variants(options: PlanOptions, card: Card) -> list[tuple[tuple[str, ...], PlanOptions]]:
    """Every way to save memory by options, with the words for it; the fewest changes first."""
    bits = WEIGHT_BITS[options.precision]
    found = []
    for precision in [options.precision, *(name for name in PRECISIONS if WEIGHT_BITS[name] < bits)]:
        narrower = replace(options, precision=precision)
        kv = [options.kv_precision] + ["fp8"] * (options.kv != "fp8")
        plugins = [options.plugins] + [True] * (card.takes_plugins and not options.plugins)
        for chosen in product(kv, plugins):
            changed = replace(narrower, kv_precision=chosen[0], plugins=chosen[1])
            words = (
                [f"--precision {precision}"] * (precision != options.precision)
                + [f"--kv-precision {chosen[0]}"] * (chosen[0] != options.kv_precision)
                + ["--plugins"] * (chosen[1] != options.plugins)
            )
            found.append((tuple(words), changed))
    return sorted(found, key=lambda item: len(item[0]))
