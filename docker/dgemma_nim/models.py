"""Where the model comes from: a checkpoint or engine directory, or a repository that is fetched. Knows no process."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dgemma_nim.configuration import Configuration
from dgemma_runtime.contract import MANIFEST_FILE, Manifest, checkpoint_sha256
from dgemma_runtime.errors import ConfigurationError

_HF = re.compile(r"hf://(?P<repository>[\w.-]+/[\w.-]+?)(?:[:@](?P<revision>[\w./-]+))?")
_FOREIGN = ("ngc://", "modelscope://", "s3://", "gs://", "http://", "https://")
# Weights as safetensors and what the exporter reads beside them: no pickles, no code.
FETCHED = ("*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja")
ENGINES = "engines"
DOWNLOADS = "huggingface"


@dataclass(frozen=True)
class Checkpoint:
    """A directory in transformers' format."""

    directory: Path
    context: int  # tokens, the model's own

    @property
    def name(self) -> str:
        return self.directory.name

    @property
    def fingerprint(self) -> str:
        """Changes whenever a file does, without reading weights: names, sizes, times, and the config."""
        files = sorted(path for path in self.directory.iterdir() if path.suffix in (".safetensors", ".json", ".jinja"))
        facts = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files if path.is_file()]
        content = (self.directory / "config.json").read_bytes()
        return hashlib.sha256(json.dumps(facts).encode() + content).hexdigest()[:12]

    def sha256(self) -> str:
        """The checkpoint_sha256 of its engines; reads every weight.

        Raises ConfigurationError.
        """
        index, names = _object(self.directory / "model.safetensors.index.json"), {"model.safetensors"}
        if index is not None:
            weight_map = index.get("weight_map")
            names = {str(name) for name in weight_map.values()} if isinstance(weight_map, dict) else set()
        weights = [self.directory / name for name in names]
        for path in (self.directory / "config.json", *weights):
            if not path.is_file():
                raise ConfigurationError(f"{path}: not found; complete the checkpoint")
        return checkpoint_sha256(self.directory, weights)


@dataclass(frozen=True)
class Engine:
    """A directory that `dgemma-build engine` has written."""

    directory: Path
    manifest: Manifest


@dataclass(frozen=True)
class Repository:
    """On Hugging Face, or a mirror that HF_ENDPOINT names."""

    name: str
    revision: str | None


Source = Checkpoint | Engine | Repository


def find_source(configuration: Configuration) -> Source:
    """What `model` names; without it, what lies in the cache. Raises ConfigurationError."""
    if configuration.model is None:
        return _in_cache(Path(configuration.cache_path))
    text = configuration.model
    if text.startswith("hf://"):
        found = _HF.fullmatch(text)
        if found is None or ".." in text:
            raise ConfigurationError(f"NIM_MODEL_PATH is {text!r}; write hf://ORGANISATION/NAME or .../NAME:REVISION")
        return Repository(found["repository"], found["revision"])
    if text.startswith(_FOREIGN):
        raise ConfigurationError(
            f"NIM_MODEL_PATH is {text!r}; models come from a directory or from hf://ORGANISATION/NAME: mount it"
        )
    directory = Path(text)
    if not directory.is_dir():
        raise ConfigurationError(f"NIM_MODEL_PATH is {text!r}, which is not a directory; mount the model there")
    return read_directory(directory)


def read_directory(directory: Path) -> Checkpoint | Engine:
    """A checkpoint or an engine; raises ConfigurationError for anything else."""
    config = _config(directory)
    if config is None:
        raise ConfigurationError(
            f"{directory}: has no {MANIFEST_FILE}; it must hold a checkpoint in transformers' format or an engine"
        )
    if "format_version" in config:
        return Engine(directory, Manifest.load(directory, verify_hashes=False))
    if not any(directory.glob("*.safetensors")):
        raise ConfigurationError(f"{directory}: has no *.safetensors; only weights in this format are read")
    nested = config.get("text_config")
    text = nested if isinstance(nested, dict) else config
    context = text.get("max_position_embeddings")
    if not isinstance(context, int) or isinstance(context, bool) or context < 1:
        raise ConfigurationError(
            f"{directory / 'config.json'}: max_position_embeddings is {context!r}; this is no DiffusionGemma checkpoint"
        )
    return Checkpoint(directory, context)


def engine_directory(cache: Path, checkpoint: Checkpoint, tag: str) -> Path:
    """Where the engine of a checkpoint and a profile lies in a cache."""
    return cache / ENGINES / f"{checkpoint.name}-{checkpoint.fingerprint}" / tag


def _in_cache(cache: Path) -> Source:
    if _config(cache) is not None:
        return read_directory(cache)
    engines = sorted(path.parent for path in cache.glob(f"{ENGINES}/*/*/{MANIFEST_FILE}"))
    if len(engines) == 1:
        return read_directory(engines[0])
    found = f"it holds {len(engines)} engines" if engines else "it holds neither a checkpoint nor an engine"
    raise ConfigurationError(
        f"no model is named and {cache} does not settle it: {found}; set NIM_MODEL_PATH to a directory or hf://..."
    )


def _config(directory: Path) -> dict[str, Any] | None:
    return _object(directory / MANIFEST_FILE)


def _object(path: Path) -> dict[str, Any] | None:
    """Of a JSON file; None where there is none."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(values, dict):
        raise ConfigurationError(f"{path}: must be a JSON object, is a {type(values).__name__}")
    return values


def fetch(repository: Repository, cache: Path, allowed: bool, environment: Mapping[str, str]) -> Checkpoint:
    """The checkpoint in the cache, fetched where it is not there and that is `allowed`; goes on where it stopped.

    Raises ConfigurationError. Files are named by their content, so a file that is there is whole.
    """
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    where = f"hf://{repository.name}" + (f":{repository.revision}" if repository.revision else "")
    token = environment.get("HF_TOKEN") or environment.get("HUGGING_FACE_HUB_TOKEN")
    try:
        directory = Path(
            snapshot_download(
                repository.name,
                revision=repository.revision,
                cache_dir=cache / DOWNLOADS,
                allow_patterns=list(FETCHED),
                token=token or False,
                local_files_only=not allowed,
                endpoint=environment.get("HF_ENDPOINT") or None,
            )
        )
    except LocalEntryNotFoundError as error:
        remedy = "see whether the network reaches it" if allowed else "unset NIM_DISABLE_MODEL_DOWNLOAD, or download it"
        raise ConfigurationError(f"{where} is not in {cache} and was not fetched ({_line(error)}); {remedy}") from None
    except HfHubHTTPError as error:
        remedy = "set HF_TOKEN to a token that may read it, and check the name"
        raise ConfigurationError(f"{where} was not fetched ({_line(error)}); {remedy}") from None
    except OSError as error:
        raise ConfigurationError(f"{where} was not fetched ({_line(error)}); make {cache} writable") from None
    root = (cache / DOWNLOADS).resolve()
    for path in directory.rglob("*"):
        if not path.resolve().is_relative_to(root):
            raise ConfigurationError(f"{path}: lies outside of {root}; remove it and download again")
    found = read_directory(directory)
    if not isinstance(found, Checkpoint):
        raise ConfigurationError(f"{where} holds an engine; fetch it yourself and set NIM_MODEL_PATH to its directory")
    return found


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
