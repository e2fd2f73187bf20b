"""From a configuration to an engine directory: fetch, choose a profile, build. Runs as a process of its own.

So that the process that watches servers never blocks. Writes what it found to the file that its caller names.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dgemma_nim.commands import Programs
from dgemma_nim.configuration import Configuration, Resolved, resolve
from dgemma_nim.drafters import find_drafter
from dgemma_nim.engines import ensure_engine
from dgemma_nim.log import Log
from dgemma_nim.machine import Machine, this_machine
from dgemma_nim.models import Checkpoint, Engine, Repository, Source, engine_directory, fetch, find_source
from dgemma_nim.planning import needs
from dgemma_nim.profiles import Compatibility, Profile, all_profiles, choose, compatibilities
from dgemma_nim.variables import child_environment
from dgemma_runtime.contract import MANIFEST_FILE, Manifest
from dgemma_runtime.errors import ConfigurationError, DGemmaError


@dataclass(frozen=True)
class Prepared:
    """What a server is started with."""

    engine: Path
    profile: str  # its tag
    max_model_len: int  # tokens


def prepare(resolved: Resolved, environment: Mapping[str, str], programs: Programs, log: Log) -> Prepared:
    """Everything up to an engine that can be served; raises DGemmaError."""
    configuration = resolved.configuration
    cache = Path(configuration.cache_path)
    source: Source = find_source(configuration)
    drafter = find_drafter(configuration)
    if isinstance(source, Engine):
        if drafter is not None:
            drafter.check_engine(source.manifest)
        return _engine(source, configuration)
    if isinstance(source, Repository):
        log.say(f"model: hf://{source.name}, kept in {cache}")
        source = fetch(source, cache, configuration.download, environment)
    profile = choose_profile(configuration, source, this_machine(), programs)
    log.say(f"profile: {profile.tag} ({profile.id})")
    output = engine_directory(cache, source, profile.tag)
    if drafter is not None and (output / MANIFEST_FILE).is_file():
        drafter.check_engine(Manifest.load(output, verify_hashes=False))
    elif drafter is not None:
        drafter.check_profile(source, profile, log)
    engine = ensure_engine(source, profile, output, programs.build, child_environment(environment), log)
    return Prepared(engine, profile.tag, min(configuration.max_model_len or profile.context, profile.context))


def choose_profile(
    configuration: Configuration, checkpoint: Checkpoint, machine: Machine, programs: Programs
) -> Profile:
    """The one that is named, of the whole context or less; else the best one over the context that is to be served."""
    asked = configuration.max_model_len
    if asked is not None and asked > checkpoint.context:
        raise ConfigurationError(
            f"max_model_len is {asked}, the model has {checkpoint.context} tokens of context; lower NIM_MAX_MODEL_LEN"
        )
    if (name := configuration.model_profile) is not None:
        return choose(name, compatibilities(all_profiles(checkpoint.context), machine, {}))
    return choose(None, compare(checkpoint, asked or checkpoint.context, machine, programs))


def compare(
    checkpoint: Checkpoint | None, context: int, machine: Machine, programs: Programs
) -> tuple[Compatibility, ...]:
    """Every profile beside this machine."""
    profiles = all_profiles(context)
    first = compatibilities(profiles, machine, {})
    gpus = {each.profile.gpu for each in first if not each.incompatible} - {"cpu"}
    directory = checkpoint.directory if checkpoint else None
    return compatibilities(profiles, machine, needs(programs.build, directory, context, sorted(gpus)))


def _engine(source: Engine, configuration: Configuration) -> Prepared:
    manifest = source.manifest
    name = configuration.model_profile
    served = f"{manifest.backend}-{manifest.precision}"
    if name is not None and not name.startswith(served + "-"):
        raise ConfigurationError(
            f"NIM_MODEL_PROFILE is {name!r}, but {source.directory} is an engine for {served}; unset it, or name a "
            "checkpoint"
        )
    longest = manifest.max_model_len
    return Prepared(source.directory, f"{served}-{manifest.target}", configuration.max_model_len or longest)


def main() -> None:
    """Arguments: the file for the result, then those of `nim-serve`. Exit status 2 after an error that was said."""
    result, arguments = Path(sys.argv[1]), sys.argv[2:]
    log = Log()
    try:
        resolved = resolve(arguments, os.environ)
        log = Log(resolved.configuration.log_format)
        found = prepare(resolved, os.environ, Programs.installed(), log)
    except DGemmaError as error:
        log.say(f"error: {error}", "ERROR")
        sys.exit(2)
    text = json.dumps({"engine": str(found.engine), "profile": found.profile, "max_model_len": found.max_model_len})
    result.write_text(text)


if __name__ == "__main__":
    main()
