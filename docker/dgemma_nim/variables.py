"""NIM's variables that set nothing here: which are refused by name, and which are taken with a line in the log.

Refused is what a deployment relies on and would miss without a word: adapters, several GPUs, caches outside of the
GPU. Taken is what only tunes another engine, or asks for what is so here anyway. Knows no setting.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from dgemma_nim.settings import FALSE, SETTINGS
from dgemma_runtime.errors import ConfigurationError

SECRETS = (
    "NGC_API_KEY",
    "NGC_CLI_API_KEY",
    "NIM_NGC_API_KEY",
    "NVIDIA_API_KEY",
    "HF_TOKEN",
    "HUGGING_FACE_HUB_TOKEN",
    "MODELSCOPE_API_TOKEN",
)
# OpenTelemetry's own variables, for the processes that are started.
PASSED_ON = {
    "NIM_OTEL_SERVICE_NAME": "OTEL_SERVICE_NAME",
    "NIM_OTEL_EXPORTER_OTLP_ENDPOINT": "OTEL_EXPORTER_OTLP_ENDPOINT",
    "NIM_OTEL_TRACES_EXPORTER": "OTEL_TRACES_EXPORTER",
}
OWN = ("NIM_PASSTHROUGH_ARGS", "NIM_RUNTIME_CONFIG")


def _off(value: str) -> bool:
    return value.lower() in (*FALSE, "none", "disabled")


def _one(value: str) -> bool:
    return value in ("0", "1")


def _most(value: str) -> bool:
    """Whether a fraction of the GPU's memory leaves to this server what it would take anyway."""
    try:
        return 0.8 <= float(value) <= 1
    except ValueError:
        return False


@dataclass(frozen=True)
class Other:
    """A variable that sets nothing: `harmless` says which values are taken, with `meaning` in the log."""

    name: str
    meaning: str  # what is so instead, or what to do
    harmless: Callable[[str], bool] | None = None  # None: every value is taken

    @property
    def refused(self) -> bool:
        return self.harmless is not None


