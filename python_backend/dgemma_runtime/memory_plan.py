"""Plans a server's memory at its start: what is used for what, and what fits beside. Knows no engine library.

An engine gets the most pages of keys and values that `plan_limits` wants and memory allows, less a reserve for everyone
else. Everything is counted as if it were written to, so the plan also holds when the server is full.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from dgemma_runtime.contract import EngineLimits, Manifest
from dgemma_runtime.drafter_manifest import DrafterManifest, check_drafter
from dgemma_runtime.errors import ConfigurationError, ManifestError
from dgemma_runtime.host_memory import AvailableMemory, available_memory
from dgemma_runtime.memory_formulas import (
    PROCESS_BYTES,
    LayerWork,
    device_memory,
    drafter_device_memory,
    drafter_host_memory,
    host_memory,
    largest,
    page_pool_bytes,
)
from dgemma_runtime.settings import PageChoices, RuntimeSettings, in_units, plan_limits, within_kv_memory

HOST_BACKENDS = ("onnxruntime", "scripted")
_RESERVE_BYTES, _RESERVE_SHARE = 2**29, 0.1  # kept free: the larger of the two on a CPU, the first on a GPU
_SLOT_GROUP = 64  # what a TensorRT engine's longest context is rounded up to, at most
_SMALLEST_CHUNK = 32  # tokens, of the chunks that are tried

Uses = tuple[tuple[str, int], ...]
"""What memory is used for, in words, and bytes; the pages of keys and values are one of them."""


@dataclass(frozen=True)
class MemoryPlan:
    """What an engine gets, and what all that takes."""

    limits: EngineLimits
    context: int  # tokens, max_model_len
    uses: Uses
    available: AvailableMemory
    reserve_bytes: int

    @property
    def total_bytes(self) -> int:
        return sum(nbytes for _, nbytes in self.uses)

    @property
    def tokens(self) -> int:
        """Of context, all together."""
        return self.limits.full_pages * self.limits.page_size

    @property
    def sequences(self) -> int:
        """Of max_model_len that have their pages at once."""
        per_sequence = -(-self.context // self.limits.page_size)
        return min(self.limits.max_batch_size, self.limits.full_pages // per_sequence)

    def lines(self) -> Iterator[str]:
        """The plan for a person who reads the log."""
        yield f"memory, if all of it is used: {in_units(self.total_bytes)} of {_of(self.available, self.reserve_bytes)}"
        for words, nbytes in self.uses:
            yield f"  {in_units(nbytes):>12}  {words}"
        limits = self.limits
        yield (
            f"context: {limits.full_pages:,} pages of {limits.page_size} tokens and {limits.sliding_pages:,} of the "
            f"sliding layers hold {self.tokens:,} tokens; of {self.context:,} tokens (max_model_len), "
            f"{self.sequences} of at most {limits.max_batch_size} sequences (max_batch_size) fit at once"
        )


def check_memory(directory: Path, manifest: Manifest, settings: RuntimeSettings) -> None:
    """What can be known before the engine is opened, a GPU's memory not; raises ConfigurationError."""
    if manifest.backend in HOST_BACKENDS:
        plan_host_memory(directory, manifest, settings)
    else:
        plan_limits(manifest, settings)
        _drafter(manifest, settings)


def plan_host_memory(
    directory: Path, manifest: Manifest, settings: RuntimeSettings, available: AvailableMemory | None = None
) -> MemoryPlan:
    """Of an engine that lives in the process's own memory. Raises ConfigurationError when one sequence does not fit."""
    available = available or available_memory()
    reserve = max(_RESERVE_BYTES, round(_RESERVE_SHARE * available.nbytes))
    weights = sum((directory / name).stat().st_size for name in manifest.files)
    drafter = _drafter(manifest, settings)

    def uses(chosen: RuntimeSettings, limits: EngineLimits) -> Uses:
        if manifest.backend != "onnxruntime":
            pages = page_pool_bytes(manifest.model, manifest.kv_dtype, limits)
            return (("process", PROCESS_BYTES), ("keys and values in pages", pages))
        spec, context = manifest.model, chosen.context_length(manifest)
        found = host_memory(
            spec, LayerWork(manifest.num_attention_heads, manifest.layer_values), weights, limits, context
        )
        return (
            ("process: Python and its libraries", found.process),
            ("weights", found.weights),
            ("copies of the embedding that the head's products use", found.packed_embedding),
            ("keys and values in pages", found.kv_pools),
            ("contexts laid out for calls", found.workspaces),
            ("what a call works in: attention's scores, activations, logits", found.activations),
            *((("drafter", drafter_host_memory(*drafter, spec, limits, context)),) if drafter else ()),
        )

    if manifest.backend == "onnxruntime" and not (manifest.num_attention_heads and manifest.layer_values):
        raise ManifestError(
            f"{directory}: the manifest does not say num_attention_heads and layer_values, without which memory cannot "
            "be planned; build the engine again with `dgemma-build engine`"
        )
    return _plan(manifest, settings, available, reserve, uses)


