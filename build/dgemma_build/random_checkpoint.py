"""Writes genuine DiffusionGemma checkpoints with random weights, from a seed and a named shape. Knows no torch.

The files are those that transformers 5.23 saves: one `model.safetensors` with every tied weight once (under
`model.decoder.`) and both sets of layer scalars, `config.json`, `generation_config.json`, a tokenizer and a chat
template. The odd shapes divide by nothing convenient and no norm weight or scalar in them is one, so that a wrong
axis, a swapped scalar or a forgotten factor shows. `mid` is for benchmarks.
"""

from __future__ import annotations

import argparse
import json
import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from dgemma_build.demo.tokenizer import BOS, EOS, PAD, SPECIAL_TOKENS, TURN_END, TURN_START, UNK
from dgemma_build.random_shapes import SHAPES, Shape

FloatArray = npt.NDArray[np.float32]
Tensors = dict[str, FloatArray]

CHAT_TEMPLATE = Path(__file__).parent / "demo" / "chat_template.jinja"
_VISION = {
    "model_type": "gemma4_vision",
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "patch_size": 2,
    "position_embedding_size": 4,
    "default_output_length": 4,
    "pooling_kernel_size": 1,
    "use_clipped_linears": False,
    "standardize": False,
}


# ---------------------------------------------------------------- weights


class _Recipe:
    """Draws the tensors of one shape in a fixed order."""

    def __init__(self, shape: Shape, seed: int) -> None:
        self.shape = shape
        self.random = np.random.default_rng(seed)

    def linear(self, rows: int, columns: int, scale: float = 1.0) -> FloatArray:
        drawn = self.random.standard_normal((rows, columns), dtype=np.float32)
        return np.asarray(drawn * np.float32(scale * columns**-0.5))

    def around(self, centre: float, *sizes: int) -> FloatArray:
        """Values near `centre`: exactly it in an even shape, within 40% of it in an odd one."""
        spread = self.random.uniform(0.6, 1.4, sizes) if self.shape.odd else np.ones(sizes)
        return np.asarray(centre * spread, dtype=np.float32)

    def mlp(self, prefix: str, scale: float = 1.0) -> Tensors:
        hidden, inner = self.shape.hidden_size, self.shape.intermediate_size
        return {
            f"{prefix}.gate_proj.weight": self.linear(inner, hidden),
            f"{prefix}.up_proj.weight": self.linear(inner, hidden),
            f"{prefix}.down_proj.weight": self.linear(hidden, inner, scale),
        }

    def attention(self, prefix: str, sliding: bool) -> Tensors:
        shape = self.shape
        dim = shape.head_dim if sliding else shape.global_head_dim
        key_values = shape.num_key_value_heads if sliding else shape.num_global_key_value_heads
        query_width = shape.num_attention_heads * dim
        tensors = {
            f"{prefix}.q_proj.weight": self.linear(query_width, shape.hidden_size),
            f"{prefix}.k_proj.weight": self.linear(key_values * dim, shape.hidden_size),
            f"{prefix}.o_proj.weight": self.linear(shape.hidden_size, query_width),
            # Attention itself is not scaled; these put the spread of its scores near one and a half.
            f"{prefix}.q_norm.weight": self.around(1.2 * dim**-0.25, dim),
            f"{prefix}.k_norm.weight": self.around(1.2 * dim**-0.25, dim),
        }
        if sliding:
            tensors[f"{prefix}.v_proj.weight"] = self.linear(key_values * dim, shape.hidden_size)
        return tensors

    def experts(self, prefix: str) -> Tensors:
        shape, count, inner = self.shape, self.shape.num_experts, self.shape.moe_intermediate_size
        gate_up = self.linear(count * 2 * inner, shape.hidden_size)
        down = self.linear(count * shape.hidden_size, inner)
        return {
            f"{prefix}.experts.gate_up_proj": gate_up.reshape(count, 2 * inner, shape.hidden_size),
            f"{prefix}.experts.down_proj": down.reshape(count, shape.hidden_size, inner),
            f"{prefix}.router.proj.weight": self.linear(count, shape.hidden_size, shape.hidden_size**0.5),
            f"{prefix}.router.scale": self.around(1.0, shape.hidden_size),
            f"{prefix}.router.per_expert_scale": self.around(1.0, count),
        }

    def layer(self, index: int) -> Tensors:
        prefix, hidden = f"model.decoder.layers.{index}", self.shape.hidden_size
        tensors = self.attention(f"{prefix}.self_attn", self.shape.layers[index] == "s")
        tensors |= self.mlp(f"{prefix}.mlp")
        tensors |= self.experts(prefix)
        branch = self.shape.branch_scale
        for name, centre in (
            ("input_layernorm", 1.0),
            ("post_attention_layernorm", branch),
            ("pre_feedforward_layernorm", 1.0),
            ("pre_feedforward_layernorm_2", 1.0),
            ("post_feedforward_layernorm", branch),
            ("post_feedforward_layernorm_1", 1.0),
            ("post_feedforward_layernorm_2", 1.0),
        ):
            tensors[f"{prefix}.{name}.weight"] = self.around(centre, hidden)
        tensors[f"{prefix}.layer_scalar"] = self.around(1.0, 1)
        tensors[f"model.encoder.language_model.layers.{index}.layer_scalar"] = self.around(1.0, 1)
        return tensors

    def vision(self) -> Tensors:
        """The smallest vision tower that transformers accepts; text never reaches it."""
        prefix, size = "model.encoder.vision_tower", 8
        layer = f"{prefix}.encoder.layers.0"
        tensors = {f"{layer}.mlp.{name}_proj.linear.weight": self.linear(size, size) for name in ("gate", "up", "down")}
        tensors |= {f"{layer}.self_attn.{name}_proj.linear.weight": self.linear(size, size) for name in "qkvo"}
        norms = ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm")
        for name in (*norms, "post_feedforward_layernorm", "self_attn.q_norm", "self_attn.k_norm"):
            tensors[f"{layer}.{name}.weight"] = np.ones(size, np.float32)
        tensors[f"{prefix}.patch_embedder.input_proj.weight"] = self.linear(size, 12)
        tensors[f"{prefix}.patch_embedder.position_embedding_table"] = np.ones((2, 4, size), np.float32)
        tensors["model.encoder.embed_vision.embedding_projection.weight"] = self.linear(self.shape.hidden_size, size)
        return tensors

    def tensors(self) -> Tensors:
        shape = self.shape
        tensors = {"model.decoder.embed_tokens.weight": self.linear(shape.vocab_size, shape.hidden_size)}
        for index in range(len(shape.layers)):
            tensors |= self.layer(index)
        tensors["model.decoder.norm.weight"] = self.around(shape.logit_scale, shape.hidden_size)
        tensors["model.decoder.self_conditioning.pre_norm.weight"] = self.around(1.0, shape.hidden_size)
        tensors |= self.mlp("model.decoder.self_conditioning", shape.soft_scale)
        return tensors | self.vision()


