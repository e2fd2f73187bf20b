"""Whether a drafter belongs to the engine that is to be served, told before that is built. Knows no engine library."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dgemma_nim.configuration import Configuration
from dgemma_nim.log import Log
from dgemma_nim.models import Checkpoint
from dgemma_nim.profiles import Profile
from dgemma_runtime.contract import Manifest
from dgemma_runtime.drafter_manifest import DrafterManifest, check_drafter
from dgemma_runtime.errors import ConfigurationError

_REMEDY = "set NIM_DRAFT_MODEL_PATH to a drafter that was built for this engine, or unset it"


@dataclass(frozen=True)
class Drafter:
    """A directory that `dgemma-build engine --drafter` has written."""

    directory: Path
    manifest: DrafterManifest

    def check_engine(self, engine: Manifest) -> None:
        """Raises ConfigurationError."""
        try:
            check_drafter(self.directory, self.manifest, engine)
        except ConfigurationError as error:
            raise ConfigurationError(f"{error} (here: {_REMEDY}, or name another NIM_MODEL_PROFILE)") from None

    def check_profile(self, checkpoint: Checkpoint, profile: Profile, log: Log) -> None:
        """The same of an engine that is not there yet, which takes reading the weights; raises ConfigurationError."""
        manifest, where = self.manifest, f"NIM_DRAFT_MODEL_PATH is {str(self.directory)!r}, a drafter"
        wanted = {"backend": profile.backend, "kv_dtype": profile.kv_dtype}
        for name, theirs in wanted.items():
            if (ours := getattr(manifest, name)) != theirs:
                raise ConfigurationError(
                    f"{where} with {name} {ours}; an engine of the profile {profile.tag} has {theirs}: {_REMEDY}, or "
                    "name a NIM_MODEL_PROFILE that fits it"
                )
        log.say(f"reading {checkpoint.directory} to see whether the drafter is of this model")
        if (found := checkpoint.sha256()) != manifest.denoiser_sha256:
            raise ConfigurationError(
                f"{where} of {manifest.denoiser!r} with checkpoint_sha256 {manifest.denoiser_sha256[:12]}…, but "
                f"{checkpoint.directory} has {found[:12]}…: {_REMEDY}, or name its model with NIM_MODEL_PATH"
            )


def find_drafter(configuration: Configuration) -> Drafter | None:
    """The one that is to be served with, if any; raises DGemmaError."""
    if configuration.draft_model is None or configuration.download_only:
        return None
    directory = Path(configuration.draft_model)
    if not directory.is_dir():
        raise ConfigurationError(
            f"NIM_DRAFT_MODEL_PATH is {configuration.draft_model!r}, which is not a directory; mount it, correct the "
            "path, or unset it"
        )
    return Drafter(directory, DrafterManifest.load(directory, verify_hashes=False))  # the engine verifies them
