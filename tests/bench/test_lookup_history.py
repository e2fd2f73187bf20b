"""Drafts compared with a history: files found, shares counted."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from dgemma_build.bench.lookup_history import Draft, drafts, edited_files, figures

CANVAS = 64


def page(words: range) -> str:
    return " ".join(f"word{number}" for number in words)


def commit(repository: Path, texts: dict[str, str]) -> None:
    for name, text in texts.items():
        (repository / name).write_text(text)
    person = ["-c", "user.name=A Person", "-c", "user.email=person@example.com"]
    for command in (["add", "."], [*person, "commit", "-q", "-m", "A change"]):
        subprocess.run(["git", "-C", repository, *command], check=True)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    commit(tmp_path, {"page.md": page(range(200)), "short.md": "short", "figure.svg": page(range(200))})
    commit(tmp_path, {"page.md": page(range(1, 200)), "short.md": "shorter", "figure.svg": page(range(1, 200))})
    return tmp_path


def test_files_before_and_after_a_commit(repository: Path) -> None:
    assert edited_files(repository, 10) == [(page(range(200)), page(range(1, 200)))]


def test_a_file_that_did_not_change_is_drafted_right() -> None:
    found = list(drafts([(page(range(200)), page(range(200)))], CANVAS))
    assert len(found) > 5
    assert all(draft.right == 1 for draft in found[:-1])


def test_a_file_of_other_words_is_not_drafted() -> None:
    other = "".join(chr(ord("a") + number % 26) + f"{number % 7}+" for number in range(100))
    assert list(drafts([(page(range(100, 200)), other)], CANVAS)) == []


def test_shares_by_strength() -> None:
    found = [Draft(13, 1.0, 0.5), Draft(14, 0.5, 0.4), Draft(5000, 1.0, 0.9)]
    assert figures(found) == {
        "12": {"drafts": 2, "right as a whole": 0.5, "tokens right": 0.75, "confidence": 0.45},
        "1024": {"drafts": 1, "right as a whole": 1.0, "tokens right": 1.0, "confidence": 0.9},
    }
