"""What may be asked of a plan, checked. Knows no model and no GPU."""

from __future__ import annotations

from dataclasses import dataclass

from dgemma_runtime.errors import ConfigurationError

WEIGHT_BITS = {"fp32": 32, "bf16": 16, "fp8": 8, "int4": 4}
PRECISIONS = tuple(WEIGHT_BITS)
KV_PRECISIONS = ("fp32", "bf16", "fp8")
INT4_GROUPS = (32, 64, 128)  # what the kernels read
DEFAULT_GROUP = 32  # what the builder uses; 128 does not divide the experts' 704
DEFAULT_RESERVE_GB = 0.5  # CUDA context, library and its kernels: an allowance, not a measurement


@dataclass(frozen=True)
class PlanOptions:
    """One column of questions; raises ConfigurationError naming option, value and remedy."""

    precision: str = "bf16"
    kv_precision: str = ""  # "": as the activations
    int4_group_size: int = DEFAULT_GROUP
    max_batch_size: int | None = None  # canvases in a step; None: as many as fit
    max_model_len: int | None = None  # tokens; None: the model's own limit
    plugins: bool = False  # grouped experts, head without fp32 logits
    reserve_gb: float = DEFAULT_RESERVE_GB

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise ConfigurationError(f"--precision {self.precision}: choose one of {', '.join(PRECISIONS)}")
        if self.kv_precision and self.kv_precision not in KV_PRECISIONS:
            raise ConfigurationError(f"--kv-precision {self.kv_precision}: choose one of {', '.join(KV_PRECISIONS)}")
        if self.int4_group_size not in INT4_GROUPS:
            groups = ", ".join(map(str, INT4_GROUPS))
            raise ConfigurationError(f"--int4-group-size {self.int4_group_size}: choose one of {groups}")
        if self.max_batch_size is not None and self.max_batch_size < 1:
            raise ConfigurationError(f"--max-batch-size {self.max_batch_size}: must be at least 1")
        if not 0 <= self.reserve_gb < 1e6:
            raise ConfigurationError(f"--reserve-gb {self.reserve_gb:g}: must be from 0 to 1e6")

    @property
    def activations(self) -> str:
        """Precision of activations, and of what the recipes leave unquantised."""
        return "fp32" if self.precision == "fp32" else "bf16"

    @property
    def kv(self) -> str:
        """Precision of keys and values."""
        return self.kv_precision or self.activations
