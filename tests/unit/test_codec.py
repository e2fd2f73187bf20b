"""The tokenizer of an engine directory: start token, foreign and corrupt files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models

from dgemma_runtime.codec import Codec
from dgemma_runtime.errors import CheckpointError, InvalidRequest
from dgemma_runtime.testing import BOS, EOS, TURN_START, tiny_codec, tiny_tokenizer


def save(directory: Path, config: object = None) -> Path:
    tiny_tokenizer().save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<bos>"} if config is None else config))
    return directory


def test_the_start_token_is_put_in_front_once() -> None:
    codec = tiny_codec()
    plain = codec.encode("hi")
    assert plain[0] == BOS
    assert codec.encode("<bos>hi").tolist() == plain.tolist()
    assert codec.encode("<|turn>hi").tolist()[:2] == [BOS, TURN_START]


def test_without_a_start_token_text_is_encoded_as_it_is(tmp_path: Path) -> None:
    codec = Codec.load(save(tmp_path, {}))
    assert BOS not in codec.encode("hi").tolist()


@pytest.mark.parametrize("bos", ["<bos>", {"content": "<bos>", "special": True}])
def test_both_spellings_of_the_start_token(tmp_path: Path, bos: object) -> None:
    assert Codec.load(save(tmp_path, {"bos_token": bos})).bos_token == "<bos>"


def test_special_tokens_and_bytes_are_known() -> None:
    codec = tiny_codec()
    assert codec.special_ids == frozenset(range(6))
    assert codec.special_id("<eos>") == EOS
    assert codec.special_id("hi") is None
    assert sorted(codec.bytes.values()) == [bytes([value]) for value in range(256)]


def test_an_id_without_a_token_has_no_text() -> None:
    assert tiny_codec().piece(100_000) == ""


def test_whole_sequences_with_and_without_special_tokens() -> None:
    codec = tiny_codec()
    tokens = codec.encode("<|turn>a €<turn|>")
    assert (codec.decode(tokens), codec.decode(tokens, skip_special_tokens=False)) == ("a €", "<bos><|turn>a €<turn|>")
    assert codec.piece(TURN_START) == "<|turn>"


def test_text_that_is_not_unicode_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="text_input: is not valid Unicode: a lone surrogate at character 6"):
        tiny_codec().encode("a\ud800")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("tokenizer.json", None, "tokenizer.json: not found"),
        ("tokenizer.json", "{}", "tokenizer.json: not a tokenizer"),
        ("tokenizer.json", "[", "tokenizer.json: not a tokenizer"),
        ("tokenizer_config.json", None, "tokenizer_config.json: not found"),
        ("tokenizer_config.json", "{", "tokenizer_config.json: not readable as JSON"),
        ("tokenizer_config.json", "[]", "tokenizer_config.json: expected a JSON object, found list"),
        ("tokenizer_config.json", '{"bos_token": "<s>"}', "bos_token '<s>' is not in tokenizer.json"),
    ],
)
def test_a_corrupt_directory_is_named(tmp_path: Path, name: str, text: str | None, message: str) -> None:
    save(tmp_path)
    if text is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_text(text)
    with pytest.raises(CheckpointError, match=message):
        Codec.load(tmp_path)


def test_a_foreign_decoder_is_refused() -> None:
    tokenizer = Tokenizer(models.BPE({"a": 0}, []))
    for decoder, name in ((decoders.ByteLevel(), "ByteLevel"), (decoders.Metaspace(), "Metaspace"), (None, "None")):
        if decoder is not None:
            tokenizer.decoder = decoder
        else:
            tokenizer = Tokenizer(models.BPE({"a": 0}, []))
        with pytest.raises(CheckpointError, match=f"the decoder {name} is not one"):
            Codec(tokenizer, None)
