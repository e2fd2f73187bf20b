"""Settings: what is refused, and in which words; files of keys."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest

from dgemma_openai.settings import ApiKey, Settings, SettingsError, read_api_keys

DIGEST = hashlib.sha256(b"sk-one").hexdigest()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_body_bytes": 0}, "max_body_bytes: must be at least 1, got 0"),
        ({"max_choices": -1}, "max_choices: must be at least 1, got -1"),
        ({"requests_per_minute": 0}, "requests_per_minute: must be at least 1, got 0"),
        ({"body_timeout_s": 0.0}, "body_timeout_s: must be a number of seconds above 0, got 0.0"),
        ({"timeout_s": float("inf")}, "timeout_s: must be a number of seconds above 0, got inf"),
        ({"timeout_s": float("nan")}, "timeout_s: must be a number of seconds above 0, got nan"),
        ({"keep_alive_s": -1.0}, "keep_alive_s: must be a number of seconds above 0, got -1.0"),
        ({"drain_s": -1.0}, "drain_s: must be at least 0 seconds, got -1.0"),
        ({"port": 65536}, "port: must be from 0 to 65535, got 65536"),
        ({"health_port": -1}, "health_port: must be from 0 to 65535, got -1"),
        ({"tls_key": Path("/nonexistent")}, "tls_key: /nonexistent is not a file"),
        ({"served_model_names": ("a", " ")}, "served_model_names: one of them is empty"),
    ],
)
def test_a_value_that_cannot_be_used_is_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError) as raised:
        Settings(**values)
    assert str(raised.value) == message


def test_a_certificate_and_its_key_come_together(tmp_path: Path) -> None:
    file = tmp_path / "file.pem"
    file.touch()
    with pytest.raises(SettingsError, match="one of them is missing; give both or none"):
        Settings(tls_certificate=file)
    with pytest.raises(SettingsError, match="tls_client_ca: needs tls_certificate and tls_key"):
        Settings(tls_client_ca=file)


def test_the_model_is_known_by_its_own_name_unless_others_are_given() -> None:
    assert Settings(model="m").names == ("m",)
    assert Settings(model="m", served_model_names=("a", "b")).names == ("a", "b")


def test_a_file_of_keys_has_hashes_names_and_remarks(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"# who\n\n{DIGEST} alice\n  {'0' * 64}  \n")
    assert read_api_keys(file) == (
        ApiKey(hashlib.sha256(b"sk-one").digest(), "alice"),
        ApiKey(bytes(32), "key-4"),
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"sk-one\n", "line 1 of {} is not 64 hexadecimal digits and a name; `dgemma-openai hash-key` makes one"),
        (b"# none\n", "{} has no key; leave the option out to serve anybody"),
        (b"\xff\n", "{} is not readable"),
    ],
)
def test_a_file_without_usable_keys_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "keys"
    file.write_bytes(content)
    with pytest.raises(SettingsError) as raised:
        read_api_keys(file)
    assert str(raised.value).startswith("api_key_hashes: " + message.format(file))


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"api_key_hashes: .* is not readable"):
        read_api_keys(tmp_path / "none")
