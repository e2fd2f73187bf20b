"""What is said of a card, a product in fp8, how a card's figures are made, what rows of a call see."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dgemma_build.gpu_check import machine as machine_module
from dgemma_build.gpu_check.card import measure_card
from dgemma_build.gpu_check.inputs import Canvases, cache_behind, generator
from dgemma_build.gpu_check.machine import Machine, Timing, driver_version, scaled_product, what_is_missing
from dgemma_build.gpu_check.sizes import RELEASED, ModelSizes, Scope
from dgemma_build.kernels.packing import to_fp8


def test_an_old_card_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Old")
    for capability, missing in (((8, 6), "Old has SM 8.6; fp8 needs 8.9 or later"), ((8, 9), ""), ((9, 0), "")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index, found=capability: found)
        assert what_is_missing() == missing


@pytest.fixture
def no_module(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No file of the kernel's module."""
    monkeypatch.setattr(machine_module, "Path", lambda name: tmp_path / "none")


def test_the_driver_of_the_module(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    loaded = tmp_path / "version"
    loaded.write_text(
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.86.15  Fri Jan  3 2025\nGCC version: 11.4.0\n"
    )
    monkeypatch.setattr(machine_module, "Path", lambda name: loaded)
    assert driver_version() == "570.86.15"


@pytest.mark.usefixtures("no_module")
@pytest.mark.parametrize(
    ("code", "out", "said"), [(0, "580.1\n", "580.1"), (0, "", "unknown: no driver"), (9, "", "unknown: no driver")]
)
def test_the_driver_of_nvidia_smi(monkeypatch: pytest.MonkeyPatch, code: int, out: str, said: str) -> None:
    answer = SimpleNamespace(returncode=code, stdout=out, stderr="no driver\n")
    monkeypatch.setattr("shutil.which", lambda name: name)
    monkeypatch.setattr("subprocess.run", lambda *arguments, **options: answer)
    assert driver_version() == said


@pytest.mark.usefixtures("no_module")
def test_no_driver_to_be_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert driver_version().startswith("unknown: neither")


def test_a_product_in_fp8_takes_scales_of_rows_and_of_outputs() -> None:
    random = torch.Generator().manual_seed(0)
    x, weight = torch.randn(5, 32, generator=random), torch.randn(48, 32, generator=random)
    (x8, x_scale), (w8, w_scale) = to_fp8(x), to_fp8(weight)
    expected = (x8.float() * x_scale[:, None]) @ (w8.float() * w_scale[:, None]).T
    result = scaled_product(x8, x_scale[:, None], w8, w_scale[None, :], torch.bfloat16)
    torch.testing.assert_close(result.float(), expected, rtol=1e-2, atol=1e-2)


def test_the_card_s_figures(machine: Machine, little: Scope, monkeypatch: pytest.MonkeyPatch) -> None:
    """4 KiB in a millisecond are 4.096 MB/s read and twice that copied."""

    def time(run: Any, repetitions: int) -> Timing:
        run()
        return Timing(1.0, 0.5, repetitions)

    monkeypatch.setattr(machine, "time", time)
    card = measure_card(machine, little, torch.float32)
    assert card.read == pytest.approx(4.096e6)
    assert card.copy == card.bandwidth == pytest.approx(8.192e6)
    assert card.bf16_flops == card.fp8_flops == pytest.approx(2e3 * little.probe_side**3)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize(("context", "window"), [(0, 0), (3, 0), (3, 6), (40, 6)])
def test_what_rows_see(context: int, window: int, bidirectional: bool) -> None:
    """Against the rules, position by position."""
    rows = Canvases(2, 5, context, bidirectional)
    pairs, positions = 0, set()
    for token in range(context, context + 5):
        for seen in range(context + 5):
            visible = bidirectional or seen <= token
            if window:
                visible = visible and seen > (context if bidirectional else token) - window
            pairs += visible
            positions |= {seen} if visible else set()
    assert rows.seen(window) == (len(positions), pairs)
    assert rows.first_seen(window) == min(positions)


def test_only_pages_that_are_seen_exist(machine: Machine, tiny: ModelSizes) -> None:
    rows = Canvases(2, tiny.canvas, 100, True)
    behind = cache_behind(machine, tiny.sliding, rows, torch.float16, torch.float16, generator(machine, 0))
    first = (100 - (tiny.sliding.window - 1)) // tiny.sliding.page
    assert (behind.table[:, :first] == -1).all()
    held = behind.table[:, first:]
    assert sorted(held.flatten().tolist()) == list(range(held.numel()))
    assert behind.pages.keys.shape[0] == held.numel()


def test_the_released_layers() -> None:
    kinds = list(RELEASED.layers(30))
    assert [index for index, kind in enumerate(kinds) if kind.window == 0] == [5, 11, 17, 23, 29]
