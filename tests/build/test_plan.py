"""The plan's arithmetic: against the model's published figures, the runtime's own pages, and the built graph."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import onnx
import pytest

from dgemma_build.backends import backend_for
from dgemma_build.checkpoint import Checkpoint, expected_shapes
from dgemma_build.emulation import build_emulated
from dgemma_build.engine import BuildRequest, build_engine
from dgemma_build.plan.cards import CARDS, GIGA, Card, cards_named, given_card
from dgemma_build.plan.floor import step_work
from dgemma_build.plan.host import PREFILL_CHUNK
from dgemma_build.plan.kv import KvSizes
from dgemma_build.plan.options import KV_PRECISIONS, PlanOptions
from dgemma_build.plan.planner import CardPlan, Model, context_lengths, make_plan, memory_needed, sequences_that_fit
from dgemma_build.plan.released import model_config
from dgemma_build.plan.scratch import scratch_bytes
from dgemma_build.plan.weights import (
    ATTENTION,
    DENSE_MLP,
    EMBEDDING,
    EXPERTS,
    PARTS,
    REST,
    SELF_CONDITIONING,
    built_bytes,
    bytes_by_part,
    planned_weights,
)
from dgemma_runtime.contract import Manifest
from dgemma_runtime.errors import CheckpointError, ConfigurationError
from dgemma_runtime.memory_formulas import limits_of
from dgemma_runtime.settings import RuntimeSettings, plan_limits

LONGEST = 262_144  # tokens


@pytest.fixture(scope="module")
def released() -> Model:
    return Model(*model_config(None))


def only(model: Model, options: PlanOptions, card: Card) -> CardPlan:
    (plan,) = make_plan(model, [options], [card])
    return plan


# ---------------------------------------------------------------- weights


def test_released_weights_are_as_published(released: Model) -> None:
    """Billions of weights by part, to the digits of the model's description."""
    counts = dict.fromkeys(PARTS, 0)
    for weight in released.weights(PlanOptions()):
        counts[weight.part] += weight.values
    assert round(counts[EXPERTS] / 1e9, 1) == 22.8
    assert round(counts[ATTENTION] / 1e9, 1) == 1.1
    assert round(counts[DENSE_MLP] / 1e9, 2) == 0.54
    assert round(counts[EMBEDDING] / 1e9, 2) == 0.74
    assert round(counts[SELF_CONDITIONING] / 1e9, 2) == 0.02
    assert released.elements == pytest.approx(25.2e9, rel=0.005)


@pytest.mark.parametrize("activations", ["fp32", "bf16"])
def test_the_graph_holds_the_checkpoint_and_little_else(released: Model, activations: str) -> None:
    """Folding norms saves vectors, tables and the head's ones add some: within a thousandth, matrices exactly."""
    config = released.config
    weights = planned_weights(config, PlanOptions(activations))
    matrices = sum(weight.values for weight in weights if weight.is_matrix)
    shapes = expected_shapes(config)
    assert matrices == sum(math.prod(shape) for shape in shapes.values() if len(shape) > 1)
    everything = sum(math.prod(shape) for shape in shapes.values())
    assert sum(weight.values for weight in weights) == pytest.approx(everything, rel=1e-4)


@pytest.mark.parametrize("precision", ["fp32", "int8", "int4"])
def test_weights_are_exactly_those_of_a_built_engine(odd_checkpoint: Path, tmp_path: Path, precision: str) -> None:
    build_engine(BuildRequest(odd_checkpoint, tmp_path / "engine", precision=precision))
    config = Checkpoint(odd_checkpoint).config
    stored = _initializer_bytes(tmp_path / "engine" / "model.onnx")
    assert built_bytes(config, backend_for("onnxruntime", precision).lowering()) == stored


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp8", "int4"])
def test_a_plan_for_a_gpu_has_the_bytes_of_the_graph_that_is_built(
    odd_checkpoint: Path, tmp_path: Path, precision: str
) -> None:
    build_emulated(odd_checkpoint, tmp_path / "engine", precision, "fp32" if precision == "fp32" else "bf16")
    options = PlanOptions(precision)
    weights = planned_weights(Checkpoint(odd_checkpoint).config, options)
    assert sum(bytes_by_part(weights).values()) == _initializer_bytes(tmp_path / "engine" / "rank0.engine")
    plain = planned_weights(Checkpoint(odd_checkpoint).config, PlanOptions("fp32"))
    assert sum(weight.values for weight in weights) == sum(weight.values for weight in plain)