# ---------------------------------------------------------------- files


def _encode(values: FloatArray, dtype: str) -> bytes:
    if dtype == "float32":
        return values.astype("<f4").tobytes()
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))  # to nearest, ties to even
    return (rounded >> np.uint32(16)).astype("<u2").tobytes()


def write_safetensors(path: Path, tensors: Tensors, dtype: str) -> None:
    """One safetensors file with every tensor stored as `dtype` (float32 or bfloat16)."""
    width = {"float32": 4, "bfloat16": 2}[dtype]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in sorted(tensors):
        end = offset + tensors[name].size * width
        stored = {"float32": "F32", "bfloat16": "BF16"}[dtype]
        header[name] = {"dtype": stored, "shape": list(tensors[name].shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in sorted(tensors):
            file.write(_encode(tensors[name], dtype))


def config_dict(shape: Shape) -> dict[str, Any]:
    """`config.json` of a shape."""
    kinds = ["sliding_attention" if letter == "s" else "full_attention" for letter in shape.layers]
    text: dict[str, Any] = {
        "model_type": "diffusion_gemma_text",
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
        "tie_word_embeddings": True,
        "use_bidirectional_attention": "vision" if shape.released_spelling else None,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": 2,
        "num_hidden_layers": len(kinds),
        "layer_types": kinds,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": shape.sliding_rope_theta},
            "full_attention": {
                "rope_type": "proportional",
                "rope_theta": shape.full_rope_theta,
                "partial_rotary_factor": shape.partial_rotary_factor,
            },
        },
    }
    plain = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim")
    moe = ("num_experts", "top_k_experts", "moe_intermediate_size")
    rest = ("sliding_window", "max_position_embeddings", "rms_norm_eps", "final_logit_softcapping")
    text |= {name: getattr(shape, name) for name in (*plain, *moe, *rest)}
    if shape.released_spelling:
        text["global_head_dim"] = shape.global_head_dim
        text["num_global_key_value_heads"] = shape.num_global_key_value_heads
    else:
        override = {"head_dim": shape.global_head_dim, "num_key_value_heads": shape.num_global_key_value_heads}
        text["per_layer_config"] = {str(i): override for i, kind in enumerate(kinds) if kind == "full_attention"}
    return {
        "architectures": ["DiffusionGemmaForBlockDiffusion"],
        "model_type": "diffusion_gemma",
        "dtype": shape.dtype,
        "canvas_length": shape.canvas_length,
        "tie_word_embeddings": True,
        "image_token_id": SPECIAL_TOKENS.index("<|image|>"),
        "boi_token_id": SPECIAL_TOKENS.index("<|image>"),
        "eoi_token_id": SPECIAL_TOKENS.index("<image|>"),
        "text_config": text,
        "vision_config": _VISION,
        "transformers_version": "5.23.0",
    }


def build_plain_tokenizer(vocab_size: int) -> Tokenizer:
    """A tokenizer of exactly `vocab_size` tokens that encodes character by character; every id decodes to something.

    Special tokens first, as in the demo checkpoint; the 256 bytes where they fit; made-up words fill the rest.
    """
    bytes_fit = vocab_size >= 512
    pieces = list(SPECIAL_TOKENS) + ([f"<0x{byte:02X}>" for byte in range(256)] if bytes_fit else [])
    pieces += ["▁", "\n", *(chr(code) for code in range(33, 127))]
    letters = "etaoinshrdlcumw"
    for index in range(vocab_size - len(pieces)):
        word, rest = "▁", index + 1
        while rest:
            rest, letter = divmod(rest, len(letters) + 1)
            word += ("." + letters)[letter]
        pieces.append(word)
    if len(pieces) != vocab_size:
        raise ValueError(f"vocab_size {vocab_size} is too small for the tokenizer: it needs at least {len(pieces)}")
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=[], unk_token=UNK, byte_fallback=bytes_fit, fuse_unk=True)
    )
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"."), "isolated")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


