"""Objects against their schemas, strictly: an unknown field is an error. Knows no chart.

Kubernetes' own kinds by its published OpenAPI, which the package kubernetes-validate carries for each version. Custom
kinds by `custom_kinds.json`, which has the fields that are used here and refers to Kubernetes' for what they embed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from jsonschema import Draft202012Validator
from referencing import Registry, Resource

VERSIONS = ("1.30", "1.37")  # the oldest that the chart admits, and the newest that there is a schema for
CUSTOM = Path(__file__).with_name("custom_kinds.json")

Object = dict[str, Any]


def read_objects(text: str) -> list[Object]:
    """The objects of a YAML stream; empty documents are none. A key that is there twice raises ValueError."""
    return [item for item in yaml.load_all(text, _Strict) if item]


def errors_of(item: Object, version: str) -> list[str]:
    """What is wrong with it for that version of Kubernetes: kind and name, path, and why."""
    name = f"{item.get('kind')} {item.get('metadata', {}).get('name')}"
    validator = _validator(str(item.get("apiVersion")), str(item.get("kind")), version)
    if validator is None:
        return [f"{name}: no schema of {item.get('apiVersion')} for Kubernetes {version}"]
    found = sorted(validator.iter_errors(item), key=lambda error: error.json_path)
    return [f"{name}: {error.json_path}: {error.message}" for error in found]


class _Strict(yaml.SafeLoader):
    """Refuses a key that is there twice, which YAML forbids and PyYAML takes."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key) for key, _ in node.value]
        if twice := {str(key) for key in keys if keys.count(key) > 1}:
            raise ValueError(f"{node.start_mark}: there twice: {', '.join(sorted(twice))}")
        return super().construct_mapping(node, deep)


def _folder(version: str) -> Any:
    return files("kubernetes_validate") / "kubernetes-json-schema" / f"v{version}.0-local-strict"


@cache
def _registry(version: str) -> Registry[Any]:
    definitions = json.loads((_folder(version) / "_definitions.json").read_text())
    return Resource.from_contents(definitions) @ Registry()


@cache
def _custom() -> dict[tuple[str, str], Object]:
    schemas = json.loads(CUSTOM.read_text())
    return {(each["properties"]["apiVersion"]["const"], each["properties"]["kind"]["const"]): each for each in schemas}


@cache
def _validator(api_version: str, kind: str, version: str) -> Draft202012Validator | None:
    schema = _custom().get((api_version, kind))
    if schema is None:
        group, _, number = api_version.rpartition("/")
        api = f"{group.split('.')[0]}-{number}" if group else number  # networking.k8s.io/v1 -> networking-v1
        file = _folder(version) / f"{kind.lower()}-{api}.json"
        if not file.is_file():
            return None
        schema = json.loads(file.read_text())
    return Draft202012Validator(schema, registry=_registry(version))


def walk(value: Any) -> Iterator[Any]:
    """Every value in an object, itself included."""
    yield value
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    for child in children:
        yield from walk(child)
