"""Write a trained demo denoiser as a checkpoint in transformers' format: `python -m dgemma_build.demo.export`.

The directory is a genuine DiffusionGemma: config, weights in bfloat16, a tiny vision tower (untrained, text only is
served), tokenizer, chat template and generation config. Needs torch, not transformers.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dgemma_build.demo.model import DemoConfig
from dgemma_build.demo.tokenizer import SPECIAL_TOKENS, build_tokenizer

WEIGHTS = "model.safetensors"
MAX_CONTEXT = 262_144  # tokens
CHAT_TEMPLATE = Path(__file__).with_name("chat_template.jinja")
_VISION: dict[str, Any] = {
    "model_type": "gemma4_vision",
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "patch_size": 2,
    "position_embedding_size": 2,
}


def transformers_config(config: DemoConfig) -> dict[str, Any]:
    """The checkpoint's `config.json`."""
    full = {"head_dim": config.global_head_dim, "num_key_value_heads": config.num_global_key_value_heads}
    text = {
        "model_type": "diffusion_gemma_text",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": len(config.layer_types),
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "per_layer_config": {
            str(index): full for index, kind in enumerate(config.layer_types) if kind == "full_attention"
        },
        "layer_types": list(config.layer_types),
        "sliding_window": config.sliding_window,
        "max_position_embeddings": MAX_CONTEXT,
        "num_experts": config.num_experts,
        "top_k_experts": config.top_k_experts,
        "moe_intermediate_size": config.moe_intermediate_size,
        "rms_norm_eps": config.rms_norm_eps,
        "final_logit_softcapping": config.final_logit_softcapping,
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": True,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": config.sliding_rope_theta},
            "full_attention": {
                "rope_type": "proportional",
                "rope_theta": config.full_rope_theta,
                "partial_rotary_factor": config.partial_rotary_factor,
            },
        },
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": 2,
    }
    ids = {token: index for index, token in enumerate(SPECIAL_TOKENS)}
    return {
        "architectures": ["DiffusionGemmaForBlockDiffusion"],
        "model_type": "diffusion_gemma",
        "dtype": "bfloat16",
        "canvas_length": config.canvas_length,
        "tie_word_embeddings": True,
        "boi_token_id": ids["<|image>"],
        "eoi_token_id": ids["<image|>"],
        "image_token_id": ids["<|image|>"],
        "text_config": text,
        "vision_config": _VISION,
    }


def transformers_tensors(state: dict[str, Tensor], config: DemoConfig) -> dict[str, Tensor]:
    """Training state dict to transformers' names, shared weights once and in bfloat16, plus the vision tower."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name.endswith(".encoder_scalar"):
            name = "model.encoder.language_model." + name.replace("encoder_scalar", "layer_scalar")
        else:
            name = "model.decoder." + name.replace("decoder_scalar", "layer_scalar")
        tensors[name] = tensor
    hidden: int = _VISION["hidden_size"]
    rng = torch.Generator().manual_seed(0)

    def matrix(rows: int, columns: int) -> Tensor:
        weight: Tensor = torch.randn(rows, columns, generator=rng) * columns**-0.5
        return weight

    tower = "model.encoder.vision_tower."
    layer = tower + "encoder.layers.0."
    tensors["model.encoder.embed_vision.embedding_projection.weight"] = matrix(config.hidden_size, hidden)
    tensors[tower + "patch_embedder.input_proj.weight"] = matrix(hidden, 3 * _VISION["patch_size"] ** 2)
    tensors[tower + "patch_embedder.position_embedding_table"] = torch.ones(2, 2, hidden)
    for norm in ("input", "post_attention", "pre_feedforward", "post_feedforward"):
        tensors[f"{layer}{norm}_layernorm.weight"] = torch.ones(hidden)
    for norm in ("q_norm", "k_norm"):
        tensors[f"{layer}self_attn.{norm}.weight"] = torch.ones(hidden)
    for projection in ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "mlp.gate", "mlp.up", "mlp.down"):
        tensors[f"{layer}{projection}_proj.linear.weight"] = matrix(hidden, hidden)
    return {name: tensor.detach().bfloat16().contiguous() for name, tensor in tensors.items()}


def training_state(checkpoint: Path) -> dict[str, Tensor]:
    """The training state dict that a checkpoint was written from, in float32 (the weights are in bfloat16)."""
    state: dict[str, Tensor] = {}
    for name, tensor in load_file(checkpoint / WEIGHTS).items():
        if name.startswith("model.decoder."):
            state[name.removeprefix("model.decoder.").replace("layer_scalar", "decoder_scalar")] = tensor.float()
        elif name.endswith(".layer_scalar"):
            name = name.removeprefix("model.encoder.language_model.")
            state[name.replace("layer_scalar", "encoder_scalar")] = tensor.float()
    return state


GENERATION_CONFIG: dict[str, Any] = {
    "max_new_tokens": 256,
    "max_denoising_steps": 48,
    "sampler_config": {"_cls_name": "EntropyBoundSamplerConfig", "entropy_bound": 0.1},
    "t_min": 0.4,
    "t_max": 0.8,
    "stability_threshold": 1,
    "confidence_threshold": 0.005,
    "bos_token_id": 2,
    "eos_token_id": [1, 5],
    "pad_token_id": 0,
    "return_dict_in_generate": True,
}


def write_checkpoint(state: dict[str, Tensor], config: DemoConfig, output: Path, vocab_size: int, seed: int) -> None:
    """Write every file of the checkpoint to `output`."""
    output.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer(vocab_size, seed)
    if tokenizer.get_vocab_size() != config.vocab_size:
        raise ValueError(f"the tokenizer has {tokenizer.get_vocab_size()} tokens, the model {config.vocab_size}")
    tokenizer.save(str(output / "tokenizer.json"))
    save_file(transformers_tensors(state, config), output / WEIGHTS, metadata={"format": "pt"})
    special = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
    documents = {
        "config.json": transformers_config(config),
        "generation_config.json": GENERATION_CONFIG,
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": MAX_CONTEXT,
            "clean_up_tokenization_spaces": False,
            **special,
        },
    }
    for name, document in documents.items():
        (output / name).write_text(json.dumps(document, indent=2) + "\n")
    shutil.copyfile(CHAT_TEMPLATE, output / "chat_template.jinja")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--training", type=Path, required=True, help="directory that dgemma_build.demo.train wrote")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    saved = torch.load(args.training / "training.pt", weights_only=True)
    plan = json.loads((args.training / "train_log.jsonl").read_text().split("\n")[0])["plan"]
    config = DemoConfig(vocab_size=saved["model"]["embed_tokens.weight"].shape[0])
    write_checkpoint(saved["model"], config, args.output, plan["vocab_size"], plan["seed"])


if __name__ == "__main__":
    main()
