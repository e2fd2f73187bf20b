"""How much memory this process may still take, as the operating system says. Knows no engine and no plan."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from dgemma_runtime.errors import ConfigurationError


@dataclass(frozen=True)
class AvailableMemory:
    """Bytes that may still be allocated, and in words what sets that limit."""

    nbytes: int
    source: str


def available_memory(root: Path = Path("/")) -> AvailableMemory:
    """The least of what the machine has left and what every memory cgroup around this process leaves it.

    What files hold in memory counts as available, as it is given back on demand. Reads /proc/meminfo and cgroups of
    version 2 and 1 under `root`; raises ConfigurationError where the first does not say.
    """
    machine = AvailableMemory(_machine_bytes(root / "proc/meminfo"), "free memory of this machine")
    return min([machine, *_cgroups(root)], key=lambda found: found.nbytes)


def _machine_bytes(path: Path) -> int:
    try:
        lines = path.read_text().splitlines()
        kibibytes = next(line.split()[1] for line in lines if line.startswith("MemAvailable:"))
        return int(kibibytes) * 1024
    except (OSError, StopIteration, IndexError, ValueError):
        raise ConfigurationError(
            f"{path}: does not say MemAvailable, so memory cannot be planned; this server needs Linux 3.14 or later"
        ) from None


@dataclass(frozen=True)
class _Version:
    """Where a version of cgroups keeps its figures."""

    mount: str
    limit: str
    usage: str
    reclaimable: str  # a line of memory.stat


_V2 = _Version("sys/fs/cgroup", "memory.max", "memory.current", "inactive_file")
_V1 = _Version("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def _cgroups(root: Path) -> Iterator[AvailableMemory]:
    """Of the process's group and of those around it that set a limit."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:  # a kernel without cgroups
        return
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        version = _V1 if controllers else _V2
        path = PurePosixPath(group.lstrip("/"))
        for around in dict.fromkeys([path, *path.parents, PurePosixPath()]):  # a container sees its own as the root
            if found := _left(root / version.mount / around, version):
                yield found


def _left(folder: Path, version: _Version) -> AvailableMemory | None:
    """What one group leaves; None where it sets no limit or does not exist here."""
    try:
        limit = (folder / version.limit).read_text().strip()
        if limit == "max":
            return None
        used = int((folder / version.usage).read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except OSError:
        return None
    left = int(limit) - max(used - int(stat.get(version.reclaimable, 0)), 0)
    return AvailableMemory(max(left, 0), f"left of the limit of {int(limit)} bytes in {folder / version.limit}")