def _initializer_bytes(path: Path) -> int:
    """Of a graph's weights, without its constants."""
    graph = onnx.load(path, load_external_data=False).graph
    bits = {onnx.TensorProto.INT4: 4}
    total = 0
    for tensor in graph.initializer:
        if not tensor.name.startswith("const/"):
            width = bits.get(tensor.data_type)
            width = width or 8 * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
            total += math.prod(tensor.dims) * width // 8
    return total


def test_fp8_is_a_byte_a_weight(released: Model) -> None:
    """25.2 GB with everything in E4M3; the bf16 embedding adds its second byte."""
    size = sum(bytes_by_part(released.weights(PlanOptions("fp8"))).values())
    assert size - 262_144 * 2816 == pytest.approx(25.2e9, rel=0.01)


def test_quantised_bytes_of_one_expert_stack(released: Model) -> None:
    """The experts' downs stand in eight parts of sixteen experts; fp8 has a scale for each output of a part."""
    count, stem = 128 * 704 * 2816, "layers.0.experts.down"

    def stored(options: PlanOptions) -> int:
        return sum(item.nbytes for item in released.weights(options) if item.name.startswith(stem))

    assert stored(PlanOptions("bf16")) == 2 * count
    assert stored(PlanOptions("fp8")) == count + 2 * 8 * 2816
    assert stored(PlanOptions("int4", int4_group_size=64)) == count // 2 + 2 * count // 64
    assert stored(PlanOptions("int4", int4_group_size=128)) == count // 2 + 2 * count // 128


def test_recipes_leave_embedding_router_and_norms_alone(released: Model) -> None:
    sizes = {name: bytes_by_part(released.weights(PlanOptions(name))) for name in ("bf16", "int4")}
    for part in (EMBEDDING, REST):
        assert sizes["int4"][part] == sizes["bf16"][part]
    for part in (EXPERTS, ATTENTION, DENSE_MLP, SELF_CONDITIONING):
        assert sizes["int4"][part] * 16 == sizes["bf16"][part] * 4.5  # 4 bits and 16 more for each 32 weights


# ---------------------------------------------------------------- keys and values


def test_released_keys_and_values_are_as_published() -> None:
    kv = KvSizes.of(model_config(None)[1].spec, "bf16")
    assert kv.full_token_bytes == 20_480
    assert kv.sliding_token_bytes == 204_800
    assert kv.seen_bytes(LONGEST) == 20_480 * LONGEST + 204_800 * 1023  # 5.4 GB and 0.21 GB
    assert round(kv.seen_bytes(LONGEST) / 1e9, 2) == 5.58


@pytest.mark.parametrize("precision", KV_PRECISIONS)
@pytest.mark.parametrize("context", [130, 1024, 4000, 4096])
@pytest.mark.parametrize("longest", [0, 256])
def test_sequences_have_the_pages_that_the_runtime_reserves(
    odd_engine: Path, precision: str, context: int, longest: int
) -> None:
    """Where it keeps none for later prompts; an engine may limit its chunks."""
    manifest = Manifest.load(odd_engine)
    manifest = replace(manifest, kv_dtype=precision, max_encode_tokens=longest)
    settings = RuntimeSettings(max_model_len=context, max_batch_size=3, prefix_cache=False)
    assert limits_of(manifest.model, 3, context, longest or PREFILL_CHUNK) == plan_limits(manifest, settings)


def test_fp8_halves_all_but_the_keys_of_full_layers(released: Model) -> None:
    wide, narrow = (KvSizes.of(released.config.spec, kv) for kv in ("bf16", "fp8"))
    assert narrow.sliding_token_bytes * 2 == wide.sliding_token_bytes
    assert narrow.full_token_bytes * 4 == wide.full_token_bytes * 3


# ---------------------------------------------------------------- time


