"""The commands of the container: nim-serve, list-model-profiles, download-to-cache, create-model-store.

`dgemma-nim` is the entry point: the first word may be one of them, and without one it is nim-serve. Knows how to talk
to a person; the work is elsewhere.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dgemma_nim import configuration as settings
from dgemma_nim.commands import Programs, build_command, front_end_command, server_command
from dgemma_nim.drafters import find_drafter
from dgemma_nim.engines import ensure_engine
from dgemma_nim.log import Log
from dgemma_nim.machine import this_machine
from dgemma_nim.models import Checkpoint, Engine, Repository, engine_directory, fetch, find_source
from dgemma_nim.prepare import choose_profile, compare
from dgemma_nim.profiles import Compatibility
from dgemma_nim.supervisor import Plan, Supervisor
from dgemma_nim.variables import child_environment
from dgemma_runtime.errors import ConfigurationError, DGemmaError

_RELEASED_CONTEXT = 262144  # tokens, of the released model


def serve(arguments: Sequence[str]) -> int:
    """Serve: front end, engine, Triton."""
    dry_run = {"action": "store_true", "help": "say what would run, and run nothing"}
    as_json = {"action": "store_true", "help": "with --dry-run: one JSON object"}
    own, rest = _read(serve, arguments, dry_run=dry_run, json=as_json)
    resolved = settings.resolve(rest, os.environ)
    log = Log(resolved.configuration.log_format)
    for note in resolved.notes:
        log.say(f"warning: {note}", "WARNING")
    if own.dry_run:
        return _dry_run(resolved, own.json)
    find_source(resolved.configuration)  # what is wrong with these is said before anything starts
    find_drafter(resolved.configuration)
    with tempfile.TemporaryDirectory(prefix="dgemma-nim-") as folder:
        result = Path(folder) / "prepared.json"
        prepare = [sys.executable, "-m", "dgemma_nim.prepare", str(result), *rest]
        plan = Plan(prepare, result, Programs.installed(), os.environ, child_environment(os.environ))
        return Supervisor(resolved.configuration, plan, log).run()


def list_profiles(arguments: Sequence[str]) -> int:
    """List the profiles of the model, and which of them run on this machine."""
    own, rest = _read(list_profiles, arguments, json={"action": "store_true", "help": "one JSON object"})
    configuration = settings.resolve(rest, os.environ).configuration
    checkpoint = _checkpoint_if_there(configuration)
    context = checkpoint.context if checkpoint else _RELEASED_CONTEXT
    machine = this_machine()
    found = compare(checkpoint, min(configuration.max_model_len or context, context), machine, Programs.installed())
    if own.json:
        gpus = [{"index": gpu.index, "name": gpu.name, "memory_bytes": gpu.memory_bytes} for gpu in machine.gpus]
        system = {"gpus": gpus, "memory_bytes": machine.memory_bytes, "driver": machine.driver}
        print(json.dumps({"system": system, "profiles": [_as_json(each) for each in found]}, indent=2))
        return 0
    print("SYSTEM INFO")
    print("- Free GPUs:" if machine.gpus else f"- No GPU: {machine.driver}")
    for gpu in machine.gpus:
        print(f"  - ({gpu.index}) {gpu.name} [{gpu.memory_bytes / 1e9:.0f} GB]")
    print(f"- Memory: {machine.memory_bytes / 1e9:.0f} GB\nMODEL PROFILES")
    _print_profiles("Compatible with system and runnable", [each for each in found if each.runnable])
    _print_profiles("Compatible with system but low memory", [each for each in found if each.low_memory])
    _print_profiles("Incompatible with system", [each for each in found if each.incompatible])
    return 0


def download(arguments: Sequence[str]) -> int:
    """Fetch the model into the cache, so that a later start needs no network."""
    _, rest = _read(download, _plural(arguments))
    configuration = settings.resolve(rest, os.environ).configuration
    source = find_source(configuration)
    log = Log(configuration.log_format)
    if not isinstance(source, Repository):
        log.say(f"{source.directory} is on this machine already; nothing to fetch", source="download-to-cache")
        return 0
    found = fetch(source, Path(configuration.cache_path), configuration.download, os.environ)
    log.say(f"hf://{source.name} is in {found.directory}", source="download-to-cache")
    return 0


def create_store(arguments: Sequence[str]) -> int:
    """Build the engine of a profile into a directory that NIM_MODEL_PATH can name."""
    store = {"metavar": "DIR", "help": "engine directory to write", "required": True, "type": Path}
    own, rest = _read(create_store, _plural(arguments), model_store=store)
    output: Path = own.model_store
    if output.is_mount():
        raise ConfigurationError(f"--model-store is {str(output)!r}, a mount; name a directory inside of it")
    configuration = settings.resolve(rest, os.environ).configuration
    source = find_source(configuration)
    if isinstance(source, Engine):
        raise ConfigurationError(f"{source.directory} is an engine already; name a checkpoint with NIM_MODEL_PATH")
    if isinstance(source, Repository):
        source = fetch(source, Path(configuration.cache_path), configuration.download, os.environ)
    programs, log = Programs.installed(), Log(configuration.log_format)
    profile = choose_profile(configuration, source, this_machine(), programs)
    ensure_engine(source, profile, output, programs.build, child_environment(os.environ), log)
    log.say(f"{output}: {profile.tag}", source="create-model-store")
    return 0


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "nim-serve": serve,
    "list-model-profiles": list_profiles,
    "download-to-cache": download,
    "create-model-store": create_store,
}


# ---------------------------------------------------------------- dry run


def _dry_run(resolved: settings.Resolved, as_json: bool) -> int:
    """Settings with their origins and the commands, as far as they are known without fetching or building."""
    configuration, programs = resolved.configuration, Programs.installed()
    resolved, build, engine = _planned(resolved, programs)
    steps = {
        "front_end": front_end_command(programs.front_end, configuration),
        "build": build,
        "server": server_command(programs.server, resolved.configuration, engine),
    }
    if configuration.download_only:
        steps = {"build": build}
    if as_json:
        values = {"settings": resolved.values(), "notes": resolved.notes, "commands": steps}
        print(json.dumps(values, indent=2))
        return 0
    rows = [("setting", "value", "from"), *resolved.rows()]
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    for name, value, origin in rows:
        print(f"{name:{widths[0]}}  {value:{widths[1]}}  {origin}")
    for name, command in steps.items():
        print(f"\n{name}:\n  {' '.join(command) if command else 'nothing: the engine is there'}")
    return 0


def _planned(resolved: settings.Resolved, programs: Programs) -> tuple[settings.Resolved, list[str], Path]:
    """With what the profile says; what builds the engine (empty: it is there), and where it is."""
    configuration = resolved.configuration
    source = find_source(configuration)
    cache = Path(configuration.cache_path)
    if isinstance(source, Repository):
        try:
            source = fetch(source, cache, False, os.environ)
        except ConfigurationError:
            return resolved, ["(after a download)", *programs.build], cache / "engines"
    if isinstance(source, Engine):
        if configuration.max_model_len is None:
            resolved = resolved.with_value("max_model_len", source.manifest.max_model_len, "engine")
        return resolved, [], source.directory
    profile = choose_profile(configuration, source, this_machine(), programs)
    origin = "chosen for this machine" if configuration.model_profile is None else resolved.origins["model_profile"]
    resolved = resolved.with_value("model_profile", profile.tag, origin)
    if configuration.max_model_len is None:
        resolved = resolved.with_value("max_model_len", profile.context, "profile")
    output = engine_directory(cache, source, profile.tag)
    there = (output / "config.json").is_file()
    return resolved, [] if there else build_command(programs.build, source.directory, profile, output), output


# ---------------------------------------------------------------- helpers


def _read(
    command: Callable[[Sequence[str]], int], arguments: Sequence[str], **options: dict[str, Any]
) -> tuple[argparse.Namespace, list[str]]:
    """A command's own options, and the words that set settings; --help shows both and exits."""
    own = settings.Parser(add_help=False, allow_abbrev=False)
    for name, about in options.items():
        own.add_argument("--" + name.replace("_", "-"), **about)
    name = next(name for name, each in COMMANDS.items() if each is command)
    if {"-h", "--help"} & set(arguments):
        settings.parser(own, prog=name, description=command.__doc__).parse_args(["--help"])
    return own.parse_known_args(list(arguments))


