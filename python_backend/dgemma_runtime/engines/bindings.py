"""The inputs and outputs of a TensorRT engine: names, types, shapes, and whether an engine has them. Knows no device.

B rows, L tokens a row, R canvas rows, H hidden size, S cache slots; shapes are contiguous. `soft_embedding` [R, L, H]
and `next_soft_embedding` stay on the device; `key_cache_i`, `value_cache_i` hold the context, left-aligned, and
`new_keys_i`, `new_values_i` [B, kv_heads, L, head_dim] what the call's own tokens add to it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dgemma_runtime.contract import FULL, LayerSpec, Manifest, ModelSpec, cache_dtypes, sliding_slots
from dgemma_runtime.engines.device import Shapes, TensorSpec
from dgemma_runtime.errors import ManifestError

# Optimisation profiles: up to max_batch_size rows of a canvas's length, any number of them canvases; or one row of up
# to max_encode_tokens, which is none.
DENOISE, ENCODE = 0, 1
ENGINE_FILE = "rank0.engine"
CACHES = (("key_cache", "new_keys"), ("value_cache", "new_values"))  # in the order of `cache_dtypes`
CALL_INPUTS = {  # name -> type, dimensions
    "token_ids": ("int32", "BL"),
    "position": ("int64", "B"),  # tokens of context
    "sliding_length": ("int64", "B"),  # of these, what sliding layers see
    "is_canvas": ("bool", "B"),
    "canvas_rows": ("int64", "R"),
    "temperature": ("fp32", "R"),
    "uniforms": ("fp32", "RL"),
}
ROW_INPUTS = ("token_ids", "position", "sliding_length")
RESULTS = {"argmax_ids": ("int32", "RL"), "sampled_ids": ("int32", "RL"), "entropies": ("fp32", "RL")}
SOFT_TYPES = ("bf16", "fp16", "fp32")


@dataclass(frozen=True)
class Bindings:
    """What one engine takes."""

    spec: ModelSpec
    kv_dtype: str  # as in the manifest; see `cache_dtypes`
    soft_dtype: str
    slot_group: int  # slots of full layers come in multiples of it, as [.., S / slot_group, slot_group, head_dim]; or 1
    largest_slots: int  # of full layers
    max_batch_size: int
    max_encode_tokens: int

    def specs(self) -> dict[str, TensorSpec]:
        """Every input and output; an engine must take shapes from `least` to `largest`."""
        batch, canvas = self.max_batch_size, self.spec.canvas_length
        least = ({"B": 1, "L": canvas, "R": 0}, {"B": 1, "L": 1, "R": 0})
        largest = ({"B": batch, "L": canvas, "R": batch}, {"B": 1, "L": self.max_encode_tokens, "R": 0})
        specs = {}

        def shapes(axes: str, *last: int) -> tuple[Shapes, Shapes]:
            few, many = (tuple((*(sizes[axis] for axis in axes), *last) for sizes in of) for of in (least, largest))
            return few, many

        for name, (dtype, axes) in CALL_INPUTS.items():
            specs[name] = TensorSpec(True, dtype, (-1,) * len(axes), *shapes(axes))
        for name, (dtype, axes) in RESULTS.items():
            specs[name] = TensorSpec(False, dtype, (-1,) * len(axes))
        hidden = self.spec.hidden_size
        specs["soft_embedding"] = TensorSpec(True, self.soft_dtype, (-1, -1, hidden), *shapes("RL", hidden))
        specs["next_soft_embedding"] = TensorSpec(False, self.soft_dtype, (-1, -1, hidden))
        for index, layer in enumerate(self.spec.layers):
            held = sliding_slots(self.spec)
            sizes = self.cache_shape(layer, -1, -1 if layer.kind == FULL else held)
            few, many = (self.slot_group, self.largest_slots) if layer.kind == FULL else (held, held)
            smallest = (self.cache_shape(layer, 1, few),) * 2
            most = tuple(self.cache_shape(layer, rows, many) for rows in (batch, 1))
            fresh = (-1, layer.num_key_value_heads, -1, layer.head_dim)
            for (cache, new), dtype in zip(CACHES, cache_dtypes(self.kv_dtype, layer), strict=True):
                specs[f"{cache}_{index}"] = TensorSpec(True, dtype, sizes, smallest, most)
                specs[f"{new}_{index}"] = TensorSpec(False, dtype, fresh)
        return specs

    def cache_shape(self, layer: LayerSpec, rows: int, slots: int) -> tuple[int, ...]:
        """Of a layer's cache; -1 slots: dynamic."""
        if layer.kind == FULL and self.slot_group > 1:
            groups = slots // self.slot_group if slots >= 0 else -1
            return (rows, layer.num_key_value_heads, groups, self.slot_group, layer.head_dim)
        return (rows, layer.num_key_value_heads, slots, layer.head_dim)