def test_a_step_at_batch_one_is_bound_by_the_weights(released: Model) -> None:
    """8.4 ms in fp8 at 3.0 TB/s, 0.25 more for the bf16 embedding, 17 in bf16; 2 TFLOP and 0.4 for the head."""
    card = given_card(80, 3000, 989)
    assert card is not None
    for options, published in ((PlanOptions("fp8"), 8.65), (PlanOptions("bf16"), 16.8)):
        work = step_work(released.config, released.weights(options), options, 1, 0)
        step = work.floor(card)
        assert step.bound == "bytes"
        assert step.ms == pytest.approx(published, rel=0.02)
    options = PlanOptions("bf16")
    (flops,) = step_work(released.config, released.weights(options), options, 1, 0).flops.values()
    head = 2 * 256 * 262_144 * 2816
    assert round(head / 1e12, 1) == 0.4
    assert flops - 2 * head == pytest.approx(1.6e12, rel=0.1)  # 3.1 B active weights, twice, 256 tokens; rounded to 2


def test_arithmetic_takes_over_as_the_batch_grows(released: Model) -> None:
    """About 8 canvases in fp8 on an H100."""
    options, card = PlanOptions("fp8"), CARDS["h100-80"]
    weights = released.weights(options)
    bounds = [step_work(released.config, weights, options, batch, 0).floor(card).bound for batch in range(1, 33)]
    turn = bounds.index("flops") + 1
    assert bounds == ["bytes"] * (turn - 1) + ["flops"] * (33 - turn)
    assert 4 <= turn <= 12


def test_a_long_context_is_read_in_every_step(released: Model) -> None:
    options = PlanOptions("bf16")
    weights = released.weights(options)
    short, long = (step_work(released.config, weights, options, 1, length).read_bytes for length in (1023, LONGEST))
    assert long - short == 20_480 * (LONGEST - 1023)


def test_experts_that_no_token_reaches_are_not_read() -> None:
    name, config = model_config(None)
    few = replace(config, spec=replace(config.spec, canvas_length=1))
    options = PlanOptions("bf16")
    model = Model(name, few)
    parts = bytes_by_part(model.weights(options))
    read = step_work(few, model.weights(options), options, 1, 0).read_bytes
    kv = KvSizes.of(few.spec, "bf16").canvas_bytes()
    assert read - kv == pytest.approx(sum(parts.values()) - parts[EXPERTS] * 15 / 16, rel=1e-9)


# ---------------------------------------------------------------- what fits


def test_the_released_model_in_int4_with_8k_of_context_fits_18_gb(released: Model) -> None:
    plan = only(released, PlanOptions("int4", max_model_len=8192), CARDS["budget-18"])
    (item,) = plan.contexts
    assert item.sequences >= 1
    assert plan.weights_bytes + plan.reserve_bytes + item.scratch.total + item.runtime.total <= 18 * GIGA


def test_what_fits_fills_the_memory_and_one_more_does_not_fit(released: Model) -> None:
    for options in (PlanOptions("int4"), PlanOptions("fp8", kv_precision="fp8", plugins=True)):
        for context in (8192, LONGEST):
            memory = CARDS["h200-141"].memory_bytes
            count = sequences_that_fit(released, options, memory, context)
            assert count > 1
            assert memory_needed(released, options, count, context) <= memory
            assert memory_needed(released, options, count + 1, context) > memory


def test_the_batch_limits_the_sequences_and_fixes_the_scratch(released: Model) -> None:
    card = CARDS["h100-80"]
    free = only(released, PlanOptions("fp8"), card).contexts[0]
    limited = only(released, PlanOptions("fp8", max_batch_size=4), card).contexts[0]
    assert limited.sequences == 4 < free.sequences
    assert limited.scratch == scratch_bytes(released.config, PlanOptions("fp8"), 4, 8192)
    assert limited.step_all is not None
    assert limited.step_all.batch == 4


def test_bf16_on_a_small_card_says_by_how_much_not_and_what_helps(released: Model) -> None:
    item = only(released, PlanOptions("bf16"), CARDS["rtx4090-24"]).contexts[0]
    assert item.sequences == 0
    assert item.step_all is None
    assert item.missing_bytes == memory_needed(released, PlanOptions("bf16"), 1, 8192) - 24 * GIGA
    assert item.remedies == ("--precision int4",)


