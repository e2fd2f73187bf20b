"""Runtime settings: what whoever runs the process may tune, and what an engine gets to work with. Knows no request."""

from __future__ import annotations

from dataclasses import dataclass, fields

from dgemma_runtime.contract import FULL, EngineLimits, Manifest, cache_dtypes
from dgemma_runtime.errors import ConfigurationError
from dgemma_runtime.pages import PageRules

_ELEMENT_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "fp8": 1}  # of keys or values


@dataclass(frozen=True)
class RuntimeSettings:
    """Checked when made; raises ConfigurationError naming setting, value and remedy."""

    max_model_len: int | None = None  # tokens, prompt and output together; None: the engine's own
    max_batch_size: int = 8  # requests that run at once
    prefill_chunk: int = 512  # prompt tokens of one request encoded at once
    prefill_budget: int = 1024  # prompt tokens of all requests per tick
    page_size: int = 64  # tokens
    kv_memory_bytes: int = 4 * 2**30  # for keys and values; at most, see `plan_limits`
    full_pages: int | None = None  # None: what max_batch_size whole contexts need, as far as the memory goes
    sliding_pages: int | None = None  # None: what max_batch_size sequences need
    queue_size: int = 128  # requests that may wait
    threads: int = 0  # of an engine on the CPU; 0: one per core
    gpu: int = 0  # which one, of an engine on a GPU; counted from 0 as CUDA shows them
    cuda_graphs: bool = True  # replay captured denoising steps, on a GPU

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            least = 0 if item.name in ("threads", "gpu") else 1
            if value is None and item.default is None:
                continue
            if isinstance(item.default, bool):
                if not isinstance(value, bool):
                    raise ConfigurationError(f"{item.name} must be true or false, got {value!r}")
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ConfigurationError(f"{item.name} must be an integer of at least {least}, got {value!r}")
        if self.prefill_budget < self.prefill_chunk:
            raise ConfigurationError(
                f"prefill_budget ({self.prefill_budget}) must be at least prefill_chunk ({self.prefill_chunk}); "
                "raise the first or lower the second"
            )

    def context_length(self, manifest: Manifest) -> int:
        """The longest prompt and output together, in tokens."""
        if self.max_model_len is None:
            return manifest.max_model_len
        if self.max_model_len > manifest.max_model_len:
            raise ConfigurationError(
                f"max_model_len is {self.max_model_len}, the engine was built for {manifest.max_model_len} tokens; "
                "lower it or build an engine with a longer context"
            )
        return self.max_model_len


@dataclass(frozen=True)
class PageBytes:
    """Memory of one page, keys and values of all layers of a group."""

    full: int
    sliding: int


def page_bytes(manifest: Manifest, page_size: int) -> PageBytes:
    """Of `page_size` tokens; raises ConfigurationError for a cache type that is not known."""
    if manifest.kv_dtype not in _ELEMENT_BYTES:
        known = ", ".join(_ELEMENT_BYTES)
        raise ConfigurationError(f"the engine's kv_dtype is {manifest.kv_dtype!r}, this runtime knows {known}")
    token = {True: 0, False: 0}  # bytes, by whether a layer is a full one
    for layer in manifest.model.layers:
        elements = sum(_ELEMENT_BYTES[dtype] for dtype in cache_dtypes(manifest.kv_dtype, layer))
        token[layer.kind == FULL] += layer.num_key_value_heads * layer.head_dim * elements
    return PageBytes(full=token[True] * page_size, sliding=token[False] * page_size)


def plan_limits(manifest: Manifest, settings: RuntimeSettings) -> EngineLimits:
    """Page counts from memory. One request over the whole context always fits, or ConfigurationError says what helps.

    By default the cache holds max_batch_size whole contexts, or as many pages as `kv_memory_bytes` pays for. A page
    that was never written costs address space only, where the engine's memory comes from the operating system.
    """
    if manifest.max_batch_size and settings.max_batch_size > manifest.max_batch_size:
        raise ConfigurationError(
            f"max_batch_size is {settings.max_batch_size}, the engine was built for {manifest.max_batch_size}; "
            "lower it or build an engine with a larger one"
        )
    context = settings.context_length(manifest)
    canvas = manifest.model.canvas_length
    max_encode = max(min(settings.prefill_chunk, context, manifest.max_encode_tokens or context), canvas)
    need = PageRules(settings.page_size, manifest.model.sliding_window, max_encode).need(context)
    size = page_bytes(manifest, settings.page_size)
    sliding = settings.sliding_pages or need.sliding * settings.max_batch_size
    left = settings.kv_memory_bytes - sliding * size.sliding
    affordable = max(left, 0) // size.full if size.full else need.full * settings.max_batch_size
    full = settings.full_pages or min(need.full * settings.max_batch_size, affordable)
    if full < need.full or sliding < need.sliding or full * size.full > left:
        required = need.full * size.full + max(sliding, need.sliding) * size.sliding
        raise ConfigurationError(
            f"a context of {context} tokens (max_model_len) needs {need.full} full and {need.sliding} sliding pages, "
            f"and with the sliding pages of {settings.max_batch_size} sequences {_mib(required)} of memory; "
            f"kv_memory_bytes is {settings.kv_memory_bytes} ({_mib(settings.kv_memory_bytes)}), full_pages {full}, "
            f"sliding_pages {sliding}; raise kv_memory_bytes or the page counts, or lower max_model_len or "
            "max_batch_size"
        )
    return EngineLimits(settings.max_batch_size, max_encode, settings.page_size, full, sliding)


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"
