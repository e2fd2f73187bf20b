"""The configuration of a container: ranks, spellings, and what is refused."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dgemma_nim.configuration import Configuration, resolve
from dgemma_nim.settings import SETTINGS
from dgemma_nim.variables import OTHERS, SECRETS, child_environment
from dgemma_runtime.errors import ConfigurationError


def value(name: str, arguments: list[str] | None = None, **environment: str) -> Any:
    return getattr(resolve(arguments or [], environment).configuration, name)


def test_each_setting_has_a_field_and_one_default() -> None:
    assert [item.name for item in fields(Configuration)] == [setting.name for setting in SETTINGS]
    found = resolve([], {})
    assert {item.name: getattr(found.configuration, item.name) for item in fields(Configuration)} == {
        setting.name: setting.default for setting in SETTINGS
    }
    assert set(found.origins.values()) == {"default"}


def test_the_context_is_the_models_own_unless_somebody_says_otherwise() -> None:
    assert value("max_model_len") is None


def test_ranks(tmp_path: Path) -> None:
    """Each layer taken away lets the next one through."""
    (tmp_path / "runtime_config.json").write_text(json.dumps({"server_port": 5, "log-level": "debug"}))
    environment = {
        "NIM_PASSTHROUGH_ARGS": "--port 2",
        "NIM_SERVER_PORT": "3",
        "NIM_HTTP_API_PORT": "4",
        "NIM_CACHE_PATH": str(tmp_path),
    }
    arguments = ["--port", "1"]
    seen = []
    for name in ("command line", "NIM_PASSTHROUGH_ARGS", "NIM_SERVER_PORT", "NIM_HTTP_API_PORT"):
        found = resolve(arguments, environment)
        seen.append((found.configuration.server_port, found.origins["server_port"]))
        assert seen[-1][1] == name
        arguments = []
        if name != "command line":
            del environment[name]
    found = resolve([], environment)
    assert (found.configuration.server_port, found.origins["server_port"]) == (5, "runtime_config.json")
    assert found.configuration.log_level == "DEBUG"
    del environment["NIM_CACHE_PATH"]
    assert resolve([], environment).configuration.server_port == 8000
    assert [number for number, _ in seen] == [1, 2, 3, 4]


def test_the_last_of_two_flags_counts_and_empty_variables_do_not() -> None:
    assert value("prefix_cache", ["--enable-prefix-caching", "--no-enable-prefix-caching"]) is False
    assert value("server_port", NIM_SERVER_PORT="", NIM_HTTP_API_PORT="9000") == 9000


@pytest.mark.parametrize(
    ("name", "environment", "expected"),
    [
        ("cuda_graphs", {"NIM_DISABLE_CUDA_GRAPH": "1"}, False),
        ("download", {"NIM_DISABLE_MODEL_DOWNLOAD": "true"}, False),
        ("download_only", {"NIM_ENGINE_MODEL_DOWNLOAD_ONLY": "1"}, True),
        ("cache_path", {"NIM_CACHE_PATH": "/a", "NIM_ENGINE_MODEL_PATH": "/model"}, "/model"),
        ("prefix_cache", {"NIM_ENABLE_KV_CACHE_REUSE": "0"}, False),
        ("log_format", {"NIM_JSONL_LOGGING": "1"}, "json"),
        ("log_format", {"NIM_JSONL_LOGGING": "false"}, "text"),
        ("log_level", {"NIM_LOG_LEVEL": "critical"}, "ERROR"),
        ("log_level", {"NIM_LOG_LEVEL": "DEFAULT"}, "INFO"),
        ("traces", {"NIM_ENABLE_OTEL": "1"}, True),
        ("served_model_names", {"NIM_SERVED_MODEL_NAME": "a, b"}, ("a", "b")),
        ("cors_origins", {"NIM_CORS_ALLOW_ORIGINS": "https://a.example"}, ("https://a.example",)),
        ("max_model_len", {"NIM_MAX_MODEL_LEN": "65536"}, 65536),
        ("model", {"NIM_MODEL_NAME": "hf://a/b"}, "hf://a/b"),
    ],
)
def test_variables(name: str, environment: dict[str, str], expected: Any) -> None:
    assert getattr(resolve([], environment).configuration, name) == expected


def test_a_drafter_need_not_be_there_until_one_is_served_with() -> None:
    assert value("draft_model", NIM_DRAFT_MODEL_PATH="/nowhere") == "/nowhere"


def test_names_on_a_command_line_may_be_several_words() -> None:
    assert value("served_model_names", ["--served-model-name", "a", "b"]) == ("a", "b")


@pytest.mark.parametrize(
    ("arguments", "environment", "words"),
    [
        ([], {"NIM_SERVER_PORT": "abc"}, ["NIM_SERVER_PORT", "'abc'", "65535"]),
        ([], {"NIM_SERVER_PORT": "tcp://10.0.0.1:8000"}, ["NIM_SERVER_PORT", "enableServiceLinks: false"]),
        ([], {"NIM_MAX_MODEL_LEN": "0"}, ["NIM_MAX_MODEL_LEN", "'0'", "at least 1"]),
        ([], {"NIM_LOG_LEVEL": "LOUD"}, ["NIM_LOG_LEVEL", "'LOUD'", "WARNING"]),
        ([], {"NIM_SSL_MODE": "ssl3"}, ["NIM_SSL_MODE", "'ssl3'", "mtls"]),
        ([], {"NIM_SSL_MODE": "tls"}, ["ssl_certificate", "NIM_SSL_CERTS_PATH"]),
        ([], {"NIM_JSONL_LOGGING": "maybe"}, ["NIM_JSONL_LOGGING", "'maybe'", "1 or 0"]),
        ([], {"NIM_SERVED_MODEL_NAME": "a,,b"}, ["NIM_SERVED_MODEL_NAME", "none of them empty"]),
        ([], {"NIM_PASSTHROUGH_ARGS": "--port '1"}, ["NIM_PASSTHROUGH_ARGS", "quote"]),
        ([], {"NIM_PASSTHROUGH_ARGS": "--quantization fp8"}, ["--quantization", "NIM_PASSTHROUGH_ARGS", "--help"]),
        (["--swap-space=4"], {}, ["--swap-space", "command line"]),
        (["--port"], {}, ["--port"]),
        (["--api-key", "sk-very-secret"], {}, ["--api-key", "--api-key-hashes"]),
        (["--health-port", "8000"], {}, ["health_port", "server_port", "8000"]),
        ([], {"NIM_RUNTIME_CONFIG": "/nowhere.json"}, ["NIM_RUNTIME_CONFIG", "/nowhere.json"]),
    ],
)
def test_what_cannot_be_used_is_named(arguments: list[str], environment: dict[str, str], words: list[str]) -> None:
    with pytest.raises(ConfigurationError) as error:
        resolve(arguments, environment)
    assert all(word in str(error.value) for word in words), str(error.value)
    assert "sk-very-secret" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", ["not readable as JSON"]),
        ("[]", ["JSON object", "list"]),
        ('{"ports": 1}', ["'ports'", "server_port"]),
        ('{"model": "/x"}', ["'model'", "cannot be set here"]),
        ('{"server_port": null}', ["server_port", "None"]),
        ('{"server_port": "x"}', ["server_port", "'x'"]),
    ],
)
def test_runtime_config_is_checked(text: str, words: list[str], tmp_path: Path) -> None:
    file = tmp_path / "runtime_config.json"
    file.write_text(text)
    with pytest.raises(ConfigurationError) as error:
        resolve(["--model", str(tmp_path)], {})
    assert all(word in str(error.value) for word in [str(file), *words]), str(error.value)


def test_runtime_config_beside_the_model_comes_before_the_one_in_the_cache(tmp_path: Path) -> None:
    model, cache = tmp_path / "model", tmp_path / "cache"
    for folder, names in ((model, ["a"]), (cache, ["b"])):
        folder.mkdir()
        (folder / "runtime_config.json").write_text(json.dumps({"served_model_names": names, "traces": True}))
    found = resolve(["--cache-path", str(cache)], {"NIM_MODEL_PATH": str(model)}).configuration
    assert found.served_model_names == ("a",)
    assert found.traces is True
    assert resolve(["--cache-path", str(cache)], {}).configuration.served_model_names == ("b",)


@pytest.mark.parametrize("other", [other for other in OTHERS if other.refused], ids=lambda other: other.name)
def test_variables_that_cannot_be_honoured_are_refused_by_name(other: Any) -> None:
    with pytest.raises(ConfigurationError, match=other.name) as error:
        resolve([], {other.name: "2"})
    assert other.meaning in str(error.value)


@pytest.mark.parametrize("other", [other for other in OTHERS if not other.refused], ids=lambda other: other.name)
def test_variables_that_change_nothing_are_said(other: Any) -> None:
    (note,) = resolve([], {other.name: "2"}).notes
    assert other.name in note
    assert other.meaning in note


@pytest.mark.parametrize(
    ("name", "harmless"),
    [
        ("NIM_TENSOR_PARALLEL_SIZE", "1"),
        ("NIM_ENABLE_KV_CACHE_HOST_OFFLOAD", "0"),
        ("NIM_GPU_MEM_FRACTION", "0.9"),
    ],
)
def test_a_refused_variable_may_say_what_is_so(name: str, harmless: str) -> None:
    assert len(resolve([], {name: harmless}).notes) == 1


def test_a_misspelt_variable_is_said_and_those_of_services_are_not() -> None:
    (note,) = resolve([], {"NIM_MAX_MODEL_LENGHT": "1", "NIM_LLM_SERVICE_HOST": "10.0.0.1", "PATH": "/bin"}).notes
    assert "did you mean NIM_MAX_MODEL_LEN?" in note


def test_secrets_are_neither_shown_nor_passed_to_servers() -> None:
    environment = {name: f"secret-{name}" for name in SECRETS} | {"NIM_OTEL_SERVICE_NAME": "x", "PATH": "/bin"}
    found = resolve([], environment)
    assert "secret-" not in repr(found) + repr(found.rows()) + json.dumps(found.values())
    child = child_environment(environment)
    assert not any("secret-" in text for text in child.values())
    assert child["OTEL_SERVICE_NAME"] == "x"


def test_rows_name_every_setting_with_its_origin() -> None:
    rows = resolve(["--port", "9"], {"NIM_LOG_LEVEL": "DEBUG"}).rows()
    assert [row[0] for row in rows] == [setting.name for setting in SETTINGS]
    assert ("server_port", "9", "command line") in rows
    assert ("log_level", "DEBUG", "NIM_LOG_LEVEL") in rows
    assert ("cors_origins", "-", "default") in rows


@given(st.dictionaries(st.sampled_from([name for each in SETTINGS for name in each.variables]), st.text(max_size=12)))
def test_any_values_are_a_configuration_or_one_error(environment: dict[str, str]) -> None:
    try:
        said = resolve([], environment).configuration.cache_path
    except ConfigurationError as error:
        said = str(error)
    assert said
