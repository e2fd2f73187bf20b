"""Text to token ids and back, with the tokenizer of an engine directory. Knows no request and no streaming."""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from dgemma_runtime.contract import Int32Array
from dgemma_runtime.errors import CheckpointError, InvalidRequest

TOKENIZER_FILE, TOKENIZER_CONFIG_FILE = "tokenizer.json", "tokenizer_config.json"
_SILENT = ("bos_token", "eos_token", "mask_token", "pad_token", "unk_token")  # of tokenizer_config.json
_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")
# With these a token's text does not depend on its neighbours, bytes apart; Gemma's tokenizers use no others.
_KNOWN_DECODERS = frozenset({"Sequence", "Replace", "ByteFallback", "Fuse"})


class Codec:
    """One tokenizer. Thread-safe; raises CheckpointError when the files are missing or not usable."""

    def __init__(self, tokenizer: Tokenizer, bos_token: str | None, silent: Collection[str] = ()) -> None:
        document = json.loads(tokenizer.to_str())
        _check_decoder(document.get("decoder"))
        vocabulary: dict[str, int] = tokenizer.get_vocab(with_added_tokens=True)
        if bos_token is not None and bos_token not in vocabulary:
            raise CheckpointError(f"{TOKENIZER_CONFIG_FILE}: bos_token {bos_token!r} is not in {TOKENIZER_FILE}")
        self._tokenizer = tokenizer
        self._pieces: dict[int, str] = {}
        self.bos_token = bos_token
        self.special_ids = frozenset(t["id"] for t in document.get("added_tokens", []) if t["special"])
        self._special_texts = {t["content"]: t["id"] for t in document.get("added_tokens", []) if t["special"]}
        # Special tokens that mark no part of an answer: a model that writes padding says nothing.
        self.silent_ids = frozenset(id_ for text, id_ in self._special_texts.items() if text in silent)
        byte_tokens = ((_BYTE_TOKEN.fullmatch(token), id_) for token, id_ in vocabulary.items())
        self.bytes: dict[int, bytes] = {id_: bytes.fromhex(match[1]) for match, id_ in byte_tokens if match}

    @staticmethod
    def load(directory: Path) -> Codec:
        """Read tokenizer.json and tokenizer_config.json of an engine or checkpoint directory."""
        config = read_json_object(directory / TOKENIZER_CONFIG_FILE)
        path = directory / TOKENIZER_FILE
        if not path.is_file():
            raise CheckpointError(f"{path}: not found")
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # noqa: BLE001 - the library raises bare Exception
            raise CheckpointError(f"{path}: not a tokenizer ({error})") from None
        silent = [text for name in _SILENT if (text := token_text(config.get(name))) is not None]
        return Codec(tokenizer, token_text(config.get("bos_token")), silent)

    def encode(self, text: str, field: str = "text_input") -> Int32Array:
        """`text` as token ids [n] int32. The start token is put in front unless the text already starts with it.

        Special tokens written out in the text are recognised. Raises InvalidRequest for text that is not Unicode.
        """
        if self.bos_token is not None and not text.startswith(self.bos_token):
            text = self.bos_token + text
        return self.encode_part(text, field)

    def encode_part(self, text: str, field: str) -> Int32Array:
        """As `encode`, of text that stands inside of another: no start token is put in front."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            message = f"is not valid Unicode: a lone surrogate at character {error.start}"
            raise InvalidRequest(field, message) from None
        return np.array(self._tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.int32)

    def piece(self, token_id: int) -> str:
        """The text of one token that is no byte, special or not; "" for an id the tokenizer does not have."""
        piece = self._pieces.get(token_id)
        if piece is None:
            piece = self._pieces[token_id] = self._tokenizer.decode([token_id], skip_special_tokens=False)
        return piece

    def decode(self, token_ids: Int32Array, skip_special_tokens: bool = True) -> str:
        """The text of a whole sequence [n], as the tokenizer itself has it."""
        text: str = self._tokenizer.decode(token_ids.tolist(), skip_special_tokens=skip_special_tokens)
        return text

    def special_id(self, text: str) -> int | None:
        """The special token that is written exactly like `text`."""
        return self._special_texts.get(text)


def read_json_object(path: Path) -> dict[str, Any]:
    """A JSON object from a checkpoint's file; raises CheckpointError."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: not found") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def token_text(value: object) -> str | None:
    """A token of tokenizer_config.json, which is a string or an object with `content`."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _check_decoder(decoder: Any) -> None:
    for part in [decoder, *((decoder or {}).get("decoders", []))]:
        kind = None if part is None else part.get("type")
        if kind not in _KNOWN_DECODERS:
            raise CheckpointError(
                f"{TOKENIZER_FILE}: the decoder {kind} is not one this runtime can stream with "
                f"({', '.join(sorted(_KNOWN_DECODERS))}); DiffusionGemma's tokenizers use only these"
            )
