"""The images, built from scratch and run: the check that CI makes of them, as a test."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

CHECK = Path(__file__).resolve().parents[2] / "build" / "tooling" / "check-image"


@pytest.mark.debian
@pytest.mark.timeout(1500)  # the first run makes a Debian and downloads the packages
@pytest.mark.parametrize("target", ["serve", "gateway"])
def test_the_image_is_built_and_serves(target: str) -> None:
    done = subprocess.run(
        [sys.executable, CHECK, "--target", target],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    assert f"check-image: {target}: all is well" in done.stdout
    if target == "serve":
        assert "stopped with status 0" in done.stdout
