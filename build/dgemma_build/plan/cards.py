"""What the GPUs that a plan knows can do, from public specifications. Knows no model.

Memory is the advertised size in decimal gigabytes; what a driver reports is 3 to 6% more (80 GB are 84.9e9 bytes on
an H100 SXM), so a plan errs on the safe side. Bandwidth and TFLOPS are peaks, so a floor in time cannot be reached.
TFLOPS are dense and accumulate in fp32; fp32 itself is without tensor cores.

Sources: NVIDIA H100 and H200 datasheets, SXM variants, whose tensor figures are with 2:4 sparsity and are halved here
(1,979 bf16, 3,958 fp8); NVIDIA Ada whitepaper 2.1, appendix A, RTX 4090; NVIDIA RTX Blackwell whitepaper, appendix A,
RTX 5090. The 18 GB budget is what the model's makers name for a quantised one; its speed here is that of an RTX 4090
of which 18 GB are given to the model.
"""

from __future__ import annotations

from dataclasses import dataclass

from dgemma_runtime.errors import ConfigurationError

GIGA, TERA = 10**9, 10**12


@dataclass(frozen=True)
class Card:
    """One GPU, or a share of one."""

    name: str  # as given to --gpu
    title: str
    memory_bytes: int
    bandwidth: float  # bytes per second
    fp32_flops: float  # per second, dense, as all three
    bf16_flops: float
    fp8_flops: float
    takes_plugins: bool  # as Hopper does; what a card of given numbers is cannot be known

    def flops(self, compute: str) -> float:
        """FLOP per second of products in `compute`: fp32, bf16 or fp8."""
        return {"fp32": self.fp32_flops, "fp8": self.fp8_flops}.get(compute, self.bf16_flops)


def _card(name: str, title: str, memory_gb: float, bandwidth_gbs: float, tflops: tuple[float, float, float]) -> Card:
    fp32, bf16, fp8 = (value * TERA for value in tflops)
    return Card(name, title, round(memory_gb * GIGA), bandwidth_gbs * GIGA, fp32, bf16, fp8, name in _PLUGINS)


_PLUGINS = ("h100-80", "h200-141", "given")
_RTX_4090 = (82.6, 165.2, 330.3)
CARDS = {
    card.name: card
    for card in (
        _card("h100-80", "H100 SXM 80 GB", 80, 3350, (66.9, 989.4, 1978.9)),
        _card("h200-141", "H200 SXM 141 GB", 141, 4800, (66.9, 989.4, 1978.9)),
        _card("rtx5090-32", "RTX 5090 32 GB", 32, 1792, (104.8, 209.5, 419.0)),
        _card("rtx4090-24", "RTX 4090 24 GB", 24, 1008, _RTX_4090),
        _card("budget-18", "18 GB budget", 18, 1008, _RTX_4090),
    )
}


def cards_named(names: list[str]) -> list[Card]:
    """The cards of `names`, in that order; raises ConfigurationError for one that is not known."""
    for name in names:
        if name not in CARDS:
            raise ConfigurationError(
                f"--gpu {name}: not known; choose of {', '.join(CARDS)}, or give --memory-gb, --bandwidth-gbs and "
                "--tflops"
            )
    return [CARDS[name] for name in dict.fromkeys(names)]


def given_card(memory_gb: float | None, bandwidth_gbs: float | None, tflops: float | None) -> Card | None:
    """A card of given numbers, `tflops` for products of every precision; None if none is given.

    Raises ConfigurationError if only some are given, or one is not positive.
    """
    given = {"--memory-gb": memory_gb, "--bandwidth-gbs": bandwidth_gbs, "--tflops": tflops}
    if memory_gb is None and bandwidth_gbs is None and tflops is None:
        return None
    for option, value in given.items():
        if value is None:
            raise ConfigurationError(f"{option}: missing; a GPU of given numbers needs {', '.join(given)}")
        if not 0 < value < 1e6:
            raise ConfigurationError(f"{option} {value:g}: must be above 0 and below 1e6")
    assert memory_gb is not None
    assert bandwidth_gbs is not None
    assert tflops is not None
    title = f"{memory_gb:g} GB, {bandwidth_gbs:,.0f} GB/s, {tflops:g} TFLOPS"
    return _card("given", title, memory_gb, bandwidth_gbs, (tflops, tflops, tflops))
