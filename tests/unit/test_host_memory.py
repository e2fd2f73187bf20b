"""What memory a process may take: the machine's, and what cgroups leave of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from dgemma_runtime.errors import ConfigurationError
from dgemma_runtime.host_memory import available_memory

GIB = 2**30


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def machine(available_gib: int) -> dict[str, str]:
    return {"proc/meminfo": f"MemTotal: 99999999 kB\nMemFree: 1 kB\nMemAvailable:  {available_gib * 2**20} kB\n"}


def v2(folder: str, limit: str, used: int, inactive: int = 0) -> dict[str, str]:
    at = f"sys/fs/cgroup/{folder}"
    return {
        f"{at}/memory.max": f"{limit}\n",
        f"{at}/memory.current": f"{used}\n",
        f"{at}/memory.stat": f"anon 5\nactive_file 7\ninactive_file {inactive}\n",
    }


def v1(folder: str, limit: int, used: int, inactive: int = 0) -> dict[str, str]:
    at = f"sys/fs/cgroup/memory/{folder}"
    return {
        f"{at}/memory.limit_in_bytes": f"{limit}\n",
        f"{at}/memory.usage_in_bytes": f"{used}\n",
        f"{at}/memory.stat": f"inactive_file 1\ntotal_inactive_file {inactive}\n",
    }


def test_a_machine_without_cgroups(tmp_path: Path) -> None:
    found = available_memory(write(tmp_path, machine(20)))
    assert (found.nbytes, found.source) == (20 * GIB, "free memory of this machine")


def test_a_container_sees_its_own_group_as_the_root(tmp_path: Path) -> None:
    """Version 2; what files hold can be given back."""
    files = machine(20) | {"proc/self/cgroup": "0::/\n"} | v2("", str(4 * GIB), GIB, GIB // 2)
    found = available_memory(write(tmp_path, files))
    assert found.nbytes == 4 * GIB - GIB // 2
    assert f"limit of {4 * GIB} bytes in" in found.source
    assert found.source.endswith("sys/fs/cgroup/memory.max")


def test_the_tightest_group_around_counts(tmp_path: Path) -> None:
    files = machine(20) | {"proc/self/cgroup": "0::/user/service\n"}
    files |= v2("user/service", "max", 5) | v2("user", str(2 * GIB), GIB)
    assert available_memory(write(tmp_path, files)).nbytes == GIB


def test_the_machine_counts_where_it_has_less(tmp_path: Path) -> None:
    files = machine(3) | {"proc/self/cgroup": "0::/\n"} | v2("", str(8 * GIB), 0)
    assert available_memory(write(tmp_path, files)).source == "free memory of this machine"


@pytest.mark.parametrize("seen", ["docker/abc", ""])
def test_version_1(tmp_path: Path, seen: str) -> None:
    """A container's path is the host's, while its own group is mounted as the root."""
    groups = "5:devices:/docker/abc\n4:cpu,memory:/docker/abc\n0::/\n"
    files = machine(20) | {"proc/self/cgroup": groups} | v1(seen, 2 * GIB, GIB, 2**20)
    assert available_memory(write(tmp_path, files)).nbytes == GIB + 2**20


def test_version_1_without_a_limit(tmp_path: Path) -> None:
    files = machine(20) | {"proc/self/cgroup": "4:memory:/\n"} | v1("", 9223372036854771712, GIB)
    assert available_memory(write(tmp_path, files)).nbytes == 20 * GIB


def test_a_group_that_is_full_leaves_nothing(tmp_path: Path) -> None:
    files = machine(20) | {"proc/self/cgroup": "0::/\n"} | v2("", str(GIB), 2 * GIB)
    assert available_memory(write(tmp_path, files)).nbytes == 0


@pytest.mark.parametrize("text", [None, "MemFree: 5 kB\n", "MemAvailable:\n", "MemAvailable: much kB\n"])
def test_a_machine_that_does_not_say(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        write(tmp_path, {"proc/meminfo": text})
    with pytest.raises(ConfigurationError, match=r"proc/meminfo: does not say MemAvailable"):
        available_memory(tmp_path)


def test_this_machine() -> None:
    lines = Path("/proc/meminfo").read_text().splitlines()
    total = int(next(line for line in lines if line.startswith("MemTotal")).split()[1])
    assert 0 < available_memory().nbytes < total * 1024
