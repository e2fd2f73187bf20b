"""What was found, as frozen data. Knows no tensors and no table."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Check:
    """One comparison with PyTorch; NaN does not pass."""

    name: str
    error: float
    tolerance: float

    @property
    def holds(self) -> bool:
        return self.error <= self.tolerance


@dataclass(frozen=True)
class Card:
    """What the card was measured to do."""

    copy: float  # bytes per second, read and written
    read: float  # bytes per second
    bf16_flops: float  # per second, of a large product
    fp8_flops: float
    launch_ms: float  # of a kernel that does nothing worth measuring, timed like all others; nowhere subtracted

    @property
    def bandwidth(self) -> float:
        """The greater one."""
        return max(self.copy, self.read)


@dataclass(frozen=True)
class Work:
    """What a call cannot do without, from shapes."""

    bytes: float
    flops: float  # of products in 16 bits, whatever the weights are stored in


@dataclass(frozen=True)
class Bar:
    """What a figure is held to."""

    text: str
    value: float
    limit: float
    at_least: bool

    @property
    def holds(self) -> bool:
        return self.value >= self.limit if self.at_least else self.value <= self.limit


@dataclass(frozen=True)
class Row:
    """One measurement. Without `error` its checks were made; it may still have none that failed."""

    name: str
    checks: tuple[Check, ...] = ()
    median_ms: float | None = None
    least_ms: float | None = None
    work: Work | None = None
    bandwidth_share: float | None = None  # of the measured one
    flops_share: float | None = None
    bar: Bar | None = None
    error: str = ""  # why there is no measurement
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def numbers_hold(self) -> bool:
        return not self.error and all(check.holds for check in self.checks)

    @property
    def share(self) -> float | None:
        """Of what bounds the call: the greater of the two."""
        shares = [share for share in (self.bandwidth_share, self.flops_share) if share is not None]
        return max(shares) if shares else None
