"""Writes genuine DiffusionGemma checkpoints with random weights, from a seed and a named shape. Knows no torch.

The files are those that transformers 5.23 saves: every tied weight once (under `model.decoder.`) and both sets of
layer scalars in `model.safetensors`, or, where that would be too large, in shards with an index; `config.json`,
`generation_config.json`, a tokenizer and a chat template. The odd shapes divide by nothing convenient and no norm
weight or scalar in them is one, so that a wrong axis, a swapped scalar or a forgotten factor shows. `mid` is for
benchmarks. `real` has the released dimensions; its tensors go to the disk piece by piece, never whole in memory.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import struct
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from dgemma_build.demo.tokenizer import BOS, EOS, PAD, SPECIAL_TOKENS, TURN_END, TURN_START, UNK
from dgemma_build.random_shapes import SHAPES, Shape, Weight, resized, weights
from dgemma_runtime.errors import ConfigurationError, DGemmaError

FloatArray = npt.NDArray[np.float32]
Pieces = Iterable[npt.NDArray[Any]]  # a tensor's stored values, in order
Report = Callable[[int, int], None]  # bytes written, bytes in all

CHAT_TEMPLATE = Path(__file__).parent / "demo" / "chat_template.jinja"
SHARD_BYTES = 5_000_000_000
INDEX = "model.safetensors.index.json"
_WIDTH = {"float32": 4, "bfloat16": 2}
_PIECE = 1 << 18  # values; small enough to stay in a cache
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


# ---------------------------------------------------------------- drawing


def _encode(values: FloatArray, dtype: str) -> npt.NDArray[Any]:
    """float32 values as they are stored: little-endian float32, or the bits of bfloat16."""
    if dtype == "float32":
        return values.astype("<f4")
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))  # to nearest, ties to even
    return (rounded >> np.uint32(16)).astype("<u2")


def _draw(random: np.random.Generator, weight: Weight) -> FloatArray:
    if weight.kind == "normal":
        drawn = random.standard_normal(weight.sizes, dtype=np.float32)
        return np.asarray(drawn * np.float32(weight.scale))
    spread = random.uniform(0.6, 1.4, weight.sizes) if weight.kind == "around" else np.ones(weight.sizes)
    return np.asarray(weight.scale * spread, dtype=np.float32)


def _drawn_together(listed: dict[str, Weight], seed: int, dtype: str) -> dict[str, Pieces]:
    """All tensors from one stream in the order of the list, by name in alphabetical order."""
    random = np.random.default_rng(seed)
    drawn = {name: _draw(random, weight) for name, weight in listed.items()}
    return {name: [_encode(drawn[name], dtype)] for name in sorted(drawn)}


@cache
def _normal_quantiles() -> FloatArray:
    """The standard normal distribution's quantiles at 65,536 equal steps of probability; their variance is one."""
    upper = np.array([NormalDist().inv_cdf((step + 0.5) / 65536) for step in range(32768, 65536)])
    values = np.concatenate([-upper[::-1], upper])
    return np.asarray(values / values.std(), dtype=np.float32)