def _drafter(manifest: Manifest, settings: RuntimeSettings) -> tuple[DrafterManifest, int] | None:
    """The drafter and the bytes of its weights; None without one. Raises where it is of another denoiser."""
    if settings.draft_model is None:
        return None
    directory = Path(settings.draft_model)
    drafter = DrafterManifest.load(directory, verify_hashes=False)  # the engine verifies them
    check_drafter(directory, drafter, manifest)
    return drafter, sum((directory / name).stat().st_size for name in drafter.files)


def plan_device_memory(
    weights: int, manifest: Manifest, settings: RuntimeSettings, available: AvailableMemory
) -> MemoryPlan:
    """Of an engine on a GPU that has `available` memory before it loads `weights` bytes. Raises ConfigurationError."""
    activations = "fp32" if manifest.precision == "fp32" else "bf16"
    longest = -(-manifest.max_model_len // _SLOT_GROUP) * _SLOT_GROUP
    drafter = _drafter(manifest, settings)

    def uses(chosen: RuntimeSettings, limits: EngineLimits) -> Uses:
        found = device_memory(manifest.model, manifest.kv_dtype, activations, limits, longest)
        return (
            ("weights", weights),
            ("what a call works in: attention's scores, activations, logits", manifest.scratch_bytes),
            ("keys and values in pages", found.pages),
            ("contexts laid out for calls", found.rows + found.encoder + found.fresh + found.opening),
            ("inputs, results and soft embeddings", found.calls),
            *((("drafter", drafter_device_memory(*drafter, limits)),) if drafter else ()),
        )

    return _plan(manifest, settings, available, _RESERVE_BYTES, uses)


# ---------------------------------------------------------------- what fits


def _plan(
    manifest: Manifest,
    settings: RuntimeSettings,
    available: AvailableMemory,
    reserve: int,
    uses: Callable[[RuntimeSettings, EngineLimits], Uses],
) -> MemoryPlan:
    """The most pages that fit, of those that are wanted."""

    def need(chosen: RuntimeSettings, limits: EngineLimits) -> int:
        return sum(nbytes for _, nbytes in uses(chosen, limits))

    def fits(chosen: RuntimeSettings) -> bool:
        return need(chosen, PageChoices.of(manifest, chosen)[0]) + reserve <= available.nbytes

    plan_limits(manifest, settings)  # raises what has nothing to do with memory
    context, choices = settings.context_length(manifest), PageChoices.of(manifest, settings)

    def holds(choice: int) -> bool:
        limits = choices[choice]
        return within_kv_memory(manifest, settings, limits) and need(settings, limits) + reserve <= available.nbytes

    best = largest(len(choices) - 1, holds)
    if best is None:
        least = uses(settings, choices[0])
        remedies = _remedies(manifest, settings, fits)
        raise ConfigurationError(_does_not_fit(context, least, available, reserve, remedies))
    limits = choices[best]
    return MemoryPlan(limits, context, uses(settings, limits), available, reserve)


def _does_not_fit(context: int, uses: Uses, available: AvailableMemory, reserve: int, remedies: list[str]) -> str:
    total = sum(nbytes for _, nbytes in uses)
    parts = ", ".join(f"{in_units(nbytes)} {words}" for words, nbytes in uses)
    return (
        f"one sequence of max_model_len ({context} tokens) does not fit: it needs {in_units(total)} ({parts}), "
        f"there is {_of(available, reserve)}; {'; or '.join(remedies)}"
    )


def _of(available: AvailableMemory, reserve: int) -> str:
    return f"{in_units(available.nbytes)} ({available.source}), of which {in_units(reserve)} stay free"


def _remedies(manifest: Manifest, settings: RuntimeSettings, fits: Callable[[RuntimeSettings], bool]) -> list[str]:
    """Each of which alone makes one sequence fit."""
    found = []
    size, context = settings.page_size, settings.context_length(manifest)
    pages = largest(
        max(context // size - 1, 0), lambda count: fits(replace(settings, max_model_len=(count + 1) * size))
    )
    if pages is not None and (pages + 1) * size > manifest.model.canvas_length:
        found.append(f"lower max_model_len to {(pages + 1) * size}")
    batch = largest(settings.max_batch_size - 1, lambda count: fits(replace(settings, max_batch_size=count + 1)))
    if batch is not None:
        found.append(f"lower max_batch_size to {batch + 1}")
    chunk = settings.prefill_chunk // 2
    while chunk >= max(_SMALLEST_CHUNK, manifest.model.canvas_length):
        if fits(replace(settings, prefill_chunk=chunk, prefill_budget=chunk)):
            found.append(f"lower prefill_chunk and prefill_budget to {chunk}")
            break
        chunk //= 2
    given = [name for name in ("full_pages", "sliding_pages") if getattr(settings, name) is not None]
    if given and fits(replace(settings, full_pages=None, sliding_pages=None)):
        found.append(f"leave {' and '.join(given)} out")
    return found or [
        "no setting alone helps: free memory, or take an engine of a smaller precision or a larger machine"
    ]
