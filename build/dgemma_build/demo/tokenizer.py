"""The demo checkpoint's tokenizer: BPE with byte fallback and Gemma 4's turn tokens. Knows no model.

Words, punctuation runs and single digits are separate pieces, so that a word is the same token wherever it
stands; anything else falls back to UTF-8 bytes, so every text has a tokenization.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from dgemma_build.demo.skills import draw

PAD, EOS, BOS, UNK, TURN_START, TURN_END = "<pad>", "<eos>", "<bos>", "<unk>", "<|turn>", "<turn|>"
SPECIAL_TOKENS = (
    *(PAD, EOS, BOS, UNK, TURN_START, TURN_END, "<|think|>", "<|channel>", "<channel|>", "<|tool>", "<tool|>"),
    *("<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>", '<|"|>'),
    *("<|image>", "<|image|>", "<image|>"),
)
_CORPUS = ("infill", "json", "sudoku4", "sudoku6", "table")  # fixed, so that a skill learnt later changes no token
_PIECES = r"\p{L}+|[\d_]|\n|[^\p{L}\d_\n]+"


def _corpus(seed: int, examples_per_skill: int) -> Iterator[str]:
    rng = random.Random(seed)
    for skill in _CORPUS:
        for _ in range(examples_per_skill):
            example = draw(skill, rng, held_out=False)
            yield from (example.prompt, example.answer)
    yield from ("user", "model", "system", "thought") * examples_per_skill


def build_tokenizer(vocab_size: int, seed: int = 0) -> Tokenizer:
    """A tokenizer of at most `vocab_size` tokens, trained on generated training examples.

    Ids 0 to 5 are pad, eos, bos, unk and the two turn tokens; the 256 bytes follow the special tokens.
    """
    tokenizer = Tokenizer(models.BPE(unk_token=UNK, byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(_PIECES), "isolated")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    printable = ["▁", "\n", *(chr(code) for code in range(33, 127))]
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=8,
        special_tokens=[*SPECIAL_TOKENS, *byte_tokens],
        initial_alphabet=printable,
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(seed, 3000), trainer)
    # The trainer makes the byte pieces special too; they must stay ordinary, or "<0x0A>" in a text would become one.
    document = json.loads(tokenizer.to_str())
    document["added_tokens"] = [token for token in document["added_tokens"] if token["content"] in SPECIAL_TOKENS]
    return Tokenizer.from_str(json.dumps(document))


def render_turn(prompt: str) -> str:
    """The text of one user turn as the checkpoint's chat template renders it, ready for the model's answer."""
    return render_chat((), prompt)


def render_chat(told: Sequence[tuple[str, str]], prompt: str) -> str:
    """Turns of (user, model) and a user turn behind them, as the checkpoint's chat template renders them."""
    turns = [("user", prompt)]
    for user, model in reversed(told):
        turns = [("user", user), ("model", model), *turns]
    return BOS + "".join(f"{TURN_START}{role}\n{text}{TURN_END}\n" for role, text in turns) + f"{TURN_START}model\n"