def _plural(arguments: Sequence[str]) -> list[str]:
    """NIM's spellings: --profiles, -p and -m; --all means every download, and there is one."""
    renamed = {"--profiles": "--profile", "-p": "--profile", "-m": "--model-store"}
    return [renamed.get(word, word) for word in arguments if word != "--all"]


def _checkpoint_if_there(configuration: settings.Configuration) -> Checkpoint | None:
    """None where no model is named or it has not been fetched: the released one is planned for."""
    if configuration.model is None:
        return None
    source = find_source(configuration)
    if isinstance(source, Repository):
        try:
            return fetch(source, Path(configuration.cache_path), False, os.environ)
        except ConfigurationError:
            return None
    return source if isinstance(source, Checkpoint) else None


def _print_profiles(title: str, found: Sequence[Compatibility]) -> None:
    print(f"- {title}:")
    for each in found:
        line = f"  - {each.profile.id} ({each.profile.tag})"
        if each.incompatible:
            line += f" [{each.incompatible}]"
        elif each.needs_bytes:
            place = "of memory" if each.profile.gpu == "cpu" else "per GPU"
            line += f" [requires >={each.needs_bytes / 1e9:.1f} GB {place}"
            line += f"; {each.remedy}]" if each.low_memory else "]"
        print(line)


