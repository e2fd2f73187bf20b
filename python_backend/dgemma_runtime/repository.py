"""The model repository that one server loads: a copy of the given one, its configuration with this engine's facts.

Triton shows a model's configuration at /v2/models/NAME/config and knows it before the model is loaded, so what depends
on engine and settings has to be in the file. Where Triton is started without `dgemma-server`, these parameters are
absent unless someone writes them into config.pbtxt; the model itself does not read them. Knows no Triton process.
"""

from __future__ import annotations

import importlib.metadata
import json
import shutil
from collections.abc import Mapping
from pathlib import Path

from dgemma_runtime.contract import Manifest
from dgemma_runtime.settings import RuntimeSettings

_CONFIG_FILE = "config.pbtxt"
_DISTRIBUTION = "dgemma-triton"


def model_facts(manifest: Manifest, settings: RuntimeSettings) -> dict[str, str]:
    """What clients may want to know of the served model, by name. Lengths and sizes are in tokens."""
    return {
        "max_model_len": str(settings.context_length(manifest)),
        "canvas_length": str(manifest.model.canvas_length),
        "checkpoint": manifest.checkpoint,
        "backend": manifest.backend,
        "precision": manifest.precision,
        "page_size": str(settings.page_size),
        "max_batch_size": str(settings.max_batch_size),
        "server_version": _version(),
    }


def stage_repository(source: Path, target: Path, model: str, facts: Mapping[str, str]) -> Path:
    """Copy one model of the repository `source` to the new folder `target`, with `facts` as its parameters."""
    shutil.copytree(source / model, target / model, ignore=shutil.ignore_patterns("__pycache__"))
    config = target / model / _CONFIG_FILE
    entries = "".join(_parameter(name, value) for name, value in facts.items())
    config.write_text(f"{config.read_text().rstrip()}\n\n# of this server\n{entries}")
    return target


def _parameter(name: str, value: str) -> str:
    """An entry of the configuration's map; strings of the protobuf text format are escaped as JSON's are."""
    quoted = (json.dumps(text, ensure_ascii=False) for text in (name, value))
    return "parameters {{ key: {} value: {{ string_value: {} }} }}\n".format(*quoted)


def _version() -> str:
    """Of this package; a source tree on the path has none."""
    try:
        return importlib.metadata.version(_DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