OTHERS: tuple[Other, ...] = (
    Other("NIM_TENSOR_PARALLEL_SIZE", "an engine runs on one GPU; start a server per GPU", _one),
    Other("NIM_PIPELINE_PARALLEL_SIZE", "an engine runs on one GPU; start a server per GPU", _one),
    Other("NIM_NUM_COMPUTE_NODES", "an engine runs on one node; scale out with replicas", _one),
    Other("NIM_MULTI_NODE", "an engine runs on one node; scale out with replicas", _off),
    Other("NIM_KVCACHE_PERCENT", "memory is planned from what is free; limit it with --kv-memory-bytes", _most),
    Other("NIM_GPU_MEM_FRACTION", "memory is planned from what is free; limit it with --kv-memory-bytes", _most),
    Other("NIM_ENABLE_KV_CACHE_HOST_OFFLOAD", "keys and values stay with the engine; unset it", _off),
    Other("NIM_PEFT_SOURCE", "there are no adapters (LoRA); merge them into the checkpoint and unset it", _off),
    Other("NIM_FT_MODEL", "serve a fine-tuned checkpoint with NIM_MODEL_PATH and unset it", _off),
    Other("NIM_CUSTOM_MODEL_NAME", "give the name with NIM_SERVED_MODEL_NAME and unset it", _off),
    Other("NIM_REWARD_MODEL", "this is not a reward model; unset it", _off),
    Other("NIM_GUIDED_DECODING_BACKEND", "there is no guided decoding yet; unset it", _off),
    Other("NIM_CUSTOM_GUIDED_DECODING_BACKENDS", "there is no guided decoding yet; unset it", _off),
    Other("NIM_ENABLE_PROMPT_LOGPROBS", "there are no log probabilities of prompts; unset it", _off),
    Other("NIM_TOOL_PARSER_PLUGIN", "no code is loaded; the model's own tool calls are parsed. Unset it", _off),
    Other("NIM_REPOSITORY_OVERRIDE", "mirrors are not known; set HF_ENDPOINT, or mount the model", _off),
    Other("NIM_TAGS_SELECTOR", "name one profile with NIM_MODEL_PROFILE instead", _off),
    Other("NIM_MIDDLEWARE_CONFIG_PATH", "there is no middleware; put a proxy in front", _off),
    Other("NIM_SAGEMAKER_MODE", "SageMaker's routes are not served; unset it", _off),
    Other("NIM_CAPTURE_ENABLE", "requests are not captured; unset it", _off),
    Other("NIM_PROXY_CONNECTIVITY_TARGETS", "nothing is probed at the start; unset it", _off),
    Other("NIM_KV_CACHE_HOST_MEM_FRACTION", "keys and values stay with the engine"),
    Other("NIM_PEFT_REFRESH_INTERVAL", "there are no adapters"),
    Other("NIM_PEFT_API_TIMEOUT_SECS", "there are no adapters"),
    Other("NIM_MAX_GPU_LORAS", "there are no adapters"),
    Other("NIM_MAX_CPU_LORAS", "there are no adapters"),
    Other("NIM_MAX_LORA_RANK", "there are no adapters"),
    Other("NIM_CORS_ALLOW_METHODS", "the methods that the API has are allowed"),
    Other("NIM_CORS_ALLOW_HEADERS", "the headers that the API reads are allowed"),
    Other("NIM_CORS_EXPOSE_HEADERS", "the headers that the API sets are exposed"),
    Other("NIM_CORS_MAX_AGE", "the front end's own is used"),
    Other("NIM_ENABLE_AUTO_TOOL_CHOICE", "tool calls are always parsed"),
    Other("NIM_TOOL_CALL_PARSER", "the model's own format is parsed"),
    Other("NIM_REASONING_PARSER", "the model's own format is parsed"),
    Other("NIM_TRUST_CUSTOM_CODE", "no code of a checkpoint is ever run"),
    Other("NIM_FORCE_TRUST_REMOTE_CODE", "no code of a checkpoint is ever run"),
    Other("NIM_FORCE_DETERMINISTIC", "a request with a seed always has the same answer"),
    Other("NIM_SCHEDULER_POLICY", "there is one scheduler, which packs steps and keeps what it admitted"),
    Other("NIM_DISABLE_OVERLAP_SCHEDULING", "there is one scheduler"),
    Other("NIM_LOW_MEMORY_MODE", "weights are always streamed, at the build and at the start"),
    Other("NIM_RELAX_MEM_CONSTRAINTS", "memory is planned before the start, and never beyond what is there"),
    Other("NIM_NUM_KV_CACHE_SEQ_LENS", "memory is planned from what is free"),
    Other("NIM_TOKENIZER_MODE", "there is one tokenizer, the fast one"),
    Other("NIM_PER_REQ_METRICS_ENABLE", "metrics of requests are always there"),
    Other("NIM_OTEL_METRICS_EXPORTER", "metrics are scraped from /metrics"),
    Other("NIM_TELEMETRY_MODE", "nothing is ever reported to anybody"),
    Other("NIM_MANIFEST_PATH", "profiles are computed from the checkpoint"),
    Other("NIM_MANIFEST_ALLOW_UNSAFE", "profiles are computed from the checkpoint"),
    Other("NIM_CACHE_PROBE_TIMEOUT", "the cache is not probed"),
    Other("NIM_NGINX_DIR", "there is no nginx"),
    Other("NIM_RUNTIME_MAX_WORKER_THREADS", "downloads choose their own threads"),
    Other("NIM_ENGINE_MODEL_NAME", "the model is named by NIM_MODEL_PATH"),
    Other("NIM_ENGINE_MODEL_VARIANT", "the precision is named by NIM_MODEL_PROFILE"),
    Other("NIM_ENGINE_MODEL_DOWNLOAD_PROVIDER", "models come from Hugging Face or from a directory"),
)
_BY_NAME = {other.name: other for other in OTHERS}
KNOWN = frozenset(
    (*_BY_NAME, *SECRETS, *PASSED_ON, *OWN, *(name for setting in SETTINGS for name in setting.variables))
)


def notes_on(environment: Mapping[str, str]) -> tuple[str, ...]:
    """A line for each variable that sets nothing; raises ConfigurationError for one that is refused."""
    notes = []
    for name in sorted(environment):
        value = environment[name].strip()
        if not name.startswith("NIM_") or not value or _of_a_service(name, value):
            continue
        if (other := _BY_NAME.get(name)) is not None:
            if other.harmless is not None and not other.harmless(value):
                raise ConfigurationError(f"{name} is {value!r}, which is not supported: {other.meaning}")
            notes.append(f"{name} changes nothing: {other.meaning}")
        elif name not in KNOWN:
            notes.append(f"{name} is not known and changes nothing{_hint(name, KNOWN)}")
    return tuple(notes)


def child_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """What servers are started with: no credentials for downloads, OpenTelemetry's variables by their own names."""
    child = {name: value for name, value in environment.items() if name not in SECRETS}
    for name, plain in PASSED_ON.items():
        if environment.get(name) and not environment.get(plain):
            child[plain] = environment[name]
    return child


def _of_a_service(name: str, value: str) -> bool:
    """What Kubernetes sets in every container for a service that is called nim-something."""
    return value.startswith("tcp://") or name.endswith(("_SERVICE_HOST", "_SERVICE_PORT")) or "_PORT_" in name


def _hint(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.85)
    return f"; did you mean {close[0]}?" if close else ""
