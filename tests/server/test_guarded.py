"""What only the supervisor may ask of Triton: loading, shared memory, traces, logging; by gRPC and by HTTP."""

from __future__ import annotations

import http.client
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException

from dgemma_runtime.server import RunningServer

if TYPE_CHECKING:
    from tests.server.conftest import Caller

MODEL = "diffusion_gemma"
HEADER = "triton-grpc-protocol-dgemma-key"
CALLS: dict[str, Callable[..., Any]] = {
    "load": lambda client, **more: client.load_model(MODEL, **more),
    "unload": lambda client, **more: client.unload_model(MODEL, **more),
    "index": lambda client, **more: client.get_model_repository_index(**more),
    "shared memory": lambda client, **more: client.register_system_shared_memory("a", "/a", 8, **more),
    "no shared memory": lambda client, **more: client.unregister_system_shared_memory(**more),
    "status of shared memory": lambda client, **more: client.get_system_shared_memory_status(**more),
    "GPU's shared memory": lambda client, **more: client.register_cuda_shared_memory("a", b"aaaa", 0, 8, **more),
    "status of GPU's": lambda client, **more: client.get_cuda_shared_memory_status(**more),
    "trace": lambda client, **more: client.update_trace_settings(settings={"trace_level": "TIMESTAMPS"}, **more),
    "trace settings": lambda client, **more: client.get_trace_settings(**more),
    "log to a file": lambda client, **more: client.update_log_settings({"log_file": "triton.log"}, **more),
    "log settings": lambda client, **more: client.get_log_settings(**more),
}
PATHS = [
    ("POST", "/v2/repository/index"),
    ("POST", f"/v2/repository/models/{MODEL}/load"),
    ("POST", f"/v2/repository/models/{MODEL}/unload"),
    ("GET", "/v2/systemsharedmemory/status"),
    ("POST", "/v2/systemsharedmemory/region/a/register"),
    ("POST", "/v2/systemsharedmemory/unregister"),
    ("GET", "/v2/cudasharedmemory/status"),
    ("POST", "/v2/cudasharedmemory/region/a/register"),
    ("GET", "/v2/trace/setting"),
    ("POST", f"/v2/models/{MODEL}/trace/setting"),
    ("GET", "/v2/logging"),
    ("POST", "/v2/logging"),
]


def key_of(server: RunningServer) -> str:
    arguments = Path(f"/proc/{server.pid}/cmdline").read_text().split("\0")
    return next(item.partition("dgemma-key=")[2] for item in arguments if "grpc-restricted-protocol" in item)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize(
    "headers", [None, {HEADER: "0" * 32}, {"dgemma-key": "0" * 32}], ids=["none", "wrong", "other"]
)
def test_grpc_refuses_who_has_no_key(server: RunningServer, name: str, headers: dict[str, str] | None) -> None:
    with triton.InferenceServerClient(server.grpc_url) as client:
        with pytest.raises(InferenceServerException, match="This protocol is restricted"):
            CALLS[name](client, headers=headers)
        assert client.is_model_ready(MODEL)


@pytest.mark.parametrize(("method", "path"), PATHS)
def test_http_refuses_who_has_no_key(server: RunningServer, method: str, path: str) -> None:
    for headers in ({}, {"dgemma-key": "0" * 32}):
        body = b"{}" if method == "POST" else None
        request = urllib.request.Request(server.http_url + path, body, headers, method=method)
        with pytest.raises(urllib.error.HTTPError) as raised:
            urllib.request.urlopen(request, timeout=10)
        assert raised.value.code == http.client.FORBIDDEN
        assert b"This API is restricted" in raised.value.read()


def test_the_key_is_this_server_s_alone_and_opens_it(server: RunningServer) -> None:
    key = key_of(server)
    assert len(key) == 32
    with triton.InferenceServerClient(server.grpc_url) as client:
        index = client.get_model_repository_index(headers={HEADER: key})
        assert [model.name for model in index.models] == [MODEL]
        assert not client.get_system_shared_memory_status(headers={HEADER: key}).regions


def test_what_is_not_guarded_works_without_a_key(server: RunningServer, caller: Caller) -> None:
    assert caller.infer(text_input="short").text == "a reply"
    with triton.InferenceServerClient(server.grpc_url) as client:
        assert client.get_server_metadata().name == "triton"
        assert client.get_model_config(MODEL).config.name == MODEL
        assert client.get_inference_statistics(MODEL).model_stats
