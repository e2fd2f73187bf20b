"""Two layers of the released dimensions, one of each kind, built by TensorRT for RTX in every precision."""

from __future__ import annotations

from pathlib import Path

import pytest

from dgemma_build.engine import BuildRequest, build_engine
from dgemma_build.random_checkpoint import write_checkpoint

CONTEXT = 262_144  # tokens
SCRATCH = 1e9  # bytes, with one canvas behind the whole context
# Values in E4M3 are turned for their product: a copy of one byte an element.
SCRATCH_FP8_CACHE = SCRATCH + CONTEXT * 2 * 512


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("real") / "real", "real", layers=2, vocab_size=8192)


@pytest.mark.parametrize(
    ("precision", "kv", "ceiling"),
    [("bf16", "bf16", SCRATCH), ("fp8", "fp8", SCRATCH_FP8_CACHE), ("int4", "bf16", SCRATCH)],
)
def test_it_builds_with_the_whole_context_in_a_gigabyte_of_scratch(
    real: Path, tmp_path: Path, precision: str, kv: str, ceiling: float
) -> None:
    request = BuildRequest(real, tmp_path / "engine", "tensorrt_rtx", precision, kv, max_batch_size=1)
    manifest = build_engine(request)
    assert (manifest.max_model_len, manifest.precision, manifest.kv_dtype) == (CONTEXT, precision, kv)
    assert 0.25e9 < manifest.scratch_bytes < ceiling
    weights = 1.68e9 * {"bf16": 2, "fp8": 1, "int4": 4.5 / 8}[precision]
    assert weights < (tmp_path / "engine/rank0.engine").stat().st_size < 1.1 * weights