@pytest.mark.parametrize(
    ("options", "memory_gb", "context"),
    [
        (PlanOptions("bf16"), 58, LONGEST),
        (PlanOptions("int4"), 18, LONGEST),
        (PlanOptions("int4"), 20, 65_536),
        (PlanOptions("fp8", max_batch_size=64), 48, 8192),
        (PlanOptions("fp32"), 30, LONGEST),
    ],
)
def test_every_remedy_alone_makes_a_sequence_fit(
    released: Model, options: PlanOptions, memory_gb: float, context: int
) -> None:
    card = given_card(memory_gb, 1000, 100)
    assert card is not None
    item = next(item for item in only(released, options, card).contexts if item.context == context)
    assert item.sequences == 0
    assert item.remedies
    for remedy in item.remedies:
        words = remedy.split()
        changed, length = options, context
        while words:
            match words.pop(0):
                case "--precision":
                    changed = replace(changed, precision=words.pop(0))
                case "--kv-precision":
                    changed = replace(changed, kv_precision=words.pop(0))
                case "--plugins":
                    changed = replace(changed, plugins=True)
                case "--max-batch-size":
                    changed = replace(changed, max_batch_size=int(words.pop(0)))
                case "--max-model-len":
                    length = int(words.pop(0))
                case word:
                    pytest.fail(f"unknown remedy {word}")
        assert sequences_that_fit(released, changed, card.memory_bytes, length) > 0


def test_nothing_helps_where_the_smallest_weights_are_too_large(released: Model) -> None:
    card = given_card(8, 1000, 100)
    assert card is not None
    for item in only(released, PlanOptions("int4"), card).contexts:
        assert item.remedies == ("no option here helps; take a GPU with more memory",)


def test_scratch_is_of_the_widest_stage(released: Model) -> None:
    config, options = released.config, PlanOptions("bf16")
    one, eight = (scratch_bytes(config, options, batch, 8192) for batch in (1, 8))
    assert one.logits == 2 * 256 * 262_144 * 4
    assert eight.total == 8 * one.total
    assert one.total == one.layer + one.logits
    long = scratch_bytes(config, options, 1, LONGEST)
    assert long.attention == 3 * 2 * 256 * LONGEST * 2
    assert long.total == long.layer + long.attention + long.logits // 4
    fused = scratch_bytes(config, PlanOptions("bf16", plugins=True), 1, LONGEST)
    assert fused.logits == 256 * 262_144 * 2
    assert fused.attention == long.attention
    assert scratch_bytes(config, PlanOptions("bf16", plugins=True), 8, LONGEST).logits == 2 * fused.logits
    assert fused.experts < long.experts


def test_contexts_end_at_the_limit(released: Model) -> None:
    assert context_lengths(released, None) == (8192, 65_536, LONGEST)
    assert context_lengths(released, 8192) == (8192,)
    assert context_lengths(released, 100_000) == (8192, 65_536, 100_000)


@pytest.mark.parametrize("length", [256, LONGEST + 1, -1])
def test_a_context_out_of_range_is_refused(released: Model, length: int) -> None:
    with pytest.raises(ConfigurationError, match=f"--max-model-len {length}: .*262144"):
        context_lengths(released, length)


# ---------------------------------------------------------------- edges


def test_a_checkpoint_is_named_and_read_as_the_builder_reads_it(odd_checkpoint: Path) -> None:
    name, config = model_config(odd_checkpoint)
    assert name == "odd_a"
    assert config.spec == Checkpoint(odd_checkpoint).config.spec


def test_only_the_config_is_read(odd_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((odd_checkpoint / "config.json").read_text())
    name, config = model_config(tmp_path)
    assert Model(name, config).elements > 0


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gemma4"}')
    with pytest.raises(CheckpointError, match="'gemma4'"):
        model_config(tmp_path)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"precision": "int8"}, "--precision int8: choose one of fp32"),
        ({"kv_precision": "int4"}, "--kv-precision int4: choose one of fp32"),
        ({"int4_group_size": 48}, "--int4-group-size 48: choose one of 32, 64, 128"),
        ({"max_batch_size": 0}, "--max-batch-size 0: must be at least 1"),
        ({"reserve_gb": -1.0}, "--reserve-gb -1: must be"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, str], words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        PlanOptions(**options)  # type: ignore[arg-type]


def test_cards_are_named_or_given_whole() -> None:
    assert [card.name for card in cards_named(["budget-18", "h100-80", "budget-18"])] == ["budget-18", "h100-80"]
    with pytest.raises(ConfigurationError, match="--gpu a100: not known; choose of h100-80"):
        cards_named(["a100"])
    assert given_card(None, None, None) is None
    with pytest.raises(ConfigurationError, match="--tflops: missing"):
        given_card(24, 1000, None)
    with pytest.raises(ConfigurationError, match="--bandwidth-gbs -1: must be above 0"):
        given_card(24, -1, 100)
