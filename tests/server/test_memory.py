"""A start that memory does not allow: refused before Triton is started; and what a start that it allows says of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from dgemma_runtime.errors import ConfigurationError
from dgemma_runtime.process_settings import ProcessSettings
from dgemma_runtime.server import ServerOptions, running_server, start_server

FREE = ServerOptions(http_port=0, grpc_port=0, metrics_port=0)


def test_too_many_pages_are_refused_before_triton_starts(engine: Path) -> None:
    settings = ProcessSettings.from_mapping({"engine": engine, "full_pages": 10**9})
    with pytest.raises(ConfigurationError, match=r"does not fit: it needs .* GiB \(.*leave full_pages out"):
        start_server(settings, FREE)


def test_too_little_for_pages_is_refused(engine: Path) -> None:
    settings = ProcessSettings.from_mapping({"engine": engine, "kv_memory_bytes": 1000})
    with pytest.raises(ConfigurationError, match=r"kv_memory_bytes is 1000 .*one sequence of max_model_len"):
        start_server(settings, FREE)


def test_the_plan_is_in_the_log(engine: Path) -> None:
    with running_server(engine, max_model_len=1000, max_batch_size=2) as server:
        log = server.log_tail(100)
    assert "memory, if all of it is used: " in log
    assert "keys and values in pages" in log
    assert "of 1,000 tokens (max_model_len), 2 of at most 2 sequences (max_batch_size) fit at once" in log