def _stream(seed: int, name: str, weight: Weight, dtype: str) -> Iterator[npt.NDArray[Any]]:
    """One tensor from a stream of its own; it depends on nothing but seed, name, sizes and recipe.

    Sixteen random bits choose one of the normal distribution's quantiles, which takes a table and no arithmetic.
    """
    bits = np.random.SFC64(np.random.SeedSequence([seed, *name.encode()]))
    if weight.kind != "normal":
        yield _encode(_draw(np.random.Generator(bits), weight), dtype)
        return
    table = _encode(_normal_quantiles() * np.float32(weight.scale), dtype)
    left = math.prod(weight.sizes)
    while left:
        count = min(left, _PIECE)
        yield np.take(table, bits.random_raw(-(-count // 4)).view(np.uint16)[:count])  # faster than indexing
        left -= count


def _ahead(pieces: Pieces) -> Iterator[npt.NDArray[Any]]:
    """The same pieces, each drawn while the one before it is written."""
    left = iter(pieces)
    with ThreadPoolExecutor(1) as thread:
        drawn = thread.submit(next, left, None)
        while (piece := drawn.result()) is not None:
            drawn = thread.submit(next, left, None)
            yield piece


# ---------------------------------------------------------------- weight files


def _write_file(path: Path, sizes: dict[str, tuple[int, ...]], pieces: dict[str, Pieces], dtype: str) -> Iterator[int]:
    """Write one safetensors file under a passing name, then give it its own; yields the bytes of each piece."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in pieces:
        end = offset + math.prod(sizes[name]) * _WIDTH[dtype]
        stored = {"float32": "F32", "bfloat16": "BF16"}[dtype]
        header[name] = {"dtype": stored, "shape": list(sizes[name]), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            for values in pieces.values():
                for piece in values:
                    file.write(piece.data)
                    yield piece.nbytes
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_safetensors(path: Path, tensors: dict[str, FloatArray], dtype: str) -> None:
    """One safetensors file with every tensor stored as `dtype` (float32 or bfloat16)."""
    pieces: dict[str, Pieces] = {name: [_encode(tensors[name], dtype)] for name in sorted(tensors)}
    for _ in _write_file(path, {name: values.shape for name, values in tensors.items()}, pieces, dtype):
        pass


def _shards(bytes_of: dict[str, int], limit: int) -> list[list[str]]:
    """The names in order, cut before a shard would pass `limit` bytes; a larger tensor has a shard to itself."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in bytes_of.items():
        if shards[-1] and filled + size > limit:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def _write_weights(directory: Path, shape: Shape, seed: int, shard_bytes: int, report: Report) -> None:
    """`model.safetensors`, or shards and last of all their index: what is cut short cannot be opened."""
    listed = weights(shape)
    sizes = {name: weight.sizes for name, weight in listed.items()}
    pieces: dict[str, Pieces]
    if shape.streams:
        pieces = {name: _ahead(_stream(seed, name, weight, shape.dtype)) for name, weight in listed.items()}
    else:
        pieces = _drawn_together(listed, seed, shape.dtype)
    bytes_of = {name: math.prod(sizes[name]) * _WIDTH[shape.dtype] for name in pieces}
    done, total = 0, sum(bytes_of.values())
    if (free := shutil.disk_usage(directory).free) < total:
        raise ConfigurationError(f"{directory}: the weights take {total:,} bytes and the disk has {free:,} left")
    shards = _shards(bytes_of, shard_bytes)
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else "model.safetensors"
        weight_map |= dict.fromkeys(names, file)
        for written in _write_file(directory / file, sizes, {name: pieces[name] for name in names}, shape.dtype):
            done += written
            report(done, total)
    if len(shards) > 1:
        parameters = total // _WIDTH[shape.dtype]
        index = {"metadata": {"total_parameters": parameters, "total_size": total}, "weight_map": weight_map}
        (directory / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


# ---------------------------------------------------------------- the other files


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
        raise ConfigurationError(f"vocabulary of {vocab_size} tokens: the tokenizer needs at least {len(pieces)}")
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=[], unk_token=UNK, byte_fallback=bytes_fit, fuse_unk=True)
    )
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"."), "isolated")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


def _write_small_files(directory: Path, shape: Shape, tokenizer: Tokenizer) -> None:
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
    tokenizer.save(str(directory / "tokenizer.json"))


def write_checkpoint(
    directory: Path,
    name: str,
    seed: int = 0,
    *,
    layers: int | None = None,
    vocab_size: int | None = None,
    shard_bytes: int = SHARD_BYTES,
    report: Report = lambda done, total: None,
) -> Path:
    """Write the checkpoint `name` of SHAPES, drawn from `seed`, into `directory`; returns the directory.

    Takes the place of a checkpoint that lies there. `layers` and `vocab_size` change the shape, see `resized`. No
    weight file is larger than `shard_bytes`, but for one with a single larger tensor.
    Raises ConfigurationError for a seed or shape that cannot be used and for a disk without the room.
    """
    if seed < 0:
        raise ConfigurationError(f"--seed {seed}: must be at least 0")
    shape = resized(SHAPES[name], layers, vocab_size)
    tokenizer = build_plain_tokenizer(shape.vocab_size)
    directory.mkdir(parents=True, exist_ok=True)
    for old in directory.glob("model*.safetensors*"):
        old.unlink()
    _write_small_files(directory, shape, tokenizer)
    _write_weights(directory, shape, seed, shard_bytes, report)
    return directory


def main() -> None:
    """Command line: python -m dgemma_build.random_checkpoint NAME DIRECTORY [options]."""
    parser = argparse.ArgumentParser(prog="python -m dgemma_build.random_checkpoint", description=__doc__)
    parser.add_argument("name", choices=sorted(SHAPES))
    parser.add_argument("directory", type=Path, help="new or empty")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--layers", type=int, help="number of layers; the last is full attention")
    parser.add_argument("--vocab-size", type=int, help="number of tokens")
    arguments = parser.parse_args()
    directory: Path = arguments.directory
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        parser.error(f"{directory}: not a new or empty directory")
    columns = (TextColumn("writing"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    try:
        with Progress(*columns, console=Console(stderr=True)) as progress:
            task = progress.add_task("", total=None)
            write_checkpoint(
                directory,
                arguments.name,
                arguments.seed,
                layers=arguments.layers,
                vocab_size=arguments.vocab_size,
                report=lambda done, total: progress.update(task, completed=done, total=total),
            )
    except (DGemmaError, OSError) as error:  # such as a disk that fills up
        parser.error(str(error))
    print(directory)


if __name__ == "__main__":
    main()