def write_checkpoint(directory: Path, name: str, seed: int = 0) -> Path:
    """Write the checkpoint `name` of SHAPES, drawn from `seed`, into `directory`; returns the directory."""
    shape = SHAPES[name]
    directory.mkdir(parents=True, exist_ok=True)
    write_safetensors(directory / "model.safetensors", _Recipe(shape, seed).tensors(), shape.dtype)
    generation = {
        "bos_token_id": 2,
        "eos_token_id": [1, SPECIAL_TOKENS.index(TURN_END)],
        "pad_token_id": 0,
        "max_new_tokens": 256,
        "return_dict_in_generate": True,
        "transformers_version": "5.23.0",
        **shape.generation,
    }
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "unk_token": UNK,
        "sot_token": TURN_START,
        "eot_token": TURN_END,
        "clean_up_tokenization_spaces": False,
        "model_max_length": shape.max_position_embeddings,
    }
    for file, content in (
        ("config.json", config_dict(shape)),
        ("generation_config.json", generation),
        ("tokenizer_config.json", tokenizer_config),
    ):
        (directory / file).write_text(json.dumps(content, indent=2) + "\n")
    shutil.copyfile(CHAT_TEMPLATE, directory / "chat_template.jinja")
    build_plain_tokenizer(shape.vocab_size).save(str(directory / "tokenizer.json"))
    return directory


def main() -> None:
    """Command line: python -m dgemma_build.random_checkpoint NAME DIRECTORY [--seed N]."""
    parser = argparse.ArgumentParser(prog="python -m dgemma_build.random_checkpoint", description=__doc__)
    parser.add_argument("name", choices=sorted(SHAPES))
    parser.add_argument("directory", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    print(write_checkpoint(arguments.directory, arguments.name, arguments.seed))


if __name__ == "__main__":
    main()