def _as_json(each: Compatibility) -> dict[str, object]:
    profile = each.profile
    state = "incompatible" if each.incompatible else "low_memory" if each.low_memory else "runnable"
    return {
        "id": profile.id,
        "tag": profile.tag,
        "backend": profile.backend,
        "precision": profile.precision,
        "gpu": profile.gpu,
        "context": profile.context,
        "state": state,
        "reason": each.incompatible or (each.remedy if each.low_memory else ""),
        "needs_bytes": each.needs_bytes,
    }


# ---------------------------------------------------------------- entry points


def run(name: str, arguments: Sequence[str]) -> int:
    """The exit status; an error that is raised on purpose is one line on stderr and status 2."""
    try:
        return COMMANDS[name](arguments)
    except DGemmaError as error:
        json_wanted = os.environ.get("NIM_JSONL_LOGGING", "").lower() in ("1", "true")
        Log("json" if json_wanted else "text").say(f"error: {error}", "ERROR", name)
        return 2


def main() -> None:
    """`dgemma-nim [COMMAND] [OPTIONS]`."""
    arguments = sys.argv[1:]
    name = "nim-serve"
    if arguments and not arguments[0].startswith("-"):
        name = arguments.pop(0)
    if name not in COMMANDS:
        print(f"dgemma-nim: error: {name!r} is no command; there are {', '.join(COMMANDS)}", file=sys.stderr)
        sys.exit(2)
    sys.exit(run(name, arguments))


def nim_serve() -> None:
    sys.exit(run("nim-serve", sys.argv[1:]))


def list_model_profiles() -> None:
    sys.exit(run("list-model-profiles", sys.argv[1:]))


def download_to_cache() -> None:
    sys.exit(run("download-to-cache", sys.argv[1:]))


def create_model_store() -> None:
    sys.exit(run("create-model-store", sys.argv[1:]))


if __name__ == "__main__":
    main()