def read_bindings(
    path: Path, tensors: Mapping[str, TensorSpec], manifest: Manifest, max_batch_size: int, max_encode_tokens: int
) -> Bindings:
    """What the engine in `path` takes; raises ManifestError where that is not what the runtime needs."""
    spec = manifest.model
    soft = tensors.get("soft_embedding")
    group, largest = _full_slots(spec, tensors)
    bindings = Bindings(
        spec=spec,
        kv_dtype=manifest.kv_dtype,
        soft_dtype=soft.dtype if soft and soft.dtype in SOFT_TYPES else SOFT_TYPES[0],
        slot_group=group,
        largest_slots=max(largest, manifest.max_model_len),
        max_batch_size=max_batch_size,
        max_encode_tokens=max_encode_tokens,
    )
    remedy = "build the engine again with this version's `dgemma-build engine`"
    check_tensors(path, bindings.specs(), tensors, remedy)
    return bindings


def check_tensors(path: Path, needed: Mapping[str, TensorSpec], tensors: Mapping[str, TensorSpec], remedy: str) -> None:
    """Raises ManifestError where the `tensors` of an engine are not those that are needed."""
    for name in sorted(needed.keys() | tensors.keys()):
        if problem := _difference(needed.get(name), tensors.get(name)):
            raise ManifestError(f"{path}: the engine and this runtime differ in {name}: {problem}; {remedy}")


def _full_slots(spec: ModelSpec, tensors: Mapping[str, TensorSpec]) -> tuple[int, int]:
    """Slot group and the most slots of the full layers, as the engine's own caches have them."""
    group, largest = 1, []
    for index, layer in enumerate(spec.layers):
        cache = tensors.get(f"key_cache_{index}")
        if layer.kind == FULL and cache is not None and len(cache.shape) in (4, 5):
            group = cache.shape[3] if len(cache.shape) == 5 else 1
            largest += [shape[2] * group for shape in cache.largest]
    return group, min(largest, default=0)


def _difference(needed: TensorSpec | None, found: TensorSpec | None) -> str:
    """What is wrong, or nothing."""
    if needed is None:
        return "the engine has it, this runtime does not know it"
    if found is None:
        return f"the engine does not have it, this runtime needs {_text(needed)}"
    fits = len(needed.shape) == len(found.shape) and all(
        size in (-1, given) for size, given in zip(needed.shape, found.shape, strict=True)
    )
    if not fits or (needed.is_input, needed.dtype) != (found.is_input, found.dtype):
        return f"the engine has {_text(found)}, this runtime needs {_text(needed)}"
    if len(found.largest) != len(needed.largest):
        return f"the engine has {len(found.largest)} profiles, this runtime needs {len(needed.largest)}"
    for profile, (most, given) in enumerate(zip(needed.largest, found.largest, strict=True)):
        if any(size > bound for size, bound in zip(most, given, strict=True)):
            return f"profile {profile} of the engine takes up to {given}, this runtime was set up for {most}"
    for profile, (fewest, given) in enumerate(zip(needed.least, found.least, strict=True)):
        if any(size < bound for size, bound in zip(fewest, given, strict=True)):
            return f"profile {profile} of the engine takes no less than {given}, this runtime needs {fewest}"
    return ""


def _text(spec: TensorSpec) -> str:
    return f"an {'input' if spec.is_input else 'output'} of type {spec.dtype} and shape {spec.shape}"
