"""The experts as TensorRT-LLM's plugin `MixtureOfExperts`, which multiplies in grouped GEMMs. Knows no builder.

What the plugin takes, in this order (N tokens, H hidden, I inner, E experts, k choices a token):

    tokens [N, H];  first product [E, 2 I, H], the rows of `up` before those of `gate`;  second product [E, H, I];
    chosen experts [N, k] int32;  their weights [N, k] float32

Its gated GELU is tanh's where the activation is fused into the product, and erf's where it is a kernel of its own, as
on Hopper; the two differ by at most 5e-4 and the checkpoints are trained with tanh. Quantised experts are not offered:
the plugin's creator does not list `output_type_id` among its fields, so the ONNX parser cannot pass it, and fp8
experts without it are refused; weight-only formats need an interleaving that only its own PyTorch operators make.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import TensorProto

from dgemma_build.moe import MoeWeights
from dgemma_build.onnx_writer import GraphWriter

PLUGIN, PLUGIN_VERSION, NAMESPACE = "MixtureOfExperts", "1", "tensorrt_llm"
GEGLU = 6  # ActivationType.Geglu; 4 before the enumeration was put in another order for 1.2
TYPE_IDS = {"float32": 0, "float16": 1, "bfloat16": 7}  # TensorRT's DataType


def mixture_of_experts(w: GraphWriter, weights: MoeWeights, prefix: str, tokens: str, ids: str, share: str) -> str:
    """The experts' weighted sum [N, H] as one plugin node; a lowering like those of `dgemma_build.moe`."""
    experts, hidden, inner = weights.num_experts, weights.hidden_size, weights.intermediate_size

    def first() -> Iterator[npt.NDArray[Any]]:
        for expert in range(experts):
            gate_up = weights.gate_up(expert).T  # [2 I, H]
            yield np.concatenate([gate_up[inner:], gate_up[:inner]]).astype(weights.dtype, copy=False)[None]

    def second() -> Iterator[npt.NDArray[Any]]:
        for expert in range(experts):
            yield np.ascontiguousarray(weights.down(expert).T).astype(weights.dtype, copy=False)[None]

    type_id = TYPE_IDS[weights.dtype.name]
    fields: dict[str, Any] = {
        "plugin_version": PLUGIN_VERSION,
        "plugin_namespace": NAMESPACE,
        "number_of_experts": experts,
        "experts_per_token": weights.top_k,
        "expert_hidden_size": hidden,
        "expert_inter_size": inner,
        "activation_type": GEGLU,
        "type_id": type_id,
        "weight_type_id": type_id,
        "use_final_scales": 1,
        "use_bias": 0,
        "quant_mode": 0,
        "groupwise_quant_algo": 0,
        "group_size": -1,
        "remove_input_padding": 1,
        "use_lora": 0,
        "side_stream_id": 0,
    }
    fields |= {"tp_size": 1, "tp_rank": 0, "ep_size": 1, "ep_rank": 0}  # one GPU
    return w.op(
        PLUGIN,
        tokens,
        w.weight(f"{prefix}.experts.up_gate", (experts, 2 * inner, hidden), weights.dtype, first),
        w.weight(f"{prefix}.experts.down", (experts, hidden, inner), weights.dtype, second),
        w.op("Cast", ids, to_=TensorProto.INT32),
        w.op("Cast", share, to_=TensorProto.FLOAT),
        domain=NAMESPACE,
        **fields,
    )
