"""Engines of a cache: found, or built once however many containers share the volume. Knows no serving."""

from __future__ import annotations

import contextlib
import fcntl
import os
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

from dgemma_nim.commands import build_command
from dgemma_nim.log import Log
from dgemma_nim.models import Checkpoint
from dgemma_nim.profiles import Profile
from dgemma_runtime.contract import MANIFEST_FILE, Manifest
from dgemma_runtime.errors import ConfigurationError, DGemmaError


class BuildFailed(DGemmaError):
    """The exporter ended with an error, which it has said on stderr."""


def ensure_engine(
    checkpoint: Checkpoint,
    profile: Profile,
    output: Path,
    program: tuple[str, ...],
    environment: Mapping[str, str],
    log: Log,
) -> Path:
    """The engine in `output`, built where it is not there; raises DGemmaError.

    A build that was interrupted goes on. Whoever comes second waits for the first, and then finds its engine.
    """
    if _present(output):
        return output
    with _locked(output, log):
        if _present(output):
            return output
        log.say(f"building the engine {profile.tag} of {checkpoint.directory} in {output}")
        command = build_command(program, checkpoint.directory, profile, output)
        status = subprocess.run(command, env=dict(environment), stdin=subprocess.DEVNULL, check=False).returncode
        if status:
            raise BuildFailed(f"the engine {profile.tag} was not built (status {status}); the lines above say why")
        Manifest.load(output)  # with the hash of every file
        log.say(f"built and verified: {output}")
    return output


def _present(output: Path) -> bool:
    """Whether a whole engine of this runtime's format lies there; the manifest is written last."""
    if not (output / MANIFEST_FILE).is_file():
        return False
    Manifest.load(output, verify_hashes=False)
    return True


@contextlib.contextmanager
def _locked(output: Path, log: Log) -> Iterator[None]:
    """Alone among all containers that share the volume; the kernel lets go when a process ends."""
    path = output.with_name(output.name + ".lock")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o664)
    except OSError as error:
        raise ConfigurationError(
            f"{output.parent}: cannot be written ({error.strerror}) by user {os.getuid()}; mount a volume that this "
            "user may write (chown, or fsGroup: 1000), or set NIM_CACHE_PATH"
        ) from None
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.say(f"another process builds {output}; waiting for it")
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
