"""What the adapter needs of Triton's Python backend, checked before the model loads. Knows features, not versions."""

from __future__ import annotations

from typing import Any

from dgemma_runtime.errors import ConfigurationError

_REQUIRED = (
    "InferenceRequest.get_response_sender",
    "InferenceResponse",
    "Tensor",
    "TRITONSERVER_RESPONSE_COMPLETE_FINAL",
    *(f"TritonError.{code}" for code in ("INTERNAL", "INVALID_ARG", "UNAVAILABLE")),
    "unload_model",
)


def check_triton(pb_utils: Any, numpy_version: str) -> None:
    """Raises ConfigurationError when `triton_python_backend_utils` lacks something, or does not fit this numpy."""
    missing = [name for name in _REQUIRED if not _has(pb_utils, name)]
    if missing:
        raise ConfigurationError(
            f"this Triton's Python backend has no {', '.join(missing)}; use Triton 24.10 (2.51) or later"
        )
    # Numpy 2 support and response parameters both came with the release after 24.10; only the latter can be asked for.
    # With an older one, tensors are read at the wrong offsets: garbage or a crash at the first request.
    signature = pb_utils.InferenceResponse.__init__.__doc__ or ""
    if int(numpy_version.split(".")[0]) >= 2 and "parameters" not in signature:
        raise ConfigurationError(
            f"numpy is {numpy_version}, and this Triton's Python backend was built for numpy 1; "
            "run `pip install 'numpy<2'`, or use a newer Triton"
        )


def _has(value: Any, path: str) -> bool:
    for name in path.split("."):
        if not hasattr(value, name):
            return False
        value = getattr(value, name)
    return True
