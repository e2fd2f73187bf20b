"""Engines with TensorRT-LLM 1.2: our graph, its grouped-GEMM experts. Knows the graph's inputs, not the model.

TensorRT-LLM removed its engine workflow in July 2026: `trtllm-build`, the builder, the plugins, the C++ executor and
the Triton backend for engines (its pull requests 15763, 15907, 15918 and 16369). 1.2.1 of April 2026 is the last
release with them, on TensorRT 10.14 and Python 3.12, beside a transformers that is too old for this model: it needs
an environment of its own. Of that release this backend uses TensorRT and one plugin (`tensorrt_llm_experts`). Attention
is TensorRT's own: `GPTAttention` is causal within a call, and a canvas is not.

An engine is deserialised where that plugin is registered, so serving it needs the same environment.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass, replace
from pathlib import Path

import onnx

from dgemma_build.backends import CallLimits
from dgemma_build.checkpoint import TextConfig
from dgemma_build.graph import Lowering
from dgemma_build.older_operators import write_out
from dgemma_build.progress import Progress
from dgemma_build.tensorrt import TensorRtBackend
from dgemma_build.tensorrt_llm_experts import GEGLU, NAMESPACE, PLUGIN, PLUGIN_VERSION
from dgemma_runtime.errors import ConfigurationError

VERSIONS = "1.2."  # of these releases are the numbers below
_REMOVED = (
    "TensorRT-LLM removed its engine builder, plugins and C++ executor in July 2026; 1.2.1 is the last release with "
    "them: install tensorrt-llm==1.2.1 in an environment of its own (Linux, Python 3.12, TensorRT 10.14, an NVIDIA "
    "GPU), or choose --backend tensorrt"
)


@dataclass(frozen=True)
class TensorRtLlmBackend(TensorRtBackend):
    """TensorRT as TensorRT-LLM brings it, with that library's experts. See `open_backend`."""

    llm_version: str
    gpu: str  # the one here: TensorRT builds for no other

    @property
    def version(self) -> str:
        """Of both libraries: an engine needs the same two."""
        return f"{self.llm_version}+tensorrt.{super().version}"

    @property
    def target(self) -> str:
        return self.gpu

    def lowering(self) -> Lowering:
        """Experts in the plugin; everything else as for TensorRT."""
        return replace(super().lowering(), moe="tensorrt_llm")

    def build(
        self, directory: Path, config: TextConfig, max_model_len: int, limits: CallLimits, progress: Progress
    ) -> int:
        """As for TensorRT, after operators that 10.14's parser does not know are written out."""
        model = onnx.load(directory / "model.onnx", load_external_data=False)
        onnx.save(write_out(model), directory / "model.onnx")
        return super().build(directory, config, max_model_len, limits, progress)


def open_backend(precision: str, kv_precision: str = "bf16") -> TensorRtLlmBackend:
    """The backend where TensorRT-LLM 1.2 is installed; elsewhere ConfigurationError says what is needed."""
    if precision != "bf16":
        raise ConfigurationError(f"--precision {precision}: tensorrt_llm is built in bf16")
    try:
        library = importlib.import_module("tensorrt_llm")
        trt = importlib.import_module("tensorrt")
    except ImportError as error:
        raise ConfigurationError(f"--backend tensorrt_llm: {error}. {_REMOVED}") from None
    version = str(library.__version__)
    if not version.startswith(VERSIONS):
        raise ConfigurationError(f"--backend tensorrt_llm: version {version} is installed. {_REMOVED}")
    activations = importlib.import_module("tensorrt_llm.layers.moe").activation_str_to_int_map
    if activations["geglu"] != GEGLU:
        raise ConfigurationError(
            f"--backend tensorrt_llm: {version} numbers the gated GELU {activations['geglu']}, the graph has {GEGLU}; "
            "install tensorrt-llm==1.2.1"
        )
    # Importing the library has registered its plugins.
    if trt.get_plugin_registry().get_plugin_creator(PLUGIN, PLUGIN_VERSION, NAMESPACE) is None:
        raise ConfigurationError(f"--backend tensorrt_llm: {version} has no plugin {PLUGIN}. {_REMOVED}")
    sm_version = importlib.import_module("tensorrt_llm._utils").get_sm_version()
    return TensorRtLlmBackend("tensorrt", precision, kv_precision, version, f"sm_{sm_version}")


@dataclass(frozen=True)
class Flag:
    """An option of `trtllm-build` and what it is here."""

    name: str
    ours: str  # an option of `dgemma-build engine`; "" where there is none
    meaning: str


FLAGS = (
    Flag("--checkpoint_dir", "--checkpoint", "a directory in transformers' format: nothing is converted first"),
    Flag("--output_dir", "--output", "config.json and rank0.engine, as there"),
    Flag("--max_batch_size", "--max-batch-size", "canvases in one step"),
    Flag("--max_seq_len", "--max-model-len", "tokens, prompt and output together"),
    Flag("--max_input_len", "", "no limit of its own: --max-model-len less one canvas"),
    Flag(
        "--max_num_tokens",
        "",
        "fixed: a step is whole canvases, a prompt is encoded in chunks of about a canvas",
    ),
    Flag("--opt_num_tokens", "", "fixed: one canvas"),
    Flag("--max_beam_width", "", "1: a canvas is denoised, not searched"),
    Flag("--kv_cache_type", "", "paged, by the runtime; the engine sees a row's context in one piece"),
    Flag("--gemm_plugin", "", "disable: TensorRT's own products"),
    Flag("--gpt_attention_plugin", "", "disable: it is causal within a call, and a canvas is not"),
    Flag("--moe_plugin", "", "always, in the activations' type"),
    Flag("--remove_input_padding", "", "enable: experts see tokens without their rows"),
    Flag("--workers", "", "1: one engine on one GPU"),
)
