"""Runtime settings: what whoever runs the process may tune, and what an engine gets to work with. Knows no request."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from dgemma_runtime.contract import EngineLimits, Manifest
from dgemma_runtime.errors import ConfigurationError
from dgemma_runtime.memory_formulas import largest, page_pool_bytes
from dgemma_runtime.pages import PageRules

_PREFIX_TOKENS = 262_144  # at most, beyond whole contexts of all that run at once


@dataclass(frozen=True)
class RuntimeSettings:
    """Checked when made; raises ConfigurationError naming setting, value and remedy."""

    max_model_len: int | None = None  # tokens, prompt and output together; None: the engine's own
    max_batch_size: int = 8  # requests that run at once
    prefill_chunk: int = 512  # prompt tokens of one request encoded at once
    prefill_budget: int = 1024  # prompt tokens of all requests per tick
    # Of the engine's time, for long prompts while canvases run. At a third a median step takes at most twice as long:
    # a chunk is no longer than a step, or two of three steps have none beside them.
    prefill_share: float = 1 / 3
    prefix_cache: bool = True  # keep pages of ended requests for others that begin alike
    page_size: int = 64  # tokens
    kv_memory_bytes: int | None = None  # for pages of keys and values, at most; None: what memory allows
    full_pages: int | None = None  # None: see `plan_limits`
    sliding_pages: int | None = None  # None: see `plan_limits`
    queue_size: int = 128  # requests that may wait
    threads: int = 0  # of an engine on the CPU; 0: one per core
    gpu: int = 0  # which one, of an engine on a GPU; counted from 0 as CUDA shows them
    cuda_graphs: bool = True  # replay captured denoising steps, on a GPU
    draft_model: str | None = None  # engine directory of a drafter; None: none

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            least = 0 if item.name in ("threads", "gpu") else 1
            if value is None and item.default is None:
                continue
            if item.name == "prefill_share":
                if not isinstance(value, float) or not 0 < value < 1:
                    raise ConfigurationError(f"prefill_share must be a number between 0 and 1, got {value!r}")
                continue
            if item.name == "draft_model":
                if not isinstance(value, str) or not value:
                    raise ConfigurationError(
                        f"draft_model must be the path of a drafter's engine directory, got {value!r}"
                    )
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


def plan_limits(manifest: Manifest, settings: RuntimeSettings) -> EngineLimits:
    """The pages that an engine should have, if memory goes as far as `kv_memory_bytes`, or as it takes.

    Full pages: whole contexts for all that run at once, and with the prefix cache as many again for what has ended, of
    262,144 tokens at most. Sliding pages: what all that run at once reserve, and with the prefix cache as many windows
    beside. Where `kv_memory_bytes` is less, first the full pages shrink, then the kept windows. Raises
    ConfigurationError where not even one request over the whole context fits.
    """
    if manifest.max_batch_size and settings.max_batch_size > manifest.max_batch_size:
        raise ConfigurationError(
            f"max_batch_size is {settings.max_batch_size}, the engine was built for {manifest.max_batch_size}; "
            "lower it or build an engine with a larger one"
        )
    choices = PageChoices.of(manifest, settings)
    best = largest(len(choices) - 1, lambda choice: within_kv_memory(manifest, settings, choices[choice]))
    if best is None:
        least, budget = choices[0], settings.kv_memory_bytes
        required = page_pool_bytes(manifest.model, manifest.kv_dtype, least)
        raise ConfigurationError(
            f"kv_memory_bytes is {budget} ({in_units(budget or 0)}); one sequence of max_model_len "
            f"({settings.context_length(manifest)} tokens) with the sliding pages of max_batch_size "
            f"({settings.max_batch_size}) sequences takes {required} ({in_units(required)}): {least.full_pages} full "
            f"and {least.sliding_pages} sliding pages of {settings.page_size} tokens; raise kv_memory_bytes to that, "
            "or lower max_model_len or max_batch_size"
        )
    return choices[best]


def within_kv_memory(manifest: Manifest, settings: RuntimeSettings, limits: EngineLimits) -> bool:
    """Whether `kv_memory_bytes` pays for these pages."""
    most = settings.kv_memory_bytes
    return most is None or page_pool_bytes(manifest.model, manifest.kv_dtype, limits) <= most


@dataclass(frozen=True)
class PageChoices:
    """The page counts that settings leave open, from the fewest to the most that are of use."""

    least: EngineLimits
    windows: int  # that may be kept beyond what `least` has
    window_pages: int
    more_full: int  # pages that may be added when all windows are there

    @staticmethod
    def of(manifest: Manifest, settings: RuntimeSettings) -> PageChoices:
        """Raises ConfigurationError for counts that do not hold one sequence."""
        model, batch, size = manifest.model, settings.max_batch_size, settings.page_size
        context = settings.context_length(manifest)
        chunk = min(settings.prefill_chunk, context, manifest.max_encode_tokens or context)
        encoded = max(chunk, model.canvas_length)
        rules = PageRules(size, model.sliding_window, encoded)
        need = rules.need(context)
        for name, given, needed in (
            ("full_pages", settings.full_pages, need.full),
            ("sliding_pages", settings.sliding_pages, need.sliding),
        ):
            if given is not None and given < needed:
                raise ConfigurationError(
                    f"{name} is {given}, one sequence of max_model_len ({context} tokens) needs {needed} pages of "
                    f"{size} tokens; raise {name} or lower max_model_len"
                )
        kept = settings.prefix_cache and settings.sliding_pages is None
        window = min(rules.pages(model.sliding_window - 1), need.full)
        sliding = settings.sliding_pages or batch * need.sliding + kept * window
        full = settings.full_pages or need.full
        wanted = batch * need.full
        if settings.prefix_cache:
            wanted += min(wanted, rules.pages(_PREFIX_TOKENS))
        return PageChoices(
            EngineLimits(batch, encoded, size, full, sliding),
            windows=kept * (batch - 1),
            window_pages=window,
            more_full=0 if settings.full_pages else wanted - need.full,
        )

    def __len__(self) -> int:
        return 1 + self.windows + self.more_full

    def __getitem__(self, choice: int) -> EngineLimits:
        windows = min(choice, self.windows)
        return replace(
            self.least,
            full_pages=self.least.full_pages + choice - windows,
            sliding_pages=self.least.sliding_pages + windows * self.window_pages,
        )


def in_units(size: int) -> str:
    """Bytes for a person."""
    return f"{size / 2**30:,.2f} GiB" if size >= 2**30 else f"{size / 2**20:,.1f} MiB"
